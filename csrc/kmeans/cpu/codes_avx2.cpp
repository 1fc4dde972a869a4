#include "kmeans/cpu/codes.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace pyllmq::cpu {

// Up to 4 bits every threshold is compared: 2 instructions for 8 values.
void codes_avx2(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of, uint8_t* codes) {
  if (bits > 4) return codes_scalar(values, n, thresholds, bits, code_of, codes);
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code_of));
  const int count = (1 << bits) - 1;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256 low = _mm256_loadu_ps(values + i), high = _mm256_loadu_ps(values + i + 8);
    __m256i below_low = _mm256_setzero_si256(), below_high = _mm256_setzero_si256();
    for (int t = 0; t < count; ++t) {
      const __m256 threshold = _mm256_broadcast_ss(thresholds + t);
      below_low = _mm256_sub_epi32(below_low, _mm256_castps_si256(_mm256_cmp_ps(low, threshold, _CMP_GT_OQ)));
      below_high = _mm256_sub_epi32(below_high, _mm256_castps_si256(_mm256_cmp_ps(high, threshold, _CMP_GT_OQ)));
    }
    // pack works within halves of 128 bits: 0 1 2 3 | 4 .. becomes low0 high0 low1 high1 in words of 4 values
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(below_low, below_high), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm_shuffle_epi8(table, bytes));
  }
  codes_scalar(values + i, n - i, thresholds, bits, code_of, codes + i);
}

}  // namespace pyllmq::cpu
#endif

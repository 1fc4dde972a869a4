#include "kmeans/cpu/codes.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace pyllmq::cpu {

// Up to 4 bits all thresholds are one register: a halving step is a permute, a compare and an addition for 16 values.
void codes_avx512(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of, uint8_t* codes) {
  if (bits > 4) return codes_scalar(values, n, thresholds, bits, code_of, codes);
  const __m512 table = _mm512_loadu_ps(thresholds);
  const __m128i code_table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code_of));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512 value = _mm512_maskz_loadu_ps(valid, values + i);
    __m512i below = _mm512_setzero_si512();
    for (int half = 1 << bits >> 1; half > 0; half /= 2) {
      const __m512i at = _mm512_add_epi32(below, _mm512_set1_epi32(half - 1));
      const __mmask16 above = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(at, table), _CMP_GT_OQ);
      below = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(half));
    }
    _mm_mask_storeu_epi8(codes + i, valid, _mm_shuffle_epi8(code_table, _mm512_cvtepi32_epi8(below)));
  }
}

}  // namespace pyllmq::cpu
#endif

#include <immintrin.h>

#include <algorithm>

#include "codebook/cpu/chains_avx512.h"
#include "codebook/cpu/decode_int8.h"
#include "codebook/cpu/quads_avx512.h"

namespace pyllmq::cpu {
namespace {

struct BiasedByte {
  static constexpr int kPlanes = 1;
  static constexpr float kLargest = kLargestByte;

  static void store(__m512 value, uint8_t* to, int64_t) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(value), _mm512_set1_epi32(kByteBias));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(biased));
  }
};

// --- x -------------------------------------------------------------------------------------------------------------

bool pack(const float* x, int64_t slots, const uint8_t* order, const TokenGroups& groups, int64_t group, uint8_t* packed) {
  const int64_t count = groups.size(group);
  const ByteGroup to = byte_group(packed, slots, groups.begin(group), count);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t first = 0; first < slots; first += kFlushColumns) {
      const float* from = x + t * kDecodedColumns + first;  // zeros after the last slot
      const float largest = bits_float(largest_bits(from, kFlushColumns));
      if (!(largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f))) return false;
      const __m512 per_unit = _mm512_set1_ps(largest > 0 ? kLargestByte / largest : 0.0f);
      alignas(64) int8_t bytes[kFlushColumns];
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 0; i < kFlushColumns; i += 16) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), per_unit));
        sum = _mm512_add_epi32(sum, whole);
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(whole));
      }
      const int64_t flush = first / kFlushColumns * count + t;
      to.units[flush] = largest / kLargestByte / kLargestByte;
      to.starts[flush] = -kByteBias * _mm512_reduce_add_epi32(sum);
      alignas(64) int32_t quads[kFlushColumns / 4];
      _mm512_store_si512(quads, _mm512_permutexvar_epi8(load_64(order + first), load_64(bytes)));
      for (int64_t q = 0; q < std::min(slots - first, kFlushColumns) / 4; ++q) to.x[(first / 4 + q) * count + t] = quads[q];
    }
  return true;
}

// --- multiply ------------------------------------------------------------------------------------------------------

struct ByteDot {
  using Group = ByteGroup;
  static constexpr int64_t kColumns = 4;

  static Group group(const uint8_t* packed, int64_t slots, int64_t begin, int64_t count) {
    return byte_group(packed, slots, begin, count);
  }
  static __m512i start(const Group& group, int64_t chain) { return _mm512_set1_epi32(group.starts[chain]); }
  static __m512i add(__m512i sum, __m512i weights, __m512i x) { return _mm512_dpbusd_epi32(sum, weights, x); }
};

}  // namespace

const DecodeKernels kDecodeInt8Avx512 = {.token_group = kChainTokens,
                                         .weight_bytes = 1,
                                         .relative = true,
                                         .packed_bytes = packed_int8_bytes,
                                         .pack = pack,
                                         .split_codebook = split_any_quads<BiasedByte>,
                                         .decode = decode_any_quads<BiasedByte>,
                                         .multiply = multiply_chains<ByteDot>,
                                         .add_outliers = add_outliers_loop};

}  // namespace pyllmq::cpu

#include <immintrin.h>

#include "codebook/cpu/chains_avx512.h"
#include "codebook/cpu/decode_int8.h"
#include "codebook/cpu/quads_avx512.h"

namespace pyllmq::cpu {
namespace {

struct BiasedByte {
  static constexpr int kPlanes = 1;
  static constexpr float kLargest = kWholeBytes.largest_weight;

  static void store(__m512 value, uint8_t* to, int64_t) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(value), _mm512_set1_epi32(kWholeBytes.bias));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(biased));
  }
};

// --- x -------------------------------------------------------------------------------------------------------------

struct Vectors {
  static uint32_t largest(const float* x) { return largest_bits(x, kFlushColumns); }
  static int32_t to_quads(const float* x, const uint8_t* order, float factor, int32_t* quads) {
    alignas(64) int8_t bytes[kFlushColumns];
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < kFlushColumns; i += 16) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
      sum = _mm512_add_epi32(sum, whole);
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(whole));
    }
    _mm512_store_si512(quads, _mm512_permutexvar_epi8(load_64(order), load_64(bytes)));
    return _mm512_reduce_add_epi32(sum);
  }
};

// --- multiply ------------------------------------------------------------------------------------------------------

struct ByteDot : ByteQuads {
  static __m512i start(const Group& group, int64_t chain) { return _mm512_set1_epi32(group.starts[chain]); }
  static __m512i add(__m512i sum, __m512i weights, __m512i x) { return _mm512_dpbusd_epi32(sum, weights, x); }
};

}  // namespace

const DecodeKernels kDecodeInt8Avx512 = {.token_group = kChainTokens,
                                         .weight_bytes = 1,
                                         .relative = true,
                                         .packed_bytes = packed_int8_bytes,
                                         .pack = pack_int8<Vectors, kWholeBytes>,
                                         .split_codebook = split_any_quads<BiasedByte>,
                                         .decode = decode_any_quads<BiasedByte>,
                                         .multiply = multiply_chains<ByteDot>,
                                         .add_outliers = add_outliers_loop};

}  // namespace pyllmq::cpu

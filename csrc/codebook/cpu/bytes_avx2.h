// What the rows of one-byte weights with AVX2's vectors have in common: decoding, packing of x, and the row itself. Only files
// compiled for AVX2 may hold this code.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/chains_avx2.h"
#include "codebook/cpu/decode_int8.h"
#include "codebook/cpu/integers_avx2.h"
#include "runtime/instances.h"

namespace pyllmq::cpu {
namespace {

// --- decode --------------------------------------------------------------------------------------------------------

// 4 columns of 32 rows.
inline void store_quad(__m256i a, __m256i b, __m256i c, __m256i d, uint8_t* weights) {
  const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
  const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
  auto* first = reinterpret_cast<__m256i*>(weights);
  auto* second = reinterpret_cast<__m256i*>(weights + kDecodedColumns * kHalfRows);
  _mm256_store_si256(first, _mm256_unpacklo_epi16(ab0, cd0));
  _mm256_store_si256(first + 1, _mm256_unpackhi_epi16(ab0, cd0));
  _mm256_store_si256(second, _mm256_unpacklo_epi16(ab1, cd1));
  _mm256_store_si256(second + 1, _mm256_unpackhi_epi16(ab1, cd1));
}

template <int Width>
void decode_columns(const uint8_t* codes, const uint8_t* split, int64_t slots, uint8_t* weights) {
  decode_blocks<Width>(codes, split, slots, [&](const auto& column) {
#pragma GCC unroll 2
    for (int c = 0; c < kBlockColumns; c += 4, weights += 4 * kHalfRows)
      store_quad(column(c).low, column(c + 1).low, column(c + 2).low, column(c + 3).low, weights);
  });
}

template <ByteRange kRange>
constexpr auto kSplit =
    instances<1, 8>([]<int Width>() { return split_columns<Width, IntegerEntries{kRange.largest_weight, kRange.bias}>; });
constexpr auto kDecode = instances<1, 8>([]<int Width>() { return decode_columns<Width>; });

template <ByteRange kRange>
void split_any(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  kSplit<kRange>[width](codebook, max_magnitude, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots, const float*,
                uint8_t* weights) {
  kDecode[width](tile_codes + slot / kBlockColumns * block_bytes(width), split, slots, weights);
}

// --- x -------------------------------------------------------------------------------------------------------------

template <class Join>
inline uint32_t joined(__m256i lanes, Join join) {
  __m128i both = join(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  both = join(both, _mm_shuffle_epi32(both, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(join(both, _mm_shuffle_epi32(both, 0xB1))));
}

struct Vectors {
  // The bits of magnitudes order like floats, those of NaN above all.
  static uint32_t largest(const float* x) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i found = _mm256_setzero_si256();
    for (int64_t i = 0; i < kFlushColumns; i += 8) found = _mm256_max_epu32(found, _mm256_and_si256(load_32(x + i), magnitude));
    return joined(found, [](__m128i a, __m128i b) { return _mm_max_epu32(a, b); });
  }
  static int32_t to_quads(const float* x, const uint8_t*, float factor, int32_t* quads) {
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < kFlushColumns; i += 32) {
      __m256i whole[4];
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        whole[part] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * part), _mm256_set1_ps(factor)));
        sum = _mm256_add_epi32(sum, whole[part]);
      }
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(quads + i / 4), _mm256_permutevar8x32_epi32(bytes, in_order));
    }
    return static_cast<int32_t>(joined(sum, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); }));
  }
};

template <class Dot, ByteRange kRange>
constexpr DecodeKernels int8_kernels() {
  return {.token_group = Dot::kMostTokens,
          .weight_bytes = 1,
          .relative = true,
          .packed_bytes = packed_int8_bytes,
          .pack = pack_int8<Vectors, kRange>,
          .split_codebook = split_any<kRange>,
          .decode = decode_any,
          .multiply = multiply_chains<Dot>,
          .add_outliers = add_outliers_loop};
}

}  // namespace
}  // namespace pyllmq::cpu

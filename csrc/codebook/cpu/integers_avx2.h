// Codebooks as integers, and their codes to byte planes of 32 rows. An entry is `bias` + round(C / max |C of the column| *
// `largest`); x carries the column's maximum. `static` because only files compiled for AVX2 may hold this code.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/decode.h"
#include "codebook/cpu/nibble_avx2.h"
#include "codebook/cpu/wide_avx2.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {

struct IntegerEntries {
  float largest;
  int bias;
};

// The codebook of 8 columns. The maximum of each is finite, or `pack` has refused x.
template <int Width, IntegerEntries kEntries>
static inline void quantize_block(const uint16_t* codebook, const float* max_magnitude, uint16_t* entries) {
  alignas(32) float factors[kBlockColumns];
  for (int c = 0; c < kBlockColumns; ++c) factors[c] = max_magnitude[c] > 0 ? kEntries.largest / max_magnitude[c] : 0.0f;
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bias = _mm256_set1_epi32(kEntries.bias);
  const auto eight = [&](int first) {
    const __m256i column = _mm256_srli_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(first)), Width);
    const __m256 factor = _mm256_permutevar8x32_ps(_mm256_load_ps(factors), column);
    const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook + first)));
    return _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(values, factor)), bias);
  };
  for (int first = 0; first < kBlockColumns << Width; first += 16) {
    const __m256i both = _mm256_packs_epi32(eight(first), eight(first + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(entries + first), _mm256_permute4x64_epi64(both, 0xD8));
  }
}

template <int Width, IntegerEntries kEntries>
static void split_columns(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  uint16_t entries[kBlockColumns << Width];
  for (; slots > 0; slots -= kBlockColumns, codebook += kBlockColumns << Width, max_magnitude += kBlockColumns) {
    quantize_block<Width, kEntries>(codebook, max_magnitude, entries);
    for (int column = 0; column < kBlockColumns; ++column, split += split_bytes(Width)) {
      if constexpr (Width >= 5) {
        split_codebook(entries + (column << Width), Width, split);
      } else {
        const BytePlanes planes = column_planes<Width>(entries, column);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(split), _mm256_permute2x128_si256(planes.low, planes.high, 0x20));
      }
    }
  }
}

// Codes in the order in which unpacking bytes to 32 bits puts the rows 0..7, 8..15, 16..23 and 24..31 side by side: one permute
// of 32 codes in place of four of weights.
static inline __m256i in_unpack_order(__m256i codes) {
  return _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

// store(c, column) for each block of 8 columns: column(c) has the planes of its column c, rows in the order above.
template <int Width, class Store>
static inline void decode_blocks(const uint8_t* codes, const uint8_t* split, int64_t slots, Store store) {
  for (; slots > 0; slots -= kBlockColumns, codes += block_bytes(Width), split += kBlockColumns * split_bytes(Width)) {
    for (int64_t line = 0; line < block_bytes(Width); line += 64) prefetch(codes + line, kDecoded);
    __m256i steps[4];
    if constexpr (Width <= 4) {
      load_steps<Width>(codes, steps);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        if (Width >= 3 || i < Width) steps[i] = in_unpack_order(steps[i]);
    }
    store([&](int c) -> BytePlanes {
      const uint8_t* own = split + c * split_bytes(Width);
      if constexpr (Width >= 5) {
        return decode_wide<Width>(in_unpack_order(load_32(codes + c * kTileRows)), own);
      } else {
        const __m256i index = column_nibbles<Width>(steps, c);
        return {_mm256_shuffle_epi8(broadcast16(own), index), _mm256_shuffle_epi8(broadcast16(own + 16), index)};
      }
    });
  }
}

}  // namespace pyllmq::cpu

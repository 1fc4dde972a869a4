// Codes of 1..4 bits to fp16 weights by byte shuffles: a nibble of a step indexes a 16-entry table in two byte planes,
// so two shuffles give 32 exact fp16 weights of a column. `static` because only files compiled for AVX2 may hold this
// code.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/layout.h"
#include "codebook/cpu/wide_avx2.h"

namespace pyllmq::cpu {

// pick[i] = the place of the low byte of entry i among 8 fp16 numbers.
static inline BytePlanes planes_of_8(const uint16_t* codebook, __m128i pick) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook));
  return {_mm256_broadcastsi128_si256(_mm_shuffle_epi8(entries, pick)),
          _mm256_broadcastsi128_si256(_mm_shuffle_epi8(entries, _mm_add_epi8(pick, _mm_set1_epi8(1))))};
}

static inline BytePlanes planes_of_16(const uint16_t* codebook) {
  const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i both = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load_32(codebook), apart), 0xD8);
  return {_mm256_permute2x128_si256(both, both, 0x00), _mm256_permute2x128_si256(both, both, 0x11)};
}

// The table of one of the 8 columns of a block, by the nibble that holds its code, the same in both lanes; `codebook`: of the
// block.
template <int Width>
static inline BytePlanes column_planes(const uint16_t* codebook, int column) {
  if constexpr (Width == 4) return planes_of_16(codebook + 16 * column);
  if constexpr (Width == 3)
    return planes_of_8(codebook + 8 * column, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14));
  if constexpr (Width == 2) {
    const __m128i pick[2] = {_mm_setr_epi8(0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6),
                             _mm_setr_epi8(8, 8, 8, 8, 10, 10, 10, 10, 12, 12, 12, 12, 14, 14, 14, 14)};
    return planes_of_8(codebook + column / 2 * 8, pick[column % 2]);
  }
  const __m128i pick[4] = {_mm_setr_epi8(0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2),
                           _mm_setr_epi8(4, 4, 6, 6, 4, 4, 6, 6, 4, 4, 6, 6, 4, 4, 6, 6),
                           _mm_setr_epi8(8, 8, 8, 8, 10, 10, 10, 10, 8, 8, 8, 8, 10, 10, 10, 10),
                           _mm_setr_epi8(12, 12, 12, 12, 12, 12, 12, 12, 14, 14, 14, 14, 14, 14, 14, 14)};
  return planes_of_8(codebook + column / 4 * 8, pick[column % 4]);
}

// The bytes whose nibbles hold the codes of a block of 8 columns.
template <int Width>
static inline void load_steps(const uint8_t* codes, __m256i steps[4]) {
  constexpr int loads = Width;  // block_bytes(Width) / kTileRows
  for (int i = 0; i < loads; ++i) steps[i] = load_32(codes + i * kTileRows);
  if constexpr (Width == 3)
    steps[3] = _mm256_or_si256(_mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(steps[0], 3), _mm256_set1_epi8(0x11)),
                                               _mm256_and_si256(_mm256_srli_epi16(steps[1], 2), _mm256_set1_epi8(0x22))),
                               _mm256_and_si256(_mm256_srli_epi16(steps[2], 1), _mm256_set1_epi8(0x44)));
}

// The index of a column's 32 rows into its table.
template <int Width>
static inline __m256i column_nibbles(const __m256i steps[4], int column) {
  const int nibble = column / columns_per_lookup(Width);
  const __m256i bytes = steps[nibble / 2];
  return _mm256_and_si256(nibble % 2 ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

}  // namespace pyllmq::cpu

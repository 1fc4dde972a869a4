// Codes in StepOrder::fours to weights: a 64-byte load holds four steps of 16 rows, so a dword lane is a row, and a
// lookup is a shift and one permute: permutexvar_ps of 16 fp32 entries reads only the low 4 bits of a lane, the 16-bit
// permutes the low 5 (one register of entries) or 6 (two) of a word. `static` because only files compiled for AVX-512
// may hold this code.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/layout.h"

namespace pyllmq::cpu {

static inline __m512i load_64(const void* from) { return _mm512_loadu_si512(from); }

// Columns whose steps are read together; pieces of a panel begin and end at multiples of it.
static constexpr int group_columns(int width) { return width <= 3 ? 32 : width == 4 ? 8 : 4; }
static constexpr int64_t group_bytes(int width) {  // of 32 rows
  return width <= 4 ? int64_t{group_columns(width)} * width * kTileRows / 8 : int64_t{4} * kTileRows;
}
static constexpr int group_loads(int width) { return width <= 4 ? group_columns(width) * width / 32 : 1; }

// The steps of a group of columns of 16 rows. Width 3: nibbles of the columns 6 and 7 of a block in steps[3].
template <int Width>
static inline void load_fours(const uint8_t* group, int half, __m512i steps[4]) {
  constexpr int loads = group_loads(Width);
#pragma GCC unroll 4
  for (int i = 0; i < loads; ++i) steps[i] = load_64(group + (2 * i + half) * 64);
  if constexpr (Width == 3) {
    const __m512i low = _mm512_and_si512(_mm512_srli_epi32(steps[0], 3), _mm512_set1_epi8(0x11));
    const __m512i both = _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(steps[1], 2), _mm512_set1_epi8(0x22), 0xF8);
    steps[3] = _mm512_ternarylogic_epi32(both, _mm512_srli_epi32(steps[2], 1), _mm512_set1_epi8(0x44), 0xF8);
  }
}

// Where the code of a column of a group is: register and lowest bit of the nibble (width <= 4) or byte.
struct CodePlace {
  int step, bit;
};
template <int Width>
static constexpr CodePlace code_place(int column) {
  if (Width >= 5) return {0, 8 * column};
  if (Width == 3) return {column % 8 / 2, column / 8 * 8 + column % 2 * 4};
  const int nibble = column / columns_per_lookup(Width);
  return {nibble / 8, nibble % 8 * 4};
}

// 2^Width 16-bit entries by the low bits of the words of `index`.
template <int Width>
static inline __m512i lookup_words(const uint16_t* entries, __m512i index) {
  const auto of_64 = [&](const uint16_t* from) { return _mm512_permutex2var_epi16(load_64(from), index, load_64(from + 32)); };
  if constexpr (Width == 5) return _mm512_permutexvar_epi16(index, load_64(entries));
  if constexpr (Width == 6) return of_64(entries);
  const __mmask32 second = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
  const __m512i of_128 = _mm512_mask_blend_epi16(second, of_64(entries), of_64(entries + 64));
  if constexpr (Width == 7) return of_128;
  const __m512i upper = _mm512_mask_blend_epi16(second, of_64(entries + 128), of_64(entries + 192));
  return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(128)), of_128, upper);
}

// fp32 weights of the rows 0..15 and 16..31 of a column of widths 5..8.
struct ColumnWeights {
  __m512 rows[2];
};
template <int Width>
static inline ColumnWeights decode_byte_column(__m512i low_rows, __m512i high_rows, int column, const uint16_t* entries) {
  const __m512i low = _mm512_srl_epi32(low_rows, _mm_cvtsi32_si128(8 * column));
  const __m512i high = _mm512_slli_epi32(_mm512_srl_epi32(high_rows, _mm_cvtsi32_si128(8 * column)), 16);
  const __m512i halves = lookup_words<Width>(entries, _mm512_mask_blend_epi16(0xAAAAAAAA, low, high));
  return {
      {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves)), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(halves, 16)))}};
}

// The 16 fp32 entries of the nibble that holds a column's code; `codebook`: of the lookup that the column belongs to.
template <int Width>
static inline __m512 nibble_entries(const uint16_t* codebook, int column_of_lookup) {
  if constexpr (Width == 4) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook)));
  const __m512i nibble = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i code = _mm512_and_si512(_mm512_srl_epi32(nibble, _mm_cvtsi32_si128(Width * column_of_lookup)),
                                        _mm512_set1_epi32((1 << Width) - 1));
  const __m512i pick = _mm512_add_epi32(code, _mm512_set1_epi32(column_of_lookup << Width));
  const __m256 entries = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
  return _mm512_permutexvar_ps(pick, _mm512_castps256_ps512(entries));
}

}  // namespace pyllmq::cpu

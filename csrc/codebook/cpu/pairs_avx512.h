// Codes in StepOrder::fours to int16 weights in pairs of columns: a dword lane is a row, its low word
// the weight of the even column. Widths 3 and 4: one permute of 32 words looks up both columns (the even one's 16 entries
// below the odd one's); widths 1 and 2: the nibble holds both codes and picks one of 16 pairs; widths 5..8: a lookup per
// column. `static` because only files compiled for AVX-512 may hold this code.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "codebook/cpu/fours_avx512.h"
#include "codebook/cpu/layout.h"
#include "codebook/cpu/decode.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {

// 16-bit entries are split block by block; a load of a pair's entries may read 64 bytes.
template <int Width>
struct BlockEntries {
  alignas(64) uint16_t entries[(kBlockColumns << Width) + 32];
};

// The tables of 8 columns, `stride` bytes from column to column; those of a pair stand where its even column's would.
template <int Width>
static inline void split_pairs(const BlockEntries<Width>& block, int64_t stride, uint8_t* split) {
  if constexpr (Width >= 5) {
    for (int column = 0; column < kBlockColumns; ++column)
      std::memcpy(split + column * stride, block.entries + (column << Width), 2 << Width);
  } else {
    const __m512i dword = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i mask = _mm512_set1_epi32((1 << Width) - 1);
    for (int column = 0; column < kBlockColumns; column += 2) {
      const __m512i entries = load_64(block.entries + (column << Width));
      __m512i pick;
      if constexpr (Width >= 3) {
        const __m512i even = _mm512_slli_epi32(dword, 1);  // words 2i, 2i + 1 of a register of 32 entries
        const __m512i word = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(1)), 16));
        const __m512i code = _mm512_and_si512(word, _mm512_set1_epi16((1 << Width) - 1));
        const __m512i odd = _mm512_srli_epi16(_mm512_and_si512(word, _mm512_set1_epi16(16)), 4);
        pick = _mm512_add_epi16(code, _mm512_slli_epi16(odd, Width));
      } else {
        const int bit = column % columns_per_lookup(Width) * Width;
        const __m512i low = _mm512_and_si512(_mm512_srl_epi32(dword, _mm_cvtsi32_si128(bit)), mask);
        const __m512i high = _mm512_and_si512(_mm512_srl_epi32(dword, _mm_cvtsi32_si128(bit + Width)), mask);
        pick = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(high, _mm512_set1_epi32(1 << Width)), 16));
      }
      _mm512_storeu_si512(split + column * stride, _mm512_permutexvar_epi16(pick, entries));
    }
  }
}

// Index of the weights of 16 rows of the columns `column` and `column + 1` of a group; Width <= 4.
template <int Width>
static inline __m512i pair_index(const __m512i steps[4], int column) {
  const CodePlace place = code_place<Width>(column);
  if constexpr (Width <= 2) return _mm512_srli_epi32(steps[place.step], place.bit);
  // Byte 0 and byte 2 of each dword: the 8 bits from the even and from the odd column's nibble on.
  const long long dword = place.bit | (place.bit + 4) << 16;
  const __m512i bits = _mm512_set1_epi64(dword | (dword + 0x00200020) << 32);
  const __m512i nibbles = _mm512_multishift_epi64_epi8(bits, steps[place.step]);
  return _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi32(0x000F000F), _mm512_set1_epi32(0x00100000), 0xEA);
}

template <int Width>
static inline __m512i lookup_pairs(const uint8_t* split, __m512i index) {
  if constexpr (Width <= 2) return _mm512_permutexvar_epi32(index, load_64(split));
  return _mm512_permutexvar_epi16(index, load_64(split));
}

template <int Width>
static inline void decode_pairs(const uint8_t* codes, const uint8_t* split, int64_t slots, uint16_t* weights) {
  constexpr int columns = group_columns(Width);
  constexpr int64_t half_weights = kDecodedColumns * kHalfRows;
  for (; slots > 0;
       slots -= columns, codes += group_bytes(Width), split += columns * split_bytes(Width), weights += columns * kHalfRows) {
    for (int64_t line = 0; line < group_bytes(Width); line += 64) prefetch(codes + line, kDecoded);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i steps[4];
      load_fours<Width>(codes, half, steps);
#pragma GCC unroll 16
      for (int c = 0; c < columns; c += 2) {
        const uint8_t* own = split + c * split_bytes(Width);
        uint16_t* to = weights + half * half_weights + c * kHalfRows;
        if constexpr (Width <= 4) {
          _mm512_store_si512(to, lookup_pairs<Width>(own, pair_index<Width>(steps, c)));
        } else {
          const __m512i even = _mm512_srli_epi32(steps[0], c == 0 ? 0 : 16);
          const __m512i odd = c == 0 ? _mm512_slli_epi32(steps[0], 8) : _mm512_srli_epi32(steps[0], 8);
          const auto* entries = reinterpret_cast<const uint16_t*>(own);
          const auto* next = reinterpret_cast<const uint16_t*>(own + split_bytes(Width));
          _mm512_store_si512(
              to, _mm512_mask_blend_epi16(0xAAAAAAAA, lookup_words<Width>(entries, even), lookup_words<Width>(next, odd)));
        }
      }
    }
  }
}

}  // namespace pyllmq::cpu

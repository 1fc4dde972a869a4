// Codes in StepOrder::fours to weights of one or two bytes in quads of columns: a register of codes is 4 steps of 16 rows, and
// one byte permute by four tables at once gives 4 columns of 16 rows, as AMX tiles and vpdpbusd read them. `static` because only
// files compiled for AVX-512 may hold this code.
//
// A Form says what a weight is: kPlanes bytes, of which `store` writes those of 16 numbers `plane` bytes apart; its column's
// largest magnitude becomes kLargest.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/fours_avx512.h"
#include "codebook/cpu/layout.h"
#include "codebook/cpu/decode.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {

static constexpr int64_t kHalfQuads = kDecodedColumns * kHalfRows;  // bytes of a plane of 16 rows

// Tables of a quad: per plane those of its 4 columns side by side, 16 entries each (2^Width from 5 bits on).
template <int Width>
static constexpr int64_t kTable = Width <= 4 ? 16 : 1 << Width;

template <class Form, int Width>
static void split_quads(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  constexpr int64_t plane = 4 * kTable<Width>;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t place = quad_place(Width, slot);
    uint8_t* to = split + place / 4 * Form::kPlanes * plane + place % 4 * kTable<Width>;
    const __m512 factor = _mm512_set1_ps(max_magnitude[slot] > 0 ? Form::kLargest / max_magnitude[slot] : 0.0f);
    if constexpr (Width <= 4) {
      constexpr int columns = columns_per_lookup(Width);
      const uint16_t* lookup = codebook + slot / columns * entries_per_lookup(Width);
      const __m512 entries = nibble_entries<Width>(lookup, static_cast<int>(slot % columns));
      Form::store(_mm512_mul_ps(entries, factor), to, plane);
    } else {
      for (int64_t e = 0; e < 1 << Width; e += 16) {
        const auto* from = reinterpret_cast<const __m256i*>(codebook + (slot << Width) + e);
        Form::store(_mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(from)), factor), to + e, plane);
      }
    }
  }
}

// 4 columns of 16 rows by codes of 5..8 bits; registers of 128 entries.
template <int Width>
static inline __m512i lookup_bytes(const uint8_t* tables, __m512i codes) {
  const auto of_128 = [&](int i, __m512i index) {
    return _mm512_permutex2var_epi8(load_64(tables + 128 * i), index, load_64(tables + 128 * i + 64));
  };
  const auto column = [](uint64_t byte) { return static_cast<__mmask64>(0x1111111111111111 << byte); };
  if constexpr (Width == 5) return of_128(0, _mm512_or_si512(codes, _mm512_set1_epi32(0x60402000)));
  if constexpr (Width == 6) {
    const __m512i index = _mm512_or_si512(codes, _mm512_set1_epi32(0x40004000));
    return _mm512_mask_blend_epi8(0xCCCCCCCCCCCCCCCC, of_128(0, index), of_128(1, index));
  }
  __m512i found = _mm512_setzero_si512();
  const __mmask64 upper = _mm512_movepi8_mask(codes);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    constexpr int registers = Width == 8 ? 2 : 1;
    __m512i own = of_128(registers * c, codes);
    if constexpr (Width == 8) own = _mm512_mask_blend_epi8(upper, own, of_128(registers * c + 1, codes));
    found = _mm512_mask_blend_epi8(column(c), found, own);
  }
  return found;
}

template <class Form, int Width>
static void decode_quads(const uint8_t* codes, const uint8_t* split, int64_t slots, uint8_t* weights) {
  constexpr int columns = group_columns(Width), per_lookup = Width <= 4 ? columns_per_lookup(Width) : 1;
  constexpr int64_t plane = 4 * kTable<Width>;
  const __m512i nibble = _mm512_set1_epi8(15), byte = _mm512_set1_epi32(0x30201000);
  for (; slots > 0; slots -= columns, codes += group_bytes(Width), split += columns / 4 * Form::kPlanes * plane,
                    weights += columns * kHalfRows) {
    for (int64_t line = 0; line < group_bytes(Width); line += 64) prefetch(codes + line, kDecoded);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i steps[4];
      load_fours<Width>(codes, half, steps);
      uint8_t* to = weights + half * kHalfQuads;
      if constexpr (Width >= 5) {
#pragma GCC unroll 2
        for (int p = 0; p < Form::kPlanes; ++p)
          _mm512_store_si512(to + p * kDecodedWeights, lookup_bytes<Width>(split + p * plane, steps[0]));
      } else {
#pragma GCC unroll 8
        for (int quad = 0; quad < columns / 4; quad += per_lookup) {
          const int lookups = quad / per_lookup;
          const __m512i bytes = lookups % 2 ? _mm512_srli_epi16(steps[lookups / 2], 4) : steps[lookups / 2];
          const __m512i index = _mm512_ternarylogic_epi64(bytes, nibble, byte, 0xEA);
#pragma GCC unroll 4
          for (int q = quad; q < quad + per_lookup; ++q) {
            const uint8_t* tables = split + q * Form::kPlanes * plane;
#pragma GCC unroll 2
            for (int p = 0; p < Form::kPlanes; ++p)
              _mm512_store_si512(to + q * 64 + p * kDecodedWeights, _mm512_permutexvar_epi8(index, load_64(tables + p * plane)));
          }
        }
      }
    }
  }
}

template <class Form>
constexpr auto kSplitQuads = instances<1, 8>([]<int Width>() { return split_quads<Form, Width>; });
template <class Form>
constexpr auto kDecodeQuads = instances<1, 8>([]<int Width>() { return decode_quads<Form, Width>; });

template <class Form>
static void split_any_quads(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  kSplitQuads<Form>[width](codebook, max_magnitude, slots, split);
}

template <class Form>
static void decode_any_quads(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots,
                             const float*, uint8_t* weights) {
  kDecodeQuads<Form>[width](tile_codes + slot / group_columns(width)* group_bytes(width), split, slots, weights);
}

// Bits of the largest |x|; those of infinity and NaN are larger than any other.
static inline uint32_t largest_bits(const float* x, int64_t slots) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t slot = 0; slot < slots; slot += 16)
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + slot))));
  return _mm512_reduce_max_epu32(largest);
}

}  // namespace pyllmq::cpu

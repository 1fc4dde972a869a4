// A column of 16 rows is one lookup (fours_avx512.h); 8 columns x 16 rows of fp32 are transposed in registers.
#include <immintrin.h>

#include "codebook/cpu/dequantize.h"
#include "codebook/cpu/fours_avx512.h"
#include "codebook/cpu/layout.h"

namespace pyllmq::cpu {
namespace {

// values[half][column]: 16 rows of the 8 columns from `first` of a group on.
using Block = __m512[2][kBlockColumns];

template <int Width, int First>
inline void decode_nibbles(const uint8_t* group, const uint16_t* codebook, Block values) {
  constexpr int per_lookup = columns_per_lookup(Width);
  for (int half = 0; half < 2; ++half) {
    __m512i steps[4];
    load_fours<Width>(group, half, steps);
#pragma GCC unroll 8
    for (int c = 0; c < kBlockColumns; ++c) {
      constexpr auto place_of = code_place<Width>;
      const CodePlace place = place_of(First + c);
      const __m512 entries =
          nibble_entries<Width>(codebook + c / per_lookup * entries_per_lookup(Width), c % per_lookup);
      values[half][c] =
          _mm512_permutexvar_ps(_mm512_srl_epi32(steps[place.step], _mm_cvtsi32_si128(place.bit)), entries);
    }
  }
}

template <int Width>
void decode_block(const uint8_t* tile_codes, int64_t slot, const uint16_t* codebook, Block values) {
  const uint8_t* group = tile_codes + slot / group_columns(Width) * group_bytes(Width);
  if constexpr (Width >= 5) {
    for (int c = 0; c < kBlockColumns; ++c) {
      const uint8_t* four = group + c / 4 * group_bytes(Width);
      const ColumnWeights column =
          decode_byte_column<Width>(load_64(four), load_64(four + 64), c % 4, codebook + (c << Width));
      values[0][c] = column.rows[0];
      values[1][c] = column.rows[1];
    }
  } else if constexpr (Width == 4) {
    decode_nibbles<4, 0>(group, codebook, values);
  } else {
    switch (slot % group_columns(Width) / kBlockColumns) {
      case 0: decode_nibbles<Width, 0>(group, codebook, values); break;
      case 1: decode_nibbles<Width, 8>(group, codebook, values); break;
      case 2: decode_nibbles<Width, 16>(group, codebook, values); break;
      default: decode_nibbles<Width, 24>(group, codebook, values);
    }
  }
}

using BlockKernel = void (*)(const uint8_t* tile_codes, int64_t slot, const uint16_t* codebook, Block values);
constexpr BlockKernel kByWidth[8] = {decode_block<1>, decode_block<2>, decode_block<3>, decode_block<4>,
                                     decode_block<5>, decode_block<6>, decode_block<7>, decode_block<8>};

// rows[i], 128-bit lane q: columns 0..3 of `columns` of row 4q + i.
inline void transpose_4(const __m512 columns[4], __m512 rows[4]) {
  const __m512 a = _mm512_unpacklo_ps(columns[0], columns[1]), b = _mm512_unpackhi_ps(columns[0], columns[1]);
  const __m512 c = _mm512_unpacklo_ps(columns[2], columns[3]), d = _mm512_unpackhi_ps(columns[2], columns[3]);
  const auto join = [](__m512 x, __m512 y, bool high) {
    const __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
  };
  rows[0] = join(a, c, false);
  rows[1] = join(a, c, true);
  rows[2] = join(b, d, false);
  rows[3] = join(b, d, true);
}

void store_half(const __m512 values[kBlockColumns], float* out, int64_t out_stride) {
  for (int first = 0; first < kBlockColumns; first += 4) {
    __m512 rows[4];
    transpose_4(values + first, rows);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* to = out + i * out_stride + first;
      _mm_storeu_ps(to, _mm512_castps512_ps128(rows[i]));
      _mm_storeu_ps(to + 4 * out_stride, _mm512_extractf32x4_ps(rows[i], 1));
      _mm_storeu_ps(to + 8 * out_stride, _mm512_extractf32x4_ps(rows[i], 2));
      _mm_storeu_ps(to + 12 * out_stride, _mm512_extractf32x4_ps(rows[i], 3));
    }
  }
}

void block(const uint8_t* tile_codes, StepOrder, int64_t slot, int width, const uint16_t* codebook,
           const float* row_scale, float* out, int64_t out_stride) {
  Block values;
  kByWidth[width - 1](tile_codes, slot, codebook, values);
  for (int half = 0; half < 2; ++half) {
    if (row_scale != nullptr) {
      const __m512 scale = _mm512_loadu_ps(row_scale + 16 * half);
      for (__m512& value : values[half]) value = _mm512_mul_ps(value, scale);
    }
    store_half(values[half], out + 16 * half * out_stride, out_stride);
  }
}

}  // namespace

const DequantizeKernels kDequantizeAvx512 = {block};

}  // namespace pyllmq::cpu

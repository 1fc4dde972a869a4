#include <immintrin.h>

#include "codebook/cpu/decode.h"
#include "codebook/cpu/nibble_avx2.h"
#include "codebook/cpu/wide_avx2.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

// --- decode --------------------------------------------------------------------------------------------------------

template <int Width>
void split_columns(const uint16_t* codebook, int64_t slots, uint8_t* split) {
  if constexpr (Width >= 5) {
    for (int64_t slot = 0; slot < slots; ++slot)
      split_codebook(codebook + (slot << Width), Width, split + slot * split_bytes(Width));
  } else {
    for (int64_t slot = 0; slot < slots; slot += kBlockColumns, codebook += kBlockColumns << Width)
      for (int column = 0; column < kBlockColumns; ++column, split += split_bytes(Width)) {
        const BytePlanes planes = column_planes<Width>(codebook, column);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(split), _mm256_permute2x128_si256(planes.low, planes.high, 0x20));
      }
  }
}

struct RowScale {  // rows 0-7, 8-15, 16-23, 24-31
  __m256 rows[4];
};

// Byte planes of the 32 fp16 weights of a column.
template <bool Scaled>
inline void store_column(__m256i low, __m256i high, const RowScale& scale, float* weights) {
  const __m256i a = _mm256_unpacklo_epi8(low, high);  // rows 0-7|16-23
  const __m256i b = _mm256_unpackhi_epi8(low, high);  // rows 8-15|24-31
  __m256 rows[4] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_castsi256_si128(b)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(b, 1))};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if constexpr (Scaled) rows[i] = _mm256_mul_ps(rows[i], scale.rows[i]);
    _mm256_store_ps(weights + i / 2 * kDecodedColumns * kHalfRows + i % 2 * 8, rows[i]);
  }
}

template <int Width, bool Scaled>
void decode_columns(const uint8_t* codes, const uint8_t* split, int64_t slots, const RowScale& scale, float* weights) {
  for (; slots > 0; slots -= kBlockColumns, codes += block_bytes(Width)) {
    for (int64_t line = 0; line < block_bytes(Width); line += 64) prefetch(codes + line, kDecoded);
    if constexpr (Width >= 5) {
      for (int column = 0; column < kBlockColumns; ++column, split += split_bytes(Width), weights += kHalfRows) {
        const BytePlanes bytes = decode_wide<Width>(codes + column * kTileRows, split);
        store_column<Scaled>(bytes.low, bytes.high, scale, weights);
      }
    } else {
      __m256i steps[4];
      load_steps<Width>(codes, steps);
#pragma GCC unroll 8
      for (int column = 0; column < kBlockColumns; ++column, split += split_bytes(Width), weights += kHalfRows) {
        const __m256i index = column_nibbles<Width>(steps, column);
        store_column<Scaled>(_mm256_shuffle_epi8(broadcast16(split), index), _mm256_shuffle_epi8(broadcast16(split + 16), index),
                             scale, weights);
      }
    }
  }
}

template <int Width>
void decode_width(const uint8_t* codes, const uint8_t* split, int64_t slots, const float* row_scale, float* weights) {
  RowScale scale;
  for (int i = 0; i < 4; ++i) scale.rows[i] = row_scale ? _mm256_loadu_ps(row_scale + 8 * i) : _mm256_setzero_ps();
  if (row_scale)
    decode_columns<Width, true>(codes, split, slots, scale, weights);
  else
    decode_columns<Width, false>(codes, split, slots, scale, weights);
}

constexpr auto kSplit = instances<1, 8>([]<int Width>() { return split_columns<Width>; });
constexpr auto kDecode = instances<1, 8>([]<int Width>() { return decode_width<Width>; });

void split_any(int width, const uint16_t* codebook, const float*, int64_t slots, uint8_t* split) {
  kSplit[width](codebook, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots,
                const float* row_scale, uint8_t* weights) {
  kDecode[width](tile_codes + slot / kBlockColumns * block_bytes(width), split, slots, row_scale,
                 reinterpret_cast<float*>(weights));
}

// --- multiply ------------------------------------------------------------------------------------------------------

// Tokens x (16 * Halves) rows in registers; few tokens take both halves, so that enough independent sums are in flight.
template <int Tokens, int Halves>
void multiply_group(const float* weights, const float* x, int64_t slots, float* sums) {
  constexpr int vectors = 2 * Halves;
  while (slots > 0) {
    int64_t chain = slots < kChainColumns ? slots : kChainColumns;
    slots -= chain;
    __m256 sum[Tokens][vectors];
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[t][v] = _mm256_setzero_ps();
    for (; chain > 0; --chain, weights += kHalfRows, x += Tokens) {
      if constexpr (Halves == 1) {
        const __m256 w0 = _mm256_load_ps(weights), w1 = _mm256_load_ps(weights + 8);
#pragma GCC unroll 6
        for (int t = 0; t < Tokens; ++t) {
          const __m256 x_t = _mm256_broadcast_ss(x + t);
          sum[t][0] = _mm256_fmadd_ps(x_t, w0, sum[t][0]);
          sum[t][1] = _mm256_fmadd_ps(x_t, w1, sum[t][1]);
        }
      } else {
        __m256 x_t[Tokens];
#pragma GCC unroll 6
        for (int t = 0; t < Tokens; ++t) x_t[t] = _mm256_broadcast_ss(x + t);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const __m256 w = _mm256_load_ps(weights + v / 2 * kDecodedColumns * kHalfRows + v % 2 * 8);
#pragma GCC unroll 6
          for (int t = 0; t < Tokens; ++t) sum[t][v] = _mm256_fmadd_ps(x_t[t], w, sum[t][v]);
        }
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        float* to = sums + t * kTileRows + v * 8;
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum[t][v]));
      }
  }
}

constexpr int64_t kTokenGroup = 6;  // 6 tokens x 16 rows: 12 of 16 registers hold sums, 12 multiply-adds per 8 loads
constexpr int64_t kFewTokens = 3;
constexpr auto kBoth = instances<1, kFewTokens>([]<int Tokens>() { return multiply_group<Tokens, 2>; });
constexpr auto kHalf = instances<kFewTokens + 1, kTokenGroup>([]<int Tokens>() { return multiply_group<Tokens, 1>; });

void multiply(const uint8_t* from, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const auto* weights = reinterpret_cast<const float*>(from);
  const TokenGroups groups{tokens, kTokenGroup};
  for (int half = 0; half < 2; ++half)
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t begin = groups.begin(g), count = groups.size(g);
      const float* x = reinterpret_cast<const float*>(packed) + begin * slots;
      float* group_sums = sums + begin * kTileRows;
      if (count > kFewTokens)
        kHalf[count](weights + half * kDecodedColumns * kHalfRows, x, slots, group_sums + half * kHalfRows);
      else if (half == 0)
        kBoth[count](weights, x, slots, group_sums);
    }
}

}  // namespace

const DecodeKernels kDecodeAvx2 = {.token_group = kTokenGroup,
                                   .weight_bytes = 4,
                                   .packed_bytes = packed_fp32_bytes,
                                   .pack = pack_fp32,
                                   .split_codebook = split_any,
                                   .decode = decode_any,
                                   .multiply = multiply};

}  // namespace pyllmq::cpu

// A column of 16 rows is one shift and one permute of 16 fp32 entries (widths 1..4): with the store 16 weights in about
// 1.5 cycles. The multiply holds 12 tokens x 32 rows in 24 of 32 registers: 24 multiply-adds per 14 loads.
#include <immintrin.h>

#include <cstring>

#include "codebook/cpu/fours_avx512.h"
#include "codebook/cpu/decode.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

// --- decode --------------------------------------------------------------------------------------------------------

template <int Width>
void split_columns(const uint16_t* codebook, int64_t slots, uint8_t* split) {
  constexpr int columns = Width <= 4 ? columns_per_lookup(Width) : 1;
  for (int64_t slot = 0; slot < slots; slot += columns)
    for (int column = 0; column < columns; ++column, split += split_bytes(Width)) {
      if constexpr (Width >= 5)
        std::memcpy(split, codebook + (slot << Width), 2 << Width);
      else
        _mm512_storeu_ps(reinterpret_cast<float*>(split),
                         nibble_entries<Width>(codebook + slot / columns * entries_per_lookup(Width), column));
    }
}

template <bool Scaled>
inline void store_rows(__m512 value, __m512 scale, float* weights) {
  _mm512_store_ps(weights, Scaled ? _mm512_mul_ps(value, scale) : value);
}

template <int Width, bool Scaled>
void decode_columns(const uint8_t* codes, const uint8_t* split, int64_t slots, const __m512 scale[2], float* weights) {
  constexpr int columns = group_columns(Width);
  constexpr int64_t half_weights = kDecodedColumns * kHalfRows;
  for (; slots > 0;
       slots -= columns, codes += group_bytes(Width), split += columns * split_bytes(Width), weights += columns * kHalfRows) {
    for (int64_t line = 0; line < group_bytes(Width); line += 64) prefetch(codes + line, kDecoded);
    __m512i low[4], high[4];
    load_fours<Width>(codes, 0, low);
    load_fours<Width>(codes, 1, high);
#pragma GCC unroll 32
    for (int c = 0; c < columns; ++c) {
      __m512 rows[2];
      if constexpr (Width >= 5) {
        const auto* entries = reinterpret_cast<const uint16_t*>(split + c * split_bytes(Width));
        const ColumnWeights decoded = decode_byte_column<Width>(low[0], high[0], c, entries);
        rows[0] = decoded.rows[0];
        rows[1] = decoded.rows[1];
      } else {
        const CodePlace place = code_place<Width>(c);
        const __m512 entries = _mm512_load_ps(reinterpret_cast<const float*>(split + c * split_bytes(Width)));
        rows[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(low[place.step], place.bit), entries);
        rows[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(high[place.step], place.bit), entries);
      }
      store_rows<Scaled>(rows[0], scale[0], weights + c * kHalfRows);
      store_rows<Scaled>(rows[1], scale[1], weights + half_weights + c * kHalfRows);
    }
  }
}

template <int Width>
void decode_width(const uint8_t* codes, const uint8_t* split, int64_t slots, const float* row_scale, float* weights) {
  __m512 scale[2] = {};
  if (row_scale == nullptr) return decode_columns<Width, false>(codes, split, slots, scale, weights);
  for (int half = 0; half < 2; ++half) scale[half] = _mm512_loadu_ps(row_scale + half * kHalfRows);
  decode_columns<Width, true>(codes, split, slots, scale, weights);
}

constexpr auto kSplit = instances<1, 8>([]<int Width>() { return split_columns<Width>; });
constexpr auto kDecode = instances<1, 8>([]<int Width>() { return decode_width<Width>; });

void split_any(int width, const uint16_t* codebook, const float*, int64_t slots, uint8_t* split) {
  kSplit[width](codebook, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots,
                const float* row_scale, uint8_t* weights) {
  const uint8_t* codes = tile_codes + slot / group_columns(width) * group_bytes(width);
  kDecode[width](codes, split, slots, row_scale, reinterpret_cast<float*>(weights));
}

// --- multiply ------------------------------------------------------------------------------------------------------

template <int Tokens>
void multiply_group(const float* weights, const float* x, int64_t slots, float* sums) {
  while (slots > 0) {
    int64_t chain = slots < kChainColumns ? slots : kChainColumns;
    slots -= chain;
    asm volatile("" ::: "memory");  // else gcc 12 carries the fp32 sums from chain to chain on the stack
    __m512 sum[Tokens][2];
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (; chain > 0; --chain, weights += kHalfRows, x += Tokens) {
      const __m512 w0 = _mm512_load_ps(weights), w1 = _mm512_load_ps(weights + kDecodedColumns * kHalfRows);
#pragma GCC unroll 12
      for (int t = 0; t < Tokens; ++t) {
        const __m512 x_t = _mm512_set1_ps(x[t]);
        sum[t][0] = _mm512_fmadd_ps(x_t, w0, sum[t][0]);
        sum[t][1] = _mm512_fmadd_ps(x_t, w1, sum[t][1]);
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = sums + t * kTileRows + half * kHalfRows;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[t][half]));
      }
  }
}

constexpr int64_t kTokenGroup = 12;
constexpr auto kGroup = instances<1, kTokenGroup>([]<int Tokens>() { return multiply_group<Tokens>; });

void multiply(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const TokenGroups groups{tokens, kTokenGroup};
  for (int64_t g = 0; g < groups.count(); ++g)
    kGroup[groups.size(g)](reinterpret_cast<const float*>(weights),
                           reinterpret_cast<const float*>(packed) + groups.begin(g) * slots, slots,
                           sums + groups.begin(g) * kTileRows);
}

}  // namespace

const DecodeKernels kDecodeAvx512 = {.token_group = kTokenGroup,
                                     .weight_bytes = 4,
                                     .packed_bytes = packed_fp32_bytes,
                                     .pack = pack_fp32,
                                     .split_codebook = split_any,
                                     .decode = decode_any,
                                     .multiply = multiply};

}  // namespace pyllmq::cpu

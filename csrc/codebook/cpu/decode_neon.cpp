#include <arm_neon.h>

#include "codebook/cpu/bytes_neon.h"
#include "codebook/cpu/decode.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

// --- decode --------------------------------------------------------------------------------------------------------

template <int Width>
void split_columns(const uint16_t* codebook, int64_t slots, uint8_t* split) {
  for (int64_t slot = 0; slot < slots; slot += kBlockColumns, codebook += kBlockColumns << Width)
    for (int column = 0; column < kBlockColumns; ++column, split += split_bytes(Width)) {
      if constexpr (Width >= 5) {
        split_codebook(codebook + (column << Width), Width, split);
      } else {
        const BytePlanes planes = column_planes<Width>(codebook, column);
        vst1q_u8(split, planes.low);
        vst1q_u8(split + 16, planes.high);
      }
    }
}

// 16 fp16 weights of a column, by byte planes.
template <bool Scaled>
inline __attribute__((always_inline)) void store_column(const BytePlanes& bytes, const float32x4_t scale[4], float* weights) {
  float32x4_t rows[4] = {first_fp16(bytes.first()), second_fp16(bytes.first()), first_fp16(bytes.second()),
                         second_fp16(bytes.second())};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vst1q_f32(weights + 4 * i, Scaled ? vmulq_f32(rows[i], scale[i]) : rows[i]);
}

template <int Width, bool Scaled>
void decode_half(const uint8_t* codes, const uint8_t* split, int64_t slots, const float* row_scale, float* weights) {
  float32x4_t scale[4];
  for (int i = 0; i < 4; ++i) scale[i] = Scaled ? vld1q_f32(row_scale + 4 * i) : vdupq_n_f32(0);
  for (; slots > 0; slots -= kBlockColumns, codes += block_bytes(Width)) {
    for (int64_t line = 0; line < block_bytes(Width); line += 64) prefetch(codes + line, kDecoded);
    uint8x16_t steps[4];
    if constexpr (Width <= 4) load_steps<Width>(codes, steps);
#pragma GCC unroll 8
    for (int column = 0; column < kBlockColumns; ++column, split += split_bytes(Width), weights += kHalfRows) {
      if constexpr (Width >= 5) {
        store_column<Scaled>(decode_wide<Width>(vld1q_u8(codes + column * kTileRows), split), scale, weights);
      } else {
        const uint8x16_t index = column_nibbles<Width>(steps, column);
        store_column<Scaled>({vqtbl1q_u8(vld1q_u8(split), index), vqtbl1q_u8(vld1q_u8(split + 16), index)}, scale, weights);
      }
    }
  }
}

template <int Width>
void decode_width(const uint8_t* codes, const uint8_t* split, int64_t slots, const float* row_scale, float* weights) {
  for (int half = 0; half < 2; ++half, codes += kHalfRows, weights += kDecodedColumns * kHalfRows) {
    if (row_scale)
      decode_half<Width, true>(codes, split, slots, row_scale + half * kHalfRows, weights);
    else
      decode_half<Width, false>(codes, split, slots, nullptr, weights);
  }
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

// Tokens x 16 rows in registers; few tokens take both halves, so that enough independent sums are in flight.
template <int Tokens, int Halves>
void multiply_group(const float* weights, const float* x, int64_t slots, float* sums) {
  constexpr int vectors = 4 * Halves;
  while (slots > 0) {
    int64_t chain = slots < kChainColumns ? slots : kChainColumns;
    slots -= chain;
    float32x4_t sum[Tokens][vectors];
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[t][v] = vdupq_n_f32(0);
    for (; chain > 0; --chain, weights += kHalfRows, x += Tokens) {
      float x_t[Tokens];
#pragma GCC unroll 6
      for (int t = 0; t < Tokens; ++t) x_t[t] = x[t];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const float32x4_t w = vld1q_f32(weights + v / 4 * kDecodedColumns * kHalfRows + v % 4 * 4);
#pragma GCC unroll 6
        for (int t = 0; t < Tokens; ++t) sum[t][v] = vfmaq_n_f32(sum[t][v], w, x_t[t]);
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        float* to = sums + t * kTileRows + v * 4;
        vst1q_f32(to, vaddq_f32(vld1q_f32(to), sum[t][v]));
      }
  }
}

constexpr int64_t kTokenGroup = 6;  // 6 tokens x 16 rows: 24 of 32 registers hold sums
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

const DecodeKernels kDecodeNeon = {.token_group = kTokenGroup,
                                   .weight_bytes = 4,
                                   .packed_bytes = packed_fp32_bytes,
                                   .pack = pack_fp32,
                                   .split_codebook = split_any,
                                   .decode = decode_any,
                                   .multiply = multiply};

}  // namespace pyllmq::cpu

// y[M,N] = x[M,K] @ W^T + bias for a `codebook` weight and more tokens than partial-product tables pay for: the codes
// of 32 rows x 256 columns are decoded once into fp32 weights that stay in the L1 cache, and a register-blocked
// multiply runs all tokens over them. Plain fp32 arithmetic on exact weights (row scale and outliers included), so NaN
// and infinity need no path of their own.
//
//   weights  [2 halves, columns, 16 rows]: a half of 256 columns is 16 KiB, half of an L1 cache; with the 32 rows of a
//            column side by side each half would use only every other set of it
//   x        packed once per call, [block of 256 slots, group of up to 6 tokens, slot, token]: broadcasts read it in
//            order, padding slots hold zeros
//   sums     chains of fused multiply-adds over 64 columns, added one after the other: the order depends neither on the
//            number of tokens nor on that of threads, and all ISAs agree bit for bit
#pragma once
#include <cstdint>

#include "cpu/codebook_layout.h"
#include "cpu/codebook_linear.h"
#include "cpu/half.h"

namespace pyllmq::cpu {

constexpr int64_t kDecodedColumns = 256;
constexpr int kHalfRows = kTileRows / 2;
constexpr int64_t kDecodedWeights = kDecodedColumns * kTileRows;
// Columns per chain of multiply-adds. Error against fp64 over that of torch's F.linear, K = 256 / 4096: chains of 64
// 0.9 / 0.35, of 128 1.3 / 0.4, of 256 1.9 / 0.5; the additional additions in the L1 cache take 3 % of the time.
constexpr int64_t kChainColumns = 64;
constexpr int64_t kTokenGroup = 6;  // 6 tokens x 16 rows: 12 of 16 registers hold sums, 12 multiply-adds per 8 loads

// Bytes that a decode kernel may use for the codebook of one column in the form it likes.
static constexpr int64_t split_bytes(int width) { return width <= 4 ? 32 : int64_t{2} << width; }

// Groups as even as possible: 7 tokens are 4 + 3, not 6 + 1, which would leave the multiplier idle for the last one.
static inline int64_t token_groups(int64_t tokens) { return (tokens + kTokenGroup - 1) / kTokenGroup; }
static inline int64_t group_begin(int64_t tokens, int64_t group) {
  const int64_t groups = token_groups(tokens), larger = tokens % groups;
  return group * (tokens / groups) + (group < larger ? group : larger);
}

// One row per ISA.
struct DecodeKernels {
  void (*split_codebook)(int width, const uint16_t* codebook, int64_t slots, uint8_t* split);
  // Columns [slot, slot + slots) of a panel (multiples of 8) in one tile; row_scale [32] or null; weights: of half 0.
  void (*decode)(int width, StepOrder order, const uint8_t* tile_codes, int64_t slot, const uint8_t* split,
                 int64_t slots, const float* row_scale, float* weights);
  // sums [tokens, 32] += x @ weights, x packed as above.
  void (*multiply)(const float* weights, const float* x, int64_t slots, int64_t tokens, float* sums);
};

extern const DecodeKernels kDecodeScalar;
extern const DecodeKernels kDecodeAvx2;

// As codebook_linear, tokens > 0.
void codebook_linear_decode(const LayoutView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias,
                            DType bias_dtype, void* y, Precision precision);

}  // namespace pyllmq::cpu

// y[M,N] = x[M,K] @ W^T + bias for a `codebook` weight, by tables of partial products.
//
// For one token, the 16 values that a lookup can contribute (x_k * C_k[c] of a 4-bit column, the sums of a pair of
// 2-bit or of four 1-bit columns) form a table; the inner loop is then byte shuffle + add, without a multiply, for 32
// rows at once. A table holds fixed-point numbers cut into P planes of 7 bits, one shuffle per plane:
//
//   t = round(T * 2^(7P-1-e)) + 2^(7P-1),   2^e > max |T| over a panel of 256 lookups
//
//  * 7 bits, not 8: two looked-up bytes (low and high nibble of a step) are added as bytes before they are widened:
//    6 vector operations per 64 lookups and plane instead of 8; and plane sums stay below 2^15, so that multiply-add
//    can join planes at the flush.
//  * 16-bit accumulators: even += v; odd += v >> 8 (the trick of faiss' fast scan), flushed to fp32 after each panel.
//  * The bias is taken off the joined upper planes as an exact integer, before anything is rounded: no cancellation.
//  * The scale is a power of two: scaling is exact, scalar and AVX2 rows agree bit for bit.
//  * P = 4 (28 bits) for fp32 x: below fp32's own rounding. P = 3 (21 bits) for bf16 and fp16 x: a panel shares one
//    range, and beside a channel that is 1000 times larger two planes (14 bits) would leave nothing of the others.
//    P = 2 is compiled for a later, explicit `precision` option.
//
// Widths 5..8 are decoded and multiplied in fp32. A panel whose range is not finite, or so small or large that the
// fixed point would lose bits, takes a slow path in fp64 for that token: x with NaN or infinity gives what a dense
// matmul gives.
#pragma once
#include <cstdint>

#include "cpu/codebook_layout.h"
#include "cpu/half.h"

namespace pyllmq::cpu {

constexpr int kPlaneBits = 7;
constexpr int64_t kMaxTokenBlock = 8;  // tokens that share one pass over the codes
constexpr int kMinPlanes = 2;
constexpr int kMaxPlanes = 4;
constexpr int kTableEntries =
    16;  // bytes of one plane of one lookup's table; plane p of lookup l is at (l * P + p) * 16
// The bias of a lookup, counted in units of the joined upper planes (all but the lowest one or two).
constexpr int kUpperBias = 1 << (2 * kPlaneBits - 1);

// One row per ISA; index [planes - kMinPlanes].
struct LinearKernels {
  static constexpr int kPrecisions = kMaxPlanes - kMinPlanes + 1;

  // max |x * max_magnitude|, NaN if one of them is NaN.
  float (*panel_bound)(const float* x, const float* max_magnitude, int64_t slots);
  // x [lookups * columns_per_lookup], already multiplied by 2^(7P-1-e).
  void (*build_tables[kPrecisions])(int width, const uint16_t* codebook, const float* x, int64_t lookups,
                                    uint8_t* tables);
  // y [tiles * 32] += unit * sum of lookups; `unit` = 2^(e-7P+1).
  void (*lookup_nibbles[kPrecisions])(const uint8_t* codes, int64_t tiles, int64_t lookups, const uint8_t* tables,
                                      float unit, float* y);
  void (*lookup_3bit[kPrecisions])(const uint8_t* codes, int64_t tiles, int64_t lookups, const uint8_t* tables,
                                   float unit, float* y);
  // Index [width - 5]: codebook fp16 [columns, 2^width], x [tokens, kBytePanelColumns], y [tokens, y_stride].
  void (*decode_multiply[4])(const uint8_t* codes, int64_t tiles, int64_t tile_bytes, int64_t columns,
                             const uint16_t* codebook, const float* x, int64_t tokens, float* y, int64_t y_stride);
  // Index [DType].
  void (*to_fp32[3])(const void* from, float* to, int64_t count);
  void (*from_fp32[3])(const float* from, void* to, int64_t count);
};

extern const LinearKernels kLinearScalar;
extern const LinearKernels kLinearAvx2;
const LinearKernels& linear_kernels();  // of the active ISA

// Rows [begin, begin + count) of x [., columns] in fp32: x itself where it is fp32, else converted into `converted`.
const float* rows_in_fp32(const LinearKernels& kernels, const void* x, DType dtype, int64_t begin, int64_t count,
                          int64_t columns, float* converted);

// tables: what stands above, the same cost for each token; decode: codebook_linear_decode.h, the decoding is paid once;
// automatic: the one of the two that costs less for the weight's widths.
enum class LinearPath { tables = 0, decode = 1, automatic = 2 };

// x and y [tokens, columns] and [tokens, rows], both of x_dtype; bias [rows] or null.
void codebook_linear(const LayoutView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias,
                     DType bias_dtype, void* y, LinearPath path);

}  // namespace pyllmq::cpu

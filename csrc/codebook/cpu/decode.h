// y[M,N] = x[M,K] @ W^T + bias for a `codebook` weight and more tokens than partial-product tables pay for: the codes
// of 32 rows x 256 columns are decoded once into weights that stay in the L1 cache, and a register-blocked multiply
// runs all tokens over them. What a weight is depends on the permitted error and the instruction set:
//
//   fp32   exact weights (row scale and outliers included) and chains of fused multiply-adds, so NaN and infinity need
//          no path of their own. The only one for `exact`; all ISAs agree bit for bit.
//   int16  decode_int16.h: twice the multiply-adds of fp32, error 1e-4; with AVX-VNNI in half of the instructions.
//   2 int8 decode_amx.cpp: AMX tiles, three products of numbers cut into two bytes, error 5e-5.
//   int8   decode_int8.h, decode_int8_neon.h: `fast` with AVX-VNNI, AVX-512 alone and ARM's byte products, four or eight
//          times the multiply-adds of fp32, error 1e-2; with AVX2 alone 2.7 times, error 1.7e-2. On ARM `high` is fp32: a product
//          of int16 takes as many instructions.
//
//   weights  [2 halves, columns, 16 rows]: a half of 256 columns is 16 KiB in fp32; with the 32 rows of a column side
//            by side each half would use only every other set of an L1 cache. 16-bit weights: [2, pairs, 16 rows, 2]; of
//            8 bits: [plane, 2, quads, 16 rows, 4]
//   x        packed once per call, [block of 256 slots, group of tokens, slot, token] (fp32): broadcasts read it in
//            order, padding slots hold zeros
//   sums     fp32: chains over 64 columns, added one after the other: the order depends neither on the number of
//            tokens nor on that of threads
#pragma once
#include <cstdint>
#include <cstring>

#include "codebook/cpu/layout.h"
#include "codebook/cpu/linear.h"
#include "runtime/counting.h"
#include "runtime/half.h"

namespace pyllmq::cpu {

constexpr int64_t kDecodedColumns = 256;
constexpr int kHalfRows = kTileRows / 2;
constexpr int64_t kDecodedWeights = kDecodedColumns * kTileRows;
// Columns per chain of multiply-adds. Error against fp64 over that of torch's F.linear, K = 256 / 4096: chains of 64
// 0.9 / 0.35, of 128 1.3 / 0.4, of 256 1.9 / 0.5; the additional additions in the L1 cache take 3 % of the time.
constexpr int64_t kChainColumns = 64;
constexpr int64_t kMostTokenGroup = 16;
constexpr int64_t kTokensSideBySide = 16;  // where each outlier, or each kept weight, is multiplied on its own

// Bytes that a decode kernel may use for the codebook of one column in the form it likes.
static constexpr int64_t split_bytes(int width) { return width <= 4 ? 64 : int64_t{4} << width; }

// Groups of at most `most` tokens as even as possible, larger ones first: 7 tokens are 4 + 3, not 6 + 1, which would
// leave the multiplier idle for the last one.
struct TokenGroups {
  int64_t tokens, most;

  int64_t count() const { return ceil_div(tokens, most); }
  int64_t begin(int64_t group) const {
    const int64_t groups = count(), larger = tokens % groups;
    return group * (tokens / groups) + (group < larger ? group : larger);
  }
  int64_t size(int64_t group) const { return begin(group + 1) - begin(group); }
  int64_t largest() const { return size(0); }
};

// 8-bit weights stand in quads of columns, as one lookup in a layout in fours finds them. The place of a slot's weight,
// counted in slots within its panel: columns 0, S, 2S, 3S first, then 1, S + 1, ...
static constexpr int64_t quad_place(int width, int64_t slot) {
  const int64_t stride = width >= 5 ? 1 : width == 3 ? 8 : 2 * columns_per_lookup(width), rest = slot % (4 * stride);
  return slot - rest + rest % stride * 4 + rest / stride;
}

// The outliers of the rows of a tile, as differences to what their codes say.
struct RowOutliers {
  int64_t rows;
  const uint32_t* row_offsets;
  const uint32_t* columns;
  const float* deltas;
};

// Compiled once per ISA, for which the compiler cuts the vector into registers. (As an array gcc 12 keeps the sums in memory:
// 0.5 % of outliers then take 24 of 54 ms, 512 tokens, 4096 x 4096.)
using OutlierTokens = float __attribute__((vector_size(kTokensSideBySide * 4)));
static inline void add_outliers_loop(const RowOutliers& outliers, const float* x, int64_t count, float* sums) {
  for (int64_t r = 0; r < outliers.rows; ++r) {
    OutlierTokens sum = {};
    for (uint32_t i = outliers.row_offsets[r]; i < outliers.row_offsets[r + 1]; ++i) {
      OutlierTokens column;
      std::memcpy(&column, x + int64_t{outliers.columns[i]} * kTokensSideBySide, sizeof column);
      sum += outliers.deltas[i] * column;
    }
    for (int64_t t = 0; t < count; ++t) sums[t * kTileRows + r] += sum[t];
  }
}

// One row per ISA and kind of weight.
struct DecodeKernels {
  int64_t token_group;    // most tokens that are packed side by side
  int64_t weight_bytes;   // of one element of [2, columns, 16]
  int64_t planes = 1;     // arrays of weights, one after the other
  int64_t slot_unit = 8;  // multiply reads the slots of a block in units of this many; the driver fills up with zeros
  // Integers relative to their column's largest magnitude, which x is multiplied by; the row scale multiplies sums, and
  // outliers are added to them. False: exact fp32 weights, row scale included, outliers in their place.
  bool relative = false;

  // Of one block of 256 slots.
  int64_t (*packed_bytes)(int64_t tokens);
  // x of one group of tokens, [group size, 256]; order: for each place of a quad the slot that stands there, counted
  // within its 64. False: x is outside of what this arithmetic can hold.
  bool (*pack)(const float* x, int64_t slots, const uint8_t* order, const TokenGroups& groups, int64_t group, uint8_t* packed);
  void (*split_codebook)(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split);
  // Columns [slot, slot + slots) of a panel (multiples of 8) in one tile; row_scale [32] or null; weights: of half 0.
  void (*decode)(int width, StepOrder order, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots,
                 const float* row_scale, uint8_t* weights);
  // sums [tokens, 32] += x @ weights, x packed as above. May write one token more than there are, unchanged.
  void (*multiply)(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums);
  // sums [count, 32] += the differences of the outliers of 32 rows; x [columns, kTokensSideBySide]. Of relative weights.
  void (*add_outliers)(const RowOutliers& outliers, const float* x, int64_t count, float* sums) = nullptr;
  // Around all multiplications of a chunk; null where there is nothing to set up.
  void (*begin_chunk)(int64_t tokens) = nullptr;
  void (*end_chunk)() = nullptr;
};

extern const DecodeKernels kDecodeScalar;       // reads both orders of steps
extern const DecodeKernels kDecodeAvx2;         // rows
extern const DecodeKernels kDecodeAvx512;       // fours
extern const DecodeKernels kDecodeAmx;          // fours; `high` and `fast`
extern const DecodeKernels kDecodeInt8Avx2;     // rows; `fast`
extern const DecodeKernels kDecodeInt8AvxVnni;  // rows; `fast`
extern const DecodeKernels kDecodeInt8Avx512;   // fours; `fast`
extern const DecodeKernels kDecodeNeon;         // rows
extern const DecodeKernels kDecodeInt8Dotprod;  // rows; `fast`
extern const DecodeKernels kDecodeInt8I8mm;     // rows; `fast`

// Of the active instruction set, for a layout with this order of steps; exact: the fp32 row.
const DecodeKernels& decode_kernels(StepOrder order, Precision precision);

// fp32: [group of tokens, slot, token].
static inline int64_t packed_fp32_bytes(int64_t tokens) { return kDecodedColumns * tokens * 4; }
bool pack_fp32(const float* x, int64_t slots, const uint8_t* order, const TokenGroups& groups, int64_t group, uint8_t* packed);

// x [tokens, columns] -> [group of kTokensSideBySide, columns, token], filled up with zeros.
void put_side_by_side(const float* x, int64_t tokens, int64_t columns, float* to);

// As codebook_linear, tokens > 0.
void codebook_linear_decode(const LayoutView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias,
                            DType bias_dtype, void* y, Precision precision);

}  // namespace pyllmq::cpu

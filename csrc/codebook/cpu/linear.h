// y[M,N] = x[M,K] @ W^T + bias for a `codebook` weight, by tables of partial products.
//
// For one token, the 16 values that a lookup can contribute (x_k * C_k[c] of a 4-bit column, the sums of a pair of
// 2-bit or of four 1-bit columns) form a table; the inner loop is then byte shuffle + add, without a multiply, for 32
// rows at once. A table holds fixed-point numbers cut into P planes of 7 bits, one shuffle per plane:
//
//   t = round(T * s) + 2^(bits-1),   s * max |T| over a panel of 256 lookups < 2^(bits-1)
//
//  * exact:  bits = 28 in 4 planes of 7 for fp32 x (below fp32's own rounding), 21 in 3 planes for bf16 and fp16 x;
//            s is a power of two, so that scaling is exact.
//  * high:   16 bits in 2 planes of 8. Relative error 3e-5 to 7e-5 for normal x, at most 1.5e-4 where one channel of a
//            panel dwarfs all others.
//  * fast:   14 bits in 2 planes of 7: four times that error. In layouts in fours as `high`.
//
// Planes of 7 bits: two looked-up bytes are added as bytes before they are widened: 6 vector operations per 64 lookups
// and plane (AVX2) instead of 8 with planes of 8 bits. 16-bit accumulators: even += v; odd += v >> 8 (the trick of
// faiss' fast scan), joined and flushed to fp32 after each panel. The bias is taken off as an integer, before anything
// is rounded: no cancellation. All arithmetic before the flush is exact, so all ISAs agree bit for bit.
//
// Widths 5..8 are decoded and multiplied in fp32. A panel whose range is not finite, or so small or large that the
// fixed point would lose bits, takes a slow path in fp64 for that token: x with NaN or infinity gives what a dense
// matmul gives.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "codebook/cpu/layout.h"
#include "runtime/half.h"
#include "linear_operand.h"

namespace pyllmq::cpu {

enum class TableKind { bits28 = 0, bits21 = 1, bits16 = 2, bits14 = 3 };
constexpr int kTableKinds = 4;
static constexpr int table_planes(TableKind kind) { return kind == TableKind::bits28 ? 4 : kind == TableKind::bits21 ? 3 : 2; }
static constexpr int plane_bits(TableKind kind) { return kind == TableKind::bits16 ? 8 : 7; }
static constexpr int table_bits(TableKind kind) { return table_planes(kind) * plane_bits(kind); }

// In fours planes of 8 bits cost what planes of 7 do: `fast` is as exact as `high` there.
static inline TableKind table_kind(Precision precision, DType dtype, StepOrder order) {
  if (precision == Precision::high || (precision == Precision::fast && order == StepOrder::fours)) return TableKind::bits16;
  if (precision == Precision::fast) return TableKind::bits14;
  return dtype == DType::fp32 ? TableKind::bits28 : TableKind::bits21;
}

// Outside of this range of |x * codebook| the fixed point or its scale would leave fp32's normal numbers.
constexpr float kSmallestBound = 0x1p-90f;
constexpr float kLargestBound = 0x1p100f;

// One part in 4096 less than fits: room for the rounding of the products and of the fixed point.
static inline float fixed_point_scale(TableKind kind, float bound) {
  const float room = bound * (1 + 0x1p-12f);
  if (kind == TableKind::bits28 || kind == TableKind::bits21) return std::ldexp(1.0f, table_bits(kind) - 2 - std::ilogb(room));
  return static_cast<float>((1 << (table_bits(kind) - 1)) - 1) / room;
}

constexpr int64_t kMaxTokenBlock = 8;  // tokens that share one pass over the codes
constexpr int kTableEntries = 16;      // bytes of one plane of one lookup's table

// The sums of a row over a panel, one per plane -> fp32, in units of `unit`. Planes are joined in exact integers.
template <TableKind Kind>
static inline float flush_sums(const int32_t* sum, int64_t lookups, float unit) {
  constexpr int planes = table_planes(Kind), bits = plane_bits(Kind);
  // The bias of a lookup in units of the two upper planes.
  const int32_t upper = (sum[planes - 1] << bits) + sum[planes - 2] - static_cast<int32_t>(lookups << (2 * bits - 1));
  if constexpr (planes == 2) return static_cast<float>(upper) * unit;
  const int32_t lower = planes == 4 ? (sum[1] << bits) + sum[0] : sum[0];
  constexpr float upper_units = 1 << (bits * (planes - 2));
  return static_cast<float>(upper) * (upper_units * unit) + static_cast<float>(lower) * unit;
}

// Codes are asked for this many tiles (of mostly 4 KB) before they are read. A chunk of half a strip reads half of each panel: a
// distance in bytes would ask for the other half. AVX2 (Zen 3), 2 threads, from memory: half strips 22 -> 28 GB/s, whole ones
// 24 -> 28 (1 to 4 tiles alike); a read loop has 33.
constexpr int64_t kTilesAhead = 2;

struct TokenTables {
  const uint8_t* tables;  // of one panel, in the order that `build` of the same row writes
  float unit;
  float* y;  // [tiles * 32] += unit * sum of lookups
};

struct LookupWork {
  const uint8_t* codes;       // of the first tile
  const uint8_t* next_codes;  // of the first tile in the panel that is read next; the last one's own
  StepOrder order;
  int64_t tiles, lookups;
  const TokenTables* tokens;
  int64_t count;

  // What is read kTilesAhead tiles after a tile: behind the last tile comes the first one of the next panel.
  const uint8_t* ahead_of(int64_t tile, int64_t tile_bytes) const {
    const int64_t at = tile + kTilesAhead;
    return at < tiles ? codes + at * tile_bytes : next_codes + (at - tiles) * tile_bytes;
  }
};

// Tables of one kind.
struct TableKernels {
  // x [lookups * columns_per_lookup], already multiplied by s; tables [lookups * planes * 16].
  void (*build)(int width, StepOrder order, const uint16_t* codebook, const float* x, int64_t lookups, uint8_t* tables);
  void (*lookup_nibbles)(const LookupWork& work);
  void (*lookup_3bit)(const LookupWork& work);
};

// One row per ISA and order of steps.
struct LinearKernels {
  TableKernels tables[kTableKinds];  // index TableKind; bits14 in rows only
  // Index [width - 5]: codebook fp16 [columns, 2^width], x [tokens, kBytePanelColumns], y [tokens, y_stride].
  void (*decode_multiply[4])(const uint8_t* codes, StepOrder order, int64_t tiles, int64_t tile_bytes, int64_t columns,
                             const uint16_t* codebook, const float* x, int64_t tokens, float* y, int64_t y_stride);
};

extern const LinearKernels kLinearScalar;  // reads both orders
extern const LinearKernels kLinearAvx2;    // rows
extern const LinearKernels kLinearNeon;    // rows
extern const LinearKernels kLinearAvx512;  // fours

// What all paths do to x and y. One row per ISA.
struct RowKernels {
  // Largest sum of |x * max_magnitude| over the columns of a lookup, NaN if one of them is NaN.
  float (*panel_bound)(const float* x, const float* max_magnitude, int64_t lookups, int columns_per_lookup);
  // Index [DType].
  void (*to_fp32[3])(const void* from, float* to, int64_t count);
  void (*from_fp32[3])(const float* from, void* to, int64_t count);
  // columns [count, 16 rows], count a multiple of 8 -> rows[row * stride + column].
  void (*transpose)(const float* columns, int64_t count, float* rows, int64_t stride);
};

extern const RowKernels kRowScalar;
extern const RowKernels kRowAvx2;
extern const RowKernels kRowNeon;
const RowKernels& row_kernels();  // of the active ISA

// Rows [begin, begin + count) of x [., columns] in fp32: x itself where it is fp32, else converted into `converted`.
const float* rows_in_fp32(const RowKernels& kernels, const void* x, DType dtype, int64_t begin, int64_t count, int64_t columns,
                          float* converted);

// tables: what stands above, the same cost for each token; decode: decode.h, the decoding is paid once;
// automatic: the one of the two that costs less for the weight's widths.
enum class LinearPath { tables = 0, decode = 1, automatic = 2 };

// What `automatic` is for this many tokens.
LinearPath cheaper_path(const LayoutView& view, DType dtype, int64_t tokens, Precision precision);

// x and y [tokens, columns] and [tokens, rows], both of x_dtype; bias [rows] or null; tokens > 0.
void codebook_linear(const LayoutView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype,
                     void* y, LinearPath path, Precision precision);

// One of several Linears; x [tokens, columns] and y [tokens, rows] in fp32, bias [rows] or null; tokens > 0.
struct LinearOfMany {
  const LayoutView& view;
  const float* x;
  int64_t tokens;
  const float* bias;
  float* y;
};

// Those of a block's q, k and v, of gate and up, or of experts, side by side on all threads: the same bits as one after the
// other. Returns the places of those that were not run: they need another path, or more tables than live at once.
std::vector<size_t> codebook_linears(const std::vector<LinearOfMany>& linears, Precision precision);

}  // namespace pyllmq::cpu

// 64-bit ARM. Layouts are in rows, as for AVX2: a register of codes is one step of 16 rows, which one table serves.
// Not built: steps of a row side by side, so that one lookup reads two tables (tbl of two registers) and one instruction adds two
// bytes (uadalp): 2 instructions for 16 lookups and plane in place of 3, but a lookup in two registers takes two passes on most
// cores (Cortex-A72, Neoverse N1), and a layout of its own.
#include <arm_neon.h>

#include <cstring>

#include "codebook/cpu/bytes_neon.h"
#include "codebook/cpu/layout.h"
#include "codebook/cpu/linear.h"
#include "codebook/cpu/planes_neon.h"
#include "codebook/cpu/wide_columns.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"
#include "runtime/simd.h"

namespace pyllmq::cpu {
namespace {

inline uint16x8_t load_8(const uint16_t* from) { return vld1q_u16(from); }

// --- tables --------------------------------------------------------------------------------------------------------

template <int ColumnsPerLookup>
float largest_bound(const float* x, const float* max_magnitude, int64_t slots) {
  uint32x4_t largest = vdupq_n_u32(0);  // as integers, magnitudes order like floats and NaN comes out on top
  const auto offer = [&](float32x4_t bound) { largest = vmaxq_u32(largest, vreinterpretq_u32_f32(bound)); };
  for (int64_t i = 0; i < slots; i += kBlockColumns) {
    const float32x4_t a = vabsq_f32(vmulq_f32(vld1q_f32(x + i), vld1q_f32(max_magnitude + i)));
    const float32x4_t b = vabsq_f32(vmulq_f32(vld1q_f32(x + i + 4), vld1q_f32(max_magnitude + i + 4)));
    if constexpr (ColumnsPerLookup == 1) {
      offer(a);
      offer(b);
    } else {
      const float32x4_t pairs = vpaddq_f32(a, b);
      offer(ColumnsPerLookup == 2 ? pairs : vpaddq_f32(pairs, pairs));
    }
  }
  return bits_float(vmaxvq_u32(largest) & 0x7FFFFFFFu);
}

float panel_bound(const float* x, const float* max_magnitude, int64_t lookups, int columns_per_lookup) {
  const int64_t slots = lookups * columns_per_lookup;
  if (columns_per_lookup == 1) return largest_bound<1>(x, max_magnitude, slots);
  if (columns_per_lookup == 2) return largest_bound<2>(x, max_magnitude, slots);
  return largest_bound<4>(x, max_magnitude, slots);
}

// The products of the 16 values of a nibble; `codebook` and x of one lookup.
template <int Width>
inline Sixteen partial_products(const uint16_t* codebook, const float* x) {
  const uint16x8_t eight = load_8(codebook);
  const float32x4_t low = first_fp16(eight), high = second_fp16(eight);
  if constexpr (Width == 4) {
    const uint16x8_t rest = load_8(codebook + 8);
    return {{vmulq_n_f32(low, x[0]), vmulq_n_f32(high, x[0]), vmulq_n_f32(first_fp16(rest), x[0]),
             vmulq_n_f32(second_fp16(rest), x[0])}};
  } else if constexpr (Width == 3) {  // entry 8 + c = entry c: the fourth bit of a nibble belongs to another column
    const float32x4_t a = vmulq_n_f32(low, x[0]), b = vmulq_n_f32(high, x[0]);
    return {{a, b, a, b}};
  } else {
    float32x4_t first, second;  // of the low and of the high two bits
    if constexpr (Width == 2) {
      first = vmulq_n_f32(low, x[0]);
      second = vmulq_n_f32(high, x[1]);
    } else {
      const auto both = [](float32x4_t entries, float x0, float x1) {
        const float32x4_t even = vcombine_f32(vget_low_f32(entries), vget_low_f32(entries));
        const float32x4_t odd = vzip2q_f32(entries, entries);
        return vaddq_f32(vmulq_n_f32(even, x0), vmulq_n_f32(odd, x1));
      };
      first = both(low, x[0], x[1]);
      second = both(high, x[2], x[3]);
    }
    return {{vaddq_f32(first, vdupq_laneq_f32(second, 0)), vaddq_f32(first, vdupq_laneq_f32(second, 1)),
             vaddq_f32(first, vdupq_laneq_f32(second, 2)), vaddq_f32(first, vdupq_laneq_f32(second, 3))}};
  }
}

template <TableKind Kind, int Width>
void build_width(const uint16_t* codebook, const float* x, int64_t lookups, uint8_t* tables) {
  for (int64_t l = 0; l < lookups; ++l, codebook += entries_per_lookup(Width), x += columns_per_lookup(Width)) {
    uint8x16_t planes[table_planes(Kind)];
    cut_into_planes<Kind>(partial_products<Width>(codebook, x), planes);
    for (int p = 0; p < table_planes(Kind); ++p, tables += kTableEntries) vst1q_u8(tables, planes[p]);
  }
}

template <TableKind Kind>
void build(int width, StepOrder, const uint16_t* codebook, const float* x, int64_t lookups, uint8_t* tables) {
  constexpr auto kBuild = instances<1, 4>([]<int Width>() { return build_width<Kind, Width>; });
  kBuild[width](codebook, x, lookups, tables);
}

// --- lookups -------------------------------------------------------------------------------------------------------

// The sums of 32 rows for one token.
template <TableKind Kind>
struct Accumulators : PlaneSums<Kind, 2> {
  using PlaneSums<Kind, 2>::kPlanes;

  // Both nibbles of the bytes of a step, whose tables lie side by side.
  inline __attribute__((always_inline)) void add(uint8x16_t upper_rows, uint8x16_t lower_rows, const uint8_t* tables) {
    const uint8x16_t a[2] = {low_nibbles(upper_rows), low_nibbles(lower_rows)};
    const uint8x16_t b[2] = {high_nibbles(upper_rows), high_nibbles(lower_rows)};
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const uint8x16_t table_a = vld1q_u8(tables + p * kTableEntries);
      const uint8x16_t table_b = vld1q_u8(tables + (kPlanes + p) * kTableEntries);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) this->add_two(p, half, vqtbl1q_u8(table_a, a[half]), vqtbl1q_u8(table_b, b[half]));
    }
  }
};

// A block of codes is Bytes bytes of a row, which hold Steps bytes of nibbles.
template <TableKind Kind, int Tokens, int Bytes, int Steps>
void lookups_of_tokens(const LookupWork& work, const TokenTables* tokens) {
  constexpr int stride = 2 * table_planes(Kind) * kTableEntries;
  const uint8_t* codes = work.codes;
  for (int64_t tile = 0; tile < work.tiles; ++tile) {
    Accumulators<Kind> sums[Tokens];
    const uint8_t* table[Tokens];
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t) {
      sums[t].clear();
      table[t] = tokens[t].tables;
    }
    for (int64_t block = work.lookups / (2 * Steps); block > 0; --block, codes += Bytes * kTileRows) {
      for (int line = 0; line < Bytes * kTileRows; line += 64) prefetch(codes + line, kLookupsNeon);
      uint8x16_t upper[4], lower[4];
      load_steps<Bytes>(codes, upper);
      load_steps<Bytes>(codes + 16, lower);
#pragma GCC unroll 4
      for (int i = 0; i < Steps; ++i)
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t) {
          sums[t].add(upper[i], lower[i], table[t]);
          table[t] += stride;
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t) sums[t].flush(work.lookups, tokens[t].unit, tokens[t].y + tile * kTileRows);
  }
}

// Two tokens of two planes keep 16 of the 32 registers as sums; four planes of one token do so alone.
template <TableKind Kind>
constexpr int kTokensAtOnce = table_planes(Kind) == 2 ? 2 : 1;
// Lookups come in multiples of 2: one byte of nibbles at a time. Of 3 bits 8 columns are 3 bytes, and 4 of nibbles.
template <TableKind Kind>
constexpr auto kNibbles = instances<1, kTokensAtOnce<Kind>>([]<int Tokens>() { return lookups_of_tokens<Kind, Tokens, 1, 1>; });
template <TableKind Kind>
constexpr auto kLookups3Bit =
    instances<1, kTokensAtOnce<Kind>>([]<int Tokens>() { return lookups_of_tokens<Kind, Tokens, 3, 4>; });

template <TableKind Kind>
constexpr TableKernels table_kernels() {
  return {build<Kind>, [](const LookupWork& work) { run_in_groups(kNibbles<Kind>, work); },
          [](const LookupWork& work) { run_in_groups(kLookups3Bit<Kind>, work); }};
}

// --- widths 5..8 ---------------------------------------------------------------------------------------------------

// 32 weights of one column.
template <int Width>
inline void decode_column(const uint8_t* codes, const uint8_t* planes, float* weights) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const BytePlanes bytes = decode_wide<Width>(vld1q_u8(codes + 16 * half), planes);
    vst1q_f32(weights + 16 * half, first_fp16(bytes.first()));
    vst1q_f32(weights + 16 * half + 4, second_fp16(bytes.first()));
    vst1q_f32(weights + 16 * half + 8, first_fp16(bytes.second()));
    vst1q_f32(weights + 16 * half + 12, second_fp16(bytes.second()));
  }
}

template <int Width>
void decode_multiply(const uint8_t* codes, StepOrder, int64_t tiles, int64_t tile_bytes, int64_t columns,
                     const uint16_t* codebook, const float* x, int64_t tokens, float* y, int64_t y_stride) {
  alignas(64) uint8_t planes[kBytePanelColumns][2 << Width];
  for (int64_t k = 0; k < columns; ++k) split_codebook(codebook + (k << Width), Width, planes[k]);
  multiply_wide<Twice<Neon>>(codes, tiles, tile_bytes, columns, x, tokens, y, y_stride,
                             [&](const uint8_t* tile, int64_t k, float* weights) {
                               const uint8_t* column = tile + k * kTileRows;
                               if (k % 2 == 0) prefetch(column, kLookupsNeon);
                               decode_column<Width>(column, planes[k], weights);
                             });
}

// --- dtypes --------------------------------------------------------------------------------------------------------

void copy_to_fp32(const void* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }
void copy_from_fp32(const float* from, void* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

void fp16_row_to_fp32(const void* from, float* to, int64_t count) {
  const auto* half = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const uint16x8_t eight = load_8(half + i);
    vst1q_f32(to + i, first_fp16(eight));
    vst1q_f32(to + i + 4, second_fp16(eight));
  }
  for (; i < count; ++i) to[i] = fp16_to_fp32(half[i]);
}

void fp32_row_to_fp16(const float* from, void* to, int64_t count) {
  auto* half = static_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1_u16(half + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
  for (; i < count; ++i) half[i] = fp32_to_fp16(from[i]);
}

// The compiler vectorises these two.
void bf16_row_to_fp32(const void* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_fp32(static_cast<const uint16_t*>(from)[i]);
}

void fp32_row_to_bf16(const float* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(to)[i] = fp32_to_bf16(from[i]);
}

void transpose(const float* columns, int64_t count, float* rows, int64_t stride) {
  for (int64_t c = 0; c < count; c += 4)
    for (int row = 0; row < kTileRows / 2; row += 4) {
      float32x4_t square[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) square[i] = vld1q_f32(columns + (c + i) * (kTileRows / 2) + row);
      Quad::transpose(square);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) vst1q_f32(rows + (row + i) * stride + c, square[i]);
    }
}

}  // namespace

const LinearKernels kLinearNeon = {
    {table_kernels<TableKind::bits28>(), table_kernels<TableKind::bits21>(), table_kernels<TableKind::bits16>(),
     table_kernels<TableKind::bits14>()},
    {decode_multiply<5>, decode_multiply<6>, decode_multiply<7>, decode_multiply<8>},
};

const RowKernels kRowNeon = {
    panel_bound,
    {copy_to_fp32, bf16_row_to_fp32, fp16_row_to_fp32},
    {copy_from_fp32, fp32_row_to_bf16, fp32_row_to_fp16},
    transpose,
};

}  // namespace pyllmq::cpu

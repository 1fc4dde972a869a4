// The reference row: runs anywhere, same layout and same fixed-point arithmetic as the SIMD rows.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "codebook/cpu/layout.h"
#include "codebook/cpu/linear.h"

namespace pyllmq::cpu {
namespace {

float panel_bound(const float* x, const float* max_magnitude, int64_t lookups, int columns_per_lookup) {
  uint32_t largest = 0;  // as integers, magnitudes order like floats and NaN comes out on top
  for (int64_t l = 0; l < lookups; ++l, x += columns_per_lookup, max_magnitude += columns_per_lookup) {
    const auto magnitude = [&](int i) { return std::fabs(x[i] * max_magnitude[i]); };
    float sum = magnitude(0);
    if (columns_per_lookup >= 2) sum += magnitude(1);
    if (columns_per_lookup == 4) sum += magnitude(2) + magnitude(3);
    largest = std::max(largest, float_bits(sum) & 0x7FFFFFFFu);
  }
  return bits_float(largest);
}

float partial_product(int width, const uint16_t* codebook, const float* x, int index) {
  if (width == 4) return x[0] * fp16_to_fp32(codebook[index]);
  if (width == 3) return x[0] * fp16_to_fp32(codebook[index & 7]);
  if (width == 2) return x[0] * fp16_to_fp32(codebook[index & 3]) + x[1] * fp16_to_fp32(codebook[4 + (index >> 2)]);
  const float low = x[0] * fp16_to_fp32(codebook[index & 1]) + x[1] * fp16_to_fp32(codebook[2 + (index >> 1 & 1)]);
  const float high = x[2] * fp16_to_fp32(codebook[4 + (index >> 2 & 1)]) + x[3] * fp16_to_fp32(codebook[6 + (index >> 3)]);
  return low + high;
}

template <TableKind Kind>
void build(int width, StepOrder, const uint16_t* codebook, const float* x, int64_t lookups, uint8_t* tables) {
  constexpr int planes = table_planes(Kind), bits = plane_bits(Kind), bias = 1 << (table_bits(Kind) - 1);
  for (int64_t l = 0; l < lookups; ++l, tables += planes * kTableEntries) {
    for (int index = 0; index < kTableEntries; ++index) {
      const int t = static_cast<int>(std::nearbyintf(partial_product(width, codebook, x, index))) + bias;
      for (int p = 0; p < planes; ++p) tables[p * kTableEntries + index] = t >> (bits * p) & ((1 << bits) - 1);
    }
    codebook += entries_per_lookup(width);
    x += columns_per_lookup(width);
  }
}

template <TableKind Kind, class Index>  // index(tile codes, lookup, row)
void lookup(const LookupWork& work, int64_t tile_bytes, Index&& index) {
  constexpr int planes = table_planes(Kind);
  for (int64_t t = 0; t < work.count; ++t)
    for (int64_t tile = 0; tile < work.tiles; ++tile)
      for (int row = 0; row < kTileRows; ++row) {
        int32_t sum[planes] = {};
        for (int64_t l = 0; l < work.lookups; ++l)
          for (int p = 0; p < planes; ++p)
            sum[p] += work.tokens[t].tables[(l * planes + p) * kTableEntries + index(work.codes + tile * tile_bytes, l, row)];
        work.tokens[t].y[tile * kTileRows + row] += flush_sums<Kind>(sum, work.lookups, work.tokens[t].unit);
      }
}

template <TableKind Kind>
void lookup_nibbles(const LookupWork& work) {
  lookup<Kind>(work, work.lookups / 2 * kTileRows, [&](const uint8_t* codes, int64_t l, int row) {
    return codes[step_place(work.order, l / 2, row)] >> (4 * (l % 2)) & 15;
  });
}

template <TableKind Kind>
void lookup_3bit(const LookupWork& work) {
  lookup<Kind>(work, work.lookups / kBlockColumns * block_bytes(3),
               [&](const uint8_t* codes, int64_t l, int row) { return read_code(codes, work.order, 3, l, row); });
}

template <TableKind Kind>
constexpr TableKernels table_kernels() {
  return {build<Kind>, lookup_nibbles<Kind>, lookup_3bit<Kind>};
}

// Sums of 8 columns, then of the panel, then of the panels: a plain chain of fp32 additions over thousands of columns
// would have several times the error of torch's blocked sum.
template <int Width>
void decode_multiply(const uint8_t* codes, StepOrder order, int64_t tiles, int64_t tile_bytes, int64_t columns,
                     const uint16_t* codebook, const float* x, int64_t tokens, float* y, int64_t y_stride) {
  for (int64_t tile = 0; tile < tiles; ++tile, codes += tile_bytes, y += kTileRows)
    for (int64_t t = 0; t < tokens; ++t)
      for (int row = 0; row < kTileRows; ++row) {
        float panel_sum = 0;
        for (int64_t begin = 0; begin < columns; begin += kBlockColumns) {
          float block_sum = 0;
          for (int64_t k = begin; k < columns && k < begin + kBlockColumns; ++k)
            block_sum +=
                x[t * kBytePanelColumns + k] * fp16_to_fp32(codebook[(k << Width) + read_code(codes, order, Width, k, row)]);
          panel_sum += block_sum;
        }
        y[t * y_stride + row] += panel_sum;
      }
}

void copy_to_fp32(const void* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }
void copy_from_fp32(const float* from, void* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

template <float (*Convert)(uint16_t)>
void halves_to_fp32(const void* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Convert(static_cast<const uint16_t*>(from)[i]);
}

template <uint16_t (*Convert)(float)>
void fp32_to_halves(const float* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(to)[i] = Convert(from[i]);
}

void transpose(const float* columns, int64_t count, float* rows, int64_t stride) {
  for (int64_t c = 0; c < count; ++c)
    for (int row = 0; row < kTileRows / 2; ++row) rows[row * stride + c] = columns[c * (kTileRows / 2) + row];
}

}  // namespace

const LinearKernels kLinearScalar = {
    {table_kernels<TableKind::bits28>(), table_kernels<TableKind::bits21>(), table_kernels<TableKind::bits16>(),
     table_kernels<TableKind::bits14>()},
    {decode_multiply<5>, decode_multiply<6>, decode_multiply<7>, decode_multiply<8>},
};

const RowKernels kRowScalar = {
    panel_bound,
    {copy_to_fp32, halves_to_fp32<bf16_to_fp32>, halves_to_fp32<fp16_to_fp32>},
    {copy_from_fp32, fp32_to_halves<fp32_to_bf16>, fp32_to_halves<fp32_to_fp16>},
    transpose,
};

}  // namespace pyllmq::cpu

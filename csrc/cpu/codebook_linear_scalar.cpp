// The reference row: runs anywhere, same layout and same fixed-point arithmetic as the SIMD rows.
#include <cmath>
#include <cstring>

#include "cpu/codebook_layout.h"
#include "cpu/codebook_linear.h"

namespace pyllmq::cpu {
namespace {

float panel_bound(const float* x, const float* max_magnitude, int64_t slots) {
  uint32_t largest = 0;  // as integers, magnitudes order like floats and NaN comes out on top
  for (int64_t i = 0; i < slots; ++i) {
    const uint32_t magnitude = float_bits(x[i] * max_magnitude[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits_float(largest);
}

float partial_product(int width, const uint16_t* codebook, const float* x, int index) {
  if (width == 4) return x[0] * fp16_to_fp32(codebook[index]);
  if (width == 3) return x[0] * fp16_to_fp32(codebook[index & 7]);
  if (width == 2) return x[0] * fp16_to_fp32(codebook[index & 3]) + x[1] * fp16_to_fp32(codebook[4 + (index >> 2)]);
  const float low = x[0] * fp16_to_fp32(codebook[index & 1]) + x[1] * fp16_to_fp32(codebook[2 + (index >> 1 & 1)]);
  const float high =
      x[2] * fp16_to_fp32(codebook[4 + (index >> 2 & 1)]) + x[3] * fp16_to_fp32(codebook[6 + (index >> 3)]);
  return low + high;
}

template <int Planes>
void build_tables(int width, const uint16_t* codebook, const float* x, int64_t lookups, uint8_t* tables) {
  constexpr int bias = 1 << (kPlaneBits * Planes - 1);
  for (int64_t l = 0; l < lookups; ++l, tables += Planes * kTableEntries) {
    for (int index = 0; index < kTableEntries; ++index) {
      const int t = static_cast<int>(std::nearbyintf(partial_product(width, codebook, x, index))) + bias;
      for (int p = 0; p < Planes; ++p) tables[p * kTableEntries + index] = t >> (kPlaneBits * p) & 127;
    }
    codebook += entries_per_lookup(width);
    x += columns_per_lookup(width);
  }
}

template <int Planes>
float flush(const int* sum, int64_t lookups, float unit) {
  const int upper = sum[Planes - 1] * 128 + sum[Planes - 2] - static_cast<int>(lookups) * kUpperBias;
  if constexpr (Planes == 2) return static_cast<float>(upper) * unit;
  const int lower = Planes == 4 ? sum[1] * 128 + sum[0] : sum[0];
  return static_cast<float>(upper) * (Planes == 4 ? 16384 * unit : 128 * unit) + static_cast<float>(lower) * unit;
}

int nibble(const uint8_t* codes, int64_t lookup, int row) {
  return codes[lookup / 2 * kTileRows + row] >> (4 * (lookup % 2)) & 15;
}

template <int Planes>
void lookup_nibbles(const uint8_t* codes, int64_t tiles, int64_t lookups, const uint8_t* tables, float unit, float* y) {
  for (; tiles > 0; --tiles, codes += lookups / 2 * kTileRows, y += kTileRows)
    for (int row = 0; row < kTileRows; ++row) {
      int sum[Planes] = {};
      for (int64_t l = 0; l < lookups; ++l)
        for (int p = 0; p < Planes; ++p) sum[p] += tables[(l * Planes + p) * kTableEntries + nibble(codes, l, row)];
      y[row] += flush<Planes>(sum, lookups, unit);
    }
}

template <int Planes>
void lookup_3bit(const uint8_t* codes, int64_t tiles, int64_t lookups, const uint8_t* tables, float unit, float* y) {
  for (; tiles > 0; --tiles, codes += lookups / kBlockColumns * block_bytes(3), y += kTileRows)
    for (int row = 0; row < kTileRows; ++row) {
      int sum[Planes] = {};
      for (int64_t l = 0; l < lookups; ++l)
        for (int p = 0; p < Planes; ++p)
          sum[p] += tables[(l * Planes + p) * kTableEntries + read_code(codes, 3, l, row)];
      y[row] += flush<Planes>(sum, lookups, unit);
    }
}

// Sums of 8 columns, then of the panel, then of the panels: a plain chain of fp32 additions over thousands of columns
// would have several times the error of torch's blocked sum.
template <int Width>
void decode_multiply(const uint8_t* codes, int64_t tiles, int64_t tile_bytes, int64_t columns, const uint16_t* codebook,
                     const float* x, int64_t tokens, float* y, int64_t y_stride) {
  for (int64_t tile = 0; tile < tiles; ++tile, codes += tile_bytes, y += kTileRows)
    for (int64_t t = 0; t < tokens; ++t)
      for (int row = 0; row < kTileRows; ++row) {
        float panel_sum = 0;
        for (int64_t begin = 0; begin < columns; begin += kBlockColumns) {
          float block_sum = 0;
          for (int64_t k = begin; k < columns && k < begin + kBlockColumns; ++k)
            block_sum +=
                x[t * kBytePanelColumns + k] * fp16_to_fp32(codebook[(k << Width) + read_code(codes, Width, k, row)]);
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

}  // namespace

const LinearKernels kLinearScalar = {
    panel_bound,
    {build_tables<2>, build_tables<3>, build_tables<4>},
    {lookup_nibbles<2>, lookup_nibbles<3>, lookup_nibbles<4>},
    {lookup_3bit<2>, lookup_3bit<3>, lookup_3bit<4>},
    {decode_multiply<5>, decode_multiply<6>, decode_multiply<7>, decode_multiply<8>},
    {copy_to_fp32, halves_to_fp32<bf16_to_fp32>, halves_to_fp32<fp16_to_fp32>},
    {copy_from_fp32, fp32_to_halves<fp32_to_bf16>, fp32_to_halves<fp32_to_fp16>},
};

}  // namespace pyllmq::cpu

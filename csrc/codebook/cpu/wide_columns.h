// Widths 5..8 decoded and multiplied in fp32, for a vector V of 16 rows (runtime/simd.h): sums of 8 columns, then of the panel,
// then of the panels, as a plain chain of fp32 additions over thousands of columns would have several times the error of
// torch's blocked sum.
#pragma once
#include <cstring>

#include "codebook/cpu/layout.h"
#include "codebook/cpu/linear.h"
#include "runtime/simd.h"

namespace pyllmq::cpu {
namespace {

template <class V>
inline void add_block(const float* weights, const float* x, int64_t columns, float* sums) {
  auto low = V::set(0), high = V::set(0);
  for (int64_t k = 0; k < columns; ++k, weights += kTileRows) {
    const auto x_k = V::set(x[k]);
    low = V::add(low, V::mul(x_k, V::load(weights)));
    high = V::add(high, V::mul(x_k, V::load(weights + 16)));
  }
  V::store(sums, V::add(V::load(sums), low));
  V::store(sums + 16, V::add(V::load(sums + 16), high));
}

// As LinearKernels::decode_multiply; decode(codes of the tile, column k, weights [32 rows of that column]).
template <class V, class Decode>
inline void multiply_wide(const uint8_t* codes, int64_t tiles, int64_t tile_bytes, int64_t columns, const float* x,
                          int64_t tokens, float* y, int64_t y_stride, Decode&& decode) {
  for (int64_t tile = 0; tile < tiles; ++tile, codes += tile_bytes, y += kTileRows) {
    alignas(64) float panel_sums[kMaxTokenBlock][kTileRows];
    std::memset(panel_sums, 0, tokens * sizeof panel_sums[0]);
    for (int64_t begin = 0; begin < columns; begin += kBlockColumns) {
      const int64_t count = begin + kBlockColumns < columns ? kBlockColumns : columns - begin;
      alignas(64) float weights[kBlockColumns * kTileRows];
      for (int64_t k = 0; k < count; ++k) decode(codes, begin + k, weights + k * kTileRows);
      for (int64_t t = 0; t < tokens; ++t) add_block<V>(weights, x + t * kBytePanelColumns + begin, count, panel_sums[t]);
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int row = 0; row < kTileRows; row += 16) {
        float* out = y + t * y_stride + row;
        V::store(out, V::add(V::load(out), V::load(panel_sums[t] + row)));
      }
  }
}

}  // namespace
}  // namespace pyllmq::cpu

// smmla multiplies 8 columns of two tokens by those of two rows.
#include "codebook/cpu/decode_int8_neon.h"

namespace pyllmq::cpu {
namespace {

struct Matrix {
  static constexpr int kRun = 8;

  template <int Tokens>
  static void multiply(const int8_t* weights, const int8_t* x, int64_t slots, const float* units, float* sums) {
    constexpr int pairs = (Tokens + 1) / 2;
    for (; slots > 0; slots -= kFlushColumns, units += Tokens) {
      int32x4_t sum[pairs][8];  // by pairs of rows: first token's two, second token's two
#pragma GCC unroll 3
      for (int p = 0; p < pairs; ++p)
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) sum[p][v] = vdupq_n_s32(0);
      for (int64_t run = std::min(slots, kFlushColumns) / kRun; run > 0; --run, weights += kRun * kHalfRows, x += kRun * Tokens) {
        int8x16_t x_p[pairs];
#pragma GCC unroll 3
        for (int p = 0; p < pairs; ++p)
          x_p[p] = 2 * p + 1 < Tokens ? vld1q_s8(x + 16 * p) : vcombine_s8(vld1_s8(x + 16 * p), vdup_n_s8(0));
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
          const int8x16_t w = vld1q_s8(weights + 16 * v);
#pragma GCC unroll 3
          for (int p = 0; p < pairs; ++p) sum[p][v] = vmmlaq_s32(sum[p][v], x_p[p], w);
        }
      }
#pragma GCC unroll 3
      for (int p = 0; p < pairs; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < 8; v += 2) {
          float* to = sums + 2 * p * kTileRows + 2 * v;
          add_four(to, vcombine_s32(vget_low_s32(sum[p][v]), vget_low_s32(sum[p][v + 1])), units[2 * p]);
          if (2 * p + 1 < Tokens)
            add_four(to + kTileRows, vcombine_s32(vget_high_s32(sum[p][v]), vget_high_s32(sum[p][v + 1])), units[2 * p + 1]);
        }
    }
  }
};

}  // namespace

constinit const DecodeKernels kDecodeInt8I8mm = int8_kernels<Matrix>();

}  // namespace pyllmq::cpu

#include "codebook/cpu/decode_int8_neon.h"

namespace pyllmq::cpu {
namespace {

struct Dot {
  static constexpr int kRun = 4;

  template <int Tokens>
  static void multiply(const int8_t* weights, const int8_t* x, int64_t slots, const float* units, float* sums) {
    for (; slots > 0; slots -= kFlushColumns, units += Tokens) {
      int32x4_t sum[Tokens][4];
#pragma GCC unroll 6
      for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[t][v] = vdupq_n_s32(0);
      for (int64_t run = std::min(slots, kFlushColumns) / kRun; run > 0; --run, weights += kRun * kHalfRows, x += kRun * Tokens) {
        int8x16_t w[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) w[v] = vld1q_s8(weights + 16 * v);
#pragma GCC unroll 6
        for (int t = 0; t < Tokens; ++t) {
          const int8x16_t x_t = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(x + kRun * t)));
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) sum[t][v] = vdotq_s32(sum[t][v], w[v], x_t);
        }
      }
#pragma GCC unroll 6
      for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) add_four(sums + t * kTileRows + 4 * v, sum[t][v], units[t]);
    }
  }
};

}  // namespace

constinit const DecodeKernels kDecodeInt8Dotprod = int8_kernels<Dot>();

}  // namespace pyllmq::cpu

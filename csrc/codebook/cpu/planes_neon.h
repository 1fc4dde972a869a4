// Fixed-point tables cut into byte planes, and the 16-bit sums of what is looked up in them (linear.h explains both).
#pragma once
#include <arm_neon.h>

#include "codebook/cpu/linear.h"

namespace pyllmq::cpu {
namespace {

struct Sixteen {
  float32x4_t part[4];
};

// 16 products as fixed-point numbers, plane by plane.
template <TableKind Kind>
inline void cut_into_planes(const Sixteen& products, uint8x16_t planes[table_planes(Kind)]) {
  constexpr int bits = plane_bits(Kind);
  uint32x4_t t[4];
  for (int i = 0; i < 4; ++i)
    t[i] = vreinterpretq_u32_s32(vaddq_s32(vcvtnq_s32_f32(products.part[i]), vdupq_n_s32(1 << (table_bits(Kind) - 1))));
  for (int p = 0; p < table_planes(Kind); ++p) {
    const auto words = [&](int i) { return vreinterpretq_u16_u32(vshlq_u32(t[i], vdupq_n_s32(-bits * p))); };
    const uint16x8_t low = vuzp1q_u16(words(0), words(1)), high = vuzp1q_u16(words(2), words(3));
    const uint8x16_t bytes = vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
    planes[p] = vandq_u8(bytes, vdupq_n_u8((1 << bits) - 1));
  }
}

// Per plane the sums of bytes looked up for 16 * Halves rows, in order. A looked-up byte is widened and added by one instruction,
// so that even and odd rows need not be told apart, as with AVX2.
template <TableKind Kind, int Halves>
struct PlaneSums {
  static constexpr int kPlanes = table_planes(Kind), kBits = plane_bits(Kind);
  uint16x8_t sum[kPlanes][2 * Halves];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p)
#pragma GCC unroll 4
      for (int i = 0; i < 2 * Halves; ++i) sum[p][i] = vdupq_n_u16(0);
  }
  inline __attribute__((always_inline)) void add_bytes(int p, int half, uint8x16_t v) {
    sum[p][2 * half] = vaddw_u8(sum[p][2 * half], vget_low_u8(v));
    sum[p][2 * half + 1] = vaddw_high_u8(sum[p][2 * half + 1], v);
  }
  // Two lookups into tables of the same planes; two bytes of 7 bits are added before they are widened.
  inline __attribute__((always_inline)) void add_two(int p, int half, uint8x16_t a, uint8x16_t b) {
    if constexpr (kBits == 7) {
      add_bytes(p, half, vaddq_u8(a, b));
    } else {
      add_bytes(p, half, a);
      add_bytes(p, half, b);
    }
  }
  // y[16 * Halves] += unit * sums, the bias taken off.
  inline __attribute__((always_inline)) void flush(int64_t lookups, float unit, float* y) const {
    const int32x4_t bias = vdupq_n_s32(static_cast<int>(lookups << (2 * kBits - 1)));
#pragma GCC unroll 8
    for (int i = 0; i < 4 * Halves; ++i) {
      const auto wide = [&](int p) {
        const uint16x8_t eight = sum[p][i / 2];
        return vreinterpretq_s32_u32(i % 2 ? vmovl_high_u16(eight) : vmovl_u16(vget_low_u16(eight)));
      };
      const auto join = [](int32x4_t low, int32x4_t high) { return vaddq_s32(low, vshlq_n_s32(high, kBits)); };
      const int32x4_t upper = vsubq_s32(join(wide(kPlanes - 2), wide(kPlanes - 1)), bias);
      float32x4_t total = vmulq_n_f32(vcvtq_f32_s32(upper), static_cast<float>(1 << (kBits * (kPlanes - 2))) * unit);
      if constexpr (kPlanes > 2) {
        const int32x4_t lower = kPlanes == 4 ? join(wide(0), wide(1)) : wide(0);
        total = vaddq_f32(total, vmulq_n_f32(vcvtq_f32_s32(lower), unit));
      }
      vst1q_f32(y + 4 * i, vaddq_f32(vld1q_f32(y + 4 * i), total));
    }
  }
};

}  // namespace
}  // namespace pyllmq::cpu

// fp32 and bf16 activations on fp16 tensor cores: scaled to where fp16 is finest, fp32 as the sum of two fp16 numbers.
#pragma once
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

constexpr float kLowPlane = 2048.0f;  // 2^11: the second plane of fp32 holds what the first one rounded off

PYLLMQ_DEVICE float power_of_two(int exponent) { return ptx::bits_to_fp32(static_cast<uint32_t>(exponent + 127) << 23); }

// Exponent that brings `largest` to 2^14..2^15; 0 where there is nothing to bring there.
PYLLMQ_DEVICE int scale_exponent(float largest) {
  const int biased = static_cast<int>(ptx::fp32_to_bits(largest) >> 23 & 255);
  if (largest == 0.0f || biased == 255) return 0;
  const int exponent = 14 - (biased - 127);
  return exponent < 126 ? exponent : 126;
}

}  // namespace pyllmq::cuda

// fp32 and bf16 activations on tensor cores: in fp16, scaled to where that is finest, fp32 as the sum of two; or as integers.
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

// A number times up[0] times up[1] is an integer, an integer times down[0] times down[1] is the number: two factors each, since
// one would not be a normal number for the smallest and the largest.
struct Unit {
  float up[2], down[2];
};

// So that `largest` becomes the integer `most`. Where it is not finite, no number is one again.
PYLLMQ_DEVICE Unit unit_of(float largest, int most) {
  if (largest == 0.0f) return {};
  const int exponent = static_cast<int>(ptx::fp32_to_bits(largest) >> 23 & 255) - 127, first = exponent / 2;
  Unit unit{{power_of_two(-first), power_of_two(first - exponent)}, {power_of_two(first), power_of_two(exponent - first)}};
  const float mantissa = largest * unit.up[0] * unit.up[1];
  unit.up[1] *= static_cast<float>(most) / mantissa;
  unit.down[0] *= mantissa / static_cast<float>(most);
  if (exponent == 128) unit.down[0] = ptx::bits_to_fp32(0x7FC00000u);
  return unit;
}

}  // namespace pyllmq::cuda

// The packing of x, the same for all ISAs.
#include "codebook/cpu/decode_int16.h"

#include <algorithm>
#include <cmath>

namespace pyllmq::cpu {
namespace {

constexpr float kLargestX = 32767, kLargestSum = 131000;
// Outside of this range of sum |x| a unit or its inverse would leave fp32's normal numbers.
constexpr float kSmallestRange = 0x1p-90f, kLargestRange = 0x1p100f;
constexpr int64_t kLanes = 8;
// Added to a number below 2^22 it leaves the nearest integer in the low bits.
constexpr float kRound = 0x1.8p23f;

struct Range {
  float sum, largest;
};

// Partial sums in lanes, of a defined order and without a chain of additions that would take 4 cycles per element.
Range range_of(const float* x) {
  float sums[kLanes] = {}, largest[kLanes] = {};
  for (int64_t i = 0; i < kFlushColumns; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float magnitude = std::fabs(x[i + lane]);
      sums[lane] += magnitude;
      largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
    }
  Range range{0, 0};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    range.sum += sums[lane];
    range.largest = std::max(range.largest, largest[lane]);
  }
  return range;
}

}  // namespace

bool pack_int16(const float* x, int64_t slots, const uint8_t*, const TokenGroups& groups, int64_t group, uint8_t* packed) {
  const int64_t begin = groups.begin(group), count = groups.size(group);
  const PackedGroup to = packed_group(packed, slots, begin, count);
  auto* pairs = const_cast<int32_t*>(to.x);
  auto* units = const_cast<float*>(to.units);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t first = 0; first < slots; first += kFlushColumns) {
      const float* from = x + t * kDecodedColumns + first;  // zeros after the last slot
      const Range range = range_of(from);
      float unit = 0, per_unit = 0;
      if (range.sum != 0) {
        if (!(range.sum >= kSmallestRange && range.sum <= kLargestRange)) return false;
        unit = std::max(range.largest / kLargestX, range.sum / kLargestSum);
        per_unit = 1 / unit;
      }
      units[first / kFlushColumns * count + t] = unit / kLargestWeight;
      uint32_t rounded[kFlushColumns];
      for (int64_t i = 0; i < kFlushColumns; ++i) rounded[i] = float_bits(from[i] * per_unit + kRound);
      for (int64_t i = 0; i < std::min(slots - first, kFlushColumns); i += 2)
        pairs[(first + i) / 2 * count + t] = static_cast<int32_t>((rounded[i] & 0xFFFF) | rounded[i + 1] << 16);
    }
  return true;
}

}  // namespace pyllmq::cpu

// The packing of x, the same for all ISAs, and the reference row.
#include "codebook/cpu/decode_int16.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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

void split_codebook(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int64_t code = 0; code < 1 << width; ++code) {
      const float entry = fp16_to_fp32(codebook[(slot << width) + code]);
      const auto weight = static_cast<int16_t>(std::nearbyint(entry * to_int16(max_magnitude[slot])));
      std::memcpy(split + slot * split_bytes(width) + 2 * code, &weight, 2);
    }
}

void decode(int width, StepOrder order, const uint8_t* tile_codes, int64_t first, const uint8_t* split, int64_t slots,
            const float*, uint8_t* weights) {
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int row = 0; row < kTileRows; ++row) {
      const int code = read_code(tile_codes, order, width, first + slot, row);
      std::memcpy(weights + 2 * pair_place(slot, row), split + slot * split_bytes(width) + 2 * code, 2);
    }
}

constexpr int64_t kTokenGroup = 6;

void multiply(const uint8_t* from, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const auto* weights = reinterpret_cast<const int16_t*>(from);
  const TokenGroups groups{tokens, kTokenGroup};
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t begin = groups.begin(g), count = groups.size(g);
    const PackedGroup group = packed_group(packed, slots, begin, count);
    const auto* x = reinterpret_cast<const int16_t*>(group.x);
    for (int64_t t = 0; t < count; ++t)
      for (int row = 0; row < kTileRows; ++row)
        for (int64_t first = 0; first < slots; first += kFlushColumns) {
          int32_t sum = 0;
          for (int64_t slot = first; slot < std::min(slots, first + kFlushColumns); ++slot)
            sum += weights[pair_place(slot, row)] * x[(slot / 2 * count + t) * 2 + slot % 2];
          float& to = sums[(begin + t) * kTileRows + row];
          to = std::fma(static_cast<float>(sum), group.units[first / kFlushColumns * count + t], to);
        }
  }
}

}  // namespace

bool pack_int16(const float* x, int64_t slots, const uint8_t*, const TokenGroups& groups, int64_t group,
                uint8_t* packed) {
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

const DecodeKernels kDecodeInt16Scalar = {
    kTokenGroup, 2,       1,        8,       true, true, packed_int16_bytes, pack_int16, split_codebook,
    decode,      nullptr, multiply, add_outliers_loop, nullptr, nullptr};

}  // namespace pyllmq::cpu

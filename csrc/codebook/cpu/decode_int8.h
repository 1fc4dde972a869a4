// Decoded weights of one byte (decode.h) for `fast`, four multiply-adds in a lane of 32 bits: by vpdpbusd twice those of
// vpdpwssd, by two vpmaddubsw of AVX2 that share one widening four thirds of those of vpmaddwd.
//
//   weight   bias + round(C / max |C of the column| * largest), unsigned as the instructions want one side; x carries the maximum
//   x        int8 with one fp32 unit per token and 64 columns, max |x| / largest
//   sums     from -bias sum x on, exact int32 over 64 columns, then fma(sum, unit, fp32)
//
// Relative error for normal x: 7e-3 to 1.1e-2 with 127 as the largest numbers, about that of engines that round activations to
// int8. AVX2 sums four products in 16 bits, at most 4 * 136 * 60: 1.4e-2 to 1.9e-2. `static` because files of several instruction
// sets hold this code.
#pragma once
#include <algorithm>
#include <cstdint>

#include "codebook/cpu/decode.h"
#include "codebook/cpu/decode_int16.h"
#include "runtime/half.h"

namespace pyllmq::cpu {

struct ByteRange {
  int bias;
  float largest_weight, largest_x;
};
static constexpr ByteRange kWholeBytes{128, 127, 127}, kPairedBytes{68, 68, 60};

// Of a group of tokens: int8 [quad of slots, token, 4], then fp32 units and int32 starts of sums, [64 columns, token] each.
static constexpr int64_t int8_token_bytes(int64_t slots) { return slots + flushes(slots) * 8; }
static inline int64_t packed_int8_bytes(int64_t tokens) { return int8_token_bytes(kDecodedColumns) * tokens; }

struct ByteGroup {
  int32_t* x;
  float* units;
  int32_t* starts;
};
static inline ByteGroup byte_group(uint8_t* packed, int64_t slots, int64_t begin, int64_t count) {
  uint8_t* group = packed + begin * int8_token_bytes(slots);
  uint8_t* units = group + count * slots;
  return {reinterpret_cast<int32_t*>(group), reinterpret_cast<float*>(units),
          reinterpret_cast<int32_t*>(units + count * flushes(slots) * 4)};
}
static inline ByteGroup byte_group(const uint8_t* packed, int64_t slots, int64_t begin, int64_t count) {
  return byte_group(const_cast<uint8_t*>(packed), slots, begin, count);
}

namespace {

// As Int16Pairs.
struct ByteQuads {
  using Group = ByteGroup;
  static constexpr int64_t kColumns = 4;

  static Group group(const uint8_t* packed, int64_t slots, int64_t begin, int64_t count) {
    return byte_group(packed, slots, begin, count);
  }
};

// DecodeKernels::pack. Of kFlushColumns numbers a Vectors gives largest(x), the bits of the largest magnitude, and
// to_quads(x, order, factor, quads): round(x * factor) as int8 by place, and their sum.
template <class Vectors, ByteRange kRange>
bool pack_int8(const float* x, int64_t slots, const uint8_t* order, const TokenGroups& groups, int64_t group, uint8_t* packed) {
  const int64_t count = groups.size(group);
  const ByteGroup to = byte_group(packed, slots, groups.begin(group), count);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t first = 0; first < slots; first += kFlushColumns) {
      const float* from = x + t * kDecodedColumns + first;  // zeros after the last slot
      const float largest = bits_float(Vectors::largest(from));
      if (!(largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f))) return false;
      alignas(64) int32_t quads[kFlushColumns / 4];
      const int32_t sum = Vectors::to_quads(from, order + first, largest > 0 ? kRange.largest_x / largest : 0.0f, quads);
      const int64_t flush = first / kFlushColumns * count + t;
      to.units[flush] = largest / kRange.largest_x / kRange.largest_weight;
      to.starts[flush] = -kRange.bias * sum;
      for (int64_t q = 0; q < std::min(slots - first, kFlushColumns) / 4; ++q) to.x[(first / 4 + q) * count + t] = quads[q];
    }
  return true;
}

}  // namespace

}  // namespace pyllmq::cpu

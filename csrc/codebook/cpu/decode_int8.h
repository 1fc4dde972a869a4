// Decoded weights of one byte (decode.h) for `fast`, by vpdpbusd: four multiply-adds in a lane, twice those of vpdpwssd.
//
//   weight   128 + round(C / max |C of the column| * 127), unsigned as the instruction wants one side; x carries the maximum
//   x        int8 with one fp32 unit per token and 64 columns, max |x| / 127
//   sums     from -128 sum x on, exact int32 over 64 columns, then fma(sum, unit, fp32)
//
// Relative error 7e-3 to 1.1e-2 for normal x, about that of engines that round activations to int8. `static` because files of
// several instruction sets hold this code.
#pragma once
#include <cstdint>

#include "codebook/cpu/decode.h"
#include "codebook/cpu/decode_int16.h"

namespace pyllmq::cpu {

static constexpr int kByteBias = 128;
static constexpr float kLargestByte = 127;

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

}  // namespace pyllmq::cpu

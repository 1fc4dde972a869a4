// Decoded weights of 16 bits (decode.h) for `high` and `fast`: a multiply-add of int16 pairs does twice
// the work of an fp32 one.
//
//   weight   round(C / max |C of the column| * 16383); x carries the column's maximum
//   x        int16 with one fp32 unit per token and kFlushColumns columns:
//              unit = max(max |x| / 32767, sum |x| / 131000), so that |sums| <= 16383 * (131000 + 32) < 2^31.
//            The sum, not the maximum, is what int32 bounds: normal x gets 13 bits, a lone large channel 15.
//   sums     exact integers over kFlushColumns columns, then fma(sum, unit, fp32): all ISAs agree bit for bit
//
// Relative error 9e-5 for normal x (either precision). Rejected for `fast`: sums of 256 columns, 6 % faster at 512 tokens with
// an error of 2.4e-4.
#pragma once
#include <cstdint>

#include "codebook/cpu/decode.h"
#include "runtime/counting.h"

namespace pyllmq::cpu {

constexpr int64_t kFlushColumns = 64;
constexpr float kLargestWeight = 16383;

extern const DecodeKernels kDecodeInt16Avx2;     // rows
extern const DecodeKernels kDecodeInt16AvxVnni;  // rows
extern const DecodeKernels kDecodeInt16Avx512;   // fours

// Of a group of tokens: int16 [pair of slots, token, 2], then fp32 units [kFlushColumns, token].
static constexpr int64_t flushes(int64_t slots) { return ceil_div(slots, kFlushColumns); }
static inline int64_t packed_token_bytes(int64_t slots) { return slots * 2 + flushes(slots) * 4; }
static inline int64_t packed_int16_bytes(int64_t tokens) { return packed_token_bytes(kDecodedColumns) * tokens; }
bool pack_int16(const float* x, int64_t slots, const uint8_t* order, const TokenGroups& groups, int64_t group, uint8_t* packed);

struct PackedGroup {
  const int32_t* x;
  const float* units;
};
static inline PackedGroup packed_group(const uint8_t* packed, int64_t slots, int64_t begin, int64_t count) {
  const uint8_t* group = packed + begin * packed_token_bytes(slots);
  return {reinterpret_cast<const int32_t*>(group), reinterpret_cast<const float*>(group + count * slots * 2)};
}

// For kDecodeInt16AvxVnni, the rest of which is that of AVX2.
void multiply_int16_avxvnni(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums);

namespace {

// What a Dot (chains_avx2.h, chains_avx512.h) of any instruction set has; the rest is its instruction. In a namespace without a
// name, as no file may take the code of another instruction set for its own.
struct Int16Pairs {
  using Group = PackedGroup;
  static constexpr int64_t kColumns = 2;

  static Group group(const uint8_t* packed, int64_t slots, int64_t begin, int64_t count) {
    return packed_group(packed, slots, begin, count);
  }
};

}  // namespace

// The factor of a column's weights; its maximum is finite, or `pack` has refused x.
static inline float to_int16(float max_magnitude) { return max_magnitude > 0 ? kLargestWeight / max_magnitude : 0.0f; }

}  // namespace pyllmq::cpu

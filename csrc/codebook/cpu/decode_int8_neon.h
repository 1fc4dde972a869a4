// Decoded weights of one byte (decode.h) for `fast`: sums of products of signed bytes, 4 times (sdot) or 8 times (smmla) the
// multiply-adds of fp32.
//
//   weight   round(C / max |C of the column| * 127); x carries the maximum
//            [half, run of columns, 16 rows, column of the run]; runs of 4 (sdot) or 8 (smmla)
//   x        int8 with one fp32 unit per token and 64 columns, max |x| / 127; [run of slots, token, slot of the run]
//   sums     exact int32 over 64 columns, then fma(sum, unit, fp32): the same bits with either instruction
//
// Relative error 7e-3 to 1.1e-2 for normal x, as with AVX-512.
//
// A Product says of one instruction: kRun; multiply<Tokens>(weights of a half, x, slots, start of sums, units).
#pragma once
#include <arm_neon.h>

#include <algorithm>
#include <cmath>

#include "codebook/cpu/bytes_neon.h"
#include "codebook/cpu/decode.h"
#include "codebook/cpu/decode_int16.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

constexpr float kLargestByte = 127;

// --- decode --------------------------------------------------------------------------------------------------------

inline int8x16_t to_bytes(const BytePlanes& entries, float factor) {
  const auto words = [&](uint16x8_t halves) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(first_fp16(halves), factor));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(second_fp16(halves), factor));
    return vcombine_s16(vmovn_s32(low), vmovn_s32(high));
  };
  return vcombine_s8(vmovn_s16(words(entries.first())), vmovn_s16(words(entries.second())));
}

template <int Width>
void split_columns(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  for (int64_t slot = 0; slot < slots; slot += kBlockColumns, codebook += kBlockColumns << Width)
    for (int column = 0; column < kBlockColumns; ++column, split += split_bytes(Width)) {
      const float largest = max_magnitude[slot + column], factor = largest > 0 ? kLargestByte / largest : 0.0f;
      auto* to = reinterpret_cast<int8_t*>(split);
      if constexpr (Width <= 4) {
        vst1q_s8(to, to_bytes(column_planes<Width>(codebook, column), factor));
      } else {
        for (int e = 0; e < 1 << Width; e += 16)
          vst1q_s8(to + e, to_bytes(column_planes<4>(codebook + (column << Width) + e, 0), factor));
      }
    }
}

// 8 columns of 16 rows.
template <int Run>
inline __attribute__((always_inline)) void store_columns(const uint8x16_t c[8], uint8_t* to) {
  if constexpr (Run == 4) {
    vst4q_u8(to, (uint8x16x4_t{{c[0], c[1], c[2], c[3]}}));
    vst4q_u8(to + 64, (uint8x16x4_t{{c[4], c[5], c[6], c[7]}}));
  } else {
    uint16x8_t pairs[4][2];
    uint32x4_t fours[2][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      pairs[i][0] = vreinterpretq_u16_u8(vzip1q_u8(c[2 * i], c[2 * i + 1]));
      pairs[i][1] = vreinterpretq_u16_u8(vzip2q_u8(c[2 * i], c[2 * i + 1]));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part) {
        fours[i][2 * part] = vreinterpretq_u32_u16(vzip1q_u16(pairs[2 * i][part], pairs[2 * i + 1][part]));
        fours[i][2 * part + 1] = vreinterpretq_u32_u16(vzip2q_u16(pairs[2 * i][part], pairs[2 * i + 1][part]));
      }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      vst1q_u8(to + 32 * part, vreinterpretq_u8_u32(vzip1q_u32(fours[0][part], fours[1][part])));
      vst1q_u8(to + 32 * part + 16, vreinterpretq_u8_u32(vzip2q_u32(fours[0][part], fours[1][part])));
    }
  }
}

template <int Run, int Width>
void decode_width(const uint8_t* codes, const uint8_t* split, int64_t slots, uint8_t* weights) {
  for (; slots > 0; slots -= kBlockColumns, codes += block_bytes(Width), split += kBlockColumns * split_bytes(Width),
                    weights += kBlockColumns * kHalfRows) {
    for (int64_t line = 0; line < block_bytes(Width); line += 64) prefetch(codes + line, kDecoded);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      uint8x16_t steps[4], columns[kBlockColumns];
      if constexpr (Width <= 4) load_steps<Width>(codes + half * kHalfRows, steps);
#pragma GCC unroll 8
      for (int c = 0; c < kBlockColumns; ++c) {
        const uint8_t* own = split + c * split_bytes(Width);
        if constexpr (Width <= 4)
          columns[c] = vqtbl1q_u8(vld1q_u8(own), column_nibbles<Width>(steps, c));
        else
          columns[c] = look_up_bytes<Width>(own, vld1q_u8(codes + c * kTileRows + half * kHalfRows));
      }
      store_columns<Run>(columns, weights + half * kDecodedColumns * kHalfRows);
    }
  }
}

void split_any(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  constexpr auto kSplit = instances<1, 8>([]<int Width>() { return split_columns<Width>; });
  kSplit[width](codebook, max_magnitude, slots, split);
}

template <int Run>
void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots, const float*,
                uint8_t* weights) {
  constexpr auto kDecode = instances<1, 8>([]<int Width>() { return decode_width<Run, Width>; });
  kDecode[width](tile_codes + slot / kBlockColumns * block_bytes(width), split, slots, weights);
}

// --- x -------------------------------------------------------------------------------------------------------------

// Of a group of tokens: int8 [run of slots, token, slot of the run], then fp32 units [64 columns, token].
constexpr int64_t token_bytes(int64_t slots) { return slots + flushes(slots) * 4; }
int64_t packed_bytes(int64_t tokens) { return token_bytes(kDecodedColumns) * tokens; }

template <int Run>
bool pack(const float* x, int64_t slots, const uint8_t*, const TokenGroups& groups, int64_t group, uint8_t* packed) {
  const int64_t count = groups.size(group);
  auto* to = reinterpret_cast<int8_t*>(packed + groups.begin(group) * token_bytes(slots));
  auto* units = reinterpret_cast<float*>(to + count * slots);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t first = 0; first < slots; first += kFlushColumns) {
      const float* from = x + t * kDecodedColumns + first;  // zeros after the last slot
      uint32x4_t most = vdupq_n_u32(0);                     // bits of magnitudes order like floats, those of NaN above
      for (int64_t i = 0; i < kFlushColumns; i += 4)
        most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(from + i))));
      const float largest = bits_float(vmaxvq_u32(most));
      if (!(largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f))) return false;
      units[first / kFlushColumns * count + t] = largest / kLargestByte / kLargestByte;
      const float per_unit = largest > 0 ? kLargestByte / largest : 0.0f;
      for (int64_t i = 0; i < std::min(slots - first, kFlushColumns); ++i)
        to[((first + i) / Run * count + t) * Run + i % Run] = static_cast<int8_t>(std::nearbyint(from[i] * per_unit));
    }
  return true;
}

// --- multiply ------------------------------------------------------------------------------------------------------

constexpr int64_t kTokenGroup = 6;  // 24 of 32 registers hold sums

// sums [16 rows] of a token += unit * total.
inline __attribute__((always_inline)) void add_four(float* sums, int32x4_t total, float unit) {
  vst1q_f32(sums, vfmaq_n_f32(vld1q_f32(sums), vcvtq_f32_s32(total), unit));
}

template <class Product>
void multiply(const uint8_t* from, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  constexpr auto kMultiply = instances<1, kTokenGroup>([]<int Tokens>() { return Product::template multiply<Tokens>; });
  const TokenGroups groups{tokens, kTokenGroup};
  for (int half = 0; half < 2; ++half)
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t begin = groups.begin(g), count = groups.size(g);
      const auto* x = reinterpret_cast<const int8_t*>(packed + begin * token_bytes(slots));
      kMultiply[count](reinterpret_cast<const int8_t*>(from) + half * kDecodedColumns * kHalfRows, x, slots,
                       reinterpret_cast<const float*>(x + count * slots), sums + begin * kTileRows + half * kHalfRows);
    }
}

template <class Product>
constexpr DecodeKernels int8_kernels() {
  return {.token_group = kTokenGroup,
          .weight_bytes = 1,
          .relative = true,
          .packed_bytes = packed_bytes,
          .pack = pack<Product::kRun>,
          .split_codebook = split_any,
          .decode = decode_any<Product::kRun>,
          .multiply = multiply<Product>,
          .add_outliers = add_outliers_loop};
}

}  // namespace
}  // namespace pyllmq::cpu

// As AVX2: a byte of the mask picks a shuffle from a table of 256, 2:4 positions pick among the bytes of four x. Codes:
// codes_neon.cpp, here they are expanded for many tokens. Sums over column numbers are the scalar ones: NEON has no gathers.
#include <arm_neon.h>

#include <bit>

#include "codebook/cpu/bytes_neon.h"
#include "sparse/cpu/expand_tables.h"
#include "sparse/cpu/linear_cells.h"

namespace pyllmq::cpu {
namespace {

using V = Twice<Neon>;

inline void prefetch(const void* at) { cpu::prefetch(at, kCellsNeon); }

template <ValueType Type>
inline int64_t kept_bytes(uint32_t byte) {
  return value_bytes(Type) * std::popcount(byte);
}

// 8 rows of one column.
inline uint8x16_t expand_halves(uint32_t byte, const uint8_t* values) {
  return vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kExpand.halves[byte]));
}

template <ValueType Type>
inline __attribute__((always_inline)) Neon::R expand_eight(uint32_t byte, const uint8_t*& values) {
  const uint8_t* from = values;
  values += kept_bytes<Type>(byte);
  if constexpr (Type == ValueType::fp16) {
    const uint16x8_t spread = vreinterpretq_u16_u8(expand_halves(byte, from));
    return {first_fp16(spread), second_fp16(spread)};
  } else if constexpr (Type == ValueType::int8) {
    const uint8x8_t spread = vtbl1_u8(vld1_u8(from), vld1_u8(kExpand.bytes[byte]));
    const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(spread));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
  } else {
    const uint8x16x2_t eight = {{vld1q_u8(from), vld1q_u8(from + 16)}};
    const uint8x16_t places = vcombine_u8(vld1_u8(kExpand.bytes[byte]), vdup_n_u8(0));
    const uint8x16_t four_times = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const uint8x16_t of_number = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
    const auto four = [&](int first) {  // a place beyond 63 stays beyond the 32 bytes: shifts saturate
      const uint8x16_t own = vqtbl1q_u8(places, vaddq_u8(four_times, vdupq_n_u8(static_cast<uint8_t>(first))));
      return vreinterpretq_f32_u8(vqtbl2q_u8(eight, vorrq_u8(vqshlq_n_u8(own, 2), of_number)));
    };
    return {four(0), four(4)};
  }
}

// --- codes ---------------------------------------------------------------------------------------------------------

inline V::Index widened(uint8x16_t bytes) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  const auto first = [](uint16x8_t x) { return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(x))); };
  const auto second = [](uint16x8_t x) { return vreinterpretq_s32_u32(vmovl_high_u16(x)); };
  return {{first(low), second(low)}, {first(high), second(high)}};
}

template <int Bits>
inline V::R entries_at(const uint8_t* planes, uint8x16_t index) {  // of 4 << Bits fp16 entries
  BytePlanes bytes;
  if constexpr (Bits == 2)
    bytes = {vqtbl1q_u8(vld1q_u8(planes), index), vqtbl1q_u8(vld1q_u8(planes + 16), index)};
  else
    bytes = decode_wide<Bits + 2>(index, planes);
  return {{first_fp16(bytes.first()), second_fp16(bytes.first())}, {first_fp16(bytes.second()), second_fp16(bytes.second())}};
}

template <int Bits>
void expand_codes(const uint8_t* cell, StepOrder, int64_t slots, const uint16_t* codebook, float* weights) {
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns, cell += code_batch_bytes(Bits)) {
    prefetch(cell);
    for (int g = 0; g < 8; ++g, codebook += 4 << Bits, weights += 4 * kCellRows) {
      uint8_t planes[8 << Bits];
      split_codebook(codebook, Bits + 2, planes);
      const auto plane = [&](int p) {
        const uint8x16_t bytes = vld1q_u8(cell + 64 * p + g / 2 * kCellRows);
        return g % 2 ? high_nibbles(bytes) : low_nibbles(bytes);
      };
      const auto place = [](uint8x16_t index) { return vshrq_n_u8(index, Bits); };
      uint8x16_t first = plane(0), second;
      if constexpr (Bits == 2) {
        second = plane(1);
      } else {
        const uint8x16_t positions = first;
        first = vorrq_u8(plane(1), vshlq_n_u8(vandq_u8(positions, vdupq_n_u8(3)), Bits));
        second = vorrq_u8(plane(2), vshlq_n_u8(vshrq_n_u8(positions, 2), Bits));
      }
      spread<V>(widened(place(first)), widened(place(second)),
                {entries_at<Bits>(planes, first), entries_at<Bits>(planes, second)}, weights);
    }
  }
}

struct CellsNeon {
  using V = Twice<Neon>;
  template <int Tokens>
  static constexpr int kChains = Tokens <= 2 ? 2 : 1;
  static constexpr int kPairs = 1, kGroups = 1, kTokenChains = 2;
  static void prefetch(const void* at) { cpu::prefetch(at, kCellsNeon); }

  template <ValueType Type>
  static inline __attribute__((always_inline)) Two<V> expand_pair(uint32_t mask, const uint8_t*& values) {
    const uint32_t byte[4] = {mask & 255, mask >> 8 & 255, mask >> 16 & 255, mask >> 24};
    if constexpr (Type == ValueType::bf16) {
      int32x4_t pairs[4];  // of 4 rows
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        pairs[i] = vreinterpretq_s32_u8(expand_halves(byte[i], values));
        values += kept_bytes<Type>(byte[i]);
      }
      const V::Index all = {{pairs[0], pairs[1]}, {pairs[2], pairs[3]}};
      return {V::first_bf16(all), V::second_bf16(all)};
    } else {
      const Neon::R a = expand_eight<Type>(byte[0], values), b = expand_eight<Type>(byte[1], values);
      const Neon::R c = expand_eight<Type>(byte[2], values), d = expand_eight<Type>(byte[3], values);
      return {{a, b}, {c, d}};
    }
  }

  template <ValueType Type>
  static float dot_columns(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x) {
    float sum[4] = {};
    for (int64_t i = 0; i < count; ++i) sum[i % 4] += value_at(Type, values, i) * x[column_at(columns, column_bytes, i)];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};

constexpr SparseKernels kernels() {
  SparseKernels found = cell_kernels<CellsNeon>(std::make_integer_sequence<int, 4>());
  found.few_code_tokens = 8;
  found.code_tables = kCodeTablesNeon;
  found.expand_codes[0] = expand_codes<2>;
  found.expand_codes[1] = expand_codes<3>;
  found.expand_codes[2] = expand_codes<4>;
  return found;
}

}  // namespace

constinit const SparseKernels kSparseNeon = kernels();

}  // namespace pyllmq::cpu

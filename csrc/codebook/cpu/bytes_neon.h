// Codes to numbers of 16 bits by table lookups of bytes: a nibble of a step indexes 16 entries in two byte planes; a code of 5 to
// 8 bits up to 256, 64 in one instruction. 16 rows in a register.
#pragma once
#include <arm_neon.h>

#include <array>

#include "codebook/cpu/layout.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

// Distances are those of AVX2: none was ever measured on ARM.
constexpr Ahead kLookupsNeon = kLookupsAvx2, kCellsNeon = kCellsAvx2;

struct BytePlanes {  // of 16 numbers of 16 bits
  uint8x16_t low, high;

  uint16x8_t first() const { return vreinterpretq_u16_u8(vzip1q_u8(low, high)); }
  uint16x8_t second() const { return vreinterpretq_u16_u8(vzip2q_u8(low, high)); }
};

inline float32x4_t first_fp16(uint16x8_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(x))); }
inline float32x4_t second_fp16(uint16x8_t x) { return vcvt_high_f32_f16(vreinterpretq_f16_u16(x)); }

// --- widths 1 to 4 -------------------------------------------------------------------------------------------------

// For each nibble the place of its entry among the 8 of a lookup, by width and column of the lookup.
template <int Width>
constexpr auto kEntryOf = [] {
  std::array<std::array<uint8_t, 16>, columns_per_lookup(Width)> found{};
  for (int column = 0; column < columns_per_lookup(Width); ++column)
    for (int nibble = 0; nibble < 16; ++nibble)
      found[column][nibble] = static_cast<uint8_t>((column << Width) + (nibble >> Width * column & ((1 << Width) - 1)));
  return found;
}();

// The table of one of the 8 columns of a block, by the nibble that holds its code; `codebook`: of the block.
template <int Width>
inline BytePlanes column_planes(const uint16_t* codebook, int column) {
  if constexpr (Width == 4) {
    const uint8x16x2_t planes = vld2q_u8(reinterpret_cast<const uint8_t*>(codebook + 16 * column));
    return {planes.val[0], planes.val[1]};
  } else {
    constexpr int columns = columns_per_lookup(Width);
    const uint8x16_t entries = vld1q_u8(reinterpret_cast<const uint8_t*>(codebook + column / columns * 8));
    const uint8x16_t low = vshlq_n_u8(vld1q_u8(kEntryOf<Width>[column % columns].data()), 1);
    return {vqtbl1q_u8(entries, low), vqtbl1q_u8(entries, vaddq_u8(low, vdupq_n_u8(1)))};
  }
}

// The bytes whose nibbles hold the codes of a block of 8 columns, of 16 rows; the top bit of a nibble of 3 bits may be anything.
template <int Width>
inline __attribute__((always_inline)) void load_steps(const uint8_t* codes, uint8x16_t steps[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < Width; ++i) steps[i] = vld1q_u8(codes + i * kTileRows);
  if constexpr (Width == 3)
    steps[3] = vbslq_u8(vdupq_n_u8(0x11), vshrq_n_u8(steps[0], 3),
                        vbslq_u8(vdupq_n_u8(0x22), vshrq_n_u8(steps[1], 2), vshrq_n_u8(steps[2], 1)));
}

inline uint8x16_t low_nibbles(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }
inline uint8x16_t high_nibbles(uint8x16_t bytes) { return vshrq_n_u8(bytes, 4); }

// The index of a column's 16 rows into its table.
template <int Width>
inline __attribute__((always_inline)) uint8x16_t column_nibbles(const uint8x16_t steps[4], int column) {
  const int nibble = column / columns_per_lookup(Width);
  return nibble % 2 ? high_nibbles(steps[nibble / 2]) : low_nibbles(steps[nibble / 2]);
}

// --- widths 5 to 8 -------------------------------------------------------------------------------------------------

// Low bytes of the 2^width entries at planes[0], high bytes at planes[2^width].
inline void split_codebook(const uint16_t* codebook, int width, uint8_t* planes) {
  const int entries = 1 << width;
  for (int e = 0; e < entries; e += 16) {
    const uint8x16x2_t both = vld2q_u8(reinterpret_cast<const uint8_t*>(codebook + e));
    vst1q_u8(planes + e, both.val[0]);
    vst1q_u8(planes + entries + e, both.val[1]);
  }
}

// table[code], of 2^Width bytes. A code beyond the 64 of an instruction leaves what was found before.
template <int Width>
inline __attribute__((always_inline)) uint8x16_t look_up_bytes(const uint8_t* table, uint8x16_t codes) {
  if constexpr (Width == 5) {
    const uint8x16x2_t entries = {{vld1q_u8(table), vld1q_u8(table + 16)}};
    return vqtbl2q_u8(entries, codes);
  } else {
    const auto entries = [&](int first) {
      return uint8x16x4_t{
          {vld1q_u8(table + first), vld1q_u8(table + first + 16), vld1q_u8(table + first + 32), vld1q_u8(table + first + 48)}};
    };
    uint8x16_t found = vqtbl4q_u8(entries(0), codes);
#pragma GCC unroll 3
    for (int first = 64; first < 1 << Width; first += 64)
      found = vqtbx4q_u8(found, entries(first), vsubq_u8(codes, vdupq_n_u8(static_cast<uint8_t>(first))));
    return found;
  }
}

template <int Width>
inline __attribute__((always_inline)) BytePlanes decode_wide(uint8x16_t codes, const uint8_t* planes) {
  return {look_up_bytes<Width>(planes, codes), look_up_bytes<Width>(planes + (1 << Width), codes)};
}

}  // namespace
}  // namespace pyllmq::cpu

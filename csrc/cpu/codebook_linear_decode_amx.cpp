// Decoded weights of two int8 planes for AMX tiles (codebook_linear_decode.h): TDPBSSD multiplies 16 tokens x 64 columns by
// 64 columns x 16 rows in 16 cycles, twice the columns of TDPBF16PS. In a layout in fours a register of codes is 4 steps
// of 16 rows, and one byte permute by four tables at once gives 4 columns of 16 rows as they stand in a tile.
//
//   weight   round(C / max |C of the column| * 32512) = 256 wh + wl; x carries the column's maximum
//   x        256 xh + xl, one fp32 unit per token and block of 256 columns: max |x| / 32512, so the largest has xl = 0
//   sums     256 xh wh + xl wh + xh wl, exact int32 over a block, then fma(sum, unit, fp32); xl wl is left out
//
// Relative error 5e-5 for normal x, 1.5e-4 where one channel dwarfs the others of its block.
// Rejected: split bf16, three products of 32 columns: error 4e-6, but 1.9 ms for 8 tokens of 4096 x 4096 at 4 bits and 18 ms
// for 512.
#include <immintrin.h>

#include <cstring>

#include "cpu/codebook_fours_avx512.h"
#include "cpu/codebook_linear_decode.h"

namespace pyllmq::cpu {
namespace {

constexpr int kPlanes = 2;  // high and low bytes of weights and of x
constexpr int64_t kTileTokens = 16, kTileColumns = 64, kTileBytes = kTileTokens * kTileColumns;
constexpr float kLargest = 127 * 256;
constexpr int64_t kPlaneWeights = kDecodedWeights, kHalfWeights = kDecodedColumns * kHalfRows;

// --- decode --------------------------------------------------------------------------------------------------------

struct Planes {  // of 16 numbers
  __m128i high, low;
};
inline Planes to_planes(__m512 value) {
  const __m512i whole = _mm512_cvtps_epi32(value);
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
  return {_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(whole)};
}
inline void store_planes(const Planes& planes, uint8_t* high, int64_t low) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), planes.high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high + low), planes.low);
}

inline float to_int16(float max_magnitude) { return max_magnitude > 0 ? kLargest / max_magnitude : 0.0f; }

// Tables of a quad: per plane those of its 4 columns side by side, 16 entries each (2^Width from 5 bits on).
template <int Width>
constexpr int64_t kTable = Width <= 4 ? 16 : 1 << Width;

template <int Width>
void split_columns(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  constexpr int64_t plane = 4 * kTable<Width>;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t place = quad_place(Width, slot);
    uint8_t* to = split + place / 4 * kPlanes * plane + place % 4 * kTable<Width>;
    const __m512 factor = _mm512_set1_ps(to_int16(max_magnitude[slot]));
    if constexpr (Width <= 4) {
      constexpr int columns = columns_per_lookup(Width);
      const uint16_t* lookup = codebook + slot / columns * entries_per_lookup(Width);
      const __m512 entries = nibble_entries<Width>(lookup, static_cast<int>(slot % columns));
      store_planes(to_planes(_mm512_mul_ps(entries, factor)), to, plane);
    } else {
      for (int64_t e = 0; e < 1 << Width; e += 16) {
        const auto* from = reinterpret_cast<const __m256i*>(codebook + (slot << Width) + e);
        store_planes(to_planes(_mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(from)), factor)), to + e, plane);
      }
    }
  }
}

// 4 columns of 16 rows by codes of 5..8 bits; registers of 128 entries.
template <int Width>
inline __m512i lookup_bytes(const uint8_t* tables, __m512i codes) {
  const auto of_128 = [&](int i, __m512i index) {
    return _mm512_permutex2var_epi8(load_64(tables + 128 * i), index, load_64(tables + 128 * i + 64));
  };
  const auto column = [](uint64_t byte) { return static_cast<__mmask64>(0x1111111111111111 << byte); };
  if constexpr (Width == 5) return of_128(0, _mm512_or_si512(codes, _mm512_set1_epi32(0x60402000)));
  if constexpr (Width == 6) {
    const __m512i index = _mm512_or_si512(codes, _mm512_set1_epi32(0x40004000));
    return _mm512_mask_blend_epi8(0xCCCCCCCCCCCCCCCC, of_128(0, index), of_128(1, index));
  }
  __m512i found = _mm512_setzero_si512();
  const __mmask64 upper = _mm512_movepi8_mask(codes);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    constexpr int registers = Width == 8 ? 2 : 1;
    __m512i own = of_128(registers * c, codes);
    if constexpr (Width == 8) own = _mm512_mask_blend_epi8(upper, own, of_128(registers * c + 1, codes));
    found = _mm512_mask_blend_epi8(column(c), found, own);
  }
  return found;
}

template <int Width>
void decode_columns(const uint8_t* codes, const uint8_t* split, int64_t slots, uint8_t* weights) {
  constexpr int columns = group_columns(Width), per_lookup = Width <= 4 ? columns_per_lookup(Width) : 1;
  constexpr int64_t plane = 4 * kTable<Width>;
  constexpr int prefetch_bytes = 4096;  // the same block of the next tile in a panel of 256 lookups
  const __m512i nibble = _mm512_set1_epi8(15), byte = _mm512_set1_epi32(0x30201000);
  for (; slots > 0; slots -= columns, codes += group_bytes(Width), split += columns / 4 * kPlanes * plane,
                    weights += columns * kHalfRows) {
    for (int64_t line = 0; line < group_bytes(Width); line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(codes) + prefetch_bytes + line, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i steps[4];
      load_fours<Width>(codes, half, steps);
      uint8_t* to = weights + half * kHalfWeights;
      if constexpr (Width >= 5) {
        _mm512_store_si512(to, lookup_bytes<Width>(split, steps[0]));
        _mm512_store_si512(to + kPlaneWeights, lookup_bytes<Width>(split + plane, steps[0]));
      } else {
#pragma GCC unroll 8
        for (int quad = 0; quad < columns / 4; quad += per_lookup) {
          const int lookups = quad / per_lookup;
          const __m512i bytes = lookups % 2 ? _mm512_srli_epi16(steps[lookups / 2], 4) : steps[lookups / 2];
          const __m512i index = _mm512_ternarylogic_epi64(bytes, nibble, byte, 0xEA);
#pragma GCC unroll 4
          for (int q = quad; q < quad + per_lookup; ++q) {
            const uint8_t* tables = split + q * kPlanes * plane;
            _mm512_store_si512(to + q * 64, _mm512_permutexvar_epi8(index, load_64(tables)));
            _mm512_store_si512(to + q * 64 + kPlaneWeights, _mm512_permutexvar_epi8(index, load_64(tables + plane)));
          }
        }
      }
    }
  }
}

struct WidthKernels {
  void (*split)(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split);
  void (*decode)(const uint8_t* codes, const uint8_t* split, int64_t slots, uint8_t* weights);
};

template <int Width>
constexpr WidthKernels width_kernels() {
  return {split_columns<Width>, decode_columns<Width>};
}

constexpr WidthKernels kByWidth[8] = {width_kernels<1>(), width_kernels<2>(), width_kernels<3>(), width_kernels<4>(),
                                      width_kernels<5>(), width_kernels<6>(), width_kernels<7>(), width_kernels<8>()};

void split_any(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  kByWidth[width - 1].split(codebook, max_magnitude, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots,
                const float*, uint8_t* weights) {
  kByWidth[width - 1].decode(tile_codes + slot / group_columns(width) * group_bytes(width), split, slots, weights);
}

// --- x -------------------------------------------------------------------------------------------------------------

// Of a group of up to 16 tokens: [high and low part, 64 columns, 16 tokens, column], whole tiles; then units [16].
constexpr int64_t kPlaneX = kDecodedColumns * kTileTokens;
constexpr int64_t kGroupX = kPlanes * kPlaneX + kTileTokens * static_cast<int64_t>(sizeof(float));

int64_t packed_bytes(int64_t tokens) { return TokenGroups{tokens, kTileTokens}.count() * kGroupX; }

// Bits of the largest |x|; those of infinity and NaN are larger than any other.
inline uint32_t largest_bits(const float* x, int64_t slots) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t slot = 0; slot < slots; slot += 16)
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + slot))));
  return _mm512_reduce_max_epu32(largest);
}

bool pack(const float* x, int64_t slots, const uint8_t* order, const TokenGroups& groups, int64_t group,
          uint8_t* packed) {
  uint8_t* to = packed + group * kGroupX;
  auto* units = reinterpret_cast<float*>(to + kPlanes * kPlaneX);
  const int64_t rows = groups.largest(), count = groups.size(group);
  for (int64_t t = 0; t < rows; ++t) {
    const float* from = x + t * kDecodedColumns;
    const float largest = t < count ? bits_float(largest_bits(from, slots)) : 0.0f;
    if (!(largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f))) return false;
    const __m512 per_unit = _mm512_set1_ps(to_int16(largest));
    units[t] = largest / kLargest * (256 / kLargest);
    for (int64_t slot = 0; slot < slots; slot += kTileColumns) {
      alignas(64) uint8_t planes[kPlanes * kTileColumns] = {};
      if (largest > 0)
        for (int64_t i = 0; i < kTileColumns; i += 16)
          store_planes(to_planes(_mm512_mul_ps(_mm512_loadu_ps(from + slot + i), per_unit)), planes + i, kTileColumns);
      uint8_t* row = to + slot * kTileTokens + t * kTileColumns;
      const __m512i index = load_64(order + slot);
      _mm512_storeu_si512(row, _mm512_permutexvar_epi8(index, load_64(planes)));
      _mm512_storeu_si512(row + kPlaneX, _mm512_permutexvar_epi8(index, load_64(planes + kTileColumns)));
    }
  }
  return true;
}

// --- multiply ------------------------------------------------------------------------------------------------------

// Tiles 0, 1: sums of xh wh for both halves of the rows; 2, 3: xh wl; 4, 5: xl wh; 6: x; 7: weights. Six sums, so that each
// waits 52 cycles for itself only once in 64 columns, cost two more loads of weights than four sums.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void begin_chunk(int64_t tokens) {
  const auto rows = static_cast<uint8_t>(TokenGroups{tokens, kTileTokens}.largest());
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = tile < 7 ? rows : 16;
  }
  asm volatile("" ::"r"(&config) : "memory");  // gcc 12 believes that the next instruction reads 8 bytes of the 64
  _tile_loadconfig(&config);
}

void end_chunk() { _tile_release(); }

void multiply_group(const uint8_t* weights, const uint8_t* x, int64_t slots, int64_t count, float* sums) {
  const auto* units = reinterpret_cast<const float*>(x + kPlanes * kPlaneX);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (; slots > 0; slots -= kTileColumns, weights += kTileColumns * kHalfRows, x += kTileBytes) {
    _tile_loadd(6, x, 64);
    _tile_loadd(7, weights, 64);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(7, weights + kHalfWeights, 64);
    _tile_dpbssd(1, 6, 7);
    _tile_loadd(7, weights + kPlaneWeights, 64);
    _tile_dpbssd(2, 6, 7);
    _tile_loadd(7, weights + kPlaneWeights + kHalfWeights, 64);
    _tile_dpbssd(3, 6, 7);
    _tile_loadd(6, x + kPlaneX, 64);
    _tile_loadd(7, weights, 64);
    _tile_dpbssd(4, 6, 7);
    _tile_loadd(7, weights + kHalfWeights, 64);
    _tile_dpbssd(5, 6, 7);
  }
  alignas(64) int32_t found[6][kTileTokens][kHalfRows];
  _tile_stored(0, found[0], 64);
  _tile_stored(1, found[1], 64);
  _tile_stored(2, found[2], 64);
  _tile_stored(3, found[3], 64);
  _tile_stored(4, found[4], 64);
  _tile_stored(5, found[5], 64);
  for (int64_t t = 0; t < count; ++t) {
    const __m512 unit = _mm512_set1_ps(units[t]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i high = _mm512_slli_epi32(load_64(found[half][t]), 8);
      const __m512i mixed = _mm512_add_epi32(load_64(found[2 + half][t]), load_64(found[4 + half][t]));
      const __m512 total = _mm512_cvtepi32_ps(_mm512_add_epi32(high, mixed));
      float* to = sums + t * kTileRows + half * kHalfRows;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(total, unit, _mm512_loadu_ps(to)));
    }
  }
}

void multiply(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const TokenGroups groups{tokens, kTileTokens};
  for (int64_t g = 0; g < groups.count(); ++g)
    multiply_group(weights, packed + g * kGroupX, slots, groups.size(g), sums + groups.begin(g) * kTileRows);
}

void add_outliers(const RowOutliers& outliers, const float* x, int64_t count, float* sums) {
  add_outliers_loop(outliers, x, count, sums);
}

}  // namespace

const DecodeKernels kDecodeAmx = {kTileTokens, 1,       kPlanes,  kTileColumns, true,        true,     packed_bytes, pack, split_any,
                                  decode_any,  nullptr, multiply, add_outliers, begin_chunk, end_chunk};

}  // namespace pyllmq::cpu

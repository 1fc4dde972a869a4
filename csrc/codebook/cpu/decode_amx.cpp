// Decoded weights of two int8 planes for AMX tiles (decode.h): TDPBSSD multiplies 16 tokens x 64 columns by
// 64 columns x 16 rows in 16 cycles, twice the columns of TDPBF16PS.
//
//   weight   round(C / max |C of the column| * 32512) = 256 wh + wl; x carries the column's maximum
//   x        256 xh + xl, one fp32 unit per token and block of 256 columns: max |x| / 32512, so the largest has xl = 0
//   sums     256 xh wh + xl wh + xh wl, exact int32 over a block, then fma(sum, unit, fp32); xl wl is left out
//
// Relative error 5e-5 for normal x, 1.5e-4 where one channel dwarfs the others of its block.
// Rejected: split bf16, three products of 32 columns: error 4e-6, but 1.9 ms for 8 tokens of 4096 x 4096 at 4 bits and 18 ms
// for 512.
#include <immintrin.h>

#include "codebook/cpu/decode.h"
#include "codebook/cpu/quads_avx512.h"
#include "runtime/amx_tiles.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kTileTokens = 16, kTileColumns = 64, kTileBytes = kTileTokens * kTileColumns;

struct TwoBytes {                    // of 16 numbers
  static constexpr int kPlanes = 2;  // high and low bytes of weights and of x
  static constexpr float kLargest = 127 * 256;

  static void store(__m512 value, uint8_t* high, int64_t low) {
    const __m512i whole = _mm512_cvtps_epi32(value);
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + low), _mm512_cvtepi32_epi8(whole));
  }
};
constexpr int kPlanes = TwoBytes::kPlanes;
constexpr float kLargest = TwoBytes::kLargest;

// --- x -------------------------------------------------------------------------------------------------------------

// Of a group of up to 16 tokens: [high and low part, 64 columns, 16 tokens, column], whole tiles; then units [16].
constexpr int64_t kPlaneX = kDecodedColumns * kTileTokens;
constexpr int64_t kGroupX = kPlanes * kPlaneX + kTileTokens * static_cast<int64_t>(sizeof(float));

int64_t packed_bytes(int64_t tokens) { return TokenGroups{tokens, kTileTokens}.count() * kGroupX; }

bool pack(const float* x, int64_t slots, const uint8_t* order, const TokenGroups& groups, int64_t group, uint8_t* packed) {
  uint8_t* to = packed + group * kGroupX;
  auto* units = reinterpret_cast<float*>(to + kPlanes * kPlaneX);
  const int64_t rows = groups.largest(), count = groups.size(group);
  for (int64_t t = 0; t < rows; ++t) {
    const float* from = x + t * kDecodedColumns;
    const float largest = t < count ? bits_float(largest_bits(from, slots)) : 0.0f;
    if (!(largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f))) return false;
    const __m512 per_unit = _mm512_set1_ps(largest > 0 ? kLargest / largest : 0.0f);
    units[t] = largest / kLargest * (256 / kLargest);
    for (int64_t slot = 0; slot < slots; slot += kTileColumns) {
      alignas(64) uint8_t planes[kPlanes * kTileColumns] = {};
      if (largest > 0)
        for (int64_t i = 0; i < kTileColumns; i += 16)
          TwoBytes::store(_mm512_mul_ps(_mm512_loadu_ps(from + slot + i), per_unit), planes + i, kTileColumns);
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
void begin_chunk(int64_t tokens) { begin_tiles(TokenGroups{tokens, kTileTokens}.largest()); }

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
    _tile_loadd(7, weights + kHalfQuads, 64);
    _tile_dpbssd(1, 6, 7);
    _tile_loadd(7, weights + kDecodedWeights, 64);
    _tile_dpbssd(2, 6, 7);
    _tile_loadd(7, weights + kDecodedWeights + kHalfQuads, 64);
    _tile_dpbssd(3, 6, 7);
    _tile_loadd(6, x + kPlaneX, 64);
    _tile_loadd(7, weights, 64);
    _tile_dpbssd(4, 6, 7);
    _tile_loadd(7, weights + kHalfQuads, 64);
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

}  // namespace

const DecodeKernels kDecodeAmx = {.token_group = kTileTokens,
                                  .weight_bytes = 1,
                                  .planes = kPlanes,
                                  .slot_unit = kTileColumns,
                                  .relative = true,
                                  .packed_bytes = packed_bytes,
                                  .pack = pack,
                                  .split_codebook = split_any_quads<TwoBytes>,
                                  .decode = decode_any_quads<TwoBytes>,
                                  .multiply = multiply,
                                  .add_outliers = add_outliers_loop,
                                  .begin_chunk = begin_chunk,
                                  .end_chunk = end_tiles};

}  // namespace pyllmq::cpu

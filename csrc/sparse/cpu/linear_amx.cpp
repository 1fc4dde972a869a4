// bf16 x times weights that are exact in bf16, by AMX tiles: 16 tokens x 32 columns by 32 columns x 16 rows in 16 cycles.
// A product of two bf16 is exact in fp32, so this is the arithmetic of the other rows, but for subnormals, which are zero.
#include <immintrin.h>

#include "runtime/amx_tiles.h"
#include "runtime/counting.h"
#include "runtime/prefetch.h"
#include "sparse/cpu/linear.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kTileTokens = 16, kTileColumns = 32, kTileElements = kTileTokens * kTileColumns;
constexpr int64_t kHalfWeights = kCellColumns * kCellRows;
constexpr int64_t kSumsStride = kTileRows * 4;

inline void prefetch(const uint8_t* at) { cpu::prefetch(at, kCellsAvx512); }

void pack_weights(const float* weights, int64_t slots, uint16_t* pairs) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  for (int64_t slot = 0; slot < slots; slot += 2, weights += 2 * kCellRows, pairs += 2 * kCellRows) {
    const __m512i first = _mm512_srli_epi32(_mm512_load_si512(weights), 16);
    const __m512i second = _mm512_and_si512(_mm512_load_si512(weights + kCellRows), upper);
    _mm512_store_si512(pairs, _mm512_or_si512(first, second));
  }
}

void expand_bitmap(const uint8_t* cell, int64_t slots, uint16_t* pairs) {
  const auto* masks = reinterpret_cast<const uint32_t*>(cell);
  const uint8_t* values = cell + slots * 2;
  for (int64_t line = 0; line < slots * 2; line += 64) prefetch(cell + line);
  for (int64_t pair = 0; pair < slots / 2; ++pair, pairs += 2 * kCellRows) {
    prefetch(values);
    __m512i loaded = _mm512_loadu_si512(values);
    asm("" : "+v"(loaded));  // as load_pinned of the AVX-512 row
    _mm512_store_si512(pairs, _mm512_maskz_expand_epi16(masks[pair], loaded));
    values += 2 * _mm_popcnt_u64(masks[pair]);
  }
}

// The two pairs of columns of a group, from its two values in a dword: by the group's positions, which bytes go where.
struct PairShuffles {
  alignas(64) uint32_t pair[2][16];
};

constexpr PairShuffles make_pair_shuffles() {
  PairShuffles shuffles{};
  for (uint32_t positions = 0; positions < 16; ++positions)
    for (uint32_t column = 0; column < 4; ++column) {
      const uint32_t word = column == (positions & 3) ? 0x0100 : column == positions >> 2 ? 0x0302 : 0x8080;
      shuffles.pair[column / 2][positions] |= word << (16 * (column % 2));
    }
  return shuffles;
}
constexpr PairShuffles kPairShuffles = make_pair_shuffles();

void expand_24(const uint8_t* cell, int64_t slots, uint16_t* pairs) {
  const __m512i shuffles[2] = {_mm512_load_si512(kPairShuffles.pair[0]), _mm512_load_si512(kPairShuffles.pair[1])};
  const __m512i own_dword = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns) {
    prefetch(cell);
    const __m512i positions = _mm512_loadu_si512(cell);
    cell += 4 * kCellRows;
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, cell += 4 * kCellRows) {
      prefetch(cell);
      const __m512i both = _mm512_loadu_si512(cell), index = _mm512_srli_epi32(positions, 4 * g);
      for (int pair = 0; pair < 2; ++pair, pairs += 2 * kCellRows) {
        const __m512i shuffle = _mm512_or_si512(_mm512_permutexvar_epi32(index, shuffles[pair]), own_dword);
        _mm512_store_si512(pairs, _mm512_shuffle_epi8(both, shuffle));
      }
    }
  }
}

int64_t packed_bytes(int64_t tokens) { return rounded_up(tokens, kTileTokens) * kCellColumns * 2; }

void pack_x(const uint16_t* x, int64_t stride, int64_t tokens, int64_t columns, int64_t slots, uint16_t* packed) {
  for (int64_t group = 0; group < tokens; group += kTileTokens)
    for (int64_t slot = 0; slot < slots; slot += kTileColumns)
      for (int64_t t = group; t < group + kTileTokens; ++t, packed += kTileColumns) {
        const int64_t count = t < tokens ? (columns - slot < kTileColumns ? columns - slot : kTileColumns) : 0;
        const auto mask = static_cast<__mmask32>(count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1);
        _mm512_storeu_si512(packed, _mm512_maskz_loadu_epi16(mask, x + t * stride + slot));
      }
}

// Tiles 0..3: sums [2 groups of tokens][2 halves]; 4, 5: x of the two groups; 6, 7: weights of the two halves.
template <int Groups>
void multiply_groups(const uint16_t* pairs, const uint16_t* x, int64_t slots, float* sums) {
  float* next_sums = sums + kTileTokens * kTileRows;
  const uint16_t* next_x = x + kTileTokens * slots;
  _tile_loadd(0, sums, kSumsStride);
  _tile_loadd(1, sums + kCellRows, kSumsStride);
  if constexpr (Groups == 2) {
    _tile_loadd(2, next_sums, kSumsStride);
    _tile_loadd(3, next_sums + kCellRows, kSumsStride);
  }
  for (; slots > 0; slots -= kTileColumns, pairs += kTileColumns * kCellRows, x += kTileElements, next_x += kTileElements) {
    _tile_loadd(6, pairs, 64);
    _tile_loadd(7, pairs + kHalfWeights, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Groups == 2) {
      _tile_loadd(5, next_x, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumsStride);
  _tile_stored(1, sums + kCellRows, kSumsStride);
  if constexpr (Groups == 2) {
    _tile_stored(2, next_sums, kSumsStride);
    _tile_stored(3, next_sums + kCellRows, kSumsStride);
  }
}

void multiply(const uint16_t* pairs, const uint16_t* packed, int64_t slots, int64_t tokens, float* sums) {
  int64_t group = 0;
  for (; group + kTileTokens < tokens; group += 2 * kTileTokens)
    multiply_groups<2>(pairs, packed + group * slots, slots, sums + group * kTileRows);
  for (; group < tokens; group += kTileTokens) multiply_groups<1>(pairs, packed + group * slots, slots, sums + group * kTileRows);
}

}  // namespace

const BFloat16Tiles kBFloat16TilesAmx = {
    pack_weights, expand_bitmap, expand_24, packed_bytes, pack_x, multiply, [] { begin_tiles(kTileTokens); }, end_tiles};

}  // namespace pyllmq::cpu

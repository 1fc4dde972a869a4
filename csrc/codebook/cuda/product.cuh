// A block's part of x W^T for the layout of layout.h: codes decoded in registers, multiplied by tensor cores.
//
// A block of 8 warps has up to 512 rows and a range of panels of K; each warp takes every 8th column group, streams its codes
// and codebooks through a ring in shared memory of its own, and keeps the sums of all rows in registers. Then the warps' sums
// are added in one pass, in order.
//
// A product without transposes: decoding gives *pairs of rows* of one column, but an operand register of mma.m16n8k16 wants
// two columns of one row. So the two k-slots of a register both stand for one column, the first for the pair's first row,
// the second for its second row, and the other operand is x in the first slot for even n and in the second for odd n:
//
//            slot 2t  2t+1                  n = 2m   2m+1
//   row g   [ W[r0,k] W[r1,k] ]   slot 2t   [ x[m,k]   0    ]     C[g, 2m] = sum_k W[r0,k] x[m,k]
//                                 slot 2t+1 [   0    x[m,k] ]     C[g, 2m+1] = the same for r1
//
// One instruction is 32 rows x 8 columns x 4 tokens.
#pragma once
#include "codebook/cuda/decode.cuh"
#include "codebook/cuda/layout.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

constexpr int kProductWarps = 8;
constexpr int kProductThreads = 32 * kProductWarps;
constexpr int kMostProductColumns = 16;  // tokens, or twice the tokens for fp32
constexpr int kRingBytes = 9216;         // of one warp: two stages of 4 bits, or the tables of an 8-bit group

using Rings = uint8_t[kProductWarps][kRingBytes];  // after the loop: the sums

// What a block multiplies: the same for all threads, so it lies in shared memory, and sums have the registers.
struct Product {
  const LayoutHeader* header;
  RowBlock block;
  int first_row, rows;  // within the row block; no rows: nothing to do
  int tokens, planes;
  GroupRange groups[9];  // by width
  PYLLMQ_MEMBER int columns() const { return tokens * planes; }
};

// Sums of 64 rows x 4 columns of the product: the two instructions' rows, the tiles of columns, the fragment.
template <int kTokenTiles>
using TileSums = float[2][kTokenTiles][4];

// x of columns t + 8*half and t + 8*half + 4 of a group as the second operand: this lane's token in its slot, 0 in the other.
template <int kTokenTiles>
PYLLMQ_DEVICE void load_x(const uint16_t* x_group, int columns, int lane, int half, uint32_t (&x)[kTokenTiles][2]) {
  unrolled<kTokenTiles>([&](int tile) {
    const int column = tile * 4 + (lane >> 3);
    unrolled<2>([&](int i) {
      const int k = (lane & 3) + 8 * half + 4 * i;
      const uint32_t value = column < columns ? x_group[k * columns + column] : 0;
      x[tile][i] = value << (lane >> 2 & 1) * 16;
    });
  });
}

// Adds the product of half a group: decode(tile, pairs) gives a tile's pairs of two columns.
template <int kTokenTiles, class Decode>
PYLLMQ_DEVICE void multiply(int tiles, const uint32_t (&x)[kTokenTiles][2], const Decode& decode,
                            TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles]) {
  unrolled<kBlockTiles / kTokenTiles>([&](int tile) {
    if (tile < tiles) {
      uint32_t pairs[2][4];
      decode(tile, pairs);
      unrolled<2, kTokenTiles>([&](int i, int column_tile) {
        ptx::mma_m16n8k16(sums[tile][i][column_tile], pairs[0][2 * i], pairs[0][2 * i + 1], pairs[1][2 * i], pairs[1][2 * i + 1],
                          x[column_tile][0], x[column_tile][1]);
      });
    }
  });
}

// Where the columns of a width start in the staged x.
template <int kWidth>
PYLLMQ_DEVICE int staged_before(const Product& w) {
  int groups = 0;
  PYLLMQ_UNROLL
  for (int width = 1; width < kWidth; ++width) groups += w.groups[width].end - w.groups[width].begin;
  return groups * kGroupColumns;
}

template <int kWidth, int kTokenTiles>
struct Ring {
  static constexpr int kTiles = kBlockTiles / kTokenTiles;
  static constexpr int kTableBytes = static_cast<int>(kGroupColumns * 2) << kWidth;
  static constexpr int kStageBytes = kTableBytes + kTiles * kTileRows * kGroupColumns / 8 * kWidth;
  static constexpr int kFit = kRingBytes / kStageBytes;
  static constexpr int kStages = kFit < 4 ? kFit : 4;
  // With 16 columns of the product no registers are left for codebooks: they are loaded for each of the two tiles.
  static constexpr bool kKeepTables = kTokenTiles <= 2;
};

// Adds the columns of one width, up to 4 bits, to the sums.
template <int kWidth, int kTokenTiles>
PYLLMQ_DEVICE void accumulate(const Product& w, uint8_t* ring, const uint16_t* x_shared,
                              TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles]) {
  using R = Ring<kWidth, kTokenTiles>;
  static_assert(R::kStages >= 2, "one stage is read while another is filled");
  const LayoutHeader& h = *w.header;
  const int lane = ptx::thread() % 32;
  const GroupRange range = w.groups[kWidth];
  const int tiles = (w.rows + kTileRows - 1) / kTileRows;
  const int first = range.begin + ptx::thread() / 32;
  const auto* base = reinterpret_cast<const uint8_t*>(&h);
  const uint8_t* next_tables = base + tables_offset(h, kWidth, w.block.segment, first);
  const uint8_t* next_codes = base + codes_offset(h, kWidth, w.block, first) + w.first_row / kTileRows * tile_bytes(kWidth);
  const int64_t codes_step = kProductWarps * block_tiles(w.block) * tile_bytes(kWidth);

  const auto fetch = [&](int group, int stage) {
    if (group < range.end) {
      uint8_t* to = ring + stage * R::kStageBytes;
      for (int at = lane * 16; at < R::kTableBytes; at += 512) ptx::copy_async_16(to + at, next_tables + at);
      const int code_bytes = tiles * static_cast<int>(tile_bytes(kWidth));
      for (int at = lane * 16; at < code_bytes; at += 512)
        ptx::copy_async_16<kTokenTiles == 1>(to + R::kTableBytes + at, next_codes + at);
      next_tables += kProductWarps * R::kTableBytes;
      next_codes += codes_step;
    }
    ptx::commit_async();
  };

  for (int ahead = 0; ahead < R::kStages - 1; ++ahead) fetch(first + ahead * kProductWarps, ahead);
  const uint16_t* x_group = x_shared + (staged_before<kWidth>(w) + (first - range.begin) * kGroupColumns) * w.columns();
  int stage = 0;
  for (int group = first; group < range.end; group += kProductWarps) {
    fetch(group + (R::kStages - 1) * kProductWarps, (stage + R::kStages - 1) % R::kStages);
    ptx::wait_async<R::kStages - 1>();
    ptx::sync_warp();
    const uint8_t* tables = ring + stage * R::kStageBytes;
#pragma unroll(kWidth == 3 ? 2 : 1)
    for (int half = 0; half < 2; ++half) {
      RegisterTable<kWidth> table[2];
      PYLLMQ_UNROLL
      for (int i = 0; R::kKeepTables && i < 2; ++i) table[i].load(tables, lane % 4 + 8 * half + 4 * i);
      uint32_t x[kTokenTiles][2];
      load_x<kTokenTiles>(x_group, w.columns(), lane, half, x);
      const auto decode = [&](int tile, uint32_t (&pairs)[2][4]) {
        uint32_t codes[2];
        column_codes<kWidth>(tables + R::kTableBytes + tile * tile_bytes(kWidth), lane, half, codes);
        unrolled<2>([&](int i) {
          if (!R::kKeepTables) table[i].load(tables, lane % 4 + 8 * half + 4 * i);
          table[i].decode(codes[i], pairs[i]);
        });
      };
      multiply<kTokenTiles>(tiles, x, decode, sums);
    }
    ptx::sync_warp();  // the next fetch overwrites this stage
    stage = (stage + 1) % R::kStages;
    x_group += kProductWarps * kGroupColumns * w.columns();
  }
  ptx::wait_async<0>();  // for groups without copies
}

// The same for widths 5..8: codebooks in shared memory, codes straight from global memory.
template <int kWidth, int kTokenTiles>
PYLLMQ_DEVICE void accumulate_wide(const Product& w, uint8_t* ring, const uint16_t* x_shared,
                                   TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles]) {
  const LayoutHeader& h = *w.header;
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  const GroupRange range = w.groups[kWidth];
  const int first_slot = staged_before<kWidth>(w);
  const int tiles = (w.rows + kTileRows - 1) / kTileRows;
  const auto* base = reinterpret_cast<const uint8_t*>(&h);

  for (int group = range.begin + warp; group < range.end; group += kProductWarps) {
    const uint8_t* tables = base + tables_offset(h, kWidth, w.block.segment, group);
    const uint8_t* codes = base + codes_offset(h, kWidth, w.block, group) + w.first_row / kTileRows * tile_bytes(kWidth);
    const uint16_t* x_group = x_shared + (first_slot + (group - range.begin) * kGroupColumns) * w.columns();
    ptx::sync_warp();  // all lanes are done with the tables before
    for (int at = lane * 16; at < table_bytes(kWidth); at += 512) ptx::copy_async_16(ring + at, tables + at);
    ptx::commit_async();
    ptx::wait_async<0>();
    ptx::sync_warp();
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const auto* entries = reinterpret_cast<const uint16_t*>(ring) + ((lane % 4 + 8 * half) << kWidth);
      uint32_t x[kTokenTiles][2];
      load_x<kTokenTiles>(x_group, w.columns(), lane, half, x);
      const auto decode = [&](int tile, uint32_t (&pairs)[2][4]) {
        const uint8_t* at = codes + tile * tile_bytes(kWidth);
        uint32_t low[2], high[2];
        column_codes<4>(at, lane, half, low);
        column_codes<kWidth - 4>(at + tile_bytes(4), lane, half, high);
        unrolled<2>([&](int i) { MemoryTable<kWidth>{entries + i * (4 << kWidth)}.decode(low[i], high[i], pairs[i]); });
      };
      multiply<kTokenTiles>(tiles, x, decode, sums);
    }
  }
  ptx::sync_warp();  // the ring is free
}

// Where the sum of a row and a column of the product stands in a warp's ring: lanes of a store meet in pairs.
template <int kTokenTiles>
PYLLMQ_DEVICE int place_of_sum(int column, int row) {
  constexpr int kStride = kBlockRows / kTokenTiles + 16;
  static_assert(kStride * 4 * kTokenTiles * sizeof(float) <= kRingBytes, "a warp's sums take the place of its ring");
  return column * kStride + row;
}

// A warp's sums in place of its ring.
template <int kTokenTiles>
PYLLMQ_DEVICE void store_sums(const Product& w, const TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles], uint8_t* ring) {
  const int lane = ptx::thread() % 32;
  auto* part = reinterpret_cast<float*>(ring);
  unrolled<kTokenTiles>([&](int column_tile) {
    const int column = column_tile * 4 + lane % 4;
    if (column >= w.columns()) return;
    unrolled<kBlockTiles / kTokenTiles, 8>([&](int tile, int e) {
      const int row = tile * kTileRows + e / 2 * 16 + lane / 4 * 2 + e % 2;
      part[place_of_sum<kTokenTiles>(column, row)] = sums[tile][e / 4][column_tile][e % 4];
    });
  });
}

// That of all warps, in order.
template <int kTokenTiles>
PYLLMQ_DEVICE float sum_of_warps(const Rings& rings, int column, int row) {
  float sum = 0.0f;
  unrolled<kProductWarps>(
      [&](int warp) { sum += reinterpret_cast<const float*>(rings[warp])[place_of_sum<kTokenTiles>(column, row)]; });
  return sum;
}

// Adds the columns of all widths.
template <int kTokenTiles>
PYLLMQ_DEVICE void accumulate_all(const Product& w, uint8_t* ring, const uint16_t* x_shared,
                                  TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles]) {
  accumulate<1, kTokenTiles>(w, ring, x_shared, sums);
  accumulate<2, kTokenTiles>(w, ring, x_shared, sums);
  accumulate<3, kTokenTiles>(w, ring, x_shared, sums);
  accumulate<4, kTokenTiles>(w, ring, x_shared, sums);
  accumulate_wide<5, kTokenTiles>(w, ring, x_shared, sums);
  accumulate_wide<6, kTokenTiles>(w, ring, x_shared, sums);
  accumulate_wide<7, kTokenTiles>(w, ring, x_shared, sums);
  accumulate_wide<8, kTokenTiles>(w, ring, x_shared, sums);
}

}  // namespace pyllmq::cuda

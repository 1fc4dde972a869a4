// One projection of the chosen experts, as routed_experts.cu launches it for each kind of weights that its experts have: tiles of
// pairs of one expert, times a part of its rows and a split of K. What differs between kinds is a class `Weights`:
//
//   Header            of its layouts
//   Shared, Work      what a block holds; shared.work is the item at work. Work derives from Item and begins empty: rows = 0
//   kTypes            of x: see Activations
//   threads(m)        of a block
//   is_one(m, h, bytes)  whether a header is one of such a weight
//   take(m, part, w)  one thread: which rows and which part of K
//   run(m, shared)    all threads: the sums of the item
#pragma once
#include "experts/cuda/routed_experts.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

constexpr int kMostTilePairs = 16;

// Pairs of one expert, neighbours in the sorted order.
struct Tile {
  int expert, first, count;
};

// Rows of activations, for weights that meet them in fp16 as planes with a power of two for each row (fp16_planes.cuh), else as
// they are.
struct Activations {
  uint16_t* planes;    // fp16 [rows, planes, columns]; null: nobody reads them
  float* unscale;      // [rows], of the planes
  const void* source;  // [rows, columns]
  DType dtype;         // of the source
};

struct Multiplication {
  const ExpertLayout* layouts;
  WeightKind weights;     // of the experts that this launch multiplies: it passes over those of other kinds
  int kind;               // its number
  int64_t rows, columns;  // of each expert
  Activations x;
  int choices;  // rows of x are tokens: pair / choices; 0: they are pairs, sorted
  int pairs, planes;
  int part_rows, parts, splits;  // of an expert's rows; of K
  int stage;                     // units of K whose x is in shared memory at once
  int warps, x_bytes;            // of a block
  const int* tile_count;
  const Tile* tiles;
  const int* order;
  float* sums;  // [splits, pairs, rows]
};

// What a block computes: the same for all threads, so it lies in shared memory, and sums have the registers.
template <class Header>
struct Item {
  const Header* header;
  int item, first_pair, split;
  int x_row[kMostTilePairs];
  int tokens, rows;  // no rows: nothing to do
  bool is_wrong;     // its layout is none of such a weight
};

PYLLMQ_DEVICE float* sums_of(const Multiplication& m, int split, int pair) {
  return m.sums + (int64_t{split} * m.pairs + pair) * m.rows;
}

// An item is a tile of pairs, a split and some rows: 32 bits, as the host has checked.
template <class Weights>
PYLLMQ_DEVICE void take(const Multiplication& m, int item, typename Weights::Work& w) {
  const int of_tile = m.parts * m.splits;
  const Tile tile = m.tiles[item / of_tile];
  if (ptx::thread() < tile.count) {
    const int place = tile.first + ptx::thread();
    w.x_row[ptx::thread()] = m.choices == 0 ? place : m.order[place] / m.choices;
  }
  if (ptx::thread() != 0) return;
  const ExpertLayout& layout = m.layouts[tile.expert];
  w.item = item;
  w.tokens = tile.count;
  w.first_pair = tile.first;
  w.split = item % of_tile / m.parts;
  w.rows = 0;
  w.is_wrong = false;
  if (layout.kind != m.kind) return;
  const auto& h = *reinterpret_cast<const typename Weights::Header*>(static_cast<uintptr_t>(layout.address));
  w.header = &h;
  w.is_wrong = !Weights::is_one(m, h, layout.bytes);
  if (!w.is_wrong) Weights::take(m, item % m.parts, w);
}

template <class Weights>
PYLLMQ_DEVICE void multiply_items(const Multiplication& m, uint8_t* memory) {
  auto& shared = *reinterpret_cast<typename Weights::Shared*>(memory);
  auto& w = shared.work;
  for (auto item = static_cast<int>(ptx::block()); item < m.tile_count[0] * m.parts * m.splits;
       item = w.item + static_cast<int>(ptx::blocks())) {
    ptx::sync_block();  // the item before is done with shared memory
    take<Weights>(m, item, w);
    ptx::sync_block();
    if (w.is_wrong && item % m.parts == 0)
      for (int token = 0; token < w.tokens; ++token)
        for (int64_t row = ptx::thread(); row < m.rows; row += Weights::threads(m))
          sums_of(m, w.split, w.first_pair + token)[row] = ptx::bits_to_fp32(0x7FC00000u);
    if (w.rows > 0) Weights::run(m, shared);
  }
}

}  // namespace pyllmq::cuda

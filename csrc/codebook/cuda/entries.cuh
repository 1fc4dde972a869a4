// A single weight of the layout of layout.h: where a column and a row of it stand, and which entry the code there names.
#pragma once
#include "codebook/cuda/layout.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

// Of a column: its width, its group among those of the width, and its place there.
struct Column {
  int width, group, in_group;
};

PYLLMQ_DEVICE Column column_at(const LayoutHeader& h, int32_t slot) {
  Column found{};
  for (int width = 1; width <= 8; ++width)
    if (slot >= h.first_slot[width]) found.width = width;
  slot -= static_cast<int32_t>(h.first_slot[found.width]);
  found.group = slot / kGroupColumns;
  found.in_group = slot % kGroupColumns;
  return found;
}

PYLLMQ_DEVICE uint16_t entry_of(const uint8_t* table, int width, int code) {
  if (!has_split_bytes(width)) return reinterpret_cast<const uint16_t*>(table)[code];
  return static_cast<uint16_t>(table[code] | table[(1 << width) + code] << 8);
}

// The code, or of widths above 4 the part of it that `part` holds, of one column and one row of a tile.
PYLLMQ_DEVICE int code_part(const uint8_t* tile, int part, int in_group, int row) {
  const int j = in_group / 4, lane = row / 2 % 8 * 4 + in_group % 4, nibble = 4 * nibble_of(row / 16, row % 2);
  const auto* words = reinterpret_cast<const uint32_t*>(tile);
  const auto bits = [&](int word) { return words[word_index(part, lane, word)] >> nibble & 15; };
  switch (part) {
    case 1: return static_cast<int>(bits(0) >> j & 1);
    case 2: return static_cast<int>(bits(j / 2) >> (2 * (j % 2)) & 3);
    case 3: return static_cast<int>(j < 3 ? bits(j) & 7 : bits(0) >> 3 | bits(1) >> 3 << 1 | bits(2) >> 3 << 2);
    default: return static_cast<int>(bits(j));
  }
}

// fp16 bits of what a code stands for, without row scale; `row` is within its block.
PYLLMQ_DEVICE uint16_t entry_at(const LayoutHeader& h, const Column& c, const RowBlock& block, int row) {
  const auto* base = reinterpret_cast<const uint8_t*>(&h);
  const uint8_t* tile = base + codes_offset(h, c.width, block, c.group) + row / kTileRows * tile_bytes(c.width);
  const int low = low_part(c.width);
  int code = code_part(tile, low, c.in_group, row % kTileRows);
  if (c.width > low) code |= code_part(tile + tile_bytes(4), c.width - low, c.in_group, row % kTileRows) << 4;
  return entry_of(base + tables_offset(h, c.width, block.segment, c.group) + (c.in_group * 2 << c.width), c.width, code);
}

// The block that holds a row of the weight.
PYLLMQ_DEVICE const RowBlock& block_of_row(const LayoutHeader& h, int64_t row) {
  const auto* blocks = section<RowBlock>(h, h.blocks_offset);
  int64_t first = 0, behind = h.blocks;
  while (behind - first > 1) {
    const int64_t middle = (first + behind) / 2;
    (blocks[middle].row_begin <= row ? first : behind) = middle;
  }
  return blocks[first];
}

// body(i) for the outliers of one row of a tile, from panel `panel_begin` on.
template <class Body>
PYLLMQ_DEVICE void for_outliers(const LayoutHeader& h, int64_t panel_begin, int64_t panel_end, int64_t tile, int row,
                                const Body& body) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t bucket = panel * h.tiles + tile;
    const uint16_t* row_end = section<uint16_t>(h, h.outlier_row_end_offset) + bucket * kTileRows + row;
    const int64_t begin = section<uint32_t>(h, h.outlier_begin_offset)[bucket];
    const int64_t end = begin + row_end[0];
    for (int64_t i = begin + (row ? row_end[-1] : 0); i < end; ++i) body(i);
  }
}

}  // namespace pyllmq::cuda

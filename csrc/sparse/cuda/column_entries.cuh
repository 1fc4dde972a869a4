// A row's kept weights as the layout `columns` (layout.h) holds them, times x in shared memory: for sparse_columns_linear and the
// experts. A block has 64 rows, of which a warp takes every eighth, and x of a panel and up to 4 tokens at once.
#pragma once
#include "runtime/cuda/words.cuh"
#include "sparse/cuda/layout.h"

namespace pyllmq::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kItemRows = kStripRows;
constexpr int kMostTokens = 4;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kWarpEntries = 32 * kEntryGroup;

// x of a panel by column; the last is 0: where steps that fill up may end.
template <int kTokens>
using PanelX = float[kPanelColumns + 1][kTokens];

// Eight entries of a lane as they are stored.
template <ValueType kType>
struct Entries {
  static constexpr int kValueBytes = kType == ValueType::fp32 ? 4 : kType == ValueType::int8 ? 1 : 2;
  static constexpr int kWords = kEntryGroup * kValueBytes / 4;
  Words<2> steps;
  Words<kWords> values;

  PYLLMQ_MEMBER void load(const uint8_t* values_from, const uint8_t* steps_from, int64_t entry) {
    steps = load_words<2>(steps_from + entry);
    values = load_words<kWords>(values_from + entry * kValueBytes);
  }
  PYLLMQ_MEMBER int step(int i) const { return static_cast<int>(steps[i / 4] >> (8 * (i % 4)) & 255); }
  PYLLMQ_MEMBER float value(int i) const {
    if constexpr (kType == ValueType::fp32) return ptx::bits_to_fp32(values[i]);
    if constexpr (kType == ValueType::bf16)
      return ptx::bits_to_fp32(i % 2 == 0 ? values[i / 2] << 16 : values[i / 2] & 0xFFFF0000u);
    if constexpr (kType == ValueType::fp16) return ptx::fp16_to_fp32(static_cast<uint16_t>(values[i / 2] >> (i % 2 * 16)));
    return static_cast<float>(static_cast<int8_t>(values[i / 4] >> (i % 4 * 8)));
  }
};

// Sums of one row's entries in one panel, of this lane.
template <ValueType kType, int kTokens>
PYLLMQ_DEVICE void add_row(const SparseHeader& h, const PanelX<kTokens>& x, int64_t begin, int64_t end, float (&sums)[kTokens]) {
  const auto* values = section<uint8_t>(h, h.data_offset);
  const auto* steps = section<uint8_t>(h, h.steps_offset);
  const int lane = ptx::thread() % 32;
  int64_t entry = begin + lane * kEntryGroup;
  Entries<kType> next = {};
  if (entry < end) next.load(values, steps, entry);
  int column = 0;  // of the last entry of the lanes' turn before
  for (int64_t turn = begin; turn < end; turn += kWarpEntries) {
    const bool here = entry < end;
    const Entries<kType> now = next;
    entry += kWarpEntries;
    if (entry < end) next.load(values, steps, entry);

    int advance = 0;
    unrolled<kEntryGroup>([&](int i) { advance += here ? now.step(i) : 0; });
    uint32_t through = static_cast<uint32_t>(advance);  // this lane and those below
    PYLLMQ_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t below = ptx::shuffle_up(through, distance);
      if (lane >= distance) through += below;
    }
    int at = column + static_cast<int>(through) - advance;
    column += static_cast<int>(ptx::shuffle(through, 31));
    if (!here) continue;
    unrolled<kEntryGroup>([&](int i) {
      at += now.step(i);
      const int place = at < kPanelColumns ? at : kPanelColumns;
      const float value = now.value(i);
      unrolled<kTokens>([&](int token) { sums[token] = fmaf(value, x[place][token], sums[token]); });
    });
  }
}

// x of a panel: x_of(token, column), 0 beyond the last of each.
template <int kTokens, class XOf>
PYLLMQ_DEVICE void stage_panel(int64_t panel, int tokens, int64_t columns, PanelX<kTokens>& x, const XOf& x_of) {
  for (int i = ptx::thread(); i < (kPanelColumns + 1) * kTokens; i += kThreads) {
    const int token = i / (kPanelColumns + 1), column = i % (kPanelColumns + 1);
    const int64_t k = panel * kPanelColumns + column;
    x[column][token] = column < kPanelColumns && k < columns && token < tokens ? x_of(token, k) : 0.0f;
  }
}

template <int kTokens>
using RowTotals = float[kTokens][kItemRows];

// Adds a panel to the totals of rows, or begins them with it.
template <ValueType kType, int kTokens>
PYLLMQ_DEVICE void add_panel(const SparseHeader& h, int64_t panel, int64_t row_begin, int rows, bool begins,
                             const PanelX<kTokens>& x, RowTotals<kTokens>& totals) {
  for (int row = ptx::thread() / 32; row < rows; row += kWarps) {
    const uint32_t* begin = section<uint32_t>(h, h.begin_offset) + panel * (h.rows + 1) + row_begin + row;
    float sums[kTokens] = {};
    add_row<kType, kTokens>(h, x, int64_t{begin[0]} * kEntryGroup, int64_t{begin[1]} * kEntryGroup, sums);
    unrolled<kTokens>([&](int token) {
      for (int mask = 16; mask > 0; mask /= 2) sums[token] += ptx::shuffle_xor(sums[token], mask);
      if (ptx::thread() % 32 == 0) totals[token][row] = begins ? sums[token] : totals[token][row] + sums[token];
    });
  }
}

}  // namespace pyllmq::cuda

// What the kernels that stream a codebook weight (streamed_linear.cuh) have in common: an item is rows of one row block and
// panels of K; row scale and outliers.
#pragma once
#include "codebook/cuda/operand.h"
#include "codebook/cuda/outliers.cuh"
#include "streamed_linear.cuh"

namespace pyllmq::cuda {

// Shared has `work`: block, first_row and rows within it, panels and groups by width.
template <int kRows, class Shared_>
struct CodebookStream {
  using Header = LayoutHeader;
  using Shared = Shared_;
  static constexpr bool kBf16 = false;
  static constexpr int kParts = kBlockRows / kRows;  // of a row block

  const StreamArguments& a;
  const LayoutHeader& h;
  Shared& shared;

  PYLLMQ_MEMBER static bool serves(const LayoutHeader& h, const StreamArguments& a) {
    return describes(h, a.call.layout_bytes, a.call.rows, a.call.columns);
  }
  PYLLMQ_MEMBER static int row_parts(const LayoutHeader& h) { return static_cast<int>(h.blocks) * kParts; }
  PYLLMQ_MEMBER static int64_t tiles(const LayoutHeader& h) { return h.tiles; }
  PYLLMQ_MEMBER int tile() const { return shared.work.block.tile_begin + shared.work.first_row / kTileRows; }

  // Threads 1..8 find the groups of a width each.
  PYLLMQ_MEMBER void take(Item& item) const {
    auto& w = shared.work;
    const Range panels = of_split(static_cast<int>(h.panels), a.splits, item.split);
    if (ptx::thread() != 0) {
      w.groups[ptx::thread()] = panel_groups(h, ptx::thread(), panels.begin, panels.end);
      return;
    }
    w.block = section<RowBlock>(h, h.blocks_offset)[item.row_part / kParts];
    w.first_row = item.row_part % kParts * kRows;
    w.rows = w.block.rows - w.first_row < kRows ? w.block.rows - w.first_row : kRows;
    w.panels = panels;
    item.rows = w.rows;
    item.row_begin = w.block.row_begin + w.first_row;
  }

  // What the codes' sum of a row becomes.
  PYLLMQ_MEMBER float finished(int token, int row, float sum) const {
    const auto& w = shared.work;
    if (h.row_scale_offset != 0) sum *= ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[shared.item.row_begin + row]);
    if (h.outliers != 0)
      sum += outlier_sum(h, a.call, shared.item.token_begin + token, w.panels.begin, w.panels.end, tile() + row / kTileRows,
                         row % kTileRows);
    return sum;
  }
};

// Panels of K of a layout of one width; and at most, where each of so many widths is padded to whole groups.
inline int64_t panels_of(int64_t columns) { return ceil_div(columns, kGroupColumns * kPanelGroups); }
inline int64_t most_panels(int64_t columns, int widths) {
  return ceil_div(ceil_div(columns, kGroupColumns) + widths - 1, kPanelGroups);
}

}  // namespace pyllmq::cuda

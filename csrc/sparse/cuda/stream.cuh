// What the kernels that stream a sparse weight (streamed_linear.cuh) have in common: an item is some strips and cells of K; scale
// and outliers.
#pragma once
#include "sparse/cuda/cells.cuh"
#include "sparse/cuda/operand.h"
#include "streamed_linear.cuh"

namespace pyllmq::cuda {

// Shared has `work`, of type Strips.
template <class Cells, int kStrips, class Shared_, class Arguments = StreamArguments>
struct SparseStream {
  using Header = SparseHeader;
  using Shared = Shared_;
  static constexpr bool kBf16 = Cells::kBf16;

  const Arguments& a;
  const SparseHeader& h;
  Shared& shared;
  uint32_t outlier_begin = 0, outlier_end = 0;  // of a row in the item's cells

  PYLLMQ_MEMBER static bool describes_cells(const SparseHeader& h, const Arguments& a, int64_t stage_bytes) {
    return describes(h, Cells::kKind, a.call.layout_bytes, a.call.rows, a.call.columns) && h.stage_bytes == stage_bytes;
  }
  PYLLMQ_MEMBER static int row_parts(const SparseHeader& h) { return static_cast<int>((h.strips + kStrips - 1) / kStrips); }
  PYLLMQ_MEMBER static int64_t tiles(const SparseHeader& h) { return h.strips; }
  PYLLMQ_MEMBER int tile() const { return shared.work.begin; }

  PYLLMQ_MEMBER void take(Item& item) const {
    if (ptx::thread() != 0) return;
    Strips& w = shared.work;
    w.take(h, item.row_part * kStrips, kStrips, a.splits, item.split);
    item.row_begin = w.row_begin();
    item.rows = w.rows(h);
  }

  // What the sum of a row becomes; a row's outliers are found with its first token.
  PYLLMQ_MEMBER float finished(int token, int row, float sum) {
    const int64_t of_weight = shared.item.row_begin + row;
    if (Cells::kKind == SparseKind::codes && h.outliers != 0) {
      if (token == 0) {
        outlier_begin = outlier_from(h, of_weight, int64_t{shared.work.cells.begin} * Cells::kColumns);
        outlier_end = outlier_from(h, of_weight, int64_t{shared.work.cells.end} * Cells::kColumns);
      }
      for (uint32_t i = outlier_begin; i < outlier_end; ++i)
        sum +=
            section<float>(h, h.outlier_deltas_offset)[i] *
            load_element(a.call.x, static_cast<DType>(a.call.dtype),
                         (shared.item.token_begin + token) * a.call.columns + section<uint32_t>(h, h.outlier_columns_offset)[i]);
    }
    return h.scale_offset == 0 ? sum : sum * section<float>(h, h.scale_offset)[of_weight];
  }
};

}  // namespace pyllmq::cuda

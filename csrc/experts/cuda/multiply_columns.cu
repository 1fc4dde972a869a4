// Experts laid out as column numbers, which few kept weights and fp32 values are: fp32 products of the kept weights alone
// (sparse/cuda/column_entries.cuh), as in sparse_columns_linear.
// A block takes a split of the panels, and up to 4 pairs of the tile at once.
#include <algorithm>

#include "experts/cuda/multiply.cuh"
#include "experts/cuda/multiply.h"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "sparse/cuda/column_entries.cuh"

namespace pyllmq::cuda {
namespace {

template <ValueType kType, int kTokens>
struct ColumnWeights {
  using Header = SparseHeader;
  struct Work : Item<SparseHeader> {
    int row_begin, panel_begin, panel_end;
  };
  struct Shared {
    Work work;
    RowTotals<kTokens> totals;
    PanelX<kTokens> x;
  };

  PYLLMQ_MEMBER static int threads(const Multiplication&) { return kThreads; }

  PYLLMQ_MEMBER static bool is_one(const Multiplication& m, const SparseHeader& h, int64_t bytes) {
    return describes(h, SparseKind::columns, bytes, m.rows, m.columns) && h.values == kType;
  }

  PYLLMQ_MEMBER static void take(const Multiplication& m, int part, Work& w) {
    const SparseHeader& h = *w.header;
    w.row_begin = part * kItemRows;
    w.rows = h.rows - w.row_begin < kItemRows ? static_cast<int>(h.rows - w.row_begin) : kItemRows;
    w.panel_begin = static_cast<int>(w.split * h.cells / m.splits);
    w.panel_end = static_cast<int>((w.split + 1) * h.cells / m.splits);
  }

  PYLLMQ_MEMBER static void run(const Multiplication& m, Shared& shared) {
    const Work& w = shared.work;
    for (int first = 0; first < w.tokens; first += kTokens) {
      for (int i = ptx::thread(); i < kTokens * kItemRows; i += kThreads) shared.totals[i / kItemRows][i % kItemRows] = 0.0f;
      for (int panel = w.panel_begin; panel < w.panel_end; ++panel) {
        ptx::sync_block();  // all are done with x, and see the sums begin at 0
        stage_panel<kTokens>(panel, w.tokens - first, m.columns, shared.x, [&](int token, int64_t column) {
          return load_element(m.x.source, m.x.dtype, w.x_row[first + token] * m.columns + column);
        });
        ptx::sync_block();  // x is there
        add_panel<kType, kTokens>(*w.header, panel, w.row_begin, w.rows, false, shared.x, shared.totals);
      }
      ptx::sync_block();  // the sums are there
      finish(m, w, first, shared);
      ptx::sync_block();  // before the sums begin again
    }
  }

 private:
  PYLLMQ_MEMBER static void finish(const Multiplication& m, const Work& w, int first, const Shared& shared) {
    const SparseHeader& h = *w.header;
    const int tokens = w.tokens - first < kTokens ? w.tokens - first : kTokens;
    for (int i = ptx::thread(); i < tokens * w.rows; i += kThreads) {
      const int token = i / w.rows, row = i % w.rows;
      float sum = shared.totals[token][row];
      if (h.scale_offset != 0) sum *= section<float>(h, h.scale_offset)[w.row_begin + row];
      sums_of(m, w.split, w.first_pair + first + token)[w.row_begin + row] = sum;
    }
  }
};

template <ValueType kType, int kTokens>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) experts_multiply_columns_kernel(const Multiplication m) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  multiply_items<ColumnWeights<kType, kTokens>>(m, memory);
}

template <ValueType kType>
void launch(const Multiplication& m, const MultiplyPlan& plan, int64_t items, uintptr_t stream) {
  const auto run = [&](auto kernel) {
    allow_shared(reinterpret_cast<const void*>(kernel), plan.shared_bytes);
    PYLLMQ_LAUNCH(kernel, std::min(plan.slots, items), kThreads, plan.shared_bytes, stream, m);
    check_launch("routed_experts, multiply by column numbers");
  };
  if (plan.pairs_at_once == 1) return run(experts_multiply_columns_kernel<kType, 1>);
  run(experts_multiply_columns_kernel<kType, kMostTokens>);
}

}  // namespace

MultiplyPlan plan_columns(const MultiplyProblem& problem, int64_t splits) {
  MultiplyPlan plan{};
  plan.slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  plan.part_rows = kItemRows;
  plan.parts = ceil_div(problem.rows, kItemRows);
  const int64_t panels = ceil_div(problem.columns, kPanelColumns), items = problem.likely_tiles * plan.parts;
  plan.splits = splits > 0 ? splits : std::clamp<int64_t>(ceil_div(plan.slots, items), 1, panels);
  plan.stage = 1;
  plan.warps = kWarps;
  plan.pairs_at_once = problem.tokens == 1 ? 1 : kMostTokens;
  plan.shared_bytes = static_cast<int64_t>(problem.tokens == 1 ? sizeof(ColumnWeights<ValueType::fp32, 1>::Shared)
                                                               : sizeof(ColumnWeights<ValueType::fp32, kMostTokens>::Shared));
  return plan;
}

void multiply_columns(const Multiplication& m, const MultiplyPlan& plan, int64_t items, uintptr_t stream) {
  switch (m.weights.values) {
    case ValueType::fp32: return launch<ValueType::fp32>(m, plan, items, stream);
    case ValueType::bf16: return launch<ValueType::bf16>(m, plan, items, stream);
    case ValueType::fp16: return launch<ValueType::fp16>(m, plan, items, stream);
    case ValueType::int8: return launch<ValueType::int8>(m, plan, items, stream);
  }
}

}  // namespace pyllmq::cuda

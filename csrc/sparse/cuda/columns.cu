// bitmap_linear and sparse24_linear by column numbers (layout `cuda.columns`): the work is that of the kept weights alone, so it
// serves where few are kept; and fp32 values, whose products are fp32 here.
//
// A block takes 64 rows and a range of panels of 4096 columns, with x of one panel and 1, 2 or 4 tokens in shared memory. Of a
// warp's row the lanes take 8 entries each, a scan of their steps gives their columns, and the lanes' sums are added at the end
// of the row's panel. The next entries are loaded before these are multiplied.
#include <algorithm>
#include <limits>

#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "sparse/cuda/column_entries.cuh"
#include "sparse/cuda/operand.h"

namespace pyllmq::cuda {
namespace {

struct Arguments {
  LinearCall call;
  int splits, tokens_per_block;
};

template <int kTokens>
struct Shared {
  PanelX<kTokens> x;
  RowTotals<kTokens> totals;
  uint32_t arrived;
};

template <ValueType kType, int kTokens>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sparse_columns_linear_kernel(const Arguments a, int row_blocks, int items) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<kTokens>*>(memory);
  const LinearCall& call = a.call;
  const auto dtype = static_cast<DType>(call.dtype);
  const auto& h = *reinterpret_cast<const SparseHeader*>(call.layout);
  ptx::let_next_begin();
  if (!describes(h, SparseKind::columns, call.layout_bytes, call.rows, call.columns) || h.values != kType)
    return store_nan(call.y, dtype, call.tokens * call.rows, kThreads);

  for (auto item = static_cast<int>(ptx::block()); item < items; item += static_cast<int>(ptx::blocks())) {
    const int split = item % a.splits, row_block = item / a.splits % row_blocks;
    const int64_t token_begin = int64_t{item / a.splits / row_blocks} * kTokens;
    const int64_t row_begin = int64_t{row_block} * kItemRows;
    const int rows = call.rows - row_begin < kItemRows ? static_cast<int>(call.rows - row_begin) : kItemRows;
    const int tokens = call.tokens - token_begin < kTokens ? static_cast<int>(call.tokens - token_begin) : kTokens;

    const int64_t first_panel = split * h.cells / a.splits, last_panel = (split + 1) * h.cells / a.splits;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      ptx::sync_block();  // all are done with x, and with the item before
      stage_panel<kTokens>(panel, tokens, call.columns, shared.x, [&](int token, int64_t column) {
        return load_element(call.x, dtype, (token_begin + token) * call.columns + column);
      });
      ptx::sync_block();  // x is there
      add_panel<kType, kTokens>(h, panel, row_begin, rows, panel == first_panel, shared.x, shared.totals);
    }
    ptx::sync_block();

    const auto for_each_output = [&](const auto& body) {
      for (int i = ptx::thread(); i < tokens * rows; i += kThreads) body(i / rows, i % rows);
    };
    const auto sum_of = [&](int token, int row) {
      const float sum = shared.totals[token][row];
      return h.scale_offset == 0 ? sum : sum * section<float>(h, h.scale_offset)[row_begin + row];
    };
    uint32_t* counter = counter_of(call, h, token_begin / kTokens, h.strips, row_block);
    store_outputs(call, a.splits, split, counter, token_begin, row_begin, shared.arrived, for_each_output, sum_of);
  }
}

template <ValueType kType, int kTokens>
void launch(const SparsePlan& plan, int64_t row_blocks, int64_t items, const LinearCall& call, uintptr_t stream) {
  const Arguments arguments{call, static_cast<int>(plan.splits), kTokens};
  const auto kernel = sparse_columns_linear_kernel<kType, kTokens>;
  allow_shared(reinterpret_cast<const void*>(kernel), sizeof(Shared<kTokens>));
  PYLLMQ_LAUNCH(kernel, plan.grid, kThreads, sizeof(Shared<kTokens>), stream, arguments, static_cast<int>(row_blocks),
                static_cast<int>(items));
  check_launch("sparse_columns_linear");
}

template <ValueType kType>
void launch_tokens(const SparsePlan& plan, const LinearCall& call, int64_t row_blocks, int64_t items, uintptr_t stream) {
  if (plan.tokens_per_block == 1) return launch<kType, 1>(plan, row_blocks, items, call, stream);
  if (plan.tokens_per_block == 2) return launch<kType, 2>(plan, row_blocks, items, call, stream);
  launch<kType, kMostTokens>(plan, row_blocks, items, call, stream);
}

}  // namespace

SparsePlan SparseOperand::plan_columns(int64_t tokens) const {
  SparsePlan plan{};
  plan.warps = kWarps;
  plan.tokens_per_block = tokens <= 2 ? tokens : kMostTokens;
  plan.token_blocks = ceil_div(tokens, plan.tokens_per_block);
  const int64_t slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  const int64_t blocks = ceil_div(rows, kItemRows) * plan.token_blocks;
  plan.splits = std::clamp<int64_t>(ceil_div(slots, blocks), 1, ceil_div(columns, kPanelColumns));
  plan.grid = std::min(slots, blocks * plan.splits);
  if (plan.splits > 1) plan.partials = plan.splits * tokens * rows;
  return plan;
}

void SparseOperand::run_columns(const LinearCall& call, uintptr_t stream) const {
  const SparsePlan plan = plan_columns(call.tokens);
  const int64_t row_blocks = ceil_div(rows, kItemRows), items = row_blocks * plan.token_blocks * plan.splits;
  if (items > std::numeric_limits<int32_t>::max()) refuse_work("sparse_columns_linear", call);
  switch (values) {
    case ValueType::fp32: return launch_tokens<ValueType::fp32>(plan, call, row_blocks, items, stream);
    case ValueType::bf16: return launch_tokens<ValueType::bf16>(plan, call, row_blocks, items, stream);
    case ValueType::fp16: return launch_tokens<ValueType::fp16>(plan, call, row_blocks, items, stream);
    case ValueType::int8: return launch_tokens<ValueType::int8>(plan, call, row_blocks, items, stream);
  }
}

}  // namespace pyllmq::cuda

// bitmap_linear and sparse24_linear by column numbers (layout `cuda.columns`): the work is that of the kept weights alone, so it
// serves where few are kept; and fp32 values, whose products are fp32 here.
//
// A block takes 64 rows and a range of panels of 4096 columns, with x of one panel and 1, 2 or 4 tokens in shared memory. A warp
// takes every eighth row: its lanes take 8 entries each, a scan of the lanes' steps gives their columns, and the lanes' sums
// are added at the end of the row's panel. The next entries are loaded before these are multiplied.
#include <algorithm>
#include <limits>

#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "sparse/cuda/layout.h"
#include "sparse/cuda/operand.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kItemRows = kStripRows;
constexpr int kMostTokens = 4;
constexpr int kWarpEntries = 32 * kEntryGroup;
constexpr int kBlocksPerMultiprocessor = 2;

struct Arguments {
  LinearCall call;
  int splits, tokens_per_block;
};

template <int kTokens>
struct Shared {
  float x[kPanelColumns + 1][kTokens];  // the last is 0: where steps that fill up may end
  float total[kTokens][kItemRows];
  uint32_t arrived;
};

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
PYLLMQ_DEVICE void add_row(const SparseHeader& h, const float (*x)[kTokens], int64_t begin, int64_t end, float (&sums)[kTokens]) {
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

template <ValueType kType, int kTokens>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sparse_columns_linear_kernel(const Arguments a, int row_blocks, int items) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<kTokens>*>(memory);
  const LinearCall& call = a.call;
  const auto dtype = static_cast<DType>(call.dtype);
  const auto& h = *reinterpret_cast<const SparseHeader*>(call.layout);
  const int warp = ptx::thread() / 32, lane = ptx::thread() % 32;
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
      for (int i = ptx::thread(); i < (kPanelColumns + 1) * kTokens; i += kThreads) {
        const int token = i / (kPanelColumns + 1), column = i % (kPanelColumns + 1);
        const int64_t k = panel * kPanelColumns + column;
        shared.x[column][token] = column < kPanelColumns && k < call.columns && token < tokens
                                      ? load_element(call.x, dtype, (token_begin + token) * call.columns + k)
                                      : 0.0f;
      }
      ptx::sync_block();
      for (int row = warp; row < rows; row += kWarps) {
        const uint32_t* begin = section<uint32_t>(h, h.begin_offset) + panel * (h.rows + 1) + row_begin + row;
        float sums[kTokens] = {};
        add_row<kType, kTokens>(h, shared.x, int64_t{begin[0]} * kEntryGroup, int64_t{begin[1]} * kEntryGroup, sums);
        unrolled<kTokens>([&](int token) {
          for (int mask = 16; mask > 0; mask /= 2) sums[token] += ptx::shuffle_xor(sums[token], mask);
          if (lane != 0) return;
          float& to = shared.total[token][row];
          to = panel == first_panel ? sums[token] : to + sums[token];
        });
      }
    }
    ptx::sync_block();

    const auto for_each_output = [&](const auto& body) {
      for (int i = ptx::thread(); i < tokens * rows; i += kThreads) body(i / rows, i % rows);
    };
    const auto sum_of = [&](int token, int row) {
      const float sum = shared.total[token][row];
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

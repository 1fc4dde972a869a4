// codebook_linear for few tokens: codes are decoded in registers and multiplied by tensor cores (product.cuh), in one launch, by
// the frame of streamed_linear.cuh.
#include "codebook/cuda/product.cuh"
#include "codebook/cuda/stream.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 2;

struct Work : Product {
  Range panels;
};

// Shared memory: this, the warps' rings (after the loop: the sums), x.
struct Shared {
  Item item;
  Work work;
  XScales<kMostProductColumns, kProductWarps> scales;
  uint32_t arrived;
  alignas(16) Rings ring;
};
static_assert(sizeof(Shared) + kMostXBytes <= 99 << 10, "what a block gets on compute capability 8.6");
static_assert(sizeof(Shared) % 16 == 0, "x lies behind it");

template <int kTokenTiles>
struct FewTokens : CodebookStream<kBlockRows / kTokenTiles, Shared> {
  using Base = CodebookStream<kBlockRows / kTokenTiles, Shared>;
  using Base::a, Base::h, Base::shared;

  PYLLMQ_MEMBER void take(Item& item) const {
    Base::take(item);
    if (ptx::thread() != 0) return;
    Work& w = shared.work;
    w.header = &h;
    w.tokens = item.tokens;
    w.planes = item.planes;
  }

  PYLLMQ_MEMBER void multiply() const {
    const Work& w = shared.work;
    auto* x_shared = reinterpret_cast<uint16_t*>(&shared + 1);
    uint8_t* ring = shared.ring[ptx::thread() / 32];
    prefetch_codes();
    const auto for_each_slot = [&](const auto& body) {
      int staged = 0;
      for (int width = 1; width <= 8; ++width) {
        const GroupRange range = w.groups[width];
        const int32_t* columns = section<int32_t>(h, h.columns_offset) + h.first_slot[width] + range.begin * kGroupColumns;
        const int slots = (range.end - range.begin) * kGroupColumns;
        for (int slot = ptx::thread(); slot < slots; slot += kProductThreads) body(staged + slot, columns[slot]);
        staged += slots;
      }
    };
    stage_x<false>(a.call, shared.item, kProductWarps, shared.scales, x_shared, for_each_slot,
                   [&](int slot, int column) { return slot * w.columns() + column; });
    TileSums<kTokenTiles> sums[kBlockTiles / kTokenTiles] = {};
    accumulate_all<kTokenTiles>(w, ring, x_shared, sums);
    store_sums<kTokenTiles>(w, sums, ring);
  }

  PYLLMQ_MEMBER float sum(int token, int row) const {
    const auto of_warps = [&](int column) { return sum_of_warps<kTokenTiles>(shared.ring, column, row); };
    return Base::finished(token, row, sum_of_planes<false>(shared.item, shared.scales, token, of_warps));
  }
  PYLLMQ_MEMBER float* place(int token, int row) const {
    return reinterpret_cast<float*>(shared.ring[0]) + place_of_sum<kTokenTiles>(token * shared.item.planes, row);
  }

 private:
  // The codes of a warp's first groups leave memory while x is brought into order.
  PYLLMQ_MEMBER void prefetch_codes() const {
    constexpr int kAhead = 3, kLine = 128;
    const Work& w = shared.work;
    const int lane = ptx::thread() % 32, tiles = (w.rows + kTileRows - 1) / kTileRows;
    for (int width = 1; width <= 8; ++width) {
      const int end = w.groups[width].end;
      int group = w.groups[width].begin + ptx::thread() / 32;
      if (group >= end) continue;
      for (const int last = group + kAhead * kProductWarps; group < end && group < last; group += kProductWarps) {
        const uint8_t* codes = reinterpret_cast<const uint8_t*>(&h) + codes_offset(h, width, w.block, group) +
                               w.first_row / kTileRows * tile_bytes(width);
        for (int at = lane * kLine; at < tiles * tile_bytes(width); at += 32 * kLine) ptx::prefetch(codes + at);
      }
      return;
    }
  }
};

template <int kTokenTiles>
PYLLMQ_KERNEL void __launch_bounds__(kProductThreads, kBlocksPerMultiprocessor) codebook_linear_kernel(const StreamArguments a) {
  run_items<FewTokens<kTokenTiles>>(a, kProductThreads);
}

LinearPlan plan_linear(int64_t rows, int64_t columns, int64_t tokens, int dtype) {
  const int64_t planes = planes_of(false, static_cast<DType>(dtype));
  LinearPlan plan{};
  plan.token_tiles = tokens * planes <= 4 ? 1 : tokens * planes <= 8 ? 2 : 4;
  plan.set_tokens(tokens, 4 * plan.token_tiles / planes);
  plan.threads = kProductThreads;
  plan.slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  plan.row_parts = ceil_div(rows, kBlockRows / plan.token_tiles);

  // Of x a split of q panels stages at most 16 q + 8 groups, since each of 8 widths rounds up to one.
  const int64_t panels = most_panels(columns, 8), group_x = kGroupColumns * 2 * plan.tokens_per_block * planes;
  plan.set_splits(panels_of(columns), ceil_div(panels, (kMostXBytes / group_x - 8) / kPanelGroups), 1,
                  [](int64_t of_item) { return of_item; });
  plan.shared_bytes = sizeof(Shared) + (ceil_div(panels, plan.splits) * kPanelGroups + 8) * group_x;
  return plan;
}

}  // namespace

int64_t CodebookOperand::find_room(int64_t tokens, int dtype) const {
  return plan_linear(rows, columns, tokens, dtype).partials(tokens, rows);
}

void CodebookOperand::run(const LinearCall& call, uintptr_t stream) const {
  const LinearPlan plan = plan_linear(rows, columns, call.tokens, call.dtype);
  const auto kernel = plan.token_tiles == 1   ? codebook_linear_kernel<1>
                      : plan.token_tiles == 2 ? codebook_linear_kernel<2>
                                              : codebook_linear_kernel<4>;
  launch_items("codebook_linear", kernel, plan, plan.arguments(call), stream);
}

}  // namespace pyllmq::cuda

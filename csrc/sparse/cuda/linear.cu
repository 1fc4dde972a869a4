// bitmap_linear, sparse24_linear and sparse24_codebook_linear for few tokens: cells of W times x (product.cuh), by the frame of
// streamed_linear.cuh.
#include "sparse/cuda/product.cuh"
#include "sparse/cuda/stream.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kMostTokens = 16;  // columns of the product

struct Arguments : StreamArguments {
  int stage_bytes, warps, x_bytes, warp_bytes;
};

// Shared memory: this, x, the warps' rings and tables (after the loop: the sums).
struct alignas(16) Shared {
  Item item;
  Strips work;
  XScales<kMostTokens, kMostWarps> scales;
  uint32_t arrived;
};

template <class Cells, int kTokenTiles>
struct FewTokens : SparseStream<Cells, kStripsOf<kTokenTiles>, Shared, Arguments> {
  using Base = SparseStream<Cells, kStripsOf<kTokenTiles>, Shared, Arguments>;
  using Base::a, Base::h, Base::shared;
  static constexpr bool kOnce = kTokenTiles == 1;  // so few tokens are one block's

  PYLLMQ_MEMBER static bool serves(const SparseHeader& h, const Arguments& a) {
    return Base::describes_cells(h, a, a.stage_bytes);
  }

  PYLLMQ_MEMBER void multiply() const {
    const Strips& w = shared.work;
    const Item& item = shared.item;
    auto* x_shared = reinterpret_cast<uint16_t*>(&shared + 1);
    uint8_t* ring = of_warp(ptx::thread() / 32);
    CellCursor<Cells, kOnce> cursor{h, w, w.cells, a.warps};
    cursor.prefetch(ptx::thread() % 32);

    const int64_t begin = int64_t{w.cells.begin} * Cells::kColumns;
    const int slots = (w.cells.end - w.cells.begin) * Cells::kColumns;
    const auto for_each_slot = [&](const auto& body) {
      for (int slot = ptx::thread(); slot < slots; slot += a.warps * 32)
        body(slot, begin + slot < a.call.columns ? begin + slot : -1);
    };
    stage_x<Cells::kBf16>(a.call, item, a.warps, shared.scales, x_shared, for_each_slot,
                          [&](int slot, int column) { return place_of_x(slot, column, item.columns()); });

    BlockSums<kTokenTiles> sums = {};
    accumulate<Cells, kOnce, kTokenTiles>(cursor, ring, a.stage_bytes, x_shared, [&] { return item.columns(); }, sums);
    store_sums<kTokenTiles>(sums, item.columns(), ring);
  }

  PYLLMQ_MEMBER float sum(int token, int row) {
    const auto of_warps = [&](int column) { return sum_of_warps<kTokenTiles>(of_warp(0), a.warp_bytes, a.warps, column, row); };
    return Base::finished(token, row, sum_of_planes<Cells::kBf16>(shared.item, shared.scales, token, of_warps));
  }
  PYLLMQ_MEMBER float* place(int token, int row) const {
    return reinterpret_cast<float*>(of_warp(0)) + token * shared.item.planes * kSumStride<kTokenTiles> + row;
  }

 private:
  PYLLMQ_MEMBER uint8_t* of_warp(int warp) const {
    return reinterpret_cast<uint8_t*>(&shared + 1) + a.x_bytes + warp * a.warp_bytes;
  }
};

template <class Cells, int kTokenTiles>
PYLLMQ_KERNEL void __launch_bounds__(kMostWarps * 32, Cells::kBlocks) sparse_linear_kernel(const Arguments a) {
  run_items<FewTokens<Cells, kTokenTiles>>(a, a.warps * 32);
}

struct SparseLinearPlan : LinearPlan {
  int64_t x_bytes, warp_bytes;
};

template <class Cells>
SparseLinearPlan plan_linear(const SparseOperand& operand, int64_t tokens, int dtype) {
  const int64_t planes = planes_of(Cells::kBf16, static_cast<DType>(dtype)), shared_limit = shared_bytes();
  SparseLinearPlan plan{};
  plan.token_tiles = tokens * planes <= 8 ? 1 : 2;
  plan.set_tokens(tokens, 8 * plan.token_tiles / planes);
  plan.row_parts = ceil_div(ceil_div(operand.rows, kStripRows), kBlockStrips / plan.token_tiles);
  const int64_t cells = ceil_div(operand.columns, Cells::kColumns), cell_x = Cells::kColumns * plan.tokens_per_block * planes * 2;
  plan.warp_bytes =
      plan.token_tiles == 1 ? cell_ring_bytes<Cells, 1>(operand.stage_bytes) : cell_ring_bytes<Cells, 2>(operand.stage_bytes);
  const auto bytes = [&](int64_t warps, int64_t x_bytes) { return int64_t{sizeof(Shared)} + x_bytes + warps * plan.warp_bytes; };

  const int64_t most_x = std::min(kMostXBytes, cells * cell_x);
  int64_t warps = kMostWarps;
  while (warps > 1 && bytes(warps, most_x) > shared_limit) warps /= 2;
  plan.threads = static_cast<int>(warps * 32);
  // 1 KiB of every block, and of the device's limit, is the driver's.
  const int64_t resident = std::clamp<int64_t>((shared_limit + 1024) / (bytes(warps, most_x) + 1024), 1, Cells::kBlocks);
  plan.slots = multiprocessors() * resident;
  const int64_t strips = kBlockStrips / plan.token_tiles;
  plan.set_splits(cells, ceil_div(cells, kMostXBytes / cell_x), kItemCost,
                  [&](int64_t of_item) { return ceil_div(of_item, warps) * strips; });
  plan.x_bytes = ceil_div(cells, plan.splits) * cell_x;
  plan.shared_bytes = bytes(warps, plan.x_bytes);
  return plan;
}

}  // namespace

int64_t SparseOperand::find_room(int64_t tokens, int dtype) const {
  if (kind == SparseKind::columns) return plan_columns(tokens).partials;
  int64_t room = 0;
  with_cells(kind, values, bits,
             [&](auto cells) { room = plan_linear<decltype(cells)>(*this, tokens, dtype).partials(tokens, rows); });
  return room;
}

void SparseOperand::run(const LinearCall& call, uintptr_t stream) const {
  if (kind == SparseKind::columns) return run_columns(call, stream);
  with_cells(kind, values, bits, [&](auto cells) {
    using Cells = decltype(cells);
    const SparseLinearPlan plan = plan_linear<Cells>(*this, call.tokens, call.dtype);
    const Arguments arguments{plan.arguments(call), static_cast<int>(stage_bytes), plan.threads / 32,
                              static_cast<int>(plan.x_bytes), static_cast<int>(plan.warp_bytes)};
    launch_items("sparse_linear", plan.token_tiles == 1 ? sparse_linear_kernel<Cells, 1> : sparse_linear_kernel<Cells, 2>, plan,
                 arguments, stream);
  });
}

}  // namespace pyllmq::cuda

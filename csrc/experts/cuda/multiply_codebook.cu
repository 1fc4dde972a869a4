// Experts packed as codebooks: codes decoded in registers once for a tile of pairs (codebook/cuda/product.cuh).
#include <algorithm>

#include "codebook/cuda/entries.cuh"
#include "codebook/cuda/fp16_planes.cuh"
#include "codebook/cuda/product.cuh"
#include "experts/cuda/multiply.cuh"
#include "experts/cuda/multiply.h"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kThreads = kProductThreads;
constexpr int64_t kMostXBytes = 24 << 10;  // as codebook_linear's: one block fits on compute capability 8.6, two on 9.0
constexpr int kBlocksPerMultiprocessor = 2;

template <int kTokenTiles>
struct CodebookWeights {
  using Header = LayoutHeader;
  struct Work : Item<LayoutHeader> {
    Product product;
    int panel_begin, panel_end, panel;  // panel: the first that is not multiplied yet
  };
  // Shared memory: this, then x.
  struct Shared {
    Work work;
    alignas(16) Rings ring;
  };
  static_assert(sizeof(Shared) + kMostXBytes <= 99 << 10, "what a block gets on compute capability 8.6");
  static_assert(sizeof(Shared) % 16 == 0, "x lies behind it");

  PYLLMQ_MEMBER static int threads(const Multiplication&) { return kThreads; }

  PYLLMQ_MEMBER static bool is_one(const Multiplication& m, const LayoutHeader& h, int64_t bytes) {
    return describes(h, bytes, m.rows, m.columns);
  }

  PYLLMQ_MEMBER static void take(const Multiplication& m, int part, Work& w) {
    const LayoutHeader& h = *w.header;
    const int of_block = kBlockRows / m.part_rows;
    Product& p = w.product;
    p.header = &h;
    p.tokens = w.tokens;
    p.planes = m.planes;
    p.first_row = part % of_block * m.part_rows;
    if (part / of_block >= h.blocks) return;
    p.block = section<RowBlock>(h, h.blocks_offset)[part / of_block];
    p.rows = p.block.rows - p.first_row < m.part_rows ? p.block.rows - p.first_row : m.part_rows;
    w.rows = p.rows;
    w.panel_begin = w.panel = static_cast<int>(w.split * h.panels / m.splits);
    w.panel_end = static_cast<int>((w.split + 1) * h.panels / m.splits);
  }

  PYLLMQ_MEMBER static void run(const Multiplication& m, Shared& shared) {
    Work& w = shared.work;
    auto* x_shared = reinterpret_cast<uint16_t*>(&shared + 1);
    TileSums<kTokenTiles> sums[kBlockTiles / kTokenTiles] = {};
    do {
      ptx::sync_block();  // the stage before is multiplied
      if (ptx::thread() >= 1 && ptx::thread() <= 8) {
        const int end = w.panel + m.stage < w.panel_end ? w.panel + m.stage : w.panel_end;
        w.product.groups[ptx::thread()] = panel_groups(*w.header, ptx::thread(), w.panel, end);
      }
      ptx::sync_block();
      if (ptx::thread() == 0) w.panel += m.stage;
      stage_x(m, w, x_shared);
      ptx::sync_block();
      accumulate_all<kTokenTiles>(w.product, shared.ring[ptx::thread() / 32], x_shared, sums);
    } while (w.panel < w.panel_end);
    store_sums<kTokenTiles>(w.product, sums, shared.ring[ptx::thread() / 32]);
    ptx::sync_block();
    finish(m, w, shared.ring);
  }

 private:
  // x of the block's columns, in the order of its groups, as fp16 [slot, column of the product].
  PYLLMQ_MEMBER static void stage_x(const Multiplication& m, const Work& w, uint16_t* x_shared) {
    const auto* column_of = section<int32_t>(*w.header, w.header->columns_offset);
    const int planes = m.planes, product_columns = w.product.columns();
    int staged = 0;
    for (int width = 1; width <= 8; ++width) {
      const GroupRange range = w.product.groups[width];
      const int32_t* columns = column_of + w.header->first_slot[width] + range.begin * kGroupColumns;
      const int slots = (range.end - range.begin) * kGroupColumns;
      for (int slot = ptx::thread(); slot < slots; slot += kThreads) {
        uint16_t* to = x_shared + (staged + slot) * product_columns;
        for (int i = 0; i < product_columns; ++i) {
          const int64_t row = int64_t{w.x_row[i / planes]} * planes + i % planes;
          to[i] = columns[slot] < 0 ? 0 : m.x.planes[row * m.columns + columns[slot]];
        }
      }
      staged += slots;
    }
  }

  // Sums of all warps, row scale, outliers.
  PYLLMQ_MEMBER static void finish(const Multiplication& m, const Work& w, const Rings& rings) {
    const LayoutHeader& h = *w.header;
    const Product& p = w.product;
    const int64_t row_begin = p.block.row_begin + p.first_row;
    for (int token = 0; token < w.tokens; ++token) {
      const uint16_t* x = m.x.planes + int64_t{w.x_row[token]} * m.planes * h.columns;
      const float unscale = m.x.unscale[w.x_row[token]];
      for (int row = ptx::thread(); row < w.rows; row += kThreads) {
        float sum = sum_of_warps<kTokenTiles>(rings, token * m.planes, row);
        if (m.planes == 2) sum += sum_of_warps<kTokenTiles>(rings, token * 2 + 1, row) * (1.0f / kLowPlane);
        if (h.row_scale_offset != 0) sum *= ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[row_begin + row]);
        if (h.outliers != 0) {
          const int in_block = p.first_row + row;
          for_outliers(h, w.panel_begin, w.panel_end, p.block.tile_begin + in_block / kTileRows, in_block % kTileRows,
                       [&](int64_t i) {
                         const int32_t column = section<int32_t>(h, h.outlier_columns_offset)[i];
                         float value = ptx::fp16_to_fp32(x[column]);
                         if (m.planes == 2) value += ptx::fp16_to_fp32(x[h.columns + column]) * (1.0f / kLowPlane);
                         sum += section<float>(h, h.outlier_deltas_offset)[i] * value;
                       });
        }
        sums_of(m, w.split, w.first_pair + token)[row_begin + row] = sum * unscale;
      }
    }
  }
};

template <int kTokenTiles>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    experts_multiply_codebook_kernel(const Multiplication m) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  multiply_items<CodebookWeights<kTokenTiles>>(m, memory);
}

// Columns of the product, in units of 4.
int64_t token_tiles_of(int64_t product_columns) { return product_columns <= 4 ? 1 : product_columns <= 8 ? 2 : 4; }

// Shared memory for x: `panels` panels have at most 16 groups each and 8 more, since each of 8 widths rounds up to a group.
int64_t staged_bytes(int64_t panels, int64_t product_columns) {
  return (panels * kPanelGroups + 8) * kGroupColumns * product_columns * 2;
}

}  // namespace

MultiplyPlan plan_codebook(const MultiplyProblem& problem, int64_t splits) {
  const int64_t product_columns = problem.tile_pairs * problem.planes, blocks = problem.weights.size;
  const int64_t panels = ceil_div(ceil_div(problem.columns, kGroupColumns) + 7, kPanelGroups);
  MultiplyPlan plan{};
  plan.pairs_at_once = problem.tile_pairs;
  plan.slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  plan.part_rows = kBlockRows / token_tiles_of(product_columns);
  const auto cells = [&] { return problem.likely_tiles * blocks * (kBlockRows / plan.part_rows); };
  // Fewer rows a block where K has too few panels to fill the device: each block stages x and loads codebooks of its own.
  while (plan.part_rows > kTileRows && cells() * panels < plan.slots) plan.part_rows /= 2;
  plan.parts = blocks * (kBlockRows / plan.part_rows);
  plan.splits = splits > 0 ? splits : std::clamp<int64_t>(ceil_div(plan.slots, cells()), 1, panels);
  plan.stage = 1;
  while (staged_bytes(plan.stage + 1, product_columns) <= kMostXBytes) ++plan.stage;
  plan.stage = std::min(plan.stage, ceil_div(panels, plan.splits));
  plan.x_bytes = staged_bytes(plan.stage, product_columns);
  plan.shared_bytes = static_cast<int64_t>(sizeof(CodebookWeights<1>::Shared)) + plan.x_bytes;
  plan.warps = kProductWarps;
  return plan;
}

void multiply_codebook(const Multiplication& m, const MultiplyPlan& plan, int64_t items, uintptr_t stream) {
  const auto launch = [&](auto kernel) {
    allow_shared(reinterpret_cast<const void*>(kernel), sizeof(CodebookWeights<1>::Shared) + kMostXBytes);
    PYLLMQ_LAUNCH(kernel, std::min(plan.slots, items), kThreads, plan.shared_bytes, stream, m);
    check_launch("routed_experts, multiply by codebooks");
  };
  const int64_t token_tiles = token_tiles_of(plan.pairs_at_once * m.planes);
  if (token_tiles == 1) launch(experts_multiply_codebook_kernel<1>);
  if (token_tiles == 2) launch(experts_multiply_codebook_kernel<2>);
  if (token_tiles == 4) launch(experts_multiply_codebook_kernel<4>);
}

}  // namespace pyllmq::cuda

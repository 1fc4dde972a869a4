// Experts packed as bitmap, 2:4 or 2:4 with codes: cells of W, spread or looked up once for a tile of pairs, times x
// (sparse/cuda/product.cuh). A block takes some strips and a split of the cells of K, in stages of those whose x is in shared
// memory at once.
#include <algorithm>

#include "codebook/cuda/fp16_planes.cuh"
#include "experts/cuda/multiply.cuh"
#include "experts/cuda/multiply.h"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "sparse/cuda/product.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int64_t kMostXBytes = 24 << 10;

// Blocks of a multiprocessor: four would leave 128 registers to a thread, of which one kernel spills two.
template <class Cells>
constexpr int kBlocks = Cells::kBlocks < 3 ? Cells::kBlocks : 3;

template <class Cells, int kTokenTiles>
struct CellWeights {
  using Header = SparseHeader;
  struct Work : Item<SparseHeader> {
    Strips strips;
  };
  // Shared memory: this, x, the warps' rings and tables (after the loop: the sums).
  struct alignas(16) Shared {
    Work work;
  };

  PYLLMQ_MEMBER static int threads(const Multiplication& m) { return 32 * m.warps; }

  PYLLMQ_MEMBER static bool is_one(const Multiplication& m, const SparseHeader& h, int64_t bytes) {
    if (!describes(h, Cells::kKind, bytes, m.rows, m.columns)) return false;
    if (Cells::kKind == SparseKind::codes ? (h.bits == 2) != (m.weights.bits == 2) : h.values != m.weights.values) return false;
    return Cells::kKind == SparseKind::bitmap ? h.stage_bytes <= m.weights.size : h.stage_bytes == m.weights.size;
  }

  PYLLMQ_MEMBER static void take(const Multiplication& m, int part, Work& w) {
    const SparseHeader& h = *w.header;
    w.strips.take(h, part * kStripsOf<kTokenTiles>, kStripsOf<kTokenTiles>, m.splits, w.split);
    w.rows = w.strips.rows(h);
  }

  PYLLMQ_MEMBER static void run(const Multiplication& m, Shared& shared) {
    const Work& w = shared.work;
    const Strips& strips = w.strips;
    auto* x_shared = reinterpret_cast<uint16_t*>(&shared + 1);
    uint8_t* rings = reinterpret_cast<uint8_t*>(&shared + 1) + m.x_bytes;
    const auto stage_bytes = static_cast<int>(m.weights.size);
    const int64_t ring_bytes = cell_ring_bytes<Cells, kTokenTiles>(stage_bytes);
    uint8_t* const ring = rings + ptx::thread() / 32 * ring_bytes;
    BlockSums<kTokenTiles> sums = {};
    for (int begin = strips.cells.begin; begin < strips.cells.end; begin += m.stage) {
      const Range cells{begin, begin + m.stage < strips.cells.end ? begin + m.stage : strips.cells.end};
      CellCursor<Cells, false> cursor{*w.header, strips, cells, m.warps};
      cursor.prefetch(ptx::thread() % 32);
      ptx::sync_block();  // the stage before is multiplied
      stage_x(m, w, cells, x_shared);
      ptx::sync_block();  // x is there
      accumulate<Cells, false, kTokenTiles>(cursor, ring, stage_bytes, x_shared, [&] { return w.tokens * m.planes; }, sums);
    }
    store_sums<kTokenTiles>(sums, w.tokens * m.planes, ring);
    ptx::sync_block();  // all warps' sums are there
    finish(m, w, rings, ring_bytes);
  }

 private:
  // x of these cells.
  PYLLMQ_MEMBER static void stage_x(const Multiplication& m, const Work& w, const Range& cells, uint16_t* x_shared) {
    const int64_t begin = int64_t{cells.begin} * Cells::kColumns;
    const int slots = (cells.end - cells.begin) * Cells::kColumns, product_columns = w.tokens * m.planes;
    for (int token = 0; token < w.tokens; ++token) {
      const int64_t row = w.x_row[token];
      for (int slot = ptx::thread(); slot < slots; slot += threads(m)) {
        const int64_t column = begin + slot;
        uint16_t* to = x_shared + place_of_x(slot, token * m.planes, product_columns);
        const bool inside = column < m.columns;
        if constexpr (Cells::kBf16) {
          float rest = inside ? load_element(m.x.source, m.x.dtype, row * m.columns + column) : 0.0f;
          for (int plane = 0; plane < m.planes; ++plane) {
            to[plane * kStepColumns] = ptx::fp32_to_bf16(rest);
            rest -= bf16_to_fp32(to[plane * kStepColumns]);
          }
        } else {
          for (int plane = 0; plane < m.planes; ++plane)
            to[plane * kStepColumns] = inside ? m.x.planes[(row * m.planes + plane) * m.columns + column] : 0;
        }
      }
    }
  }

  // What the outliers of a row in this split's columns add for a token, in the unit of its planes.
  PYLLMQ_MEMBER static float outliers_of(const Multiplication& m, const Work& w, int token, int64_t row) {
    const SparseHeader& h = *w.header;
    const uint16_t* x = m.x.planes + int64_t{w.x_row[token]} * m.planes * m.columns;
    const auto first_of = [&](int cell) { return outlier_from(h, row, int64_t{cell} * Cells::kColumns); };
    const uint32_t end = first_of(w.strips.cells.end);
    float sum = 0.0f;
    for (uint32_t i = first_of(w.strips.cells.begin); i < end; ++i) {
      const uint32_t column = section<uint32_t>(h, h.outlier_columns_offset)[i];
      float value = ptx::fp16_to_fp32(x[column]);
      if (m.planes == 2) value += ptx::fp16_to_fp32(x[m.columns + column]) * (1.0f / kLowPlane);
      sum += section<float>(h, h.outlier_deltas_offset)[i] * value;
    }
    return sum;
  }

  // Sums of all warps, planes, outliers, row scale.
  PYLLMQ_MEMBER static void finish(const Multiplication& m, const Work& w, const uint8_t* rings, int64_t ring_bytes) {
    const SparseHeader& h = *w.header;
    const int64_t row_begin = w.strips.row_begin();
    for (int token = 0; token < w.tokens; ++token)
      for (int row = ptx::thread(); row < w.rows; row += threads(m)) {
        float sum = 0.0f, weight = 1.0f;
        for (int plane = 0; plane < m.planes; ++plane) {
          sum += sum_of_warps<kTokenTiles>(rings, ring_bytes, m.warps, token * m.planes + plane, row) * weight;
          if (!Cells::kBf16) weight *= 1.0f / kLowPlane;
        }
        if (Cells::kKind == SparseKind::codes && h.outliers != 0) sum += outliers_of(m, w, token, row_begin + row);
        if (!Cells::kBf16) sum *= m.x.unscale[w.x_row[token]];
        if (h.scale_offset != 0) sum *= section<float>(h, h.scale_offset)[row_begin + row];
        sums_of(m, w.split, w.first_pair + token)[row_begin + row] = sum;
      }
  }
};

template <class Cells, int kTokenTiles>
PYLLMQ_KERNEL void __launch_bounds__(kMostWarps * 32, kBlocks<Cells>) experts_multiply_cells_kernel(const Multiplication m) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  multiply_items<CellWeights<Cells, kTokenTiles>>(m, memory);
}

// Columns of the product, in units of 8.
int64_t token_tiles_of(int64_t product_columns) { return product_columns <= 8 ? 1 : 2; }

template <class Cells>
MultiplyPlan plan_of(const MultiplyProblem& problem, int64_t splits) {
  const int64_t product_columns = problem.tile_pairs * problem.planes, token_tiles = token_tiles_of(product_columns);
  const int64_t cells = ceil_div(problem.columns, Cells::kColumns), cell_x = Cells::kColumns * product_columns * 2;
  const int64_t strips = kBlockStrips / token_tiles, shared_limit = shared_bytes();
  MultiplyPlan plan{};
  plan.pairs_at_once = problem.tile_pairs;
  plan.part_rows = strips * kStripRows;
  plan.parts = ceil_div(problem.rows, plan.part_rows);
  const auto bytes = [&](int64_t warps, int64_t x_bytes) {
    return static_cast<int64_t>(sizeof(typename CellWeights<Cells, 1>::Shared)) + x_bytes +
           warps * (token_tiles == 1 ? cell_ring_bytes<Cells, 1>(problem.weights.size)
                                     : cell_ring_bytes<Cells, 2>(problem.weights.size));
  };
  const int64_t most_x = std::min(kMostXBytes, cells * cell_x);
  plan.warps = kMostWarps;
  while (plan.warps > 1 && bytes(plan.warps, most_x) > shared_limit) plan.warps /= 2;
  // 1 KiB of every block, and of the device's limit, is the driver's.
  plan.slots =
      multiprocessors() * std::clamp<int64_t>((shared_limit + 1024) / (bytes(plan.warps, most_x) + 1024), 1, kBlocks<Cells>);

  plan.splits = splits > 0 ? splits : 1;
  const int64_t items = problem.likely_tiles * plan.parts;
  const auto cost = [&](int64_t count) {
    const int64_t rounds = ceil_div(items * count, plan.slots);
    return rounds * (ceil_div(ceil_div(cells, count), plan.warps) * strips + kItemCost);
  };
  for (int64_t count = 2; splits == 0 && count <= cells && items * (count - 1) <= 8 * plan.slots; ++count)
    if (cost(count) < cost(plan.splits)) plan.splits = count;

  const int64_t per_split = ceil_div(cells, plan.splits);
  plan.stage = std::min(per_split, kMostXBytes / cell_x);
  if (plan.stage < per_split && plan.stage > plan.warps) plan.stage -= plan.stage % plan.warps;  // all warps have as many
  plan.x_bytes = plan.stage * cell_x;
  plan.shared_bytes = bytes(plan.warps, plan.x_bytes);
  return plan;
}

}  // namespace

MultiplyPlan plan_cells(const MultiplyProblem& problem, int64_t splits) {
  MultiplyPlan plan{};
  with_cells(problem.weights.sparse, problem.weights.values, problem.weights.bits,
             [&](auto cells) { plan = plan_of<decltype(cells)>(problem, splits); });
  return plan;
}

void multiply_cells(const Multiplication& m, const MultiplyPlan& plan, int64_t items, uintptr_t stream) {
  with_cells(m.weights.sparse, m.weights.values, m.weights.bits, [&](auto cells) {
    using Cells = decltype(cells);
    const auto launch = [&](auto kernel) {
      allow_shared(reinterpret_cast<const void*>(kernel), plan.shared_bytes);
      PYLLMQ_LAUNCH(kernel, std::min(plan.slots, items), plan.warps * 32, plan.shared_bytes, stream, m);
      check_launch("routed_experts, multiply by cells");
    };
    if (token_tiles_of(plan.pairs_at_once * m.planes) == 1) return launch(experts_multiply_cells_kernel<Cells, 1>);
    launch(experts_multiply_cells_kernel<Cells, 2>);
  });
}

}  // namespace pyllmq::cuda

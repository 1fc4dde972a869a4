// Experts packed as bitmap, 2:4 or 2:4 with codes: cells of W are the first operand of tensor core instructions, spread or looked
// up once for a tile of pairs, or 2:4 sparse as they are (sparse/cuda/cells.cuh); x is the second.
//
// A block of 4 warps takes up to 256 rows (four strips) and a split of the cells of K; each warp takes every fourth cell of those
// whose x is in shared memory and streams it strip by strip through a ring of its own, as sparse_linear does.
#include <algorithm>

#include "codebook/cuda/fp16_planes.cuh"
#include "experts/cuda/multiply.cuh"
#include "experts/cuda/multiply.h"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "sparse/cuda/cells.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kMostWarps = 4;
constexpr int kBlockStrips = 4;  // with one tile of 8 columns of the product, two with two
constexpr int kSums = kBlockStrips * kStripRows * 8;
constexpr int64_t kMostXBytes = 24 << 10;
constexpr int kItemCost = 8;  // what starts and ends an item, in cells of a strip (predicted, as sparse_linear's)

// Blocks of a multiprocessor: four would leave 128 registers to a thread, of which one kernel spills two.
template <class Cells>
constexpr int kBlocks = Cells::kBlocks < 3 ? Cells::kBlocks : 3;

// Cells of K that a block has at work, and its strips.
struct Range {
  const SparseHeader* header;
  int strip_begin, strips, begin, end;
};

// Where a warp's next cells come from: its cells one after the other, of each the strips of the block.
template <class Cells>
struct Cursor {
  Range range;
  int stage_bytes, warps;
  int cell, strip, table;  // table: slot of the cell's codebooks; as many as stages, since a stage may be a whole cell

  // body(where the cell of a strip of the block begins, its bytes)
  template <class Body>
  PYLLMQ_MEMBER void at_cell(int of_strip, const Body& body) const {
    const SparseHeader& h = *range.header;
    const int64_t in_strip = int64_t{range.strip_begin + of_strip};
    const auto* data = section<uint8_t>(h, h.data_offset);
    if constexpr (Cells::kKind == SparseKind::bitmap) {
      const uint32_t* begin = section<uint32_t>(h, h.begin_offset) + in_strip * (h.cells + 1) + cell;
      body(data + int64_t{begin[0]} * 16, static_cast<int>(begin[1] - begin[0]) * 16);
    } else {
      body(data + (in_strip * h.cells + cell) * stage_bytes, stage_bytes);
    }
  }

  // The first cells leave memory while x is brought into order.
  PYLLMQ_MEMBER void prefetch(int lane) const {
    constexpr int kLine = 128;
    for (int of_strip = 0; cell < range.end && of_strip < range.strips; ++of_strip)
      at_cell(of_strip, [&](const uint8_t* from, int bytes) {
        for (int at = lane * kLine; at < bytes; at += 32 * kLine) ptx::prefetch(from + at);
      });
  }

  // Copies the next cell of a strip, and with the first strip's the codebooks, if there is any left.
  PYLLMQ_MEMBER void fetch(uint8_t* to, uint8_t* tables, int lane) {
    if (cell < range.end) {
      at_cell(strip, [&](const uint8_t* from, int bytes) {
        for (int at = lane * 16; at < bytes; at += 512) ptx::copy_async_16(to + at, from + at);
      });
      if (Cells::kTableBytes > 0 && strip == 0) {
        const SparseHeader& h = *range.header;
        const auto* codebooks = section<uint8_t>(h, h.codebook_offset + int64_t{cell} * Cells::kTableBytes);
        for (int at = lane * 16; at < Cells::kTableBytes; at += 512)
          ptx::copy_async_16(tables + table * Cells::kTableBytes + at, codebooks + at);
        table = (table + 1) % Cells::kStages;
      }
      if (++strip == range.strips) {
        strip = 0;
        cell += warps;
      }
    }
    ptx::commit_async();
  }
};

template <class Cells>
PYLLMQ_HOST_DEVICE int64_t warp_bytes(int64_t stage_bytes) {
  const int64_t ring = Cells::kStages * (stage_bytes + Cells::kTableBytes) + Cells::kOwnBytes;
  return ring > kSums * 4 ? ring : kSums * 4;
}

template <class Cells, int kTokenTiles>
struct CellWeights {
  static constexpr int kStrips = kBlockStrips / kTokenTiles;
  static constexpr int kRows = kStrips * kStripRows;
  using Header = SparseHeader;
  struct Work : Item<SparseHeader> {
    int strip_begin, strips, cell_begin, cell_end;
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
    w.strip_begin = part * kStrips;
    w.strips = h.strips - w.strip_begin < kStrips ? static_cast<int>(h.strips - w.strip_begin) : kStrips;
    const int64_t rows = h.rows - int64_t{w.strip_begin} * kStripRows;
    w.rows = rows < kRows ? static_cast<int>(rows) : kRows;
    w.cell_begin = static_cast<int>(w.split * h.cells / m.splits);
    w.cell_end = static_cast<int>((w.split + 1) * h.cells / m.splits);
  }

  PYLLMQ_MEMBER static void run(const Multiplication& m, Shared& shared) {
    const Work& w = shared.work;
    auto* x_shared = reinterpret_cast<uint16_t*>(&shared + 1);
    uint8_t* rings = reinterpret_cast<uint8_t*>(&shared + 1) + m.x_bytes;
    StripSums<kTokenTiles> sums[kStrips] = {};
    for (int begin = w.cell_begin; begin < w.cell_end; begin += m.stage) {
      const Range range{w.header, w.strip_begin, w.strips, begin, begin + m.stage < w.cell_end ? begin + m.stage : w.cell_end};
      cursor_of(m, range).prefetch(ptx::thread() % 32);
      ptx::sync_block();  // the stage before is multiplied
      stage_x(m, w, range, x_shared);
      ptx::sync_block();
      const int64_t of_warp = warp_bytes<Cells>(m.weights.size);
      accumulate(m, range, w.tokens * m.planes, rings + ptx::thread() / 32 * of_warp, x_shared, sums);
    }
    auto* total = reinterpret_cast<float*>(rings);
    add_warps(m, w.tokens * m.planes, total, sums);
    finish(m, w, total);
  }

 private:
  PYLLMQ_MEMBER static Cursor<Cells> cursor_of(const Multiplication& m, const Range& range) {
    return {range, static_cast<int>(m.weights.size), m.warps, range.begin + ptx::thread() / 32, 0, 0};
  }

  // x of these cells as fragments: 16 bits [step][column of the product][t][i][2] hold columns 8i + 2t and the next.
  PYLLMQ_MEMBER static void stage_x(const Multiplication& m, const Work& w, const Range& range, uint16_t* x_shared) {
    const int64_t begin = int64_t{range.begin} * Cells::kColumns;
    const int slots = (range.end - range.begin) * Cells::kColumns, product_columns = w.tokens * m.planes;
    for (int token = 0; token < w.tokens; ++token) {
      const int64_t row = w.x_row[token];
      for (int slot = ptx::thread(); slot < slots; slot += threads(m)) {
        const int64_t column = begin + slot;
        const int in_step = slot % kStepColumns;
        uint16_t* to = x_shared + (slot / kStepColumns * product_columns + token * m.planes) * kStepColumns +
                       in_step % 8 / 2 * 8 + in_step / 8 * 2 + in_step % 2;
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

  // Adds this warp's cells to the sums.
  PYLLMQ_MEMBER static void accumulate(const Multiplication& m, const Range& range, int product_columns, uint8_t* memory,
                                       const uint16_t* x_shared, StripSums<kTokenTiles> (&sums)[kStrips]) {
    const int lane = ptx::thread() % 32, stage_bytes = static_cast<int>(m.weights.size);
    uint8_t* ring = memory;
    uint8_t* tables = ring + Cells::kStages * stage_bytes;
    uint8_t* own = tables + Cells::kStages * Cells::kTableBytes;
    Cursor<Cells> cursor = cursor_of(m, range);
    for (int ahead = 0; ahead < Cells::kStages - 1; ++ahead) cursor.fetch(ring + ahead * stage_bytes, tables, lane);
    constexpr int kSteps = Cells::kColumns / kStepColumns;
    int stage = 0, table = 0;
    for (int cell = range.begin + ptx::thread() / 32; cell < range.end; cell += m.warps) {
      const auto x = [&](int step, StepX<kTokenTiles>& fragments) {
        load_x<kTokenTiles>(x_shared + ((cell - range.begin) * kSteps + step) * product_columns * kStepColumns, product_columns,
                            lane, fragments);
      };
      unrolled<kStrips>([&](int strip) {
        if (strip >= range.strips) return;
        cursor.fetch(ring + (stage + Cells::kStages - 1) % Cells::kStages * stage_bytes, tables, lane);
        ptx::wait_async<Cells::kStages - 1>();
        ptx::sync_warp();
        const uint8_t* cell_tables = tables + table * Cells::kTableBytes;
        if (strip == 0) Cells::begin_cell(cell_tables, own, lane);
        Cells::template multiply<kTokenTiles>(ring + stage * stage_bytes, cell_tables, own, lane, x, sums[strip]);
        ptx::sync_warp();  // the next fetch overwrites this stage
        stage = (stage + 1) % Cells::kStages;
      });
      table = (table + 1) % Cells::kStages;
    }
    ptx::wait_async<0>();
  }

  // The warps' sums, added in order: [column of the product, row], in place of the rings.
  PYLLMQ_MEMBER static void add_warps(const Multiplication& m, int product_columns, float* total,
                                      const StripSums<kTokenTiles> (&sums)[kStrips]) {
    const int lane = ptx::thread() % 32;
    const auto of_warp = static_cast<int>(warp_bytes<Cells>(m.weights.size) / 4);
    float* const own = total + ptx::thread() / 32 * of_warp;
    unrolled<kStrips, kStripTiles>([&](int strip, int tile) {
      unrolled<kTokenTiles, 4>([&](int i, int e) {
        const int column = i * 8 + lane % 4 * 2 + e % 2, row = strip * kStripRows + tile * 16 + lane / 4 + e / 2 * 8;
        if (column < product_columns) own[column * kRows + row] = sums[strip][tile][i][e];
      });
    });
    ptx::sync_block();
    for (int i = ptx::thread(); i < product_columns * kRows; i += threads(m)) {
      float sum = total[i];
      for (int warp = 1; warp < m.warps; ++warp) sum += total[warp * of_warp + i];
      total[i] = sum;
    }
    ptx::sync_block();
  }

  // What the outliers of a row in this split's columns add for a token, in the unit of its planes.
  PYLLMQ_MEMBER static float outliers_of(const Multiplication& m, const Work& w, int token, int64_t row) {
    const SparseHeader& h = *w.header;
    const uint16_t* x = m.x.planes + int64_t{w.x_row[token]} * m.planes * m.columns;
    const auto first_of = [&](int cell) { return outlier_from(h, row, int64_t{cell} * Cells::kColumns); };
    const uint32_t end = first_of(w.cell_end);
    float sum = 0.0f;
    for (uint32_t i = first_of(w.cell_begin); i < end; ++i) {
      const uint32_t column = section<uint32_t>(h, h.outlier_columns_offset)[i];
      float value = ptx::fp16_to_fp32(x[column]);
      if (m.planes == 2) value += ptx::fp16_to_fp32(x[m.columns + column]) * (1.0f / kLowPlane);
      sum += section<float>(h, h.outlier_deltas_offset)[i] * value;
    }
    return sum;
  }

  // Planes, outliers, row scale.
  PYLLMQ_MEMBER static void finish(const Multiplication& m, const Work& w, const float* total) {
    const SparseHeader& h = *w.header;
    const int64_t row_begin = int64_t{w.strip_begin} * kStripRows;
    for (int token = 0; token < w.tokens; ++token)
      for (int row = ptx::thread(); row < w.rows; row += threads(m)) {
        float sum = 0.0f, weight = 1.0f;
        for (int plane = 0; plane < m.planes; ++plane) {
          sum += total[(token * m.planes + plane) * kRows + row] * weight;
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
           warps * warp_bytes<Cells>(problem.weights.size);
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

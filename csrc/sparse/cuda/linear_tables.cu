// sparse24_codebook_linear for one token and codes of 3 and 4 bits: what a kept weight adds is one of 64 products of its group of
// four columns, looked up in shared memory and added in fp32.
//
// A block of 16 warps takes 1024 rows (a strip of 64 a warp) and a range of cells of 32 columns. For each cell it multiplies the
// codebooks with x once, 512 products, and stores each eight times: a lane of the layout (layout.h) has two groups of columns,
// and reads their products from a column of words of its own, so that no lookup meets another's bank. Entry 16 position + code is
// 256 bytes, 128 for each of the two groups: a byte of the index stands where the address wants it. The next cell's table is made
// beside the lookups of this one.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "sparse/cuda/cells.cuh"
#include "sparse/cuda/operand.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kRows = kWarps * kStripRows;
constexpr int kStages = 3;
constexpr int kMostCells = 64;  // of a split: what x in shared memory has room for
constexpr int kCellBytes = 512 + kPositionBytes / 2;
constexpr int kEntries = 64;  // of a group
constexpr int kTableBytes = kEntries * 2 * 32 * 4;
static_assert(kEntries * kStepColumns / 4 == kThreads, "a product each");

struct Arguments {
  LinearCall call;
  int splits;
};

struct Work {
  int strip_begin, rows, cell_begin, cell_end, split;
};

// Shared memory: this, two tables.
struct Shared {
  Work work;
  uint32_t arrived;
  float x[(kMostCells + 2) * kStepColumns];  // after the loop: the sums; two cells more are asked for
  alignas(16) uint8_t ring[kWarps][kStages * kCellBytes];
};
static_assert(sizeof(Shared::x) >= kRows * sizeof(float));
constexpr int kSharedBytes = static_cast<int>(sizeof(Shared)) + 3 * kTableBytes;  // tables begin at a multiple of their size
static_assert(kSharedBytes <= 99 << 10, "what a block gets on compute capability 8.6");

// x of a block's columns, 0 beyond them.
PYLLMQ_DEVICE void stage_x(const SparseHeader& h, const LinearCall& call, Shared& shared) {
  const Work& w = shared.work;
  const int64_t first = int64_t{w.cell_begin} * kStepColumns;
  for (int at = ptx::thread(); at < (w.cell_end - w.cell_begin + 2) * kStepColumns; at += kThreads)
    shared.x[at] = first + at < h.columns ? load_element(call.x, static_cast<DType>(call.dtype), first + at) : 0.0f;
}

// Makes the tables, cell by cell: each thread has one entry of one group.
class Maker {
 public:
  PYLLMQ_MEMBER Maker(const SparseHeader& h, const Shared& shared, uint8_t* tables)
      : left_(shared.work.cell_end - shared.work.cell_begin) {
    const int thread = ptx::thread(), entry = thread % 256 / 4, group = thread / 256 * 4 + thread % 4,
              column = group * 4 + entry / 16;
    x_ = shared.x + column;
    values_ =
        section<uint16_t>(h, h.codebook_offset) + (int64_t{shared.work.cell_begin} * kStepColumns + column) * 16 + entry % 16;
    unrolled<8>([&](int i) { to_[i] = tables + entry * 256 + group / 4 * 128 + group % 4 * 4 + (thread / 4 % 8 ^ i) * 16; });
  }

  // Asks for what the next table needs; nothing behind the last.
  PYLLMQ_MEMBER void fetch() {
    if (left_-- > 0) value_ = *values_;
    values_ += kStepColumns * 16;
  }

  // The lanes of a warp have eight entries of four groups, and each stores to other lanes' words at a time.
  PYLLMQ_MEMBER void store(int table) {
    const float product = *x_ * ptx::fp16_to_fp32(value_);
    x_ += kStepColumns;
    unrolled<8>([&](int i) { *reinterpret_cast<float*>(to_[i] + table) = product; });
  }

 private:
  int left_;
  uint8_t* to_[8];  // of the first table
  const float* x_;
  const uint16_t* values_;
  uint16_t value_ = 0;
};

// Of a lane: rows g and g + 8 of the tiles of 16.
using RowSums = float[kStripTiles][2];

// Adds what a tile of a cell keeps. own: the lane's words of the first table, which begins at a multiple of its size.
PYLLMQ_DEVICE void add_tile(const uint8_t* cell, int tile, int lane, ptx::SharedAddress own, int table, float (&sums)[2]) {
  const uint32_t codes = reinterpret_cast<const uint32_t*>(cell)[tile * 32 + lane];
  const uint32_t kept = kept_of_lane(load_words<2>(cell + 512 + (tile * 16 + lane / 4 * 2) * 4), lane);
  const uint32_t indices[2] = {(codes & 0x0F0F0F0Fu) | (kept << 4 & 0x30303030u),
                               (codes >> 4 & 0x0F0F0F0Fu) | (kept << 2 & 0x30303030u)};
  unrolled<2, 2>([&](int j, int half) {
    const uint32_t pair = half == 0 ? indices[j] : indices[j] >> 16;  // of rows g and g + 8
    unrolled<2>([&](int i) {
      const uint32_t entry = (i == 0 ? pair << 8 : pair) & 0x3F00u;
      sums[i] += ptx::bits_to_fp32(ptx::load_shared_word((entry | own) + (table + half * 128)));
    });
  });
}

PYLLMQ_DEVICE void accumulate(const SparseHeader& h, const Shared& shared, uint8_t* tables, uint8_t* ring, RowSums& sums) {
  const Work& w = shared.work;
  const int lane = ptx::thread() & 31, strip = w.strip_begin + ptx::thread() / 32;
  const bool has_strip = strip < h.strips;
  const uint8_t* from = section<uint8_t>(h, h.data_offset) + (strip * h.cells + w.cell_begin) * kCellBytes + lane * 16;
  int left = has_strip ? w.cell_end - w.cell_begin : 0, filled = 0, used = 0;
  const auto fetch = [&] {
    if (left-- > 0) {
      ptx::copy_async_16(ring + filled + lane * 16, from);
      if (lane < (kCellBytes - 512) / 16) ptx::copy_async_16(ring + filled + lane * 16 + 512, from + 512);
    }
    ptx::commit_async();
    from += kCellBytes;
    filled = filled == (kStages - 1) * kCellBytes ? 0 : filled + kCellBytes;
  };
  for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch();
  Maker maker(h, shared, tables);
  maker.fetch();
  maker.store(0);
  maker.fetch();
  const ptx::SharedAddress own = ptx::shared_address(tables) | static_cast<uint32_t>(lane * 4);
#pragma unroll 1
  for (int cell = w.cell_begin; cell < w.cell_end; cell += 2)
    unrolled<2>([&](int odd) {
      if (cell + odd >= w.cell_end) return;
      fetch();
      ptx::wait_async<kStages - 1>();
      ptx::sync_block();  // the cell's table is there, and nobody reads the other one any more
      maker.store((1 - odd) * kTableBytes);
      maker.fetch();
      if (has_strip)
        unrolled<kStripTiles>([&](int tile) { add_tile(ring + used, tile, lane, own, odd * kTableBytes, sums[tile]); });
      ptx::sync_warp();  // the next fetch overwrites this stage
      used = used == (kStages - 1) * kCellBytes ? 0 : used + kCellBytes;
    });
  ptx::wait_async<0>();
}

// The four lanes that share rows have two of eight groups each.
PYLLMQ_DEVICE void store_sums(const RowSums& sums, float* to) {
  const int lane = ptx::thread() & 31;
  unrolled<kStripTiles, 2>([&](int tile, int i) {
    float sum = sums[tile][i];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    if (lane % 4 == 0) to[row_of(tile, lane, i)] = sum;
  });
}

// Outliers, row scale; then y, or this split's part of it.
PYLLMQ_DEVICE void finish(const SparseHeader& h, const Arguments& a, Shared& shared) {
  const Work& w = shared.work;
  const int64_t row_begin = int64_t{w.strip_begin} * kStripRows;
  const auto for_each_output = [&](const auto& body) {
    for (int row = ptx::thread(); row < w.rows; row += kThreads) body(0, row);
  };
  const auto sum_of = [&](int, int row) {
    float sum = shared.x[row];
    if (h.outliers != 0) {
      const auto first_of = [&](int cell) { return outlier_from(h, row_begin + row, int64_t{cell} * kStepColumns); };
      const uint32_t end = first_of(w.cell_end);
      for (uint32_t i = first_of(w.cell_begin); i < end; ++i)
        sum += section<float>(h, h.outlier_deltas_offset)[i] *
               load_element(a.call.x, static_cast<DType>(a.call.dtype), section<uint32_t>(h, h.outlier_columns_offset)[i]);
    }
    return h.scale_offset == 0 ? sum : sum * section<float>(h, h.scale_offset)[row_begin + row];
  };
  uint32_t* counter = counter_of(a.call, h, 0, h.strips, w.strip_begin);
  store_outputs(a.call, a.splits, w.split, counter, 0, row_begin, shared.arrived, for_each_output, sum_of);
}

PYLLMQ_DEVICE void take(const Arguments& a, const SparseHeader& h, int item, Work& w) {
  const int row_blocks = static_cast<int>((h.strips + kWarps - 1) / kWarps);
  w.split = item / row_blocks;
  w.strip_begin = item % row_blocks * kWarps;
  const int64_t rows = h.rows - int64_t{w.strip_begin} * kStripRows;
  w.rows = rows < kRows ? static_cast<int>(rows) : kRows;
  w.cell_begin = static_cast<int>(w.split * h.cells / a.splits);
  w.cell_end = static_cast<int>((w.split + 1) * h.cells / a.splits);
}

PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sparse_linear_tables_kernel(const Arguments a, int items) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* tables = memory + sizeof(Shared);
  tables += -static_cast<uint32_t>(ptx::shared_address(tables)) % kTableBytes;
  const int warp = ptx::thread() / 32;
  const auto& h = *reinterpret_cast<const SparseHeader*>(a.call.layout);
  if (!describes(h, SparseKind::codes, a.call.layout_bytes, a.call.rows, a.call.columns) || h.stage_bytes != kCellBytes ||
      h.bits < 3)
    return store_nan(a.call.y, static_cast<DType>(a.call.dtype), a.call.rows, kThreads);
  for (auto item = static_cast<int>(ptx::block()); item < items; item += static_cast<int>(ptx::blocks())) {
    ptx::sync_block();  // the item before is done with shared memory
    if (ptx::thread() == 0) take(a, h, item, shared.work);
    ptx::sync_block();
    stage_x(h, a.call, shared);
    ptx::sync_block();
    RowSums sums = {};
    accumulate(h, shared, tables, shared.ring[warp], sums);
    ptx::sync_block();  // nobody reads x any more
    store_sums(sums, shared.x + warp * kStripRows);
    ptx::sync_block();
    finish(h, a, shared);
  }
}

struct TablesPlan {
  int64_t row_blocks, splits, grid;
};

TablesPlan plan_tables(int64_t rows, int64_t columns) {
  const int64_t cells = ceil_div(columns, kStepColumns), row_blocks = ceil_div(rows, kRows);
  const int64_t slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  // The time of a slot in cells; beginning and ending an item cost as much as six.
  const auto time = [&](int64_t splits) { return ceil_div(row_blocks * splits, slots) * (ceil_div(cells, splits) + 6); };
  int64_t best = ceil_div(cells, kMostCells);
  for (int64_t splits = best; splits <= std::min(cells, best + slots); ++splits)
    if (time(splits) < time(best)) best = splits;
  return {row_blocks, best, std::min(slots, row_blocks * best)};
}

}  // namespace

int64_t SparseTables::find_room(int64_t, int) const {
  const int64_t splits = plan_tables(rows, columns).splits;
  return splits > 1 ? splits * rows : 0;
}

void SparseTables::run(const LinearCall& call, uintptr_t stream) const {
  if (call.tokens > 1) throw std::invalid_argument("tables of products serve one token, here " + std::to_string(call.tokens));
  const TablesPlan plan = plan_tables(rows, columns);
  const int64_t items = plan.row_blocks * plan.splits;
  if (items > std::numeric_limits<int32_t>::max()) refuse_work("sparse_linear_tables", call);
  allow_shared(reinterpret_cast<const void*>(sparse_linear_tables_kernel), kSharedBytes);
  const Arguments arguments{call, static_cast<int>(plan.splits)};
  PYLLMQ_LAUNCH(sparse_linear_tables_kernel, plan.grid, kThreads, kSharedBytes, stream, arguments, static_cast<int>(items));
  check_launch("sparse_linear_tables");
}

}  // namespace pyllmq::cuda

// sparse24_codebook_linear for one token and codes of 3 and 4 bits: what a kept weight adds is one of 64 products of its group of
// four columns, looked up in shared memory and added in fp32.
//
// A block of 16 warps takes 1024 rows (a strip of 64 a warp) and a range of cells of 32 columns. For each cell it multiplies the
// codebooks with x once, 512 products, and stores each eight times: a lane of the layout (layout.h) has two groups of columns,
// and reads their products from a column of words of its own, so that no lookup meets another's bank. Entry 16 position + code is
// 256 bytes, 128 for each of the two groups: a byte of the index stands where the address wants it. The next cell's table is made
// beside the lookups of this one.
#include <stdexcept>
#include <string>

#include "sparse/cuda/stream.cuh"

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

// Shared memory: this, two tables.
struct Shared {
  Item item;
  Strips work;
  uint32_t arrived;
  float x[(kMostCells + 2) * kStepColumns];  // after the loop: the sums; two cells more are asked for
  alignas(16) uint8_t ring[kWarps][kStages * kCellBytes];
};
static_assert(sizeof(Shared::x) >= kRows * sizeof(float));
constexpr int kSharedBytes = static_cast<int>(sizeof(Shared)) + 3 * kTableBytes;  // tables begin at a multiple of their size
static_assert(kSharedBytes <= 99 << 10, "what a block gets on compute capability 8.6");

// x of a block's columns, 0 beyond them.
PYLLMQ_DEVICE void stage_x(const SparseHeader& h, const LinearCall& call, Shared& shared) {
  const Range cells = shared.work.cells;
  const int64_t first = int64_t{cells.begin} * kStepColumns;
  for (int at = ptx::thread(); at < (cells.end - cells.begin + 2) * kStepColumns; at += kThreads)
    shared.x[at] = first + at < h.columns ? load_element(call.x, static_cast<DType>(call.dtype), first + at) : 0.0f;
}

// Makes the tables, cell by cell: each thread has one entry of one group.
class Maker {
 public:
  PYLLMQ_MEMBER Maker(const SparseHeader& h, const Shared& shared, uint8_t* tables)
      : left_(shared.work.cells.end - shared.work.cells.begin) {
    const int thread = ptx::thread(), entry = thread % 256 / 4, group = thread / 256 * 4 + thread % 4,
              column = group * 4 + entry / 16;
    x_ = shared.x + column;
    values_ =
        section<uint16_t>(h, h.codebook_offset) + (int64_t{shared.work.cells.begin} * kStepColumns + column) * 16 + entry % 16;
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

PYLLMQ_DEVICE void accumulate(const SparseHeader& h, const LinearCall& call, Shared& shared, RowSums& sums) {
  const Strips& w = shared.work;
  const int lane = ptx::thread() & 31, warp = ptx::thread() / 32, cell_begin = w.cells.begin, cell_end = w.cells.end;
  const bool has_strip = warp < w.count;
  uint8_t* const ring = shared.ring[warp];
  auto* tables = reinterpret_cast<uint8_t*>(&shared + 1);
  tables += -static_cast<uint32_t>(ptx::shared_address(tables)) % kTableBytes;
  const uint8_t* from = section<uint8_t>(h, h.data_offset) + ((w.begin + warp) * h.cells + cell_begin) * kCellBytes + lane * 16;
  int left = has_strip ? cell_end - cell_begin : 0, filled = 0, used = 0;
  const auto fetch = [&] {
    if (left-- > 0) {
      ptx::copy_async_16<true>(ring + filled + lane * 16, from);
      if (lane < (kCellBytes - 512) / 16) ptx::copy_async_16<true>(ring + filled + lane * 16 + 512, from + 512);
    }
    ptx::commit_async();
    from += kCellBytes;
    filled = filled == (kStages - 1) * kCellBytes ? 0 : filled + kCellBytes;
  };
  for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch();
  ptx::wait_for_previous();
  stage_x(h, call, shared);
  ptx::sync_block();
  Maker maker(h, shared, tables);
  maker.fetch();
  maker.store(0);
  maker.fetch();
  const ptx::SharedAddress own = ptx::shared_address(tables) | static_cast<uint32_t>(lane * 4);
#pragma unroll 1
  for (int cell = cell_begin; cell < cell_end; cell += 2)
    unrolled<2>([&](int odd) {
      if (cell + odd >= cell_end) return;
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
  ptx::wait_async<0>();  // for groups without copies
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

struct OneToken : SparseStream<Codes4Cells, kWarps, Shared> {
  PYLLMQ_MEMBER static bool serves(const SparseHeader& h, const StreamArguments& a) {
    return describes_cells(h, a, kCellBytes) && h.bits >= 3;
  }

  PYLLMQ_MEMBER void multiply() const {
    RowSums sums = {};
    accumulate(h, a.call, shared, sums);
    ptx::sync_block();  // nobody reads x any more
    store_sums(sums, shared.x + ptx::thread() / 32 * kStripRows);
  }

  PYLLMQ_MEMBER float sum(int token, int row) { return finished(token, row, shared.x[row]); }
  PYLLMQ_MEMBER float* place(int, int row) const { return shared.x + row; }
};

PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) sparse_linear_tables_kernel(const StreamArguments a) {
  run_items<OneToken>(a, kThreads);
}

LinearPlan plan_linear(int64_t rows, int64_t columns) {
  LinearPlan plan{};
  plan.set_tokens(1, 1);
  plan.threads = kThreads;
  plan.shared_bytes = kSharedBytes;
  plan.slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  plan.row_parts = ceil_div(rows, kRows);
  // In cells; beginning and ending an item cost as much as six.
  const int64_t cells = ceil_div(columns, kStepColumns);
  plan.set_splits(cells, ceil_div(cells, kMostCells), 6, [](int64_t of_item) { return of_item; });
  return plan;
}

}  // namespace

int64_t SparseTables::find_room(int64_t tokens, int) const { return plan_linear(rows, columns).partials(tokens, rows); }

void SparseTables::run(const LinearCall& call, uintptr_t stream) const {
  if (call.tokens > 1) throw std::invalid_argument("tables of products serve one token, here " + std::to_string(call.tokens));
  const LinearPlan plan = plan_linear(rows, columns);
  launch_items("sparse_linear_tables", sparse_linear_tables_kernel, plan, plan.arguments(call), stream);
}

}  // namespace pyllmq::cuda

// bitmap_linear, sparse24_linear and sparse24_codebook_linear for few tokens: W is the first operand of tensor core instructions,
// spread or looked up in registers, or 2:4 sparse as it is (mma.sp); x is the second.
//
// A block takes up to 256 rows (four strips) and a range of cells of K; each of its warps takes every fourth cell, streams it
// strip by strip through a ring in shared memory of its own, and keeps the sums of all rows in registers. Then the warps' sums
// are added in order, outliers and scale applied; blocks that share rows leave their sums in a workspace (linear_outputs.cuh).
//
// The columns of a block's product are tokens, or planes of tokens: values in fp16 and codes meet x in fp16 as in
// codebook_linear (fp16_planes.cuh); values in bf16 meet fp16 x as the sum of two, fp32 x as the sum of three bf16 numbers,
// exactly. int8 values become fp16.
#include "runtime/counting.h"
#include "sparse/cuda/operand.h"

#include <algorithm>
#include <limits>

#include "codebook/cuda/fp16_planes.cuh"
#include "linear_outputs.cuh"
#include "runtime/cuda/runtime.h"
#include "sparse/cuda/cells.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kMostWarps = 4;
constexpr int kBlockStrips = 4;  // with one tile of tokens, two with two
constexpr int kSums = kBlockStrips * kStripRows * 8;
constexpr int kMostTokens = 16;  // columns of the product
constexpr int64_t kMostXBytes = 24 << 10;
constexpr int kItemCost = 8;  // what starts and ends an item, in cells of a strip (predicted)

struct Arguments {
  LinearCall call;
  int stage_bytes, tokens_per_block, token_blocks, splits, warps;
};

// What one block computes: the same for all threads, so it lies in shared memory, and sums have the registers.
struct Work {
  int item;
  const SparseHeader* header;
  int strip_begin, strips, rows;  // rows of the strips
  int cell_begin, cell_end, split;
  int64_t token_begin;
  int tokens, planes;
  PYLLMQ_MEMBER int columns() const { return tokens * planes; }
  PYLLMQ_MEMBER int64_t row_begin() const { return int64_t{strip_begin} * kStripRows; }
};

// Shared memory: this, x, the warps' rings and tables (after the loop: the sums).
struct alignas(16) Shared {
  Work work;
  float largest[kMostTokens][kMostWarps];
  float unscale[kMostTokens];
  uint32_t arrived;
};

PYLLMQ_HOST_DEVICE int planes_of(bool bf16_values, DType x) {
  if (x == DType::fp32) return bf16_values ? 3 : 2;
  return bf16_values && x == DType::fp16 ? 2 : 1;
}

// x of this block's columns as fragments: 16 bits [step][column of the product][t][i][2] hold columns 8i + 2t and the next.
template <class Cells>
PYLLMQ_DEVICE void stage_x(const Work& w, const Arguments& a, Shared& shared, uint16_t* x_shared) {
  const auto dtype = static_cast<DType>(a.call.dtype);
  const int threads = a.warps * 32, thread = ptx::thread();
  const int64_t begin = int64_t{w.cell_begin} * Cells::kColumns;
  const int slots = (w.cell_end - w.cell_begin) * Cells::kColumns;
  const int inside = a.call.columns - begin < slots ? static_cast<int>(a.call.columns - begin) : slots;
  const auto load = [&](int token, int slot) {
    return slot < inside ? load_element(a.call.x, dtype, (w.token_begin + token) * a.call.columns + begin + slot) : 0.0f;
  };

  const bool scaled = !Cells::kBf16 && dtype != DType::fp16;
  for (int token = 0; scaled && token < w.tokens; ++token) {
    float largest = 0.0f;
    for (int slot = thread; slot < inside; slot += threads) largest = fmaxf(largest, fabsf(load(token, slot)));
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
    shared.largest[token][thread / 32] = largest;
  }
  ptx::sync_block();

  for (int token = 0; token < w.tokens; ++token) {
    float largest = 0.0f;
    for (int warp = 0; scaled && warp < a.warps; ++warp) largest = fmaxf(largest, shared.largest[token][warp]);
    const int exponent = scale_exponent(largest);
    const float scale = power_of_two(exponent);
    if (thread == 0) shared.unscale[token] = power_of_two(-exponent);
    for (int slot = thread; slot < slots; slot += threads) {
      float rest = scale * load(token, slot);
      const int in_step = slot % kStepColumns;
      uint16_t* to = x_shared + (slot / kStepColumns * w.columns() + token * w.planes) * kStepColumns + in_step % 8 / 2 * 8 +
                     in_step / 8 * 2 + in_step % 2;
      for (int plane = 0; plane < w.planes; ++plane) {
        const uint16_t half = Cells::kBf16 ? ptx::fp32_to_bf16(rest) : ptx::fp32_to_fp16(rest);
        to[plane * kStepColumns] = half;
        rest = Cells::kBf16 ? rest - bf16_to_fp32(half) : (rest - ptx::fp16_to_fp32(half)) * kLowPlane;
      }
    }
  }
  ptx::sync_block();
}

// Where a warp's next cells come from: its cells one after the other, of each the strips of the block.
template <class Cells>
struct Cursor {
  const Work& w;
  int cell, strip, table;  // table: slot of the cell's codebooks; as many as stages, since a stage may be a whole cell

  // body(where the cell of a strip of the block begins, its bytes)
  template <class Body>
  PYLLMQ_MEMBER void at_cell(const Arguments& a, int of_strip, const Body& body) const {
    const SparseHeader& h = *w.header;
    const int64_t in_strip = int64_t{w.strip_begin + of_strip};
    const auto* data = section<uint8_t>(h, h.data_offset);
    if constexpr (Cells::kKind == SparseKind::bitmap) {
      const uint32_t* begin = section<uint32_t>(h, h.begin_offset) + in_strip * (h.cells + 1) + cell;
      body(data + int64_t{begin[0]} * 16, static_cast<int>(begin[1] - begin[0]) * 16);
    } else {
      body(data + (in_strip * h.cells + cell) * a.stage_bytes, a.stage_bytes);
    }
  }

  // The first cells leave memory while x is brought into order.
  PYLLMQ_MEMBER void prefetch(const Arguments& a, int lane) const {
    constexpr int kLine = 128;
    for (int of_strip = 0; cell < w.cell_end && of_strip < w.strips; ++of_strip)
      at_cell(a, of_strip, [&](const uint8_t* from, int bytes) {
        for (int at = lane * kLine; at < bytes; at += 32 * kLine) ptx::prefetch(from + at);
      });
  }

  // Copies the next cell of a strip, and with the first strip's the codebooks, if there is any left.
  PYLLMQ_MEMBER void fetch(const Arguments& a, uint8_t* to, uint8_t* tables, int lane) {
    if (cell < w.cell_end) {
      const SparseHeader& h = *w.header;
      const auto* base = reinterpret_cast<const uint8_t*>(&h);
      at_cell(a, strip, [&](const uint8_t* from, int bytes) {
        for (int at = lane * 16; at < bytes; at += 512) ptx::copy_async_16(to + at, from + at);
      });
      if (Cells::kTableBytes > 0 && strip == 0) {
        const uint8_t* codebooks = base + h.codebook_offset + int64_t{cell} * Cells::kTableBytes;
        for (int at = lane * 16; at < Cells::kTableBytes; at += 512)
          ptx::copy_async_16(tables + table * Cells::kTableBytes + at, codebooks + at);
        table = (table + 1) % Cells::kStages;
      }
      if (++strip == w.strips) {
        strip = 0;
        cell += a.warps;
      }
    }
    ptx::commit_async();
  }
};

// x of this lane's column of the product in a step; columns that do not exist are 0.
template <int kTokenTiles>
PYLLMQ_DEVICE void load_x(const uint16_t* x_step, int columns, int lane, StepX<kTokenTiles>& x) {
  unrolled<kTokenTiles>([&](int tile) {
    const int column = tile * 8 + lane / 4;
    Words<4> words = {};
    if (column < columns) words = load_words<4>(x_step + column * kStepColumns + lane % 4 * 8);
    unrolled<4>([&](int i) { x[tile][i] = words[i]; });
  });
}

// Adds all cells of this warp to the sums.
template <class Cells, int kTokenTiles>
PYLLMQ_DEVICE void accumulate(const Work& w, const Arguments& a, uint8_t* memory, const uint16_t* x_shared,
                              StripSums<kTokenTiles> (&sums)[kBlockStrips / kTokenTiles]) {
  const int lane = ptx::thread() % 32;
  uint8_t* ring = memory;
  uint8_t* tables = ring + Cells::kStages * a.stage_bytes;
  uint8_t* own = tables + Cells::kStages * Cells::kTableBytes;
  const int first = w.cell_begin + ptx::thread() / 32;
  Cursor<Cells> cursor{w, first, 0, 0};
  for (int ahead = 0; ahead < Cells::kStages - 1; ++ahead) cursor.fetch(a, ring + ahead * a.stage_bytes, tables, lane);
  constexpr int kSteps = Cells::kColumns / kStepColumns;
  int stage = 0, table = 0;
  for (int cell = first; cell < w.cell_end; cell += a.warps) {
    const auto x = [&](int step, StepX<kTokenTiles>& fragments) {
      load_x<kTokenTiles>(x_shared + ((cell - w.cell_begin) * kSteps + step) * w.columns() * kStepColumns, w.columns(), lane,
                          fragments);
    };
    unrolled<kBlockStrips / kTokenTiles>([&](int strip) {
      if (strip >= w.strips) return;
      cursor.fetch(a, ring + (stage + Cells::kStages - 1) % Cells::kStages * a.stage_bytes, tables, lane);
      ptx::wait_async<Cells::kStages - 1>();
      ptx::sync_warp();
      const uint8_t* cell_tables = tables + table * Cells::kTableBytes;
      if (strip == 0) Cells::begin_cell(cell_tables, own, lane);
      Cells::template multiply<kTokenTiles>(ring + stage * a.stage_bytes, cell_tables, own, lane, x, sums[strip]);
      ptx::sync_warp();  // the next fetch overwrites this stage
      stage = (stage + 1) % Cells::kStages;
    });
    table = (table + 1) % Cells::kStages;
  }
  ptx::wait_async<0>();
}

// The warps' sums, added in order: [column of the product, row], in place of the rings.
template <int kTokenTiles>
PYLLMQ_DEVICE void add_warps(const Work& w, const Arguments& a, float* total,
                             const StripSums<kTokenTiles> (&sums)[kBlockStrips / kTokenTiles]) {
  constexpr int kRows = kBlockStrips / kTokenTiles * kStripRows;
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  ptx::sync_block();  // every warp is done with its ring
  unrolled<kBlockStrips / kTokenTiles, kStripTiles>([&](int strip, int tile) {
    unrolled<kTokenTiles, 4>([&](int i, int e) {
      const int column = i * 8 + lane % 4 * 2 + e % 2, row = strip * kStripRows + tile * 16 + lane / 4 + e / 2 * 8;
      if (column < w.columns()) total[warp * kSums + column * kRows + row] = sums[strip][tile][i][e];
    });
  });
  ptx::sync_block();
  for (int i = ptx::thread(); i < w.columns() * kRows; i += a.warps * 32) {
    float sum = total[i];
    for (int other = 1; other < a.warps; ++other) sum += total[other * kSums + i];
    total[i] = sum;
  }
  ptx::sync_block();
}

// What the outliers of a row in this block's columns add, for all its tokens, to the sums of their first planes.
template <class Cells, int kRows>
PYLLMQ_DEVICE void add_outliers(const Work& w, const Arguments& a, const Shared& shared, float* total, int row) {
  const SparseHeader& h = *w.header;
  const auto dtype = static_cast<DType>(a.call.dtype);
  const auto* columns = section<uint32_t>(h, h.outlier_columns_offset);
  const auto* deltas = section<float>(h, h.outlier_deltas_offset);
  const auto first_of = [&](int64_t cell) { return outlier_from(h, w.row_begin() + row, cell * Cells::kColumns); };
  const uint32_t end = first_of(w.cell_end);
  for (uint32_t i = first_of(w.cell_begin); i < end; ++i)
    for (int token = 0; token < w.tokens; ++token) {
      const float x = load_element(a.call.x, dtype, (w.token_begin + token) * a.call.columns + columns[i]);
      total[token * w.planes * kRows + row] += deltas[i] * (x / shared.unscale[token]);
    }
}

// Outliers, row scale; then y, or this split's part of it.
template <class Cells, int kTokenTiles>
PYLLMQ_DEVICE void finish(const Work& w, const Arguments& a, Shared& shared, float* total) {
  constexpr int kRows = kBlockStrips / kTokenTiles * kStripRows;
  const SparseHeader& h = *w.header;
  const int threads = a.warps * 32;
  if (Cells::kKind == SparseKind::codes && h.outliers != 0) {
    for (int row = ptx::thread(); row < w.rows; row += threads) add_outliers<Cells, kRows>(w, a, shared, total, row);
    ptx::sync_block();
  }
  const auto for_each_output = [&](const auto& body) {
    for (int token = 0; token < w.tokens; ++token)
      for (int row = ptx::thread(); row < w.rows; row += threads) body(token, row);
  };
  const auto sum_of = [&](int token, int row) {
    float sum = 0.0f, weight = 1.0f;
    for (int plane = 0; plane < w.planes; ++plane) {
      sum += total[(token * w.planes + plane) * kRows + row] * weight;
      if (!Cells::kBf16) weight *= 1.0f / kLowPlane;
    }
    sum *= shared.unscale[token];
    return h.scale_offset == 0 ? sum : sum * section<float>(h, h.scale_offset)[w.row_begin() + row];
  };
  uint32_t* counter = counter_of(a.call, h, w.token_begin / a.tokens_per_block, h.strips, w.strip_begin);
  store_outputs(a.call, a.splits, w.split, counter, w.token_begin, w.row_begin(), shared.arrived, for_each_output, sum_of);
}

// Items that share a split follow each other, since they read the same x and codebooks.
template <class Cells, int kTokenTiles>
PYLLMQ_DEVICE void take(const Arguments& a, const SparseHeader& h, int item, Work& w) {
  constexpr int kStrips = kBlockStrips / kTokenTiles;
  const int row_blocks = static_cast<int>((h.strips + kStrips - 1) / kStrips), in_split = row_blocks * a.token_blocks;
  w.item = item;
  w.header = &h;
  w.split = item / in_split;
  w.strip_begin = item % in_split % row_blocks * kStrips;
  w.strips = h.strips - w.strip_begin < kStrips ? static_cast<int>(h.strips - w.strip_begin) : kStrips;
  const int64_t rows = h.rows - w.row_begin();
  w.rows = rows < w.strips * kStripRows ? static_cast<int>(rows) : w.strips * kStripRows;
  w.cell_begin = static_cast<int>(w.split * h.cells / a.splits);
  w.cell_end = static_cast<int>((w.split + 1) * h.cells / a.splits);
  w.token_begin = int64_t{item % in_split / row_blocks} * a.tokens_per_block;
  const int64_t tokens = a.call.tokens - w.token_begin;
  w.tokens = static_cast<int>(tokens < a.tokens_per_block ? tokens : a.tokens_per_block);
  w.planes = planes_of(Cells::kBf16, static_cast<DType>(a.call.dtype));
}

template <class Cells, int kTokenTiles>
PYLLMQ_KERNEL void __launch_bounds__(kMostWarps * 32, Cells::kBlocks)
    sparse_linear_kernel(const Arguments a, int items, int64_t x_bytes, int64_t warp_bytes) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  auto* x_shared = reinterpret_cast<uint16_t*>(memory + sizeof(Shared));
  uint8_t* rings = memory + sizeof(Shared) + x_bytes;

  const auto& h = *reinterpret_cast<const SparseHeader*>(a.call.layout);
  if (!describes(h, Cells::kKind, a.call.layout_bytes, a.call.rows, a.call.columns) || h.stage_bytes != a.stage_bytes)
    return store_nan(a.call.y, static_cast<DType>(a.call.dtype), a.call.tokens * a.call.rows, a.warps * 32);
  Work& w = shared.work;
  for (auto item = static_cast<int>(ptx::block()); item < items; item = w.item + static_cast<int>(ptx::blocks())) {
    ptx::sync_block();  // the item before is done with shared memory
    if (ptx::thread() == 0) take<Cells, kTokenTiles>(a, h, item, w);
    ptx::sync_block();
    Cursor<Cells>{w, w.cell_begin + ptx::thread() / 32, 0, 0}.prefetch(a, ptx::thread() % 32);
    stage_x<Cells>(w, a, shared, x_shared);
    StripSums<kTokenTiles> sums[kBlockStrips / kTokenTiles] = {};
    accumulate<Cells, kTokenTiles>(w, a, rings + ptx::thread() / 32 * warp_bytes, x_shared, sums);
    add_warps<kTokenTiles>(w, a, reinterpret_cast<float*>(rings), sums);
    finish<Cells, kTokenTiles>(w, a, shared, reinterpret_cast<float*>(rings));
  }
}

template <class Cells>
int64_t warp_bytes(int64_t stage_bytes) {
  return Cells::kStages * (stage_bytes + Cells::kTableBytes) + Cells::kOwnBytes;
}

int64_t row_blocks_of(int64_t rows, int token_tiles) { return ceil_div(ceil_div(rows, kStripRows), kBlockStrips / token_tiles); }

template <class Cells>
SparsePlan plan_for(const SparseOperand& operand, int64_t tokens, int dtype) {
  const int64_t rows = operand.rows, columns = operand.columns, shared_limit = shared_bytes();
  SparsePlan plan{};
  const int64_t planes = planes_of(Cells::kBf16, static_cast<DType>(dtype));
  plan.token_tiles = tokens * planes <= 8 ? 1 : 2;
  plan.tokens_per_block = std::min(tokens, 8 * plan.token_tiles / planes);
  plan.token_blocks = ceil_div(tokens, plan.tokens_per_block);
  const int64_t cells = ceil_div(columns, Cells::kColumns), row_blocks = row_blocks_of(rows, plan.token_tiles);
  const int64_t cell_x = Cells::kColumns * plan.tokens_per_block * planes * 2;

  const int64_t most_x = std::min(kMostXBytes, cells * cell_x);
  const auto bytes = [&](int warps, int64_t x_bytes) {
    return static_cast<int64_t>(sizeof(Shared)) + x_bytes +
           warps * std::max<int64_t>(warp_bytes<Cells>(operand.stage_bytes), kSums * 4);
  };
  plan.warps = kMostWarps;
  while (plan.warps > 1 && bytes(plan.warps, most_x) > shared_limit) plan.warps /= 2;
  // 1 KiB of every block, and of the device's limit, is the driver's.
  const int64_t resident = std::clamp<int64_t>((shared_limit + 1024) / (bytes(plan.warps, most_x) + 1024), 1, Cells::kBlocks);
  const int64_t slots = multiprocessors() * resident;

  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t splits = ceil_div(cells * cell_x, kMostXBytes); splits <= cells; ++splits) {
    const int64_t per_split = ceil_div(cells, splits);
    if (per_split * cell_x > kMostXBytes) continue;
    const int64_t rounds = ceil_div(row_blocks * plan.token_blocks * splits, slots);
    const int64_t cost = rounds * (ceil_div(per_split, plan.warps) * (kBlockStrips / plan.token_tiles) + kItemCost);
    if (cost < least) {
      least = cost;
      plan.splits = splits;
      plan.x_bytes = per_split * cell_x;
    }
    if (row_blocks * plan.token_blocks * splits > 8 * slots) break;
  }
  plan.shared_bytes = bytes(plan.warps, plan.x_bytes);
  plan.grid = std::min(slots, row_blocks * plan.token_blocks * plan.splits);
  if (plan.splits > 1) plan.partials = plan.splits * tokens * rows;
  return plan;
}

template <class Cells, int kTokenTiles>
void launch(const SparseOperand& operand, const SparsePlan& plan, int64_t items, const LinearCall& call, uintptr_t stream) {
  const Arguments arguments{call,
                            static_cast<int>(operand.stage_bytes),
                            static_cast<int>(plan.tokens_per_block),
                            static_cast<int>(plan.token_blocks),
                            static_cast<int>(plan.splits),
                            plan.warps};
  const auto kernel = sparse_linear_kernel<Cells, kTokenTiles>;
  const int64_t of_warp = warp_bytes<Cells>(operand.stage_bytes);
  allow_shared(reinterpret_cast<const void*>(kernel), plan.shared_bytes);
  PYLLMQ_LAUNCH(kernel, plan.grid, plan.warps * 32, plan.shared_bytes, stream, arguments, static_cast<int>(items), plan.x_bytes,
                of_warp);
  check_launch("sparse_linear");
}

}  // namespace

int64_t SparseOperand::find_room(int64_t tokens, int dtype) const {
  if (kind == SparseKind::columns) return plan_columns(tokens).partials;
  int64_t room = 0;
  with_cells(kind, values, bits, [&](auto cells) { room = plan_for<decltype(cells)>(*this, tokens, dtype).partials; });
  return room;
}

void SparseOperand::run(const LinearCall& call, uintptr_t stream) const {
  if (kind == SparseKind::columns) return run_columns(call, stream);
  with_cells(kind, values, bits, [&](auto cells) {
    using Cells = decltype(cells);
    const SparsePlan plan = plan_for<Cells>(*this, call.tokens, call.dtype);
    const int64_t items = row_blocks_of(rows, plan.token_tiles) * plan.token_blocks * plan.splits;
    if (items > std::numeric_limits<int32_t>::max()) refuse_work("sparse_linear", call);
    if (plan.token_tiles == 1) launch<Cells, 1>(*this, plan, items, call, stream);
    if (plan.token_tiles == 2) launch<Cells, 2>(*this, plan, items, call, stream);
  });
}

}  // namespace pyllmq::cuda

// codebook_linear for few tokens: codes are decoded in registers and multiplied by tensor cores, in one launch.
//
// A block has some rows and a range of panels of K (product.cuh). Outliers and row scale are applied to its sums; blocks that
// share rows leave their sums in a workspace, and the one that comes last adds them, in order. So the bits do not depend on
// which block is the last.
//
// x is turned to fp16 by a power of two per token and block that brings its largest value to 2^14..2^15: exact for bf16 (what
// falls below 2^-24 is 2^-39 of the largest). fp32 becomes two fp16 numbers, 22 bits, that take two of the n columns.
#include "codebook/cuda/operand.h"

#include <algorithm>
#include <limits>

#include "codebook/cuda/outliers.cuh"
#include "codebook/cuda/fp16_planes.cuh"
#include "codebook/cuda/product.cuh"
#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = kProductWarps, kThreads = kProductThreads;
constexpr int64_t kMostXBytes = 24 << 10;  // one block fits on compute capability 8.6 (99 KiB), two on 9.0
constexpr int kBlocksPerMultiprocessor = 2;

struct Arguments {
  LinearCall call;
  int tokens_per_block, token_blocks, splits;
};

// What one block computes.
struct Work : Product {
  int item;
  int64_t panel_begin, panel_end, split;
  int64_t token_begin;
};

// Shared memory: this, the warps' rings (after the loop: the sums), x.
struct Shared {
  Work work;
  float largest[kMostProductColumns][kWarps];
  float unscale[kMostProductColumns];
  uint32_t arrived;
  alignas(16) Rings ring;
};
static_assert(sizeof(Shared) + kMostXBytes <= 99 << 10, "what a block gets on compute capability 8.6");
static_assert(sizeof(Shared) % 16 == 0, "x lies behind it");

// x of this block's columns, in the order of its groups, as fp16 [slot, column of the product].
PYLLMQ_DEVICE void stage_x(const Work& w, const LinearCall& call, Shared& shared, uint16_t* x_shared) {
  const LayoutHeader& h = *w.header;
  const auto dtype = static_cast<DType>(call.dtype);
  const int32_t* column_of = section<int32_t>(h, h.columns_offset);
  const int thread = ptx::thread();

  const bool scaled = dtype != DType::fp16;
  for (int token = 0; scaled && token < w.tokens; ++token) {
    float largest = 0.0f;
    for (int width = 1; width <= 8; ++width) {
      const int32_t* columns = column_of + h.first_slot[width];
      for (int slot = w.groups[width].begin * kGroupColumns + thread; slot < w.groups[width].end * kGroupColumns;
           slot += kThreads)
        if (columns[slot] >= 0) {
          const float x = load_element(call.x, dtype, (w.token_begin + token) * h.columns + columns[slot]);
          largest = fmaxf(largest, fabsf(x));
        }
    }
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
    shared.largest[token][thread / 32] = largest;
  }
  ptx::sync_block();

  for (int token = 0; token < w.tokens; ++token) {
    float largest = 0.0f;
    for (int warp = 0; scaled && warp < kWarps; ++warp) largest = fmaxf(largest, shared.largest[token][warp]);
    const int exponent = scale_exponent(largest);
    const float scale = power_of_two(exponent);
    if (thread == 0) shared.unscale[token] = power_of_two(-exponent);
    int staged = 0;
    for (int width = 1; width <= 8; ++width) {
      const GroupRange range = w.groups[width];
      const int32_t* columns = column_of + h.first_slot[width] + range.begin * kGroupColumns;
      const int slots = (range.end - range.begin) * kGroupColumns;
      for (int slot = thread; slot < slots; slot += kThreads) {
        float x = 0.0f;
        if (columns[slot] >= 0) x = scale * load_element(call.x, dtype, (w.token_begin + token) * h.columns + columns[slot]);
        uint16_t* to = x_shared + (staged + slot) * w.columns() + token * w.planes;
        to[0] = ptx::fp32_to_fp16(x);
        if (w.planes == 2) to[1] = ptx::fp32_to_fp16((x - ptx::fp16_to_fp32(to[0])) * kLowPlane);
      }
      staged += slots;
    }
  }
  ptx::sync_block();
}

// The codes of a warp's first groups leave memory while x is brought into order.
PYLLMQ_DEVICE void prefetch_codes(const Work& w) {
  constexpr int kAhead = 3, kLine = 128;
  const LayoutHeader& h = *w.header;
  const int lane = ptx::thread() % 32, tiles = (w.rows + kTileRows - 1) / kTileRows;
  for (int width = 1; width <= 8; ++width) {
    const int end = w.groups[width].end;
    int group = w.groups[width].begin + ptx::thread() / 32;
    if (group >= end) continue;
    for (const int last = group + kAhead * kWarps; group < end && group < last; group += kWarps) {
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(&h) + codes_offset(h, width, w.block, group) +
                             w.first_row / kTileRows * tile_bytes(width);
      for (int at = lane * kLine; at < tiles * tile_bytes(width); at += 32 * kLine) ptx::prefetch(codes + at);
    }
    return;
  }
}

// Sums of all warps, in order, row scale, outliers; then y, or this split's part of it.
template <int kTokenTiles>
PYLLMQ_DEVICE void finish(const Work& w, const Arguments& a, Shared& shared) {
  const LayoutHeader& h = *w.header;
  const int64_t row_begin = w.block.row_begin + w.first_row;
  const auto for_each_output = [&](const auto& body) {
    for (int token = 0; token < w.tokens; ++token)
      for (int row = ptx::thread(); row < w.rows; row += kThreads) body(token, row);
  };
  const auto sum_of = [&](int token, int row) {
    float sum = sum_of_warps<kTokenTiles>(shared.ring, token * w.planes, row);
    if (w.planes == 2) sum += sum_of_warps<kTokenTiles>(shared.ring, token * 2 + 1, row) * (1.0f / kLowPlane);
    sum *= shared.unscale[token];
    if (h.row_scale_offset != 0) sum *= ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[row_begin + row]);
    if (h.outliers != 0) {
      const int in_block = w.first_row + row;
      sum += outlier_sum(h, a.call, w.token_begin + token, w.panel_begin, w.panel_end, w.block.tile_begin + in_block / kTileRows,
                         in_block % kTileRows);
    }
    return sum;
  };
  uint32_t* counter =
      counter_of(a.call, h, w.token_begin / a.tokens_per_block, h.tiles, w.block.tile_begin + w.first_row / kTileRows);
  store_outputs(a.call, a.splits, w.split, counter, w.token_begin, row_begin, shared.arrived, for_each_output, sum_of);
}

// An item is some rows of a row block, some tokens and a split; items that share a split follow each other, since they read
// the same x and codebooks. 32 bits, as the host has checked: a division of 64 bits would take ten times longer.
template <int kTokenTiles>
PYLLMQ_DEVICE int items(const Arguments& a, const LayoutHeader& h) {
  return static_cast<int>(h.blocks) * kTokenTiles * a.token_blocks * a.splits;
}

// Called by threads 0..8: the first describes the item, each of the others the groups of one width.
template <int kTokenTiles>
PYLLMQ_DEVICE void take(const Arguments& a, const LayoutHeader& h, int item, Work& w) {
  constexpr int kRows = kBlockRows / kTokenTiles;
  const int row_parts = static_cast<int>(h.blocks) * kTokenTiles, cells = row_parts * a.token_blocks;
  const int split = item / cells, cell = item % cells, row_part = cell % row_parts;
  const int64_t panel_begin = split * h.panels / a.splits, panel_end = (split + 1) * h.panels / a.splits;
  if (ptx::thread() != 0) {
    w.groups[ptx::thread()] = panel_groups(h, ptx::thread(), panel_begin, panel_end);
    return;
  }
  w.item = item;
  w.header = &h;
  w.block = section<RowBlock>(h, h.blocks_offset)[row_part / kTokenTiles];
  w.first_row = row_part % kTokenTiles * kRows;
  w.rows = w.block.rows - w.first_row < kRows ? w.block.rows - w.first_row : kRows;
  w.panel_begin = panel_begin;
  w.panel_end = panel_end;
  w.split = split;
  w.token_begin = int64_t{cell / row_parts} * a.tokens_per_block;
  const int64_t tokens_left = a.call.tokens - w.token_begin;
  w.tokens = static_cast<int>(tokens_left < a.tokens_per_block ? tokens_left : a.tokens_per_block);
  w.planes = static_cast<DType>(a.call.dtype) == DType::fp32 ? 2 : 1;
}

template <int kTokenTiles>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) codebook_linear_kernel(const Arguments a) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  auto* x_shared = reinterpret_cast<uint16_t*>(memory + sizeof(Shared));
  uint8_t* ring = shared.ring[ptx::thread() / 32];

  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.call.layout);
  if (!describes(h, a.call.layout_bytes, a.call.rows, a.call.columns))
    return store_nan(a.call.y, static_cast<DType>(a.call.dtype), a.call.tokens * a.call.rows, kThreads);
  Work& w = shared.work;
  for (auto item = static_cast<int>(ptx::block()); item < items<kTokenTiles>(a, h);
       item = w.item + static_cast<int>(ptx::blocks())) {
    ptx::sync_block();  // the item before is done with shared memory
    if (ptx::thread() <= 8) take<kTokenTiles>(a, h, item, w);
    ptx::sync_block();
    if (w.rows <= 0) continue;

    prefetch_codes(w);
    stage_x(w, a.call, shared, x_shared);
    TileSums<kTokenTiles> sums[kBlockTiles / kTokenTiles] = {};
    accumulate_all<kTokenTiles>(w, ring, x_shared, sums);
    store_sums<kTokenTiles>(w, sums, ring);
    ptx::sync_block();
    finish<kTokenTiles>(w, a, shared);
  }
}

struct LinearPlan {
  int token_tiles;  // columns of a block's product, in units of 4
  int64_t tokens_per_block, token_blocks;
  int64_t splits;  // of K
  int64_t grid;
  int64_t x_bytes;   // of shared memory
  int64_t partials;  // elements of the workspace
};

// Shared memory for x: a split of q panels has at most 16 q + 8 groups, since each of 8 widths rounds up to a group.
int64_t staged_bytes(int64_t panels, int64_t splits, int64_t product_columns) {
  return (ceil_div(panels, splits) * kPanelGroups + 8) * kGroupColumns * product_columns * 2;
}

template <int kTokenTiles>
void launch(const Arguments& arguments, const LinearPlan& plan, uintptr_t stream) {
  const auto kernel = codebook_linear_kernel<kTokenTiles>;
  allow_shared(reinterpret_cast<const void*>(kernel), sizeof(Shared) + kMostXBytes);
  PYLLMQ_LAUNCH(kernel, plan.grid, kThreads, sizeof(Shared) + plan.x_bytes, stream, arguments);
  check_launch("codebook_linear");
}

// By shape alone: nothing on the device is read.
LinearPlan plan_linear(int64_t rows, int64_t columns, int64_t tokens, int dtype) {
  const int64_t planes = static_cast<DType>(dtype) == DType::fp32 ? 2 : 1;
  LinearPlan plan{};
  plan.token_tiles = tokens * planes <= 4 ? 1 : tokens * planes <= 8 ? 2 : 4;
  plan.tokens_per_block = 4 * plan.token_tiles / planes;
  plan.token_blocks = ceil_div(tokens, plan.tokens_per_block);
  const int64_t product_columns = std::min(tokens, plan.tokens_per_block) * planes;

  // The panels are in the layout; at most, each of the 8 widths pads a group.
  const int64_t panels = ceil_div(ceil_div(columns, kGroupColumns) + 7, kPanelGroups);
  const int64_t slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  const int64_t cells = ceil_div(rows, kBlockRows / plan.token_tiles) * plan.token_blocks;
  plan.splits = std::clamp<int64_t>(ceil_div(slots, cells), 1, ceil_div(columns, kGroupColumns * kPanelGroups));
  while (staged_bytes(panels, plan.splits, product_columns) > kMostXBytes) ++plan.splits;
  plan.x_bytes = staged_bytes(panels, plan.splits, product_columns);
  plan.grid = std::min(slots, cells * plan.splits);
  if (plan.splits > 1) plan.partials = plan.splits * tokens * rows;
  return plan;
}

}  // namespace

int64_t CodebookOperand::find_room(int64_t tokens, int dtype) const { return plan_linear(rows, columns, tokens, dtype).partials; }

void CodebookOperand::run(const LinearCall& call, uintptr_t stream) const {
  const LinearPlan plan = plan_linear(rows, columns, call.tokens, call.dtype);
  // Each item has at least one row.
  if (call.rows * plan.token_tiles * plan.token_blocks * plan.splits > std::numeric_limits<int32_t>::max())
    refuse_work("codebook_linear", call);
  const Arguments arguments{call, static_cast<int>(plan.tokens_per_block), static_cast<int>(plan.token_blocks),
                            static_cast<int>(plan.splits)};
  if (plan.token_tiles == 1) launch<1>(arguments, plan, stream);
  if (plan.token_tiles == 2) launch<2>(arguments, plan, stream);
  if (plan.token_tiles == 4) launch<4>(arguments, plan, stream);
}

}  // namespace pyllmq::cuda

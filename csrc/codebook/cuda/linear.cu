// codebook_linear for few tokens: codes are decoded in registers and multiplied by tensor cores, in one launch.
//
// A block of 8 warps takes up to 512 rows and a range of panels of K; each warp takes every 8th column group, streams its
// codes and codebooks through a ring in shared memory of its own, and keeps the sums of all rows in registers. Then the
// warps' sums are added in one pass, in order, outliers and row scale applied; blocks that share rows leave their sums in a
// workspace, and the one that comes last adds them, again in order. So the bits do not depend on which block is the last.
//
// A product without transposes: decoding gives *pairs of rows* of one column, but an operand register of mma.m16n8k16 wants
// two columns of one row. So the two k-slots of a register both stand for one column, the first for the pair's first row,
// the second for its second row, and the other operand is x in the first slot for even n and in the second for odd n:
//
//            slot 2t  2t+1                  n = 2m   2m+1
//   row g   [ W[r0,k] W[r1,k] ]   slot 2t   [ x[m,k]   0    ]     C[g, 2m] = sum_k W[r0,k] x[m,k]
//                                 slot 2t+1 [   0    x[m,k] ]     C[g, 2m+1] = the same for r1
//
// One instruction is 32 rows x 8 columns x 4 tokens.
//
// x is turned to fp16 by a power of two per token and block that brings its largest value to 2^14..2^15: exact for bf16 (what
// falls below 2^-24 is 2^-39 of the largest). fp32 becomes two fp16 numbers, 22 bits, that take two of the n columns.
#include "codebook/cuda/operand.h"

#include <algorithm>
#include <limits>

#include "codebook/cuda/outliers.cuh"
#include "codebook/cuda/decode.cuh"
#include "codebook/cuda/fp16_planes.cuh"
#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMostColumns = 16;           // of the product: tokens, or twice the tokens for fp32
constexpr int kRingBytes = 9216;           // of one warp: two stages of 4 bits, or the tables of an 8-bit group
constexpr int64_t kMostXBytes = 24 << 10;  // one block fits on compute capability 8.6 (99 KiB), two on 9.0
constexpr int kBlocksPerMultiprocessor = 2;

struct Arguments {
  LinearCall call;
  int tokens_per_block, token_blocks, splits;
};

// What one block computes: the same for all threads, so it lies in shared memory, and sums have the registers.
struct Work {
  int item;
  const LayoutHeader* header;
  RowBlock block;
  int first_row, rows;  // within the row block; no rows: nothing to do
  int64_t panel_begin, panel_end, split;
  int64_t token_begin;
  int tokens, planes;
  GroupRange groups[9];  // by width
  PYLLMQ_MEMBER int columns() const { return tokens * planes; }
};

// Shared memory: this, the warps' rings (after the loop: the sums), x.
struct Shared {
  Work work;
  float largest[kMostColumns][kWarps];
  float unscale[kMostColumns];
  uint32_t arrived;
  alignas(16) uint8_t ring[kWarps][kRingBytes];
};
static_assert(sizeof(Shared) + kMostXBytes <= 99 << 10, "what a block gets on compute capability 8.6");
static_assert(sizeof(Shared) % 16 == 0);

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

// Sums of 64 rows x 4 columns of the product: the two instructions' rows, the tiles of columns, the fragment.
template <int kTokenTiles>
using TileSums = float[2][kTokenTiles][4];

// x of columns t + 8*half and t + 8*half + 4 of a group as the second operand: this lane's token in its slot, 0 in the other.
template <int kTokenTiles>
PYLLMQ_DEVICE void load_x(const uint16_t* x_group, int columns, int lane, int half, uint32_t (&x)[kTokenTiles][2]) {
  unrolled<kTokenTiles>([&](int tile) {
    const int column = tile * 4 + (lane >> 3);
    unrolled<2>([&](int i) {
      const int k = (lane & 3) + 8 * half + 4 * i;
      const uint32_t value = column < columns ? x_group[k * columns + column] : 0;
      x[tile][i] = value << (lane >> 2 & 1) * 16;
    });
  });
}

// Adds the product of half a group: decode(tile, pairs) gives a tile's pairs of two columns.
template <int kTokenTiles, class Decode>
PYLLMQ_DEVICE void multiply(int tiles, const uint32_t (&x)[kTokenTiles][2], const Decode& decode,
                            TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles]) {
  unrolled<kBlockTiles / kTokenTiles>([&](int tile) {
    if (tile < tiles) {
      uint32_t pairs[2][4];
      decode(tile, pairs);
      unrolled<2, kTokenTiles>([&](int i, int column_tile) {
        ptx::mma_m16n8k16(sums[tile][i][column_tile], pairs[0][2 * i], pairs[0][2 * i + 1], pairs[1][2 * i], pairs[1][2 * i + 1],
                          x[column_tile][0], x[column_tile][1]);
      });
    }
  });
}

// Where the columns of a width start in the staged x.
template <int kWidth>
PYLLMQ_DEVICE int staged_before(const Work& w) {
  int groups = 0;
  PYLLMQ_UNROLL
  for (int width = 1; width < kWidth; ++width) groups += w.groups[width].end - w.groups[width].begin;
  return groups * kGroupColumns;
}

template <int kWidth, int kTokenTiles>
struct Ring {
  static constexpr int kTiles = kBlockTiles / kTokenTiles;
  static constexpr int kTableBytes = static_cast<int>(kGroupColumns * 2) << kWidth;
  static constexpr int kStageBytes = kTableBytes + kTiles * kTileRows * kGroupColumns / 8 * kWidth;
  static constexpr int kFit = kRingBytes / kStageBytes;
  static constexpr int kStages = kFit < 4 ? kFit : 4;
  // With 16 columns of the product no registers are left for codebooks: they are loaded for each of the two tiles.
  static constexpr bool kKeepTables = kTokenTiles <= 2;
};

// Adds the columns of one width, up to 4 bits, to the sums.
template <int kWidth, int kTokenTiles>
PYLLMQ_DEVICE void accumulate(const Work& w, uint8_t* ring, const uint16_t* x_shared,
                              TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles]) {
  using R = Ring<kWidth, kTokenTiles>;
  static_assert(R::kStages >= 2, "one stage is read while another is filled");
  const LayoutHeader& h = *w.header;
  const int lane = ptx::thread() % 32;
  const GroupRange range = w.groups[kWidth];
  const int tiles = (w.rows + kTileRows - 1) / kTileRows;
  const int first = range.begin + ptx::thread() / 32;
  const auto* base = reinterpret_cast<const uint8_t*>(&h);
  const uint8_t* next_tables = base + tables_offset(h, kWidth, w.block.segment, first);
  const uint8_t* next_codes = base + codes_offset(h, kWidth, w.block, first) + w.first_row / kTileRows * tile_bytes(kWidth);
  const int64_t codes_step = kWarps * block_tiles(w.block) * tile_bytes(kWidth);

  const auto fetch = [&](int group, int stage) {
    if (group < range.end) {
      uint8_t* to = ring + stage * R::kStageBytes;
      for (int at = lane * 16; at < R::kTableBytes; at += 512) ptx::copy_async_16(to + at, next_tables + at);
      const int code_bytes = tiles * static_cast<int>(tile_bytes(kWidth));
      for (int at = lane * 16; at < code_bytes; at += 512) ptx::copy_async_16(to + R::kTableBytes + at, next_codes + at);
      next_tables += kWarps * R::kTableBytes;
      next_codes += codes_step;
    }
    ptx::commit_async();
  };

  for (int ahead = 0; ahead < R::kStages - 1; ++ahead) fetch(first + ahead * kWarps, ahead);
  const uint16_t* x_group = x_shared + (staged_before<kWidth>(w) + (first - range.begin) * kGroupColumns) * w.columns();
  int stage = 0;
  for (int group = first; group < range.end; group += kWarps) {
    fetch(group + (R::kStages - 1) * kWarps, (stage + R::kStages - 1) % R::kStages);
    ptx::wait_async<R::kStages - 1>();
    ptx::sync_warp();
    const uint8_t* tables = ring + stage * R::kStageBytes;
#pragma unroll(kWidth == 3 ? 2 : 1)
    for (int half = 0; half < 2; ++half) {
      RegisterTable<kWidth> table[2];
      PYLLMQ_UNROLL
      for (int i = 0; R::kKeepTables && i < 2; ++i) table[i].load(tables, lane % 4 + 8 * half + 4 * i);
      uint32_t x[kTokenTiles][2];
      load_x<kTokenTiles>(x_group, w.columns(), lane, half, x);
      const auto decode = [&](int tile, uint32_t (&pairs)[2][4]) {
        uint32_t codes[2];
        column_codes<kWidth>(tables + R::kTableBytes + tile * tile_bytes(kWidth), lane, half, codes);
        unrolled<2>([&](int i) {
          if (!R::kKeepTables) table[i].load(tables, lane % 4 + 8 * half + 4 * i);
          table[i].decode(codes[i], pairs[i]);
        });
      };
      multiply<kTokenTiles>(tiles, x, decode, sums);
    }
    ptx::sync_warp();  // the next fetch overwrites this stage
    stage = (stage + 1) % R::kStages;
    x_group += kWarps * kGroupColumns * w.columns();
  }
  ptx::wait_async<0>();
}

// The same for widths 5..8: codebooks in shared memory, codes straight from global memory.
template <int kWidth, int kTokenTiles>
PYLLMQ_DEVICE void accumulate_wide(const Work& w, uint8_t* ring, const uint16_t* x_shared,
                                   TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles]) {
  const LayoutHeader& h = *w.header;
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  const GroupRange range = w.groups[kWidth];
  const int first_slot = staged_before<kWidth>(w);
  const int tiles = (w.rows + kTileRows - 1) / kTileRows;
  const auto* base = reinterpret_cast<const uint8_t*>(&h);

  for (int group = range.begin + warp; group < range.end; group += kWarps) {
    const uint8_t* tables = base + tables_offset(h, kWidth, w.block.segment, group);
    const uint8_t* codes = base + codes_offset(h, kWidth, w.block, group) + w.first_row / kTileRows * tile_bytes(kWidth);
    const uint16_t* x_group = x_shared + (first_slot + (group - range.begin) * kGroupColumns) * w.columns();
    ptx::sync_warp();  // all lanes are done with the tables before
    for (int at = lane * 16; at < table_bytes(kWidth); at += 512) ptx::copy_async_16(ring + at, tables + at);
    ptx::commit_async();
    ptx::wait_async<0>();
    ptx::sync_warp();
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const auto* entries = reinterpret_cast<const uint16_t*>(ring) + ((lane % 4 + 8 * half) << kWidth);
      uint32_t x[kTokenTiles][2];
      load_x<kTokenTiles>(x_group, w.columns(), lane, half, x);
      const auto decode = [&](int tile, uint32_t (&pairs)[2][4]) {
        const uint8_t* at = codes + tile * tile_bytes(kWidth);
        uint32_t low[2], high[2];
        column_codes<4>(at, lane, half, low);
        column_codes<kWidth - 4>(at + tile_bytes(4), lane, half, high);
        unrolled<2>([&](int i) { MemoryTable<kWidth>{entries + i * (4 << kWidth)}.decode(low[i], high[i], pairs[i]); });
      };
      multiply<kTokenTiles>(tiles, x, decode, sums);
    }
  }
  ptx::sync_warp();
}

// Where the sum of a row and a column of the product stands in a warp's ring: lanes of a store meet in pairs.
template <int kTokenTiles>
PYLLMQ_DEVICE int place_of_sum(int column, int row) {
  constexpr int kStride = kBlockRows / kTokenTiles + 16;
  static_assert(kStride * 4 * kTokenTiles * sizeof(float) <= kRingBytes, "a warp's sums take the place of its ring");
  return column * kStride + row;
}

// A warp's sums in place of its ring.
template <int kTokenTiles>
PYLLMQ_DEVICE void store_sums(const Work& w, const TileSums<kTokenTiles> (&sums)[kBlockTiles / kTokenTiles], float* part) {
  const int lane = ptx::thread() % 32;
  unrolled<kTokenTiles>([&](int column_tile) {
    const int column = column_tile * 4 + lane % 4;
    if (column >= w.columns()) return;
    unrolled<kBlockTiles / kTokenTiles, 8>([&](int tile, int e) {
      const int row = tile * kTileRows + e / 2 * 16 + lane / 4 * 2 + e % 2;
      part[place_of_sum<kTokenTiles>(column, row)] = sums[tile][e / 4][column_tile][e % 4];
    });
  });
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
  const auto of_warps = [&](int column, int row) {
    float sum = 0.0f;
    unrolled<kWarps>(
        [&](int warp) { sum += reinterpret_cast<const float*>(shared.ring[warp])[place_of_sum<kTokenTiles>(column, row)]; });
    return sum;
  };
  const auto sum_of = [&](int token, int row) {
    float sum = of_warps(token * w.planes, row);
    if (w.planes == 2) sum += of_warps(token * 2 + 1, row) * (1.0f / kLowPlane);
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
    accumulate<1, kTokenTiles>(w, ring, x_shared, sums);
    accumulate<2, kTokenTiles>(w, ring, x_shared, sums);
    accumulate<3, kTokenTiles>(w, ring, x_shared, sums);
    accumulate<4, kTokenTiles>(w, ring, x_shared, sums);
    accumulate_wide<5, kTokenTiles>(w, ring, x_shared, sums);
    accumulate_wide<6, kTokenTiles>(w, ring, x_shared, sums);
    accumulate_wide<7, kTokenTiles>(w, ring, x_shared, sums);
    accumulate_wide<8, kTokenTiles>(w, ring, x_shared, sums);
    store_sums<kTokenTiles>(w, sums, reinterpret_cast<float*>(ring));
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

// codebook_linear for 3 to 32 tokens on compute capability 9.0: codes are decoded in registers, from which warp groups multiply
// by wgmma; a weight is decoded once for all tokens.
//
// As in linear.cu the two k of a register are the same column for two rows, and x stands in the one or the other: so an
// instruction of a warp group is 4 x 32 rows, 8 columns and half of its n columns of the product (tokens, or twice the tokens for
// fp32). Half of the products are zeros, which costs less than shared memory's part in linear_wgmma.cu up to n = 64.
//
// A first kernel brings x into that form, in pieces of 16 columns; meanwhile the second begins. There a block has a row block and
// a range of panels of K, of which each of its warp groups takes every second or fourth group of columns, through a ring of its
// own that one thread fills by bulk copies of x, codebooks and codes. The warp groups' sums are added in order. Outliers, row
// scale and blocks that share outputs are as in linear.cu.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "codebook/cuda/decode.cuh"
#include "codebook/cuda/operand.h"
#include "codebook/cuda/outliers.cuh"
#include "codebook/cuda/token_scale.cuh"
#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kMostBits = 4;  // codebooks of more do not fit into registers
constexpr int kMostColumns = 32;
constexpr int kWarpTiles = 2;  // of 64 rows: four warps have a row block's eight
static_assert(4 * kWarpTiles == kBlockTiles);
constexpr int kStageGroups = 2;  // of 16 columns
constexpr uint32_t kStages = 4;
constexpr int kTableRoom = kStageGroups * (kGroupColumns * 2 << kMostBits);
constexpr int kCodeRoom = kStageGroups * kBlockRows * kGroupColumns / 8 * kMostBits;
constexpr int kOrderThreads = 256;  // that bring a token's x into order
constexpr int kOrderParts = 4;      // blocks that share a token
constexpr int kMatrixAlignment = 1024;
constexpr int kSumStride = kBlockRows + 16;  // of a column of the product; lanes of a store meet in pairs

struct Arguments {
  LinearCall call;
  int splits, planes;
  float* unscale;  // [tokens]
  uint32_t* x;     // [slots / 16][n][16]: columns of a group in the slot of n's row, swizzled
};

// What a block is made of, for n columns of wgmma.
template <int kN>
struct Shape {
  static constexpr int kColumns = kN / 2;               // of the product
  static constexpr int kWarpGroups = kN == 64 ? 2 : 4;  // 128 sums a thread leave room for two
  static constexpr int kThreads = 128 * kWarpGroups;
  static constexpr int kXBytes = kN * kGroupColumns * 4;  // of a group
  static constexpr int kXRoom = kStageGroups * kXBytes;
  static constexpr int kStageBytes = kXRoom + kTableRoom + kCodeRoom;
  static constexpr int kRingBytes =
      std::max(static_cast<int>(kStages) * kStageBytes, kColumns * kSumStride * 4);  // after the loop: the sums
  static constexpr int kSharedBytes = 2048 + kMatrixAlignment + kWarpGroups * kRingBytes;
  static_assert(kStageBytes % 512 == 0 && kRingBytes % 512 == 0, "x begins where a matrix may");
  static_assert(kSharedBytes <= 227 << 10);
};

struct Work {
  RowBlock block;
  int tiles;  // of the row block
  int64_t panel_begin, panel_end, split;
};

// What a warp group asks for, of one width: every second or fourth pair of groups of columns.
struct alignas(16) Source {
  const uint8_t *codes, *tables;
  const uint32_t* x;
  int left, width;  // groups from the first pair on; no more where it is not positive
};

// Shared memory: this, the warp groups' rings.
struct Shared {
  Work work;
  uint32_t arrived;
  Source sources[4][kMostBits];  // by warp group and width
  Source next[4];                // here, since registers are few
  ptx::Barrier full[4][kStages], empty[4][kStages];
};
static_assert(sizeof(Shared) <= 2048);

// ---- x -------------------------------------------------------------------------------------------------------------------

// A block takes a part of a token, which may be one of those that fill up the columns of the product: 0, as where no column is.
PYLLMQ_KERNEL void __launch_bounds__(kOrderThreads, 4) codebook_linear_wgmma_registers_x_kernel(const Arguments a, int n) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  ptx::let_next_begin();
  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.call.layout);
  if (!describes(h, a.call.layout_bytes, a.call.rows, a.call.columns)) return;
  const int thread = ptx::thread();
  const int64_t token = ptx::block() / kOrderParts, part = ptx::block() % kOrderParts;
  const bool is_token = token < a.call.tokens;
  const int exponent = is_token ? token_exponent<kOrderThreads>(a.call, token, reinterpret_cast<float*>(memory)) : 0;
  const float scale = power_of_two(exponent);
  if (thread == 0 && part == 0 && is_token) a.unscale[token] = power_of_two(-exponent);

  constexpr int kChunk = 4, kChunks = kGroupColumns / kChunk;  // 16 bytes
  const int32_t* column_of = section<int32_t>(h, h.columns_offset);
  const int64_t chunks = h.slots / kChunk;
  for (int64_t at = part * kOrderThreads + thread; at < chunks; at += kOrderParts * kOrderThreads) {
    Words<4> halves[2] = {};  // by plane
    unrolled<kChunk>([&](int i) {
      const int32_t column = is_token ? column_of[at * kChunk + i] : -1;
      if (column < 0) return;
      const float x = load_element(a.call.x, static_cast<DType>(a.call.dtype), token * h.columns + column) * scale;
      const uint16_t high = ptx::fp32_to_fp16(x);
      halves[0].word[i] = high;
      if (a.planes == 2) halves[1].word[i] = ptx::fp32_to_fp16((x - ptx::fp16_to_fp32(high)) * kLowPlane);
    });
    const int64_t group = at / kChunks;
    for (int plane = 0; plane < a.planes; ++plane)
      unrolled<2>([&](int odd) {
        const int64_t row = (token * a.planes + plane) * 2 + odd;
        Words<4> words;
        unrolled<kChunk>([&](int i) { words.word[i] = halves[plane].word[i] << (16 * odd); });
        *reinterpret_cast<Words<4>*>(a.x + (group * n + row) * kGroupColumns + (at % kChunks ^ row / 2 % 4) * kChunk) = words;
      });
  }
}

// ---- the product ---------------------------------------------------------------------------------------------------------

// Sums of a warp's 128 rows: two tiles, of each twice 32 rows.
template <int kN>
using Sums = float[kWarpTiles][2][kN / 2];

// Operands that a product may still be reading: one tile's while the other's are decoded.
using Operands = uint32_t[kWarpTiles][2][4];

// Adds a group of a stage. codes: of the warp.
template <int kN, int kWidth>
PYLLMQ_DEVICE void multiply(uint64_t x, const uint8_t* tables, const uint8_t* codes, Operands& operands, Sums<kN>& sums) {
  const int lane = ptx::thread() & 31;
  unrolled<2>([&](int half) {
    RegisterTable<kWidth> table[2];
    unrolled<2>([&](int i) { table[i].load(tables, lane % 4 + 8 * half + 4 * i); });
    unrolled<kWarpTiles>([&](int tile) {
      uint32_t of_column[2];
      column_codes<kWidth>(codes + tile * tile_bytes(kWidth), lane, half, of_column);
      ptx::wgmma_wait<1>();  // this tile's operands are read
      unrolled<2>([&](int i) {
        uint32_t pairs[4];
        table[i].decode(of_column[i], pairs);
        unrolled<4>([&](int k) { operands[tile][k / 2][2 * i + k % 2] = pairs[k]; });
      });
      ptx::wgmma_begin();
      // A descriptor's address is in units of 16 bytes; 8 columns are 32 bytes of a row.
      unrolled<2>([&](int i) { ptx::wgmma<kN>(sums[tile][i], operands[tile][i], x + static_cast<uint64_t>(2 * half)); });
      ptx::wgmma_commit();
    });
  });
}

// The groups of a warp group's share of a block's work, one after the other.
template <int kN>
struct Stream {
  using S = Shape<kN>;
  static constexpr uint32_t kAhead = kStages - 2;  // a stage is free when the turn behind its own has ended
  Shared& shared;
  uint8_t* const rings;
  uint32_t turn;  // stages that the warp group went through before

  static PYLLMQ_MEMBER int warp_group() { return ptx::thread() / 128; }
  PYLLMQ_MEMBER uint8_t* ring() const { return rings + warp_group() * S::kRingBytes; }
  // One thread asks, of the four warp groups each in the warps of another scheduler.
  static PYLLMQ_MEMBER bool asks() { return ptx::thread() % 128 == 32 * warp_group(); }

  PYLLMQ_MEMBER void begin() {
    if (asks()) shared.next[warp_group()] = shared.sources[warp_group()][0];
    for (uint32_t ahead = 0; ahead < kAhead; ++ahead) fetch(turn + ahead);
  }

  PYLLMQ_MEMBER void fetch(uint32_t to_turn) {
    if (!asks()) return;
    Source next = shared.next[warp_group()];
    while (next.left <= 0) {
      if (next.width == kMostBits) return;
      next = shared.sources[warp_group()][next.width];
    }
    const uint32_t stage = to_turn % kStages;
    const int groups = next.left < kStageGroups ? 1 : kStageGroups, tables = static_cast<int>(table_bytes(next.width));
    const int codes = shared.work.tiles * static_cast<int>(tile_bytes(next.width));
    ptx::Barrier* const full = &shared.full[warp_group()][stage];
    uint8_t* const to = ring() + stage * S::kStageBytes;
    ptx::barrier_wait(&shared.empty[warp_group()][stage], (to_turn / kStages & 1) ^ 1);
    ptx::barrier_arrive_and_expect(full, groups * (S::kXBytes + tables + codes));
    ptx::copy_bulk(to, next.x, groups * S::kXBytes, full);
    ptx::copy_bulk(to + S::kXRoom, next.tables, groups * tables, full);
    ptx::copy_bulk(to + S::kXRoom + kTableRoom, next.codes, groups * codes, full);
    constexpr int kStep = S::kWarpGroups * kStageGroups;
    next.codes += kStep * codes;
    next.tables += kStep * tables;
    next.x += kStep * kN * kGroupColumns;
    next.left -= kStep;
    shared.next[warp_group()] = next;
  }

  PYLLMQ_MEMBER void free(uint32_t of_turn) {
    if (ptx::thread() % 32 == 0) ptx::barrier_arrive(&shared.empty[warp_group()][of_turn % kStages]);
  }

  template <int kWidth>
  PYLLMQ_MEMBER void accumulate(Operands& operands, Sums<kN>& sums) {
#pragma unroll 1
    for (int left = shared.sources[warp_group()][kWidth - 1].left; left > 0; left -= S::kWarpGroups * kStageGroups, ++turn) {
      fetch(turn + kAhead);
      ptx::sync_warp();  // together again, as wgmma wants the lanes
      ptx::barrier_wait(&shared.full[warp_group()][turn % kStages], turn / kStages & 1);
#pragma unroll 1
      for (int group = 0; group < kStageGroups && group < left; ++group) {
        const uint8_t* const stage = ring() + turn % kStages * S::kStageBytes;
        const uint8_t* const tables = stage + S::kXRoom;
        const int tile = group * shared.work.tiles + ptx::thread() / 32 % 4 * kWarpTiles;
        multiply<kN, kWidth>(ptx::narrow_matrix_at(stage + group * S::kXBytes), tables + group * table_bytes(kWidth),
                             tables + kTableRoom + tile * tile_bytes(kWidth), operands, sums);
      }
      if (turn != 0) free(turn - 1);
    }
  }

  // Adds all of them.
  PYLLMQ_MEMBER void accumulate(Sums<kN>& sums) {
    begin();
    Operands operands;
    unrolled<kWarpTiles, 2>([&](int tile, int i) { ptx::hold(sums[tile][i]); });
    accumulate<1>(operands, sums);
    accumulate<2>(operands, sums);
    accumulate<3>(operands, sums);
    accumulate<4>(operands, sums);
    ptx::wgmma_wait<0>();
    unrolled<kWarpTiles, 2>([&](int tile, int i) { ptx::hold(sums[tile][i]); });
  }
};

// [column of the product, row] in place of the ring.
template <int kN>
PYLLMQ_DEVICE void store_sums(const Sums<kN>& sums, float* part) {
  const int lane = ptx::thread() & 31, warp = ptx::thread() / 32 % 4;
  unrolled<2 * kWarpTiles, kN / 2>([&](int i, int e) {
    const int row = warp * kWarpTiles * kTileRows + (2 * i + e / 2 % 2) * 16 + lane / 4 * 2 + e % 2;
    part[(e / 4 * 4 + lane % 4) * kSumStride + row] = sums[i / 2][i % 2][e];
  });
}

// Sums of all warp groups, in order, row scale, outliers; then y, or this split's part of it.
template <int kN>
PYLLMQ_DEVICE void finish(const Arguments& a, const LayoutHeader& h, Shared& shared, const uint8_t* rings) {
  using S = Shape<kN>;
  const Work& w = shared.work;
  const auto for_each_output = [&](const auto& body) {
    for (int at = ptx::thread(); at < static_cast<int>(a.call.tokens) * kBlockRows; at += S::kThreads)
      if (at % kBlockRows < w.block.rows) body(at / kBlockRows, at % kBlockRows);
  };
  const auto sum_of_column = [&](int column, int row) {
    float sum = 0.0f;
    for (int warp_group = 0; warp_group < S::kWarpGroups; ++warp_group)
      sum += reinterpret_cast<const float*>(rings + warp_group * S::kRingBytes)[column * kSumStride + row];
    return sum;
  };
  const auto sum_of = [&](int token, int row) {
    float sum = sum_of_column(token * a.planes, row);
    if (a.planes == 2) sum += sum_of_column(token * 2 + 1, row) * (1.0f / kLowPlane);
    sum *= a.unscale[token];
    if (h.row_scale_offset != 0) sum *= ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[w.block.row_begin + row]);
    if (h.outliers != 0)
      sum += outlier_sum(h, a.call, token, w.panel_begin, w.panel_end, w.block.tile_begin + row / kTileRows, row % kTileRows);
    return sum;
  };
  uint32_t* counter = counter_of(a.call, h, 0, h.tiles, w.block.tile_begin);
  store_outputs(a.call, a.splits, w.split, counter, 0, w.block.row_begin, shared.arrived, for_each_output, sum_of);
}

template <int kN>
PYLLMQ_DEVICE void take(const Arguments& a, const LayoutHeader& h, int item, Shared& shared) {
  constexpr int kWarpGroups = Shape<kN>::kWarpGroups;
  const int blocks = static_cast<int>(h.blocks), split = item / blocks, thread = ptx::thread();
  const int64_t panel_begin = split * h.panels / a.splits, panel_end = (split + 1) * h.panels / a.splits;
  const RowBlock& block = section<RowBlock>(h, h.blocks_offset)[item % blocks];
  if (thread == 0) shared.work = {block, block_tiles(block), panel_begin, panel_end, split};
  if (thread >= kWarpGroups * kMostBits) return;
  const int warp_group = thread / kMostBits, width = thread % kMostBits + 1;
  const GroupRange groups = panel_groups(h, width, panel_begin, panel_end);
  const int group = groups.begin + warp_group * kStageGroups;
  shared.sources[warp_group][width - 1] = {
      a.call.layout + codes_offset(h, width, block, group), a.call.layout + tables_offset(h, width, block.segment, group),
      a.x + (h.first_slot[width] / kGroupColumns + group) * (kN * kGroupColumns), groups.end - group, width};
}

template <int kN>
PYLLMQ_KERNEL void __launch_bounds__(Shape<kN>::kThreads, 1) codebook_linear_wgmma_registers_kernel(const Arguments a) {
#ifdef PYLLMQ_NO_CODE
  PYLLMQ_NO_CODE
#else
  using S = Shape<kN>;
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* rings = memory + 2048;
  rings += -static_cast<uint32_t>(ptx::shared_address(rings)) % kMatrixAlignment;
  const int thread = ptx::thread();
  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.call.layout);
  if (!describes(h, a.call.layout_bytes, a.call.rows, a.call.columns) || h.widest > kMostBits)
    return store_nan(a.call.y, static_cast<DType>(a.call.dtype), a.call.tokens * a.call.rows, S::kThreads);
  if (thread == 0) {
    for (int i = 0; i < S::kWarpGroups * static_cast<int>(kStages); ++i) {
      ptx::barrier_init(&shared.full[i / kStages][i % kStages], 1);
      ptx::barrier_init(&shared.empty[i / kStages][i % kStages], 4);
    }
    ptx::fence_async();
  }
  const int items = static_cast<int>(h.blocks) * a.splits;
  Stream<kN> stream{shared, rings, 0};
  ptx::wait_for_previous();
  for (auto item = static_cast<int>(ptx::block()); item < items; item += static_cast<int>(ptx::blocks())) {
    ptx::fence_async();  // copies follow what the work before wrote to the rings
    ptx::sync_block();
    take<kN>(a, h, item, shared);
    ptx::sync_block();
    Sums<kN> sums = {};
    stream.accumulate(sums);
    ptx::sync_block();
    store_sums<kN>(sums, reinterpret_cast<float*>(stream.ring()));
    ptx::sync_block();
    finish<kN>(a, h, shared, rings);
  }
#endif
}

// ---- the launch ----------------------------------------------------------------------------------------------------------

struct LinearPlan {
  int64_t n, planes, splits, grid;
  int64_t x_words, partials;  // of the workspace, behind the tokens' scales
};

// By shape alone: nothing on the device is read.
LinearPlan plan_linear(int64_t rows, int64_t columns, int64_t tokens, int dtype) {
  LinearPlan plan{};
  plan.planes = static_cast<DType>(dtype) == DType::fp32 ? 2 : 1;
  plan.n = tokens * plan.planes <= 8 ? 16 : tokens * plan.planes <= 16 ? 32 : 64;
  // The panels are in the layout; at most, each of the 4 widths pads a group.
  const int64_t groups = ceil_div(columns, kGroupColumns) + kMostBits - 1, panels = ceil_div(groups, kPanelGroups);
  const int64_t slots = multiprocessors(), cells = ceil_div(rows, kBlockRows);
  // The time of a slot in panels of work; beginning and ending an item cost as much as two.
  const auto time = [&](int64_t splits) { return ceil_div(cells * splits, slots) * (ceil_div(panels, splits) + 2); };
  plan.splits = 1;
  for (int64_t splits = 2; splits <= std::min(panels, slots); ++splits)
    if (time(splits) < time(plan.splits)) plan.splits = splits;
  plan.grid = std::min(slots, cells * plan.splits);
  plan.x_words = groups * plan.n * kGroupColumns;
  if (plan.splits > 1) plan.partials = plan.splits * tokens * rows;
  return plan;
}

template <int kN>
void launch(const Arguments& arguments, const LinearPlan& plan, uintptr_t stream) {
  if (plan.n != kN) return;
  using S = Shape<kN>;
  const auto kernel = codebook_linear_wgmma_registers_kernel<kN>;
  allow_shared(reinterpret_cast<const void*>(kernel), S::kSharedBytes);
  PYLLMQ_LAUNCH(codebook_linear_wgmma_registers_x_kernel, S::kColumns / plan.planes * kOrderParts, kOrderThreads,
                kOrderThreads / 32 * 4, stream, arguments, kN);
  PYLLMQ_LAUNCH_EARLY(kernel, plan.grid, S::kThreads, S::kSharedBytes, stream, arguments);
  check_launch("codebook_linear_wgmma_registers");
}

}  // namespace

int64_t CodebookWgmmaRegisters::most_tokens() const { return kMostColumns; }

int64_t CodebookWgmmaRegisters::find_room(int64_t tokens, int dtype) const {
  const LinearPlan plan = plan_linear(rows, columns, tokens, dtype);
  return kMostColumns + plan.x_words + plan.partials;
}

void CodebookWgmmaRegisters::run(const LinearCall& call, uintptr_t stream) const {
  const LinearPlan plan = plan_linear(rows, columns, call.tokens, call.dtype);
  if (call.tokens * plan.planes > kMostColumns)
    throw std::invalid_argument("wgmma from registers serves at most 16 tokens in fp32, here " + std::to_string(call.tokens) +
                                "; bind the layout as a CodebookOperand");
  if (call.rows * plan.splits > std::numeric_limits<int32_t>::max())
    refuse_work("codebook_linear_wgmma_registers", call);  // each item has at least one row
  Arguments arguments{call, static_cast<int>(plan.splits), static_cast<int>(plan.planes), call.partials,
                      reinterpret_cast<uint32_t*>(call.partials + kMostColumns)};
  arguments.call.partials = call.partials + kMostColumns + plan.x_words;
  launch<16>(arguments, plan, stream);
  launch<32>(arguments, plan, stream);
  launch<64>(arguments, plan, stream);
}

}  // namespace pyllmq::cuda

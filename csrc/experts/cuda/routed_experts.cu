// All experts of a layer in five launches, whatever was chosen:
//
//   route     a list of work by expert: a counting sort of the (token, choice) pairs, and tiles of pairs of one expert
//   multiply  h = W_up x by tiles (codebook/cuda/product.cuh): a tile's pairs share one decoding of the expert's codes
//   activate  bias, gate; a row of each pair
//   multiply  W_down a
//   combine   of each token the weighted sum of its pairs, by rising choice
//
// Rejected: counting splits and summing them in the block that comes last, as codebook_linear does. The launch that follows sums
// them anyway, and without counters calls of one layer may overlap on any streams and in any graphs.
//
// x and a are held as fp16, one or two planes, with a power of two for each row (fp16_planes.cuh). Sums are fp32. The only
// atomics count integers, so the same call gives the same bits.
#include "experts/cuda/routed_experts.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "codebook/cuda/entries.cuh"
#include "codebook/cuda/fp16_planes.cuh"
#include "codebook/cuda/product.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kThreads = kProductThreads, kWarps = kProductWarps;
constexpr int64_t kMostXBytes = 24 << 10;  // as codebook_linear's: one block fits on compute capability 8.6, two on 9.0
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kCombinedColumns = 1024;  // of a token, to a block
constexpr int64_t kMostExperts = 8192;  // their counts lie in shared memory

// Pairs of one expert, neighbours in the sorted order.
struct Tile {
  int expert, first, count;
};

// Rows of activations as fp16.
struct Planes {
  uint16_t* values;  // [rows, planes, columns]
  float* unscale;    // [rows]
};

// Of one wave.
struct Arguments {
  RoutedExperts experts;
  RoutedTokens tokens;
  int pairs, planes, tile_pairs;
  int up_splits, down_splits;
  // In the workspace.
  int* counts;  // of the tiles, and of the pairs that have an expert
  Tile* tiles;
  int *order, *place;  // [pairs]: place in the sorted order -> pair; pair -> place, where it has an expert
  Planes x, a;         // of the tokens; of the pairs, sorted
  float* sums;         // [splits, pairs, rows]
};

// --- what the threads of a block have in common; `room` may be used again behind the next barrier --------------------------

struct Scanned {
  uint32_t before, all;  // the sum of the threads before this one, and of all
};
PYLLMQ_DEVICE Scanned scan_block(uint32_t value, uint32_t (&room)[kWarps]) {
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  uint32_t through = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t below = ptx::shuffle_up(through, distance);
    if (lane >= distance) through += below;
  }
  ptx::sync_block();
  if (lane == 31) room[warp] = through;
  ptx::sync_block();
  Scanned found{through - value, 0};
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) found.before += room[i];
    found.all += room[i];
  }
  return found;
}

PYLLMQ_DEVICE float largest_of_block(float value, uint32_t (&room)[kWarps]) {
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, ptx::shuffle_xor(value, mask));
  ptx::sync_block();
  if (ptx::thread() % 32 == 0) room[ptx::thread() / 32] = ptx::fp32_to_bits(value);
  ptx::sync_block();
  for (int i = 0; i < kWarps; ++i) value = fmaxf(value, ptx::bits_to_fp32(room[i]));
  return value;
}

// A row of activations, value(column), as planes. exact: it is fp16 as it is.
template <class Value>
PYLLMQ_DEVICE void store_row(const Planes& to, int planes, int64_t row, int64_t columns, bool exact, uint32_t (&room)[kWarps],
                             const Value& value) {
  float largest = 0.0f;
  if (!exact)
    for (int64_t i = ptx::thread(); i < columns; i += kThreads) largest = fmaxf(largest, ptx::magnitude(value(i)));
  const int exponent = scale_exponent(largest_of_block(largest, room));
  const float scale = power_of_two(exponent);
  if (ptx::thread() == 0) to.unscale[row] = power_of_two(-exponent);
  uint16_t* first = to.values + row * planes * columns;
  for (int64_t i = ptx::thread(); i < columns; i += kThreads) {
    const float scaled = scale * value(i);
    first[i] = ptx::fp32_to_fp16(scaled);
    if (planes == 2) first[columns + i] = ptx::fp32_to_fp16((scaled - ptx::fp16_to_fp32(first[i])) * kLowPlane);
  }
}

// --- route -------------------------------------------------------------------------------------------------------------

// One expert's tiles and pairs, in the order of the pairs. Every block counts all experts: a launch less than one that adds up.
PYLLMQ_DEVICE void sort_expert(const Arguments& a, int expert, uint32_t* counts, uint32_t (&room)[kWarps]) {
  const int experts = static_cast<int>(a.experts.experts), tile = a.tile_pairs, thread = ptx::thread();
  for (int i = thread; i < experts; i += kThreads) counts[i] = 0;
  ptx::sync_block();
  for (int pair = thread; pair < a.pairs; pair += kThreads) {
    const int64_t of_pair = a.tokens.index[pair];
    if (of_pair >= 0 && of_pair < experts) ptx::add_shared(counts + of_pair, 1);
  }
  ptx::sync_block();
  uint32_t pairs_before = 0, tiles_before = 0;
  for (int i = thread; i < expert; i += kThreads) {
    pairs_before += counts[i];
    tiles_before += (counts[i] + tile - 1) / tile;
  }
  const auto count = static_cast<int>(counts[expert]);
  const auto begin = static_cast<int>(scan_block(pairs_before, room).all);
  const auto first_tile = static_cast<int>(scan_block(tiles_before, room).all);
  const int tiles = (count + tile - 1) / tile;
  for (int i = thread; i < tiles; i += kThreads)
    a.tiles[first_tile + i] = {expert, begin + i * tile, count - i * tile < tile ? count - i * tile : tile};
  if (expert == experts - 1 && thread == 0) {
    a.counts[0] = first_tile + tiles;
    a.counts[1] = begin + count;
  }
  int to = begin;
  for (int first = 0; first < a.pairs && to < begin + count; first += kThreads) {
    const int pair = first + thread;
    const bool here = pair < a.pairs && a.tokens.index[pair] == expert;
    const Scanned found = scan_block(here ? 1 : 0, room);
    if (here) {
      const int place = to + static_cast<int>(found.before);
      a.order[place] = pair;
      a.place[pair] = place;
    }
    to += static_cast<int>(found.all);
  }
}

// A block for each expert, then one for each token.
PYLLMQ_KERNEL void __launch_bounds__(kThreads) experts_route_kernel(const Arguments a) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto& room = *reinterpret_cast<uint32_t (*)[kWarps]>(memory);
  if (ptx::block() < a.experts.experts)
    return sort_expert(a, static_cast<int>(ptx::block()), reinterpret_cast<uint32_t*>(memory) + kWarps, room);
  const int64_t token = ptx::block() - a.experts.experts, hidden = a.experts.up.columns;
  const auto dtype = static_cast<DType>(a.tokens.dtype);
  store_row(a.x, a.planes, token, hidden, dtype == DType::fp16, room,
            [&](int64_t i) { return load_element(a.tokens.x, dtype, token * hidden + i); });
}

// --- multiply ----------------------------------------------------------------------------------------------------------

struct Multiplication {
  ExpertWeights weights;
  Planes x;
  int choices;  // rows of x are tokens: pair / choices; 0: they are pairs, sorted
  int pairs, planes;
  int part_rows, splits, stage_panels;  // of an item's rows and of K; panels whose x is in shared memory at once
  const int* tile_count;
  const Tile* tiles;
  const int* order;
  float* sums;
};

struct Work : Product {
  int item, first_pair, split;
  int panel_begin, panel_end, panel;  // panel: the first that is not multiplied yet
  int x_row[kMostProductColumns];
};

// Shared memory: this, then x.
struct Shared {
  Work work;
  alignas(16) Rings ring;
};
static_assert(sizeof(Shared) + kMostXBytes <= 99 << 10, "what a block gets on compute capability 8.6");
static_assert(sizeof(Shared) % 16 == 0, "x lies behind it");

PYLLMQ_DEVICE int cells_of_tile(const Multiplication& m) {
  return static_cast<int>(m.weights.blocks) * (kBlockRows / m.part_rows) * m.splits;
}

// An item is a tile of pairs, some rows and a split: 32 bits, as the host has checked.
PYLLMQ_DEVICE void take(const Multiplication& m, int item, Work& w) {
  const int cells = cells_of_tile(m), parts = cells / m.splits, split = item % cells / parts, part = item % parts;
  const Tile tile = m.tiles[item / cells];
  if (ptx::thread() < tile.count) {
    const int place = tile.first + ptx::thread();
    w.x_row[ptx::thread()] = m.choices == 0 ? place : m.order[place] / m.choices;
  }
  if (ptx::thread() != 0) return;
  const int64_t* layout = m.weights.layouts + 2 * tile.expert;
  const auto& h = *reinterpret_cast<const LayoutHeader*>(static_cast<uintptr_t>(layout[0]));
  w.item = item;
  w.tokens = tile.count;
  w.planes = m.planes;
  w.first_pair = tile.first;
  w.split = split;
  w.rows = 0;
  w.header = describes(h, layout[1], m.weights.rows, m.weights.columns) ? &h : nullptr;
  w.first_row = part % (kBlockRows / m.part_rows) * m.part_rows;
  if (w.header == nullptr || part / (kBlockRows / m.part_rows) >= h.blocks) return;
  w.block = section<RowBlock>(h, h.blocks_offset)[part / (kBlockRows / m.part_rows)];
  w.rows = w.block.rows - w.first_row < m.part_rows ? w.block.rows - w.first_row : m.part_rows;
  w.panel_begin = w.panel = static_cast<int>(split * h.panels / m.splits);
  w.panel_end = static_cast<int>((split + 1) * h.panels / m.splits);
}

PYLLMQ_DEVICE float* sums_of(const Multiplication& m, const Work& w, int token) {
  return m.sums + (int64_t{w.split} * m.pairs + w.first_pair + token) * m.weights.rows;
}

// x of the block's columns, in the order of its groups, as fp16 [slot, column of the product].
PYLLMQ_DEVICE void stage_x(const Multiplication& m, const Work& w, uint16_t* x_shared) {
  const auto* column_of = section<int32_t>(*w.header, w.header->columns_offset);
  int staged = 0;
  for (int width = 1; width <= 8; ++width) {
    const GroupRange range = w.groups[width];
    const int32_t* columns = column_of + w.header->first_slot[width] + range.begin * kGroupColumns;
    const int slots = (range.end - range.begin) * kGroupColumns;
    for (int slot = ptx::thread(); slot < slots; slot += kThreads) {
      uint16_t* to = x_shared + (staged + slot) * w.columns();
      for (int i = 0; i < w.columns(); ++i) {
        const int64_t row = int64_t{w.x_row[i / w.planes]} * w.planes + i % w.planes;
        to[i] = columns[slot] < 0 ? 0 : m.x.values[row * m.weights.columns + columns[slot]];
      }
    }
    staged += slots;
  }
}

// Sums of all warps, row scale, outliers.
template <int kTokenTiles>
PYLLMQ_DEVICE void finish(const Multiplication& m, const Work& w, const Rings& rings) {
  const LayoutHeader& h = *w.header;
  const int64_t row_begin = w.block.row_begin + w.first_row;
  for (int token = 0; token < w.tokens; ++token) {
    const uint16_t* x = m.x.values + int64_t{w.x_row[token]} * w.planes * h.columns;
    const float unscale = m.x.unscale[w.x_row[token]];
    for (int row = ptx::thread(); row < w.rows; row += kThreads) {
      float sum = sum_of_warps<kTokenTiles>(rings, token * w.planes, row);
      if (w.planes == 2) sum += sum_of_warps<kTokenTiles>(rings, token * 2 + 1, row) * (1.0f / kLowPlane);
      if (h.row_scale_offset != 0) sum *= ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[row_begin + row]);
      if (h.outliers != 0) {
        const int in_block = w.first_row + row;
        for_outliers(h, w.panel_begin, w.panel_end, w.block.tile_begin + in_block / kTileRows, in_block % kTileRows,
                     [&](int64_t i) {
                       const int32_t column = section<int32_t>(h, h.outlier_columns_offset)[i];
                       float value = ptx::fp16_to_fp32(x[column]);
                       if (w.planes == 2) value += ptx::fp16_to_fp32(x[h.columns + column]) * (1.0f / kLowPlane);
                       sum += section<float>(h, h.outlier_deltas_offset)[i] * value;
                     });
      }
      sums_of(m, w, token)[row_begin + row] = sum * unscale;
    }
  }
}

template <int kTokenTiles>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) experts_multiply_kernel(const Multiplication m) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  auto* x_shared = reinterpret_cast<uint16_t*>(memory + sizeof(Shared));
  Work& w = shared.work;
  for (auto item = static_cast<int>(ptx::block()); item < m.tile_count[0] * cells_of_tile(m);
       item = w.item + static_cast<int>(ptx::blocks())) {
    ptx::sync_block();  // the item before is done with shared memory
    take(m, item, w);
    ptx::sync_block();
    if (w.header == nullptr && item % (cells_of_tile(m) / m.splits) == 0)
      for (int token = 0; token < w.tokens; ++token)
        for (int64_t row = ptx::thread(); row < m.weights.rows; row += kThreads)
          sums_of(m, w, token)[row] = ptx::bits_to_fp32(0x7FC00000u);
    if (w.rows <= 0) continue;

    TileSums<kTokenTiles> sums[kBlockTiles / kTokenTiles] = {};
    do {
      ptx::sync_block();  // the stage before is multiplied
      if (ptx::thread() >= 1 && ptx::thread() <= 8) {
        const int end = w.panel + m.stage_panels < w.panel_end ? w.panel + m.stage_panels : w.panel_end;
        w.groups[ptx::thread()] = panel_groups(*w.header, ptx::thread(), w.panel, end);
      }
      ptx::sync_block();
      if (ptx::thread() == 0) w.panel += m.stage_panels;
      stage_x(m, w, x_shared);
      ptx::sync_block();
      accumulate_all<kTokenTiles>(w, shared.ring[ptx::thread() / 32], x_shared, sums);
    } while (w.panel < w.panel_end);
    store_sums<kTokenTiles>(w, sums, shared.ring[ptx::thread() / 32]);
    ptx::sync_block();
    finish<kTokenTiles>(m, w, shared.ring);
  }
}

// --- between the Linears, and behind them ------------------------------------------------------------------------------------

// What the splits of one row say, in order.
PYLLMQ_DEVICE float sum_of(const Arguments& a, int splits, int64_t place, int64_t rows, int64_t row) {
  float sum = 0.0f;
  for (int split = 0; split < splits; ++split) sum += a.sums[(int64_t{split} * a.pairs + place) * rows + row];
  return sum;
}

PYLLMQ_DEVICE float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::silu: return x / (1.0f + ptx::exp(-x));
    case Activation::gelu: return 0.5f * x * (1.0f + ptx::erf(0.70710678f * x));
    case Activation::gelu_tanh: return x / (1.0f + ptx::exp(-1.5957691f * (x + 0.044715f * x * x * x)));  // (1 + tanh) / 2
    case Activation::relu: return x < 0.0f ? 0.0f : x;
    default: return x < 0.0f ? 0.0f : x * x;
  }
}

// A row for each pair: what comes out takes the place of the gate's first sums, which the same thread has read.
PYLLMQ_KERNEL void __launch_bounds__(kThreads) experts_activate_kernel(const Arguments a) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto& room = *reinterpret_cast<uint32_t (*)[kWarps]>(memory);
  const RoutedExperts& e = a.experts;
  for (int64_t place = ptx::block(); place < a.counts[1]; place += ptx::blocks()) {
    const int64_t expert = a.tokens.index[a.order[place]];
    const auto h = [&](int64_t row) {
      const float sum = sum_of(a, a.up_splits, place, e.up.rows, row);
      return e.up.bias == nullptr ? sum : sum + e.up.bias[expert * e.up.rows + row];
    };
    float* rows = a.sums + place * e.up.rows + e.gate_first;
    for (int64_t i = ptx::thread(); i < e.units; i += kThreads) {
      float gate = h(e.gate_first + i * e.stride);
      float found;
      if (e.up_first < 0) {
        found = activated(e.activation, gate);
      } else {
        float up = h(e.up_first + i * e.stride);
        // A comparison with NaN is false: NaN stays.
        gate = e.alpha * (gate > e.limit ? e.limit : gate);
        up = up > e.limit ? e.limit : up < -e.limit ? -e.limit : up;
        found = activated(e.activation, gate) / e.alpha * (up + e.offset);
      }
      rows[i * e.stride] = found;
    }
    store_row(a.a, a.planes, place, e.units, false, room, [&](int64_t i) { return rows[i * e.stride]; });
  }
}

// Some columns of a token.
PYLLMQ_KERNEL void __launch_bounds__(kThreads) experts_combine_kernel(const Arguments a) {
  const RoutedExperts& e = a.experts;
  const int64_t hidden = e.down.rows, parts = (hidden + kCombinedColumns - 1) / kCombinedColumns;
  const int64_t token = ptx::block() / parts, begin = ptx::block() % parts * kCombinedColumns, choices = a.tokens.choices;
  const int64_t end = begin + kCombinedColumns < hidden ? begin + kCombinedColumns : hidden;
  for (int64_t column = begin + ptx::thread(); column < end; column += kThreads) {
    float sum = 0.0f;
    for (int64_t pair = token * choices; pair < (token + 1) * choices; ++pair) {
      const int64_t expert = a.tokens.index[pair];
      if (expert == e.experts) continue;
      if (expert < 0 || expert > e.experts) {
        sum = ptx::bits_to_fp32(0x7FC00000u);
        break;
      }
      float y = sum_of(a, a.down_splits, a.place[pair], hidden, column);
      if (e.down.bias != nullptr) y += e.down.bias[expert * hidden + column];
      sum += a.tokens.weights[pair] * y;
    }
    store_element(a.tokens.y, static_cast<DType>(a.tokens.dtype), token * hidden + column, sum);
  }
}

// --- the host's side ---------------------------------------------------------------------------------------------------------

// Shared memory for x: `panels` panels have at most 16 groups each and 8 more, since each of 8 widths rounds up to a group.
int64_t staged_bytes(int64_t panels, int64_t product_columns) {
  return (panels * kPanelGroups + 8) * kGroupColumns * product_columns * 2;
}

struct ProductPlan {
  int64_t part_rows, splits, stage_panels, x_bytes, items;
};

// A wave: how its pairs are cut, by numbers that the host knows. How many experts are chosen it does not know: tiles are as many
// as there can be, and plans are made for the number that is likely.
struct WavePlan {
  int64_t tokens, pairs, planes, token_tiles, tile_pairs, tiles;
  ProductPlan up, down;
  int64_t workspace;
};

ProductPlan plan_product(const ExpertWeights& weights, const WavePlan& wave, int64_t likely_tiles) {
  const int64_t slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor, columns = wave.tile_pairs * wave.planes;
  const int64_t panels = ceil_div(ceil_div(weights.columns, kGroupColumns) + 7, kPanelGroups);
  ProductPlan plan{kBlockRows / wave.token_tiles, 1, 1, 0, 0};
  const auto cells = [&] { return likely_tiles * weights.blocks * (kBlockRows / plan.part_rows); };
  // Fewer rows a block where K has too few panels to fill the device: each block stages x and loads codebooks of its own.
  while (plan.part_rows > kTileRows && cells() * panels < slots) plan.part_rows /= 2;
  plan.splits = std::clamp<int64_t>(ceil_div(slots, cells()), 1, panels);
  while (staged_bytes(plan.stage_panels + 1, columns) <= kMostXBytes) ++plan.stage_panels;
  plan.stage_panels = std::min(plan.stage_panels, ceil_div(panels, plan.splits));
  plan.x_bytes = staged_bytes(plan.stage_panels, columns);
  plan.items = wave.tiles * weights.blocks * (kBlockRows / plan.part_rows) * plan.splits;
  if (plan.items > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("routed_experts of " + std::to_string(wave.tokens) + " tokens has more than 2^31 pieces of work");
  return plan;
}

// Fills what the kernels find in the workspace; without one, says how large it is.
int64_t place_arrays(const RoutedExperts& experts, const WavePlan& wave, uint8_t* workspace, Arguments& a) {
  Sections section{0, 256};
  const auto take = [&](auto*& array, int64_t count) {
    const int64_t begin = section(count * int64_t{sizeof(*array)});
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(workspace + begin);
  };
  take(a.counts, 2);
  take(a.tiles, wave.tiles);
  take(a.order, wave.pairs);
  take(a.place, wave.pairs);
  take(a.x.values, wave.tokens * wave.planes * experts.up.columns);
  take(a.x.unscale, wave.tokens);
  take(a.a.values, wave.pairs * wave.planes * experts.units);
  take(a.a.unscale, wave.pairs);
  take(a.sums, wave.pairs * std::max(wave.up.splits * experts.up.rows, wave.down.splits * experts.down.rows));
  return section.end;
}

WavePlan plan_wave(const RoutedExperts& experts, int64_t tokens, int64_t choices, int dtype) {
  WavePlan wave{};
  const int64_t most = experts.sum_bytes / (4 * std::max(experts.up.rows, experts.down.rows) * std::max<int64_t>(choices, 1));
  wave.tokens = std::min(tokens, std::max<int64_t>(most, 1));
  wave.pairs = wave.tokens * choices;
  wave.planes = static_cast<DType>(dtype) == DType::fp32 ? 2 : 1;
  // Twice the mean of an expert: routing is uneven, and a second tile decodes the expert again.
  const int64_t likely_columns = std::min(wave.tokens, 2 * ceil_div(wave.pairs, experts.experts)) * wave.planes;
  wave.token_tiles = likely_columns <= 4 ? 1 : likely_columns <= 8 ? 2 : 4;
  wave.tile_pairs = 4 * wave.token_tiles / wave.planes;
  const int64_t experts_chosen = std::min(wave.pairs, experts.experts);
  wave.tiles = experts_chosen + wave.pairs / wave.tile_pairs;
  if (wave.pairs == 0) return wave;
  const int64_t likely_tiles = std::max(experts_chosen, ceil_div(wave.pairs, wave.tile_pairs));
  wave.up = plan_product(experts.up, wave, likely_tiles);
  wave.down = plan_product(experts.down, wave, likely_tiles);
  Arguments unused{};
  wave.workspace = place_arrays(experts, wave, nullptr, unused);
  return wave;
}

template <int kTokenTiles>
void launch_multiply(const Multiplication& m, const ProductPlan& plan, uintptr_t stream) {
  const auto kernel = experts_multiply_kernel<kTokenTiles>;
  allow_shared(reinterpret_cast<const void*>(kernel), sizeof(Shared) + kMostXBytes);
  const int64_t slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  PYLLMQ_LAUNCH(kernel, std::min(slots, plan.items), kThreads, sizeof(Shared) + plan.x_bytes, stream, m);
  check_launch("routed_experts, multiply");
}

void multiply(const Arguments& a, const ExpertWeights& weights, const Planes& x, int64_t choices, const WavePlan& wave,
              const ProductPlan& plan, uintptr_t stream) {
  const Multiplication m{weights,
                         x,
                         static_cast<int>(choices),
                         a.pairs,
                         a.planes,
                         static_cast<int>(plan.part_rows),
                         static_cast<int>(plan.splits),
                         static_cast<int>(plan.stage_panels),
                         a.counts,
                         a.tiles,
                         a.order,
                         a.sums};
  if (wave.token_tiles == 1) launch_multiply<1>(m, plan, stream);
  if (wave.token_tiles == 2) launch_multiply<2>(m, plan, stream);
  if (wave.token_tiles == 4) launch_multiply<4>(m, plan, stream);
}

void run_wave(const RoutedExperts& experts, const RoutedTokens& tokens, void* workspace, uintptr_t stream) {
  const WavePlan wave = plan_wave(experts, tokens.tokens, tokens.choices, tokens.dtype);
  Arguments a{};
  a.experts = experts;
  a.tokens = tokens;
  a.pairs = static_cast<int>(wave.pairs);
  a.planes = static_cast<int>(wave.planes);
  a.tile_pairs = static_cast<int>(wave.tile_pairs);
  a.up_splits = static_cast<int>(wave.up.splits);
  a.down_splits = static_cast<int>(wave.down.splits);
  if (wave.pairs > 0) {
    place_arrays(experts, wave, static_cast<uint8_t*>(workspace), a);
    const int64_t route_shared = 4 * (kWarps + experts.experts);
    PYLLMQ_LAUNCH(experts_route_kernel, experts.experts + wave.tokens, kThreads, route_shared, stream, a);
    check_launch("routed_experts, route");
    multiply(a, experts.up, a.x, tokens.choices, wave, wave.up, stream);
    PYLLMQ_LAUNCH(experts_activate_kernel, wave.pairs, kThreads, 4 * kWarps, stream, a);
    check_launch("routed_experts, activate");
    multiply(a, experts.down, a.a, 0, wave, wave.down, stream);
  }
  PYLLMQ_LAUNCH(experts_combine_kernel, wave.tokens * ceil_div(experts.down.rows, kCombinedColumns), kThreads, 0, stream, a);
  check_launch("routed_experts, combine");
}

void require(bool holds, const std::string& otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

}  // namespace

void check_routed_experts(const RoutedExperts& e) {
  require(e.experts >= 1 && e.experts <= kMostExperts,
          std::to_string(e.experts) + " experts; allowed: 1 to " + std::to_string(kMostExperts));
  require(e.up.layouts != nullptr && e.down.layouts != nullptr, "the tables of layouts must not be null");
  require(e.units >= 1 && e.up.columns >= 1 && e.down.rows == e.up.columns && e.down.columns == e.units,
          "up is [" + std::to_string(e.up.rows) + ", " + std::to_string(e.up.columns) + "] and down [" +
              std::to_string(e.down.rows) + ", " + std::to_string(e.down.columns) + "] for " + std::to_string(e.units) +
              " units; down must be [hidden, units] where up is [rows, hidden]");
  require(e.up.blocks >= 1 && e.down.blocks >= 1, "a weight has at least one block of rows");
  const auto fits = [&](int64_t first) { return first + (e.units - 1) * e.stride < e.up.rows; };
  require(e.stride >= 1 && e.gate_first >= 0 && fits(e.gate_first) && (e.up_first < 0 || fits(e.up_first)),
          "rows of gate and up go beyond the " + std::to_string(e.up.rows) + " rows of up");
  require(e.limit > 0 && e.alpha > 0, "limit and alpha must be positive");
}

int64_t routed_experts_workspace(const RoutedExperts& experts, int64_t tokens, int64_t choices, int dtype) {
  if (tokens == 0) return 0;
  const WavePlan wave = plan_wave(experts, tokens, choices, dtype);
  const int64_t last = tokens % wave.tokens;
  return std::max(wave.workspace, last == 0 ? 0 : plan_wave(experts, last, choices, dtype).workspace);
}

void routed_experts(const RoutedExperts& experts, const RoutedTokens& tokens, void* workspace, uintptr_t stream) {
  if (tokens.tokens == 0) return;
  const int64_t in_wave = plan_wave(experts, tokens.tokens, tokens.choices, tokens.dtype).tokens;
  const int64_t row_bytes = experts.up.columns * (static_cast<DType>(tokens.dtype) == DType::fp32 ? 4 : 2);
  for (int64_t begin = 0; begin < tokens.tokens; begin += in_wave) {
    RoutedTokens wave = tokens;
    wave.tokens = std::min(in_wave, tokens.tokens - begin);
    wave.x = static_cast<const uint8_t*>(tokens.x) + begin * row_bytes;
    wave.y = static_cast<uint8_t*>(tokens.y) + begin * row_bytes;
    wave.index += begin * tokens.choices;
    wave.weights += begin * tokens.choices;
    run_wave(experts, wave, workspace, stream);
  }
}

}  // namespace pyllmq::cuda

// All experts of a layer in five launches, whatever was chosen:
//
//   route     a list of work by expert: a counting sort of the (token, choice) pairs, and tiles of pairs of one expert
//   multiply  h = W_up x by tiles (multiply.cuh): a tile's pairs share one decoding of the expert's weights
//   activate  bias, gate; a row of each pair
//   multiply  W_down a
//   combine   of each token the weighted sum of its pairs, by rising choice
//
// Where a projection's experts are of several kinds it is multiplied by a launch for each.
//
// Rejected: counting splits and summing them in the block that comes last, as codebook_linear does. The launch that follows sums
// them anyway, and without counters calls of one layer may overlap on any streams and in any graphs.
//
// x and a are held as the numbers that the weights meet: fp16, one or two planes, with a power of two for each row
// (fp16_planes.cuh), or as they are. Sums are fp32. The only atomics count integers, so the same call gives the same bits.
#include "experts/cuda/routed_experts.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "codebook/cuda/fp16_planes.cuh"
#include "experts/cuda/multiply.cuh"
#include "experts/cuda/multiply.h"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMostProductColumns = 16;  // of a tile: its pairs, each as planes
constexpr int kCombinedColumns = 1024;   // of a token, to a block
constexpr int64_t kMostExperts = 8192;   // their counts lie in shared memory

// Rows of activations as fp16.
struct Planes {
  uint16_t* values;  // [rows, planes, columns]; null: no weight meets fp16
  float* unscale;    // [rows]
};

// Of one wave.
struct Arguments {
  ExpertLayer experts;
  RoutedTokens tokens;
  int pairs, planes, tile_pairs;  // planes: of fp16
  int up_splits, down_splits;
  // In the workspace.
  int* counts;  // of the tiles, and of the pairs that have an expert
  Tile* tiles;
  int *order, *place;  // [pairs]: place in the sorted order -> pair; pair -> place, where it has an expert
  Planes x, a;         // of the tokens; of the pairs, sorted
  float* exact_a;      // [pairs, units]; null: no weight meets it
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
  ptx::sync_block();  // room is read, where the block had a row before
  if (ptx::thread() % 32 == 0) room[ptx::thread() / 32] = ptx::fp32_to_bits(value);
  ptx::sync_block();  // the largest of each warp is there
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

// A block for each expert, then one for each token where some weight meets fp16.
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
  const ExpertLayer& e = a.experts;
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
      if (a.exact_a != nullptr) a.exact_a[place * e.units + i] = found;
    }
    if (a.a.values == nullptr) continue;
    store_row(a.a, a.planes, place, e.units, false, room, [&](int64_t i) { return rows[i * e.stride]; });
  }
}

// Some columns of a token.
PYLLMQ_KERNEL void __launch_bounds__(kThreads) experts_combine_kernel(const Arguments a) {
  const ExpertLayer& e = a.experts;
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

// A wave: how its pairs are cut, by numbers that the host knows. How many experts are chosen it does not know: tiles are as many
// as there can be, and plans are made for the number that is likely.
struct WavePlan {
  int64_t tokens, pairs, tile_pairs, tiles;
  std::vector<MultiplyPlan> up, down;  // by kind of weights; of a projection all have the same splits
  int64_t workspace;
};

bool meets_bf16(const WeightKind& kind) {
  return !kind.is_codebook && kind.sparse != SparseKind::codes && kind.sparse != SparseKind::columns &&
         kind.values == ValueType::bf16;
}
bool meets_fp16(const WeightKind& kind) { return kind.is_codebook || (kind.sparse != SparseKind::columns && !meets_bf16(kind)); }

// Numbers of 16 bits that an activation is the sum of.
int64_t planes_of(const WeightKind& kind, int dtype) {
  const auto of = static_cast<DType>(dtype);
  if (meets_fp16(kind)) return of == DType::fp32 ? 2 : 1;
  if (meets_bf16(kind)) return of == DType::fp32 ? 3 : of == DType::fp16 ? 2 : 1;
  return 1;
}

MultiplyPlan plan_kind(const MultiplyProblem& problem, int64_t splits) {
  if (problem.weights.is_codebook) return plan_codebook(problem, splits);
  if (problem.weights.sparse == SparseKind::columns) return plan_columns(problem, splits);
  return plan_cells(problem, splits);
}

std::vector<MultiplyPlan> plan_product(const ExpertWeights& weights, const std::vector<WeightKind>& kinds, const WavePlan& wave,
                                       int dtype, int64_t likely_tiles) {
  std::vector<MultiplyPlan> plans(kinds.size());
  int64_t splits = 0;
  const auto plan_all = [&] {
    for (size_t i = 0; i < kinds.size(); ++i)
      plans[i] = plan_kind(
          {kinds[i], weights.rows, weights.columns, wave.tokens, wave.tile_pairs, planes_of(kinds[i], dtype), likely_tiles},
          splits);
  };
  plan_all();
  for (const MultiplyPlan& plan : plans) splits = std::max(splits, plan.splits);
  if (kinds.size() > 1) plan_all();
  for (const MultiplyPlan& plan : plans)
    if (wave.tiles * plan.parts * plan.splits > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("routed_experts of " + std::to_string(wave.tokens) +
                                  " tokens has more than 2^31 pieces of work");
  return plans;
}

template <class Is>
bool any(const std::vector<WeightKind>& kinds, const Is& is) {
  return std::any_of(kinds.begin(), kinds.end(), is);
}

// Fills what the kernels find in the workspace; without one, says how large it is.
int64_t place_arrays(const RoutedExperts& experts, const WavePlan& wave, int dtype, uint8_t* workspace, Arguments& a) {
  Sections section{0, 256};
  const auto take = [&](auto*& array, int64_t count) {
    const int64_t begin = section(count * int64_t{sizeof(*array)});
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(workspace + begin);
  };
  a.planes = static_cast<DType>(dtype) == DType::fp32 ? 2 : 1;
  take(a.counts, 2);
  take(a.tiles, wave.tiles);
  take(a.order, wave.pairs);
  take(a.place, wave.pairs);
  if (any(experts.up_kinds, meets_fp16)) {
    take(a.x.values, wave.tokens * a.planes * experts.up.columns);
    take(a.x.unscale, wave.tokens);
  }
  if (any(experts.down_kinds, meets_fp16)) {
    take(a.a.values, wave.pairs * a.planes * experts.units);
    take(a.a.unscale, wave.pairs);
  }
  if (!std::all_of(experts.down_kinds.begin(), experts.down_kinds.end(), meets_fp16)) take(a.exact_a, wave.pairs * experts.units);
  take(a.sums, wave.pairs * std::max(wave.up[0].splits * experts.up.rows, wave.down[0].splits * experts.down.rows));
  return section.end;
}

WavePlan plan_wave(const RoutedExperts& experts, int64_t tokens, int64_t choices, int dtype) {
  WavePlan wave{};
  const int64_t most = experts.sum_bytes / (4 * std::max(experts.up.rows, experts.down.rows) * std::max<int64_t>(choices, 1));
  wave.tokens = std::min(tokens, std::max<int64_t>(most, 1));
  wave.pairs = wave.tokens * choices;
  int64_t planes = 1;
  bool codebooks = false;
  for (const auto* kinds : {&experts.up_kinds, &experts.down_kinds})
    for (const WeightKind& kind : *kinds) {
      planes = std::max(planes, planes_of(kind, dtype));
      codebooks = codebooks || kind.is_codebook;
    }
  // Twice the mean of an expert: routing is uneven, and a second tile decodes the expert again. Products of codebooks have units
  // of 4 columns, those of cells of 8.
  const int64_t likely_columns = std::min(wave.tokens, 2 * ceil_div(wave.pairs, experts.experts)) * planes;
  wave.tile_pairs = (codebooks && likely_columns <= 4 ? 4 : likely_columns <= 8 ? 8 : kMostProductColumns) / planes;
  const int64_t experts_chosen = std::min(wave.pairs, experts.experts);
  wave.tiles = experts_chosen + wave.pairs / wave.tile_pairs;
  if (wave.pairs == 0) return wave;
  const int64_t likely_tiles = std::max(experts_chosen, ceil_div(wave.pairs, wave.tile_pairs));
  wave.up = plan_product(experts.up, experts.up_kinds, wave, dtype, likely_tiles);
  wave.down = plan_product(experts.down, experts.down_kinds, wave, dtype, likely_tiles);
  Arguments unused{};
  wave.workspace = place_arrays(experts, wave, dtype, nullptr, unused);
  return wave;
}

void multiply(const Arguments& a, const ExpertWeights& weights, const std::vector<WeightKind>& kinds, const Activations& x,
              int64_t choices, const WavePlan& wave, const std::vector<MultiplyPlan>& plans, uintptr_t stream) {
  for (size_t i = 0; i < kinds.size(); ++i) {
    const WeightKind& kind = kinds[i];
    const MultiplyPlan& plan = plans[i];
    const Multiplication m{weights.layouts,
                           kind,
                           static_cast<int>(i),
                           weights.rows,
                           weights.columns,
                           x,
                           static_cast<int>(choices),
                           a.pairs,
                           static_cast<int>(planes_of(kind, a.tokens.dtype)),
                           static_cast<int>(plan.part_rows),
                           static_cast<int>(plan.parts),
                           static_cast<int>(plan.splits),
                           static_cast<int>(plan.stage),
                           static_cast<int>(plan.warps),
                           static_cast<int>(plan.x_bytes),
                           a.counts,
                           a.tiles,
                           a.order,
                           a.sums};
    const int64_t items = wave.tiles * plan.parts * plan.splits;
    const auto run = kind.is_codebook                     ? multiply_codebook
                     : kind.sparse == SparseKind::columns ? multiply_columns
                                                          : multiply_cells;
    run(m, plan, items, stream);
  }
}

void run_wave(const RoutedExperts& experts, const RoutedTokens& tokens, void* workspace, uintptr_t stream) {
  const WavePlan wave = plan_wave(experts, tokens.tokens, tokens.choices, tokens.dtype);
  Arguments a{};
  a.experts = experts;
  a.tokens = tokens;
  a.pairs = static_cast<int>(wave.pairs);
  a.tile_pairs = static_cast<int>(wave.tile_pairs);
  if (wave.pairs > 0) {
    place_arrays(experts, wave, tokens.dtype, static_cast<uint8_t*>(workspace), a);
    a.up_splits = static_cast<int>(wave.up[0].splits);
    a.down_splits = static_cast<int>(wave.down[0].splits);
    const int64_t route_shared = 4 * (kWarps + experts.experts);
    const int64_t blocks = experts.experts + (a.x.values == nullptr ? 0 : wave.tokens);
    PYLLMQ_LAUNCH(experts_route_kernel, blocks, kThreads, route_shared, stream, a);
    check_launch("routed_experts, route");
    const Activations x{a.x.values, a.x.unscale, tokens.x, static_cast<DType>(tokens.dtype)};
    multiply(a, experts.up, experts.up_kinds, x, tokens.choices, wave, wave.up, stream);
    PYLLMQ_LAUNCH(experts_activate_kernel, wave.pairs, kThreads, 4 * kWarps, stream, a);
    check_launch("routed_experts, activate");
    const Activations between{a.a.values, a.a.unscale, a.exact_a, DType::fp32};
    multiply(a, experts.down, experts.down_kinds, between, 0, wave, wave.down, stream);
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
  for (const auto* kinds : {&e.up_kinds, &e.down_kinds}) {
    require(!kinds->empty(), "a projection has experts of at least one kind");
    for (const WeightKind& kind : *kinds)
      require(kind.is_codebook || kind.sparse == SparseKind::columns || kind.sparse == SparseKind::codes ||
                  kind.values != ValueType::fp32,
              "fp32 values are laid out as columns");
  }
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

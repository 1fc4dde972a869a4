#include "decode_step/attention_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "codebook/cpu/linear.h"
#include "runtime/counting.h"
#include "runtime/thread_pool.h"
#include "runtime/trace.h"
#include "decode_step/cpu/step_parts.h"

namespace pyllmq::cpu {
namespace {

// The context is cut at multiples of 128 positions, or of more where there are heads and sequences enough, but whatever the
// number of threads, and the parts are joined in order: the same bits for any number of threads. What a part of 128 hands
// over is 1/32 of what it reads with 8 rows.
constexpr int64_t kPartKeys = 128, kMostParts = 1024;
// Of more queries each task takes some rows, and all positions that they see: about as many rows as fill the L1 cache with
// what a block of keys adds to.
constexpr int64_t kFewQueries = 8, kTileRows = 128;
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kMostPositions = 1 << 24;  // fp32 holds every position up to there
constexpr double kNsPerProduct = 0.03, kNsPerPreparedElement = 1.5;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- q, k and v ----------------------------------------------------------------------------------------------------

void rotate(Rotary rotary, int64_t size, const float* cos, const float* sin, float* head) {
  const int64_t pairs = size / 2, apart = rotary == Rotary::halves ? pairs : 1, step = rotary == Rotary::halves ? 1 : 2;
  for (int64_t i = 0; i < pairs; ++i) {
    float &p = head[i * step], &q = head[i * step + apart];
    const float rotated = p * cos[i] - q * sin[i];
    q = q * cos[i] + p * sin[i];
    p = rotated;
  }
}

// Heads of one token, `stride` apart: norm and rotary positions in their order.
void prepare_heads(const AttentionStep& step, const Norm& norm, Rotary rotary, int64_t heads, int64_t size, int64_t stride,
                   const float* cos, const float* sin, float* first) {
  const auto normalize_heads = [&] {
    if (norm.kind == NormKind::none) return;
    if (step.norms_span_heads) return normalize(norm, first, heads * size, 0, first);
    for (int64_t h = 0; h < heads; ++h) normalize(norm, first + h * stride, size, h, first + h * stride);
  };
  if (!step.norms_after_rotary) normalize_heads();
  if (rotary != Rotary::none)
    for (int64_t h = 0; h < heads; ++h) rotate(rotary, step.rotary_size, cos, sin, first + h * stride);
  if (step.norms_after_rotary) normalize_heads();
}

// --- attention -----------------------------------------------------------------------------------------------------

struct Sizes {
  const StepKernels& kernels;
  int64_t batch, queries, past, length;  // length: positions with the new ones
  int64_t lanes, group;
  int64_t rows, padded_rows;  // that share a head of keys: queries * group
  int64_t tile_rows, tiles;   // whole queries and whole registers of them, unless there is one tile
  int64_t value_size;         // padded to whole registers
  int64_t units;              // heads of keys of all sequences
  int64_t part_keys;

  Sizes(const AttentionStep& step, const StepTokens& tokens, int64_t past_positions)
      : kernels(step_kernels()),
        batch(tokens.batch),
        queries(tokens.queries),
        past(past_positions),
        length(past_positions + tokens.queries),
        lanes(kernels.lanes),
        group(step.heads / step.kv_heads),
        rows(queries * group),
        padded_rows(rounded_up(rows, lanes)),
        value_size(rounded_up(step.value_size, lanes)),
        units(batch * step.kv_heads),
        part_keys(kPartKeys * ceil_div(units * ceil_div(length, kPartKeys), kMostParts)) {
    tile_rows = rows;
    if (queries > kFewQueries) {
      tile_rows = group * lanes * std::max<int64_t>(1, kTileRows / (group * lanes));
      part_keys = length;
    }
    tiles = ceil_div(rows, tile_rows);
  }
  int64_t rows_of(int64_t tile) const { return std::min(tile_rows, rows - tile * tile_rows); }
  int64_t padded_tile_rows() const { return rounded_up(std::min(tile_rows, rows), lanes); }
};

// Which positions some rows of a sequence see.
struct Sight {
  const float *first, *last;  // [rows], padded
  float earliest_first, latest_first, earliest_last, latest_last;

  Sight(const float* first_of_rows, const float* last_of_rows, int64_t rows) : first(first_of_rows), last(last_of_rows) {
    const auto firsts = std::minmax_element(first, first + rows), lasts = std::minmax_element(last, last + rows);
    earliest_first = *firsts.first, latest_first = *firsts.second;
    earliest_last = *lasts.first, latest_last = *lasts.second;
  }
};

// [first, last) of one query.
std::pair<int64_t, int64_t> seen_positions(const AttentionStep& step, const StepTokens& tokens, const Sizes& sizes,
                                           int64_t sequence, int64_t query) {
  if (tokens.mask == nullptr) {
    const int64_t position = sizes.past + query, start = tokens.starts.empty() ? 0 : tokens.starts[sequence];
    return {std::max(step.window > 0 ? position + 1 - step.window : 0, start), step.causal ? position + 1 : sizes.length};
  }
  // What a mask hides at both ends is not read: padding, and what lies before a window.
  const float* mask = tokens.mask + sequence * tokens.mask_batch_stride + query * tokens.mask_query_stride;
  const auto is_seen = [](float added) { return added != -kInfinity; };
  const int64_t first = std::find_if(mask, mask + sizes.length, is_seen) - mask;
  int64_t last = sizes.length;
  while (last > first && !is_seen(mask[last - 1])) --last;
  return {first, last};
}

// Of the tiles of each sequence; first and last [batch, padded_rows] are written.
std::vector<Sight> sights_of(const AttentionStep& step, const StepTokens& tokens, const Sizes& sizes, float* first, float* last) {
  std::fill_n(first, sizes.batch * sizes.padded_rows, 0.0f);
  std::fill_n(last, sizes.batch * sizes.padded_rows, kInfinity);
  std::vector<Sight> sights;
  for (int64_t b = 0; b < sizes.batch; ++b) {
    float *first_of_rows = first + b * sizes.padded_rows, *last_of_rows = last + b * sizes.padded_rows;
    for (int64_t query = 0; query < sizes.queries; ++query) {
      const auto seen = seen_positions(step, tokens, sizes, b, query);
      std::fill_n(first_of_rows + query * sizes.group, sizes.group, static_cast<float>(seen.first));
      std::fill_n(last_of_rows + query * sizes.group, sizes.group, static_cast<float>(seen.second));
    }
    for (int64_t tile = 0; tile < sizes.tiles; ++tile) {
      const int64_t row = tile * sizes.tile_rows;
      sights.emplace_back(first_of_rows + row, last_of_rows + row, sizes.rows_of(tile));
    }
  }
  return sights;
}

// What the parts of one tile leave, in one row of memory: largest and sums [tile rows, padded], weighted [tile rows, values].
struct PartResult {
  float *largest, *sums, *weighted;

  PartResult(const Sizes& sizes, float* memory)
      : largest(memory), sums(memory + sizes.padded_tile_rows()), weighted(memory + 2 * sizes.padded_tile_rows()) {}
  static int64_t floats(const Sizes& sizes) {
    return 2 * sizes.padded_tile_rows() + std::min(sizes.tile_rows, sizes.rows) * sizes.value_size;
  }
};

// out [value_size] of row r of a tile. A sink is a further key with this logit and without a value.
void join_parts(const AttentionStep& step, const Sizes& sizes, float* memory, int64_t parts, int64_t r, int64_t query_head,
                float* out) {
  const int64_t floats = PartResult::floats(sizes);
  const float sink = step.sinks.empty() ? -kInfinity : step.sinks[query_head];
  float largest = sink;
  for (int64_t p = 0; p < parts; ++p) {
    const float of_part = PartResult(sizes, memory + p * floats).largest[r];
    largest = of_part > largest || of_part != of_part ? of_part : largest;
  }
  float sum = sink == -kInfinity ? 0 : std::exp(sink - largest);
  std::fill_n(out, step.value_size, 0.0f);
  for (int64_t p = 0; p < parts; ++p) {
    const PartResult part(sizes, memory + p * floats);
    if (part.largest[r] == -kInfinity) continue;
    const float weight = std::exp(part.largest[r] - largest);
    sum += part.sums[r] * weight;
    const float* weighted = part.weighted + r * sizes.value_size;
    for (int64_t d = 0; d < step.value_size; ++d) out[d] += weighted[d] * weight;
  }
  const float inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t d = 0; d < step.value_size; ++d) out[d] *= inverse;
}

// At most: parts that nobody sees need none.
int64_t attend_bytes(const Sizes& sizes) {
  const int64_t tasks = sizes.units * sizes.tiles * ceil_div(sizes.length, sizes.part_keys);
  return 2 * Workspace::need<float>(sizes.batch * sizes.padded_rows) + Workspace::need<float>(tasks * PartResult::floats(sizes));
}

// q: [batch, kv_heads, rows / lanes, head_size, lanes]; context [token, heads, value_size].
void attend(const AttentionStep& step, const StepTokens& tokens, const KeyValueCache& cache, const Sizes& sizes, const float* q,
            float* context, Workspace& workspace) {
  const Traced traced(Part::attention);
  const int64_t all_rows = sizes.batch * sizes.padded_rows;
  auto *first = workspace.take<float>(all_rows), *last = workspace.take<float>(all_rows);
  const std::vector<Sight> sights = sights_of(step, tokens, sizes, first, last);
  int64_t first_part = sizes.length / sizes.part_keys;
  double seen = 0;
  for (const Sight& sight : sights) {
    first_part = std::min(first_part, static_cast<int64_t>(sight.earliest_first) / sizes.part_keys);
    seen += sight.latest_last - sight.earliest_first;
  }
  const int64_t parts = ceil_div(sizes.length, sizes.part_keys) - first_part;
  const int64_t tiles = sizes.tiles, tasks = sizes.units * tiles * parts, floats = PartResult::floats(sizes);
  auto* results = workspace.take<float>(tasks * floats);
  const double products =
      seen * static_cast<double>(step.kv_heads * sizes.padded_tile_rows() * (step.head_size + sizes.value_size));

  // Some parts in a row for a thread, which can then ask for the next one's memory.
  const int64_t grain = std::max<int64_t>(1, tasks / (kChunksPerThread * num_threads()));
  parallel_for(tasks, grain, kNsPerProduct * products, [&](int64_t task_begin, int64_t task_end) {
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t unit = task / (tiles * parts), b = unit / step.kv_heads, head = unit % step.kv_heads;
      const int64_t tile = task / parts % tiles, row = tile * sizes.tile_rows;
      const Sight& sight = sights[b * tiles + tile];
      const int64_t part_begin = (first_part + task % parts) * sizes.part_keys;
      const PartResult result(sizes, results + task * floats);
      const auto* keys = static_cast<const uint8_t*>(cache.keys);
      const auto* values = static_cast<const uint8_t*>(cache.values);
      const int64_t bytes = element_bytes(cache.dtype);
      sizes.kernels.attend(
          {.rows = sizes.rows_of(tile),
           .group = sizes.group,
           .head_size = step.head_size,
           .value_size = step.value_size,
           .q = q + (unit * sizes.padded_rows + row) * step.head_size,
           .first = sight.first,
           .last = sight.last,
           .latest_first = sight.latest_first,
           .earliest_last = sight.earliest_last,
           .soft_cap = step.soft_cap,
           .mask = tokens.mask == nullptr
                       ? nullptr
                       : tokens.mask + b * tokens.mask_batch_stride + row / sizes.group * tokens.mask_query_stride,
           .mask_query_stride = tokens.mask_query_stride,
           .begin = std::max(part_begin, static_cast<int64_t>(sight.earliest_first)),
           .end = std::min(part_begin + sizes.part_keys, static_cast<int64_t>(sight.latest_last)),
           .ahead_end = std::min(part_begin + (task_end - task) * sizes.part_keys, static_cast<int64_t>(sight.latest_last)),
           .keys = keys + (b * cache.key_strides[0] + head * cache.key_strides[1]) * bytes,
           .values = values + (b * cache.value_strides[0] + head * cache.value_strides[1]) * bytes,
           .dtype = cache.dtype,
           .key_stride = cache.key_strides[2],
           .value_stride = cache.value_strides[2],
           .to_fp32 = row_kernels().to_fp32[static_cast<int>(cache.dtype)],
           .largest = result.largest,
           .sums = result.sums,
           .weighted = result.weighted});
    }
  });

  const double joined = static_cast<double>(tasks * sizes.tile_rows * step.value_size);
  parallel_for(sizes.units * sizes.rows, 1, joined, [&](int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      const int64_t unit = row / sizes.rows, b = unit / step.kv_heads, head = unit % step.kv_heads, r = row % sizes.rows;
      const int64_t token = b * sizes.queries + r / sizes.group;
      const int64_t query_head = head * sizes.group + r % sizes.group;
      float* of_tile = results + (unit * tiles + r / sizes.tile_rows) * parts * floats;
      join_parts(step, sizes, of_tile, parts, r % sizes.tile_rows, query_head,
                 context + (token * step.heads + query_head) * step.value_size);
    }
  });
}

void check_attention_call(const AttentionStep& step, const StepCall& call, const StepTokens& tokens, const KeyValueCache& cache,
                          int64_t past) {
  check_call(call);
  require(tokens.batch == cache.batch && step.kv_heads == cache.kv_heads && step.head_size == cache.head_size &&
              step.value_size == cache.value_size,
          "batch, kv_heads, head_size and value_size of the cache are " +
              list_of({cache.batch, cache.kv_heads, cache.head_size, cache.value_size}) +
              "; needed: " + list_of({tokens.batch, step.kv_heads, step.head_size, step.value_size}));
  require(cache.keys != nullptr && cache.values != nullptr, "keys and values of the cache must not be null");
  require(past >= 0 && past + tokens.queries <= std::min(cache.capacity, kMostPositions),
          "past = " + std::to_string(past) + " and " + std::to_string(tokens.queries) + " queries; the cache has room for " +
              std::to_string(std::min(cache.capacity, kMostPositions)) + " positions");
  require(step.rotary == Rotary::none || (tokens.cos != nullptr && tokens.sin != nullptr),
          "this step rotates q and k; it needs cos and sin");
  require(tokens.starts.empty() || static_cast<int64_t>(tokens.starts.size()) == tokens.batch,
          "starts has " + std::to_string(tokens.starts.size()) + " elements; the batch is " + std::to_string(tokens.batch));
  for (const int64_t start : tokens.starts)
    require(start >= 0 && start <= past + tokens.queries,
            "a sequence starts at " + std::to_string(start) + "; allowed: 0.." + std::to_string(past + tokens.queries));
}

}  // namespace

void check_attention_step(const AttentionStep& step) {
  require(step.kv_heads > 0 && step.heads > 0 && step.heads % step.kv_heads == 0,
          "heads and kv_heads are " + list_of({step.heads, step.kv_heads}) + "; heads must be a multiple of kv_heads");
  for (const int64_t size : {step.head_size, step.value_size})
    require(size > 0 && size <= kLargestHead,
            "a head has " + std::to_string(size) + " elements; allowed: 1.." + std::to_string(kLargestHead));
  check_input(step.input, step.norm);
  const auto check = [&](const std::string& name, const HeadRows& rows, const Norm& norm, int64_t heads, int64_t size) {
    check_rows(name + "_rows", step.input, rows.operand, rows.first_row, rows.head_stride, heads, size);
    check_norm(name + "_norm", norm, {step.norms_span_heads ? heads * size : size, heads * size});
    require(norm.kind == NormKind::none || !step.norms_span_heads || heads == 1 || rows.head_stride == size,
            name + "_norm is over all heads, which must lie side by side");
  };
  check("q", step.q_rows, step.q_norm, step.heads, step.head_size);
  check("k", step.k_rows, step.k_norm, step.kv_heads, step.head_size);
  check("v", step.v_rows, step.v_norm, step.kv_heads, step.value_size);
  require(
      step.rotary == Rotary::none || (step.rotary_size > 0 && step.rotary_size % 2 == 0 && step.rotary_size <= step.head_size),
      "rotary_size = " + std::to_string(step.rotary_size) + "; allowed: even numbers up to the head size " +
          std::to_string(step.head_size));
  require(step.soft_cap >= 0, "soft_cap must be > 0, or 0 for none");
  require(step.window >= 0 && (step.window == 0 || step.causal),
          "window = " + std::to_string(step.window) + "; allowed: 0 (all), or more in a causal step");
  require(step.sinks.empty() || static_cast<int64_t>(step.sinks.size()) == step.heads,
          "sinks has " + std::to_string(step.sinks.size()) + " elements; there are " + std::to_string(step.heads) + " heads");
  check_output(step.output, step.heads * step.value_size);
}

void attention_step(const AttentionStep& step, const StepCall& call, const StepTokens& tokens, const KeyValueCache& cache,
                    int64_t past) {
  check_attention_call(step, call, tokens, cache, past);
  const Traced traced(Part::step);
  const HotThreads hot;
  const Sizes sizes(step, tokens, past);
  const int64_t size = step.head_size, lanes = sizes.lanes;
  const int64_t of_q = sizes.units * sizes.padded_rows * size, of_context = call.tokens * step.heads * step.value_size;
  Workspace& workspace = step_workspace();
  workspace.reserve(room_bytes(step.input, step.output, call.tokens) + outputs_bytes(step.input, call.tokens) +
                    Workspace::need<float>(of_q) + Workspace::need<float>(of_context) + attend_bytes(sizes));
  float* room = take_room(step.input, step.output, call.tokens, workspace);
  const std::vector<float*> outputs = project(step.input, step.norm, call, step.precision, room, workspace);
  auto* q = workspace.take<float>(of_q);
  if (sizes.padded_rows > sizes.rows) std::fill_n(q, sizes.units * sizes.padded_rows * size, 0.0f);
  const auto prepare_token = [&](int64_t token) {
    const auto heads_of = [&](const HeadRows& rows) {
      return outputs[rows.operand] + token * step.input.operands[rows.operand]->rows() + rows.first_row;
    };
    float *q_heads = heads_of(step.q_rows), *k_heads = heads_of(step.k_rows), *v_heads = heads_of(step.v_rows);
    const float *cos = tokens.cos + token * step.rotary_size / 2, *sin = tokens.sin + token * step.rotary_size / 2;
    prepare_heads(step, step.q_norm, step.rotary, step.heads, size, step.q_rows.head_stride, cos, sin, q_heads);
    prepare_heads(step, step.k_norm, step.rotary, step.kv_heads, size, step.k_rows.head_stride, cos, sin, k_heads);
    prepare_heads(step, step.v_norm, Rotary::none, step.kv_heads, step.value_size, step.v_rows.head_stride, cos, sin, v_heads);

    const int64_t b = token / sizes.queries, query = token % sizes.queries;
    for (int64_t h = 0; h < step.heads; ++h) {
      const int64_t row = query * sizes.group + h % sizes.group;
      float* to = q + (b * step.kv_heads + h / sizes.group) * sizes.padded_rows * size + row / lanes * lanes * size + row % lanes;
      for (int64_t d = 0; d < size; ++d) to[d * lanes] = q_heads[h * step.q_rows.head_stride + d] * step.scale;
    }
    const auto store = [&](const float* heads, int64_t stride, void* memory, const std::array<int64_t, 3>& strides,
                           int64_t count) {
      for (int64_t h = 0; h < step.kv_heads; ++h)
        row_kernels().from_fp32[static_cast<int>(cache.dtype)](
            heads + h * stride,
            static_cast<uint8_t*>(memory) +
                (b * strides[0] + h * strides[1] + (past + query) * strides[2]) * element_bytes(cache.dtype),
            count);
    };
    store(k_heads, step.k_rows.head_stride, cache.keys, cache.key_strides, size);
    store(v_heads, step.v_rows.head_stride, cache.values, cache.value_strides, step.value_size);
  };
  const double prepared = kNsPerPreparedElement * static_cast<double>(call.tokens * (step.heads + 2 * step.kv_heads) * size);
  parallel_for(call.tokens, 1, prepared, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) prepare_token(token);
  });

  auto* context = workspace.take<float>(of_context);
  attend(step, tokens, cache, sizes, q, context, workspace);
  finish(step.output, context, call, step.precision, room);
}

}  // namespace pyllmq::cpu

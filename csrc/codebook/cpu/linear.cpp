#include "codebook/cpu/linear.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "codebook/cpu/layout.h"
#include "codebook/cpu/decode.h"
#include "runtime/counting.h"
#include "runtime/isa.h"
#include "codebook/cpu/path_cost.h"
#include "runtime/thread_pool.h"
#include "runtime/workspace.h"

namespace pyllmq::cpu {
namespace {

// Bytes of tables alive at once: 1/25 of the weight, or this much. Where the tables of all panels for 8 tokens are more,
// panels are taken in groups, and the sums wait in memory between them.
constexpr int64_t kSmallestTableBudget = 128 << 10;
constexpr int64_t kWeightPerTables = 25;
constexpr int64_t kChunkTiles = kStripTiles;
// Single-thread estimates for the thread pool.
constexpr double kNsPerLookupStep = 1.2;  // one lookup of 32 rows
constexpr double kNsPerDecodeStep = 5.0;  // one column of 32 rows
constexpr double kNsPerTable = 6.0;
// Of many weights, threads take whole ones where that keeps them busy for so large a share of the time: they look up in tables
// that they built themselves, in one place. The 8 experts of a token of Qwen3-30B-A3B's shape: 700 -> 480 us at 4 bits on 2
// threads.
constexpr double kBusy = 0.8;

enum class Path : int32_t { nothing, tables, exact };  // nothing: every product of the panel is zero

struct PanelScale {
  Path path;
  float unit;
};

struct PanelGroup {  // of widths 1..4, whose tables are alive together
  int64_t begin, end, lookups;
};

struct Problem {
  const LayoutView& view;
  const LinearKernels& kernels;
  const RowKernels& rows;
  TableKind kind;
  DType dtype;
  int64_t block;                // tokens that share one pass over the codes
  int64_t lookup_panels = 0;    // the first panels, those of widths 1..4
  int64_t decoded_columns = 0;  // of widths 5..8
  std::vector<TileChunk> chunks;
  std::vector<PanelGroup> groups = {};  // at least one, which may be empty

  const float* x = nullptr;      // [tokens, columns]
  const float* bias = nullptr;   // [rows] or null
  uint8_t* tables = nullptr;     // [tokens, segments, lookups of a group, planes, 16]
  PanelScale* scales = nullptr;  // [tokens, segments, lookup_panels]
  float* sums = nullptr;         // [tokens, tiles * 32] between groups; null where one group holds all panels
  int64_t tokens = 0;

  const TableKernels& table_kernels() const { return kernels.tables[static_cast<int>(kind)]; }
  int64_t table_bytes(const PanelGroup& group) const { return group.lookups * table_planes(kind) * kTableEntries; }
  uint8_t* table(const PanelGroup& group, int64_t token, int64_t segment, int64_t panel) const {
    int64_t lookup = (token * view.header().segments + segment) * group.lookups;
    for (int64_t p = group.begin; p < panel; ++p) lookup += view.panel(p).lookups();
    return tables + lookup * table_planes(kind) * kTableEntries;
  }
  PanelScale& scale(int64_t token, int64_t segment, int64_t panel) const {
    return scales[(token * view.header().segments + segment) * lookup_panels + panel];
  }
};

// That of the kernels that read this order of steps.
Isa kernel_isa(StepOrder order) { return order == native_order() ? active_isa() : Isa::scalar; }

const LinearKernels& linear_kernels(StepOrder order) {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512 && order == StepOrder::fours) return kLinearAvx512;
  if (active_isa() != Isa::scalar && order == StepOrder::rows) return kLinearAvx2;
#elif defined(__aarch64__)
  if (active_isa() != Isa::scalar && order == StepOrder::rows) return kLinearNeon;
#endif
  return kLinearScalar;
}

// --- phase 1: tables -----------------------------------------------------------------------------------------------

void pick_columns(const LayoutView& view, const PanelRecord& panel, const float* x, float* picked) {
  if (panel.first_column >= 0) {
    std::copy(x + panel.first_column, x + panel.first_column + panel.columns, picked);
  } else {
    const uint32_t* columns = view.columns(panel);
    for (int64_t i = 0; i < panel.columns; ++i) picked[i] = x[columns[i]];
  }
  std::fill(picked + panel.columns, picked + panel.slots, 0.0f);
}

void prefetch(const void* memory, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const uint8_t*>(memory) + at, 0, 2);
}

void build_panel_tables(const Problem& problem, const PanelGroup& group, int64_t token, int64_t segment, int64_t p) {
  const LayoutView& view = problem.view;
  const PanelRecord& panel = view.panel(p);
  const int width = static_cast<int>(panel.width);
  const uint16_t* codebook = view.codebook(panel, segment);
  prefetch(codebook, panel.lookups() * entries_per_lookup(width) * int64_t{sizeof(uint16_t)});
  alignas(64) float x[kMaxPanelColumns];
  pick_columns(view, panel, problem.x + token * view.header().columns, x);

  PanelScale& scale = problem.scale(token, segment, p);
  const float bound = problem.rows.panel_bound(x, view.max_magnitude(panel, segment), panel.lookups(), columns_per_lookup(width));
  if (bound == 0) {
    scale = {Path::nothing, 0};
  } else if (bound >= kSmallestBound && bound <= kLargestBound) {
    const float to_fixed = fixed_point_scale(problem.kind, bound);
    scale = {Path::tables, 1 / to_fixed};
    for (int64_t i = 0; i < panel.slots; ++i) x[i] *= to_fixed;
    problem.table_kernels().build(width, view.header().order, codebook, x, panel.lookups(),
                                  problem.table(group, token, segment, p));
  } else {
    scale = {Path::exact, 0};
  }
}

// --- phase 2: lookups ----------------------------------------------------------------------------------------------

void add_exact(const Problem& problem, const PanelRecord& panel, const TileChunk& chunk, int64_t token, float* y) {
  const LayoutView& view = problem.view;
  const int width = static_cast<int>(panel.width);
  const uint16_t* codebook = view.codebook(panel, chunk.segment);
  const int64_t entries = entries_per_lookup(width) / columns_per_lookup(width);
  alignas(64) float x[kMaxPanelColumns];
  pick_columns(view, panel, problem.x + token * view.header().columns, x);
  for (int64_t tile = 0; tile < chunk.tiles; ++tile) {
    const uint8_t* codes = view.codes(panel, chunk.tile_begin + tile);
    for (int row = 0; row < kTileRows; ++row) {
      double sum = 0;
      for (int64_t slot = 0; slot < panel.columns; ++slot)
        sum +=
            static_cast<double>(x[slot]) *
            static_cast<double>(fp16_to_fp32(codebook[slot * entries + read_code(codes, view.header().order, width, slot, row)]));
      y[tile * kTileRows + row] += static_cast<float>(sum);
    }
  }
}

void add_lookups(const Problem& problem, const PanelGroup& group, int64_t p, const TileChunk& chunk, float* y, int64_t y_stride) {
  const PanelRecord& panel = problem.view.panel(p);
  TokenTables tokens[kMaxTokenBlock];
  int64_t count = 0;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    const PanelScale& scale = problem.scale(t, chunk.segment, p);
    if (scale.path == Path::tables)
      tokens[count++] = {problem.table(group, t, chunk.segment, p), scale.unit, y + t * y_stride};
    else if (scale.path == Path::exact)
      add_exact(problem, panel, chunk, t, y + t * y_stride);
  }
  const LayoutView& view = problem.view;
  const TableKernels& kernels = problem.table_kernels();
  const PanelRecord& next = p + 1 < group.end ? view.panel(p + 1) : panel;
  (panel.width == 3 ? kernels.lookup_3bit
                    : kernels.lookup_nibbles)({view.codes(panel, chunk.tile_begin), view.codes(next, chunk.tile_begin),
                                               view.header().order, chunk.tiles, panel.lookups(), tokens, count});
}

void add_decoded(const Problem& problem, int64_t p, const TileChunk& chunk, float* y, int64_t y_stride) {
  const LayoutView& view = problem.view;
  const PanelRecord& panel = view.panel(p);
  alignas(64) float x[kMaxTokenBlock * kBytePanelColumns];
  for (int64_t t = 0; t < problem.tokens; ++t)
    pick_columns(view, panel, problem.x + t * view.header().columns, x + t * kBytePanelColumns);
  problem.kernels.decode_multiply[panel.width - 5](view.codes(panel, chunk.tile_begin), view.header().order, chunk.tiles,
                                                   panel.tile_bytes, panel.columns, view.codebook(panel, chunk.segment), x,
                                                   problem.tokens, y, y_stride);
}

// --- the end of a row: scale, outliers, bias, dtype ----------------------------------------------------------------

// In fp64, in which products of two fp32 are exact. A row has few outliers (20 of 4096 columns at 0.5 %): four chains. With 8 at
// once by gathers one took 2.5 ns (AVX2, Zen 3), in two chains 0.7 to 1.2.
double outlier_sum(const float* x, const uint32_t* columns, const float* deltas, int64_t count) {
  double sums[4] = {};
  const auto product = [&](int64_t i) { return static_cast<double>(x[columns[i]]) * static_cast<double>(deltas[i]); };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += product(i + j);
  for (; i < count; ++i) sums[0] += product(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void finish_rows(const Problem& problem, int64_t token, int64_t row_begin, int64_t rows, float* sums) {
  const LayoutView& view = problem.view;
  if (const float* scale = view.row_scale())
    for (int64_t r = 0; r < rows; ++r) sums[r] *= scale[row_begin + r];
  if (view.header().outliers > 0) {
    const float* x = problem.x + token * view.header().columns;
    const uint32_t* offsets = view.outlier_row_offsets() + row_begin;
    const uint32_t* columns = view.outlier_columns();
    const float* deltas = view.outlier_deltas();
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t first = offsets[r];
      sums[r] += static_cast<float>(outlier_sum(x, columns + first, deltas + first, int64_t{offsets[r + 1]} - int64_t{first}));
    }
  }
  if (problem.bias != nullptr)
    for (int64_t r = 0; r < rows; ++r) sums[r] += problem.bias[row_begin + r];
}

// Outliers are read after the codes of their rows, in short pieces that no prefetcher of the CPU sees coming: a part of
// them is asked for with each panel: 0.5 % of outliers of 4096 x 4096 then cost 0.06 ms from memory in place of 0.19.
void prefetch_outliers(const LayoutView& view, const TileChunk& chunk, int64_t part, int64_t parts) {
  if (view.header().outliers == 0) return;
  const uint32_t* offsets = view.outlier_row_offsets() + chunk.row_begin;
  if (part == 0) prefetch(offsets, chunk.rows * int64_t{sizeof(uint32_t)});
  const int64_t count = offsets[chunk.rows] - offsets[0];
  const int64_t begin = offsets[0] + count * part / parts, end = offsets[0] + count * (part + 1) / parts;
  prefetch(view.outlier_columns() + begin, (end - begin) * int64_t{sizeof(uint32_t)});
  prefetch(view.outlier_deltas() + begin, (end - begin) * int64_t{sizeof(float)});
}

void run_chunk(const Problem& problem, const PanelGroup& group, const TileChunk& chunk, void* y) {
  const LayoutHeader& header = problem.view.header();
  alignas(64) float own_sums[kMaxTokenBlock * kChunkTiles * kTileRows];
  const int64_t rows = chunk.tiles * kTileRows;
  const int64_t stride = problem.sums == nullptr ? rows : header.tiles * kTileRows;
  float* sums = problem.sums == nullptr ? own_sums : problem.sums + chunk.tile_begin * kTileRows;
  if (group.begin == 0)
    for (int64_t t = 0; t < problem.tokens; ++t) std::fill_n(sums + t * stride, rows, 0.0f);
  for (int64_t p = group.begin; p < group.end; ++p) {
    if (group.end == problem.lookup_panels) prefetch_outliers(problem.view, chunk, p - group.begin, group.end - group.begin);
    add_lookups(problem, group, p, chunk, sums, stride);
  }
  if (group.end < problem.lookup_panels) return;
  for (int64_t p = problem.lookup_panels; p < header.panels; ++p) add_decoded(problem, p, chunk, sums, stride);
  for (int64_t t = 0; t < problem.tokens; ++t) {
    finish_rows(problem, t, chunk.row_begin, chunk.rows, sums + t * stride);
    problem.rows.from_fp32[static_cast<int>(problem.dtype)](
        sums + t * stride, static_cast<uint8_t*>(y) + (t * header.rows + chunk.row_begin) * element_bytes(problem.dtype),
        chunk.rows);
  }
}

struct GroupRun {
  const Problem& problem;
  const PanelGroup& group;
  void* y;

  int64_t panels() const { return group.end - group.begin; }
  int64_t tables() const { return problem.tokens * problem.view.header().segments * panels(); }
  int64_t chunks() const { return static_cast<int64_t>(problem.chunks.size()); }
  double tables_cost() const {
    return kNsPerTable * static_cast<double>(problem.tokens * problem.view.header().segments * group.lookups);
  }
  double lookups_cost() const {
    const bool last = group.end == problem.lookup_panels;
    const double steps = group.lookups * kNsPerLookupStep + (last ? problem.decoded_columns * kNsPerDecodeStep : 0);
    return steps * static_cast<double>(problem.tokens * problem.view.header().tiles);
  }
  void build(int64_t i) const {
    const int64_t rest = i / panels(), segments = problem.view.header().segments;
    build_panel_tables(problem, group, rest / segments, rest % segments, group.begin + i % panels());
  }
  void look_up(int64_t i) const { run_chunk(problem, group, problem.chunks[i], y); }
  void build_all() const {
    for (int64_t i = 0; i < tables(); ++i) build(i);
  }
  void look_up_all() const {
    for (int64_t i = 0; i < chunks(); ++i) look_up(i);
  }
};

// The tables of all, then the lookups of all: threads meet twice, however many there are.
void run_groups(const std::vector<GroupRun>& runs) {
  int64_t tables = 0, chunks = 0;
  double tables_cost = 0, lookups_cost = 0;
  for (const GroupRun& run : runs) {
    tables += run.tables();
    chunks += run.chunks();
    tables_cost += run.tables_cost();
    lookups_cost += run.lookups_cost();
  }
  const auto for_each = [&runs](int64_t begin, int64_t end, int64_t (GroupRun::*count)() const,
                                void (GroupRun::*task)(int64_t) const) {
    for (const GroupRun& run : runs) {
      const int64_t tasks = (run.*count)();
      for (int64_t i = std::max<int64_t>(begin, 0); i < std::min(end, tasks); ++i) (run.*task)(i);
      begin -= tasks;
      end -= tasks;
    }
  };
  // The cost of both phases: where the second one wants all threads, they may as well wake up for the first.
  parallel_for(tables, 1, lookups_cost + tables_cost,
               [&](int64_t begin, int64_t end) { for_each(begin, end, &GroupRun::tables, &GroupRun::build); });
  parallel_for(chunks, 1, lookups_cost,
               [&](int64_t begin, int64_t end) { for_each(begin, end, &GroupRun::chunks, &GroupRun::look_up); });
}

std::vector<PanelGroup> panel_groups(const Problem& problem) {
  const int64_t budget = std::max(kSmallestTableBudget, problem.view.header().bytes / kWeightPerTables);
  const int64_t copies = problem.block * problem.view.header().segments;
  std::vector<PanelGroup> groups = {{0, 0, 0}};
  for (int64_t p = 0; p < problem.lookup_panels; ++p) {
    PanelGroup grown = groups.back();
    ++grown.end;
    grown.lookups += problem.view.panel(p).lookups();
    if (grown.end - grown.begin > 1 && copies * problem.table_bytes(grown) > budget)
      groups.push_back({p, p + 1, problem.view.panel(p).lookups()});
    else
      groups.back() = grown;
  }
  return groups;
}

// All but memory, x and bias.
Problem problem_of(const LayoutView& view, DType x_dtype, int64_t tokens, Precision precision) {
  const LayoutHeader& header = view.header();
  const int64_t chunk_tiles = std::clamp<int64_t>(header.tiles / (4 * num_threads()), 4, kChunkTiles);
  Problem problem{
      .view = view,
      .kernels = linear_kernels(header.order),
      .rows = row_kernels(),
      .kind = table_kind(precision, x_dtype, header.order),
      .dtype = x_dtype,
      .block = std::min(tokens, kMaxTokenBlock),
      .chunks = tile_chunks(view, chunk_tiles, chunk_tiles, num_threads()),
  };
  while (problem.lookup_panels < header.panels && view.panel(problem.lookup_panels).width <= 4) ++problem.lookup_panels;
  for (int64_t p = problem.lookup_panels; p < header.panels; ++p) problem.decoded_columns += view.panel(p).columns;
  problem.groups = panel_groups(problem);
  return problem;
}

// Are threads busy that take whole tasks, the dearest first?
bool shared_out_whole(std::vector<double> costs) {
  if (static_cast<int64_t>(costs.size()) < num_threads()) return false;
  std::sort(costs.rbegin(), costs.rend());
  std::vector<double> loads(num_threads(), 0.0);
  for (const double cost : costs) *std::min_element(loads.begin(), loads.end()) += cost;
  const double longest = *std::max_element(loads.begin(), loads.end());
  return std::accumulate(costs.begin(), costs.end(), 0.0) >= kBusy * num_threads() * longest;
}

// Bytes of tables, scales and sums.
struct Memory {
  int64_t tables = 0, scales, sums;

  explicit Memory(const Problem& problem) {
    const LayoutHeader& header = problem.view.header();
    for (const PanelGroup& group : problem.groups)
      tables = std::max(tables, problem.block * header.segments * problem.table_bytes(group));
    scales = problem.block * header.segments * problem.lookup_panels;
    sums = problem.groups.size() == 1 ? 0 : problem.block * header.tiles * kTileRows;
  }
  int64_t need() const {
    return Workspace::need<uint8_t>(tables) + Workspace::need<PanelScale>(scales) + Workspace::need<float>(sums);
  }
  void give(Problem& problem, Workspace& workspace) const {
    problem.tables = workspace.take<uint8_t>(tables);
    problem.scales = workspace.take<PanelScale>(scales);
    if (sums > 0) problem.sums = workspace.take<float>(sums);
  }
};

}  // namespace

LinearPath cheaper_path(const LayoutView& view, DType dtype, int64_t tokens, Precision precision) {
  const double passes = static_cast<double>(ceil_div(tokens, kMaxTokenBlock));
  // Costs were measured with fp32 x; tables of other types may have fewer planes.
  const double planes = static_cast<double>(table_planes(table_kind(precision, dtype, view.header().order))) /
                        table_planes(table_kind(precision, DType::fp32, view.header().order));
  const PathCost cost = path_cost(kernel_isa(view.header().order), precision);
  double tables = 0, decode = 0;
  for (int64_t p = 0; p < view.header().panels; ++p) {
    const PanelRecord& panel = view.panel(p);
    const int64_t w = panel.width - 1;
    const double slots = static_cast<double>(panel.slots), count = static_cast<double>(tokens);
    tables += slots * (passes * cost.table_pass[w] + count * cost.table_token[w] * (panel.width <= 4 ? planes : 1));
    decode += slots * (cost.decode[w] + count * cost.decode_token[w]);
  }
  return decode < tables ? LinearPath::decode : LinearPath::tables;
}

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  if (active_isa() != Isa::scalar) return kRowAvx2;
#elif defined(__aarch64__)
  if (active_isa() != Isa::scalar) return kRowNeon;
#endif
  return kRowScalar;
}

const float* rows_in_fp32(const RowKernels& kernels, const void* x, DType dtype, int64_t begin, int64_t count, int64_t columns,
                          float* converted) {
  const void* first = static_cast<const uint8_t*>(x) + begin * columns * element_bytes(dtype);
  if (dtype == DType::fp32) return static_cast<const float*>(first);
  kernels.to_fp32[static_cast<int>(dtype)](first, converted, count * columns);
  return converted;
}

void codebook_linear(const LayoutView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype,
                     void* y, LinearPath path, Precision precision) {
  const LayoutHeader& header = view.header();
  if (path == LinearPath::automatic) path = cheaper_path(view, x_dtype, tokens, precision);
  if (path == LinearPath::decode) return codebook_linear_decode(view, x, x_dtype, tokens, bias, bias_dtype, y, precision);

  Problem problem = problem_of(view, x_dtype, tokens, precision);
  const Memory memory(problem);
  const int64_t converted = x_dtype == DType::fp32 ? 0 : problem.block * header.columns;
  thread_local Workspace workspace;
  workspace.reserve(Workspace::need<float>(converted) + Workspace::need<float>(header.rows) + memory.need());
  auto* x_block = workspace.take<float>(converted);
  auto* bias_fp32 = workspace.take<float>(header.rows);
  memory.give(problem, workspace);
  if (bias != nullptr) problem.bias = rows_in_fp32(problem.rows, bias, bias_dtype, 0, 1, header.rows, bias_fp32);

  for (int64_t begin = 0; begin < tokens; begin += problem.block) {
    problem.tokens = std::min(problem.block, tokens - begin);
    problem.x = rows_in_fp32(problem.rows, x, x_dtype, begin, problem.tokens, header.columns, x_block);
    for (const PanelGroup& group : problem.groups)
      run_groups({{problem, group, static_cast<uint8_t*>(y) + begin * header.rows * element_bytes(x_dtype)}});
  }
}

std::vector<size_t> codebook_linears(const std::vector<LinearOfMany>& linears, Precision precision) {
  std::vector<Problem> problems;
  std::vector<float*> outputs;
  std::vector<size_t> rest;
  int64_t need = 0;
  for (size_t i = 0; i < linears.size(); ++i) {
    const LinearOfMany& linear = linears[i];
    if (linear.tokens <= kMaxTokenBlock &&
        cheaper_path(linear.view, DType::fp32, linear.tokens, precision) == LinearPath::tables) {
      Problem problem = problem_of(linear.view, DType::fp32, linear.tokens, precision);
      if (problem.groups.size() == 1) {
        problem.tokens = linear.tokens;
        problem.x = linear.x;
        problem.bias = linear.bias;
        need += Memory(problem).need();
        problems.push_back(std::move(problem));
        outputs.push_back(linear.y);
        continue;
      }
    }
    rest.push_back(i);
  }
  std::vector<GroupRun> runs;
  for (size_t i = 0; i < problems.size(); ++i) runs.push_back({problems[i], problems[i].groups[0], outputs[i]});
  const auto give = [&problems](size_t i, Workspace& workspace) { Memory(problems[i]).give(problems[i], workspace); };
  std::vector<double> costs;
  for (const GroupRun& run : runs) costs.push_back(run.tables_cost() + run.lookups_cost());
  if (!shared_out_whole(costs)) {
    thread_local Workspace workspace;
    workspace.reserve(need);
    for (size_t i = 0; i < runs.size(); ++i) give(i, workspace);
    run_groups(runs);
    return rest;
  }
  std::vector<size_t> order(runs.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  const double cost = std::accumulate(costs.begin(), costs.end(), 0.0);
  parallel_for(static_cast<int64_t>(order.size()), 1, cost, [&](int64_t begin, int64_t end) {
    thread_local Workspace workspace;
    for (int64_t place = begin; place < end; ++place) {
      const size_t i = order[place];
      problems[i].chunks = tile_chunks(problems[i].view, kChunkTiles, kChunkTiles, 1);
      workspace.reserve(Memory(problems[i]).need());
      give(i, workspace);
      runs[i].build_all();
      runs[i].look_up_all();
    }
  });
  return rest;
}

}  // namespace pyllmq::cpu

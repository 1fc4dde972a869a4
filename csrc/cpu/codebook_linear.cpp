#include "cpu/codebook_linear.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/codebook_layout.h"
#include "cpu/codebook_linear_decode.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kTableBudget = int64_t{4} << 20;  // bytes of tables alive at once; stays in a share of the L3 cache
constexpr int64_t kChunkTiles = 16;
// Single-thread estimates for the thread pool.
constexpr double kNsPerLookupStep = 1.2;  // one lookup of 32 rows
constexpr double kNsPerDecodeStep = 5.0;  // one column of 32 rows
constexpr double kNsPerTable = 4.0;
// Outside of this range of |x * codebook| the fixed point or its scale would leave fp32's normal numbers.
constexpr float kSmallestBound = 0x1p-90f;
constexpr float kLargestBound = 0x1p100f;

enum class Path : int32_t { nothing, tables, exact };  // nothing: every product of the panel is zero

struct PanelScale {
  Path path;
  float unit;
};

struct Problem {
  const LayoutView& view;
  const LinearKernels& kernels;
  const RowKernels& rows;
  TableKind kind;
  DType dtype;
  int64_t lookup_panels;  // the first panels, those of widths 1..4
  std::vector<int64_t> first_lookup;
  int64_t lookups;
  int64_t decoded_columns;  // of widths 5..8
  std::vector<TileChunk> chunks;

  const float* x;      // [tokens, columns]
  const float* bias;   // [rows] or null
  uint8_t* tables;     // [tokens, segments, lookups, planes, 16]
  PanelScale* scales;  // [tokens, segments, lookup_panels]
  int64_t tokens;

  const TableKernels& table_kernels() const { return kernels.tables[static_cast<int>(kind)]; }
  uint8_t* table(int64_t token, int64_t segment, int64_t panel) const {
    const int64_t before = (token * view.header().segments + segment) * lookups + first_lookup[panel];
    return tables + before * table_planes(kind) * kTableEntries;
  }
  PanelScale& scale(int64_t token, int64_t segment, int64_t panel) const {
    return scales[(token * view.header().segments + segment) * lookup_panels + panel];
  }
};

const LinearKernels& linear_kernels(StepOrder order) {
#if defined(__x86_64__)
  if (active_isa() != Isa::scalar && order == StepOrder::rows) return kLinearAvx2;
#endif
  return kLinearScalar;
}

TableKind table_kind(Precision precision, DType dtype) {
  if (precision == Precision::high) return TableKind::bits16;
  if (precision == Precision::fast) return TableKind::bits14;
  return dtype == DType::fp32 ? TableKind::bits28 : TableKind::bits21;
}

// --- choice of the path ----------------------------------------------------------------------------------------------

// ps per weight on one core, [width - 1]; fits of N = K = 1024, 1..32 tokens.
struct PathCost {
  double table_fp32, table_half;  // per token
  double table_pass;              // per pass of kMaxTokenBlock tokens: widths 5..8 are decoded there too
  double decode;                  // once
};
constexpr PathCost kPathCost[8] = {{12, 10, 0, 70},   {22, 18, 0, 70},   {45, 34, 0, 70},    {44, 34, 0, 70},
                                   {29, 29, 80, 100}, {29, 29, 120, 145}, {29, 29, 225, 245}, {29, 29, 430, 460}};
constexpr double kMultiplyCost = 19.5;  // per token, after decoding

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

// One part in 4096 less than fits: room for the rounding of the products and of the fixed point.
float fixed_point_scale(TableKind kind, float bound) {
  const float room = bound * (1 + 0x1p-12f);
  if (kind == TableKind::bits28 || kind == TableKind::bits21)
    return std::ldexp(1.0f, table_bits(kind) - 2 - std::ilogb(room));
  return static_cast<float>((1 << (table_bits(kind) - 1)) - 1) / room;
}

void build_panel_tables(const Problem& problem, int64_t token, int64_t segment, int64_t p) {
  const LayoutView& view = problem.view;
  const PanelRecord& panel = view.panel(p);
  const int width = static_cast<int>(panel.width);
  alignas(64) float x[kMaxPanelColumns];
  pick_columns(view, panel, problem.x + token * view.header().columns, x);

  PanelScale& scale = problem.scale(token, segment, p);
  const float bound = problem.rows.panel_bound(x, view.max_magnitude(panel, segment), panel.lookups(),
                                               columns_per_lookup(width));
  if (bound == 0) {
    scale = {Path::nothing, 0};
  } else if (bound >= kSmallestBound && bound <= kLargestBound) {
    const float to_fixed = fixed_point_scale(problem.kind, bound);
    scale = {Path::tables, 1 / to_fixed};
    for (int64_t i = 0; i < panel.slots; ++i) x[i] *= to_fixed;
    problem.table_kernels().build(width, view.header().order, view.codebook(panel, segment), x, panel.lookups(),
                                  problem.table(token, segment, p));
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
        sum += static_cast<double>(x[slot]) *
               static_cast<double>(
                   fp16_to_fp32(codebook[slot * entries + read_code(codes, view.header().order, width, slot, row)]));
      y[tile * kTileRows + row] += static_cast<float>(sum);
    }
  }
}

void add_lookups(const Problem& problem, int64_t p, const TileChunk& chunk, float* y, int64_t y_stride) {
  const PanelRecord& panel = problem.view.panel(p);
  TokenTables tokens[kMaxTokenBlock];
  int64_t count = 0;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    const PanelScale& scale = problem.scale(t, chunk.segment, p);
    if (scale.path == Path::tables)
      tokens[count++] = {problem.table(t, chunk.segment, p), scale.unit, y + t * y_stride};
    else if (scale.path == Path::exact)
      add_exact(problem, panel, chunk, t, y + t * y_stride);
  }
  const TableKernels& kernels = problem.table_kernels();
  (panel.width == 3 ? kernels.lookup_3bit : kernels.lookup_nibbles)(
      {problem.view.codes(panel, chunk.tile_begin), problem.view.header().order, chunk.tiles, panel.lookups(), tokens,
       count});
}

void add_decoded(const Problem& problem, int64_t p, const TileChunk& chunk, float* y, int64_t y_stride) {
  const LayoutView& view = problem.view;
  const PanelRecord& panel = view.panel(p);
  alignas(64) float x[kMaxTokenBlock * kBytePanelColumns];
  for (int64_t t = 0; t < problem.tokens; ++t)
    pick_columns(view, panel, problem.x + t * view.header().columns, x + t * kBytePanelColumns);
  problem.kernels.decode_multiply[panel.width - 5](view.codes(panel, chunk.tile_begin), view.header().order,
                                                   chunk.tiles, panel.tile_bytes, panel.columns,
                                                   view.codebook(panel, chunk.segment), x, problem.tokens, y, y_stride);
}

// --- the end of a row: scale, outliers, bias, dtype ----------------------------------------------------------------

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
      double sum = 0;
      for (uint32_t i = offsets[r]; i < offsets[r + 1]; ++i)
        sum += static_cast<double>(x[columns[i]]) * static_cast<double>(deltas[i]);
      sums[r] += static_cast<float>(sum);
    }
  }
  if (problem.bias != nullptr)
    for (int64_t r = 0; r < rows; ++r) sums[r] += problem.bias[row_begin + r];
}

void run_chunk(const Problem& problem, const TileChunk& chunk, void* y) {
  const LayoutHeader& header = problem.view.header();
  alignas(64) float sums[kMaxTokenBlock * kChunkTiles * kTileRows];
  const int64_t stride = chunk.tiles * kTileRows;
  std::fill(sums, sums + problem.tokens * stride, 0.0f);
  for (int64_t p = 0; p < header.panels; ++p) {
    if (p < problem.lookup_panels)
      add_lookups(problem, p, chunk, sums, stride);
    else
      add_decoded(problem, p, chunk, sums, stride);
  }
  for (int64_t t = 0; t < problem.tokens; ++t) {
    finish_rows(problem, t, chunk.row_begin, chunk.rows, sums + t * stride);
    problem.rows.from_fp32[static_cast<int>(problem.dtype)](
        sums + t * stride,
        static_cast<uint8_t*>(y) + (t * header.rows + chunk.row_begin) * element_bytes(problem.dtype), chunk.rows);
  }
}

void run_block(const Problem& problem, void* y) {
  const LayoutHeader& header = problem.view.header();
  const double tokens = static_cast<double>(problem.tokens);
  const int64_t tasks = problem.tokens * header.segments * problem.lookup_panels;
  parallel_for(tasks, 1, kNsPerTable * tokens * header.segments * problem.lookups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % problem.lookup_panels, rest = i / problem.lookup_panels;
      build_panel_tables(problem, rest / header.segments, rest % header.segments, panel);
    }
  });
  const double steps = problem.lookups * kNsPerLookupStep + problem.decoded_columns * kNsPerDecodeStep;
  const double cost = steps * tokens * static_cast<double>(header.tiles);
  parallel_for(static_cast<int64_t>(problem.chunks.size()), 1, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_chunk(problem, problem.chunks[i], y);
  });
}

}  // namespace

LinearPath cheaper_path(const LayoutView& view, DType dtype, int64_t tokens, Precision) {
  const double passes = static_cast<double>((tokens + kMaxTokenBlock - 1) / kMaxTokenBlock);
  double tables = 0, decode = 0;
  for (int64_t p = 0; p < view.header().panels; ++p) {
    const PathCost& cost = kPathCost[view.panel(p).width - 1];
    const double slots = static_cast<double>(view.panel(p).slots), per_token = static_cast<double>(tokens) * slots;
    tables += per_token * (dtype == DType::fp32 ? cost.table_fp32 : cost.table_half) + slots * passes * cost.table_pass;
    decode += per_token * kMultiplyCost + slots * cost.decode;
  }
  return decode < tables ? LinearPath::decode : LinearPath::tables;
}

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  if (active_isa() != Isa::scalar) return kRowAvx2;
#endif
  return kRowScalar;
}

const float* rows_in_fp32(const RowKernels& kernels, const void* x, DType dtype, int64_t begin, int64_t count,
                          int64_t columns, float* converted) {
  const void* first = static_cast<const uint8_t*>(x) + begin * columns * element_bytes(dtype);
  if (dtype == DType::fp32) return static_cast<const float*>(first);
  kernels.to_fp32[static_cast<int>(dtype)](first, converted, count * columns);
  return converted;
}

void codebook_linear(const LayoutView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias,
                     DType bias_dtype, void* y, LinearPath path, Precision precision) {
  const LayoutHeader& header = view.header();
  if (tokens < 0) throw std::invalid_argument("tokens = " + std::to_string(tokens) + "; must be >= 0");
  if (tokens == 0) return;
  if (x == nullptr || y == nullptr) throw std::invalid_argument("x and y must not be null when there are tokens");
  if (path == LinearPath::automatic) path = cheaper_path(view, x_dtype, tokens, precision);
  if (path == LinearPath::decode) 
    return codebook_linear_decode(view, x, x_dtype, tokens, bias, bias_dtype, y, precision);

  Problem problem{view,
                  linear_kernels(header.order),
                  row_kernels(),
                  table_kind(precision, x_dtype),
                  x_dtype,
                  0,
                  {},
                  0,
                  0,
                  tile_chunks(view, std::clamp<int64_t>(header.tiles / (4 * num_threads()), 4, kChunkTiles)),
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  0};
  for (; problem.lookup_panels < header.panels && view.panel(problem.lookup_panels).width <= 4;
       ++problem.lookup_panels) {
    problem.first_lookup.push_back(problem.lookups);
    problem.lookups += view.panel(problem.lookup_panels).lookups();
  }
  for (int64_t p = problem.lookup_panels; p < header.panels; ++p) problem.decoded_columns += view.panel(p).columns;

  const int64_t tables_per_token = header.segments * problem.lookups * table_planes(problem.kind) * kTableEntries;
  const int64_t block =
      std::min(tokens, std::clamp<int64_t>(kTableBudget / std::max<int64_t>(tables_per_token, 1), 1, kMaxTokenBlock));
  const int64_t scales = block * header.segments * problem.lookup_panels;
  thread_local Workspace workspace;
  workspace.reserve(Workspace::need<float>(block * header.columns) + Workspace::need<float>(header.rows) +
                    Workspace::need<uint8_t>(block * tables_per_token) + Workspace::need<PanelScale>(scales));
  auto* x_block = workspace.take<float>(block * header.columns);
  auto* bias_fp32 = workspace.take<float>(header.rows);
  problem.tables = workspace.take<uint8_t>(block * tables_per_token);
  problem.scales = workspace.take<PanelScale>(scales);
  if (bias != nullptr) problem.bias = rows_in_fp32(problem.rows, bias, bias_dtype, 0, 1, header.rows, bias_fp32);

  for (int64_t begin = 0; begin < tokens; begin += block) {
    problem.tokens = std::min(block, tokens - begin);
    problem.x = rows_in_fp32(problem.rows, x, x_dtype, begin, problem.tokens, header.columns, x_block);
    run_block(problem, static_cast<uint8_t*>(y) + begin * header.rows * element_bytes(x_dtype));
  }
}

}  // namespace pyllmq::cpu

#include "sparse/cpu/linear.h"

#include <algorithm>
#include <atomic>

#include "runtime/counting.h"
#include "runtime/isa.h"
#include "runtime/thread_pool.h"
#include "runtime/workspace.h"

namespace pyllmq::cpu {
namespace {

// Tokens of a pass of the path for more tokens: packed x then stays a small part of the weight.
constexpr int64_t kMostTokens = 256;
// From so many tokens on each kept weight is multiplied by 16 tokens at once.
constexpr int64_t kFewestTransposed = 4;
// Single-thread estimates for the thread pool.
constexpr double kNsPerExpandedWeight = 0.05;
constexpr double kNsPerMultiply = 0.02;
constexpr double kNsPerPackedElement = 0.5;
constexpr double kNsPerGather = 0.4;

const SparseKernels& sparse_kernels(const SparseHeader& h) {
  [[maybe_unused]] const auto reads = [&](StepOrder order) { return h.kind != SparseKind::codes || h.order == order; };
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512 && reads(StepOrder::fours)) return kSparseAvx512;
  if (active_isa() != Isa::scalar && reads(StepOrder::rows)) return kSparseAvx2;
#elif defined(__aarch64__)
  if (active_isa() != Isa::scalar && reads(StepOrder::rows)) return kSparseNeon;
#endif
  return kSparseScalar;
}

const BFloat16Tiles* bfloat16_tiles([[maybe_unused]] const SparseView& view, [[maybe_unused]] DType x_dtype) {
#if defined(__x86_64__)
  const ValueType values = view.header().values;
  const bool exact = view.header().kind != SparseKind::codes && (values == ValueType::bf16 || values == ValueType::int8);
  if (active_isa() == Isa::amx && x_dtype == DType::bf16 && exact) return &kBFloat16TilesAmx;
#endif
  return nullptr;
}

struct Problem {
  const SparseView& view;
  const SparseKernels& kernels;
  const RowKernels& conversions;
  DType dtype;
  const float* bias = nullptr;  // [rows] or null

  int64_t tokens = 0;
  const float* x = nullptr;        // [tokens, columns]
  const uint16_t* bf16 = nullptr;  // the same, where tiles read it
  uint8_t* y = nullptr;            // [tokens, rows]

  const SparseHeader& header() const { return view.header(); }
};

struct Chunk {
  int64_t tile, tiles, row, rows;
};

// Chunks of at most a strip, at least four for each thread where there are tiles enough.
int64_t chunk_tiles(int64_t tiles) { return std::clamp<int64_t>(tiles / (4 * num_threads()), 1, kSparseStripTiles); }

template <class Run>
void for_chunks(const Problem& problem, double cost_ns, Run&& run) {
  const SparseHeader& h = problem.header();
  const int64_t most = chunk_tiles(h.tiles), per_strip = ceil_div(kSparseStripTiles, most);
  const int64_t strips = ceil_div(h.tiles, kSparseStripTiles);
  parallel_for(strips * per_strip, 1, cost_ns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t strip = i / per_strip * kSparseStripTiles, tile = strip + i % per_strip * most;
      const int64_t last = std::min({tile + most, strip + kSparseStripTiles, h.tiles});
      if (tile >= last) continue;
      run(Chunk{tile, last - tile, tile * kTileRows, std::min(h.rows, last * kTileRows) - tile * kTileRows});
    }
  });
}

void add_outliers(const Problem& problem, int64_t token, const Chunk& chunk, float* row_sums) {
  const SparseView& view = problem.view;
  const float* x = problem.x + token * problem.header().columns;
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const uint32_t *offsets = view.outlier_row_offsets() + chunk.row + r, *columns = view.outlier_columns();
    const float* deltas = view.outlier_deltas();
    // Four chains, as one waits 4 cycles for every addition.
    double chain[4] = {};
    for (uint32_t i = offsets[0]; i < offsets[1]; ++i)
      chain[i % 4] += static_cast<double>(x[columns[i]]) * static_cast<double>(deltas[i]);
    row_sums[r] += static_cast<float>((chain[0] + chain[1]) + (chain[2] + chain[3]));
  }
}

// sums [rows of the chunk] of one token -> y.
void store_rows(const Problem& problem, int64_t token, const Chunk& chunk, float* sums, bool outliers) {
  const SparseHeader& h = problem.header();
  if (const float* scale = problem.view.scale())
    for (int64_t r = 0; r < chunk.rows; ++r) sums[r] *= scale[chunk.row + r];
  if (outliers && h.outliers > 0) add_outliers(problem, token, chunk, sums);
  if (problem.bias != nullptr)
    for (int64_t r = 0; r < chunk.rows; ++r) sums[r] += problem.bias[chunk.row + r];
  problem.conversions.from_fp32[static_cast<int>(problem.dtype)](
      sums, problem.y + (token * h.rows + chunk.row) * element_bytes(problem.dtype), chunk.rows);
}

// --- few tokens ----------------------------------------------------------------------------------------------------

// Floats per slot and token of the x that kernels read.
int64_t x_floats(const SparseHeader& h) { return h.kind == SparseKind::codes ? int64_t{1} << h.bits : 1; }

void pack_few(const Problem& problem, float* packed) {
  const SparseHeader& h = problem.header();
  const int64_t tokens = problem.tokens, block_floats = kCellColumns * tokens * x_floats(h);
  const double cost = kNsPerPackedElement * static_cast<double>(h.blocks * block_floats);
  parallel_for(h.blocks, 1, cost, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      alignas(64) float x[kMostFewTokens][kCellColumns];
      const int64_t first = block * kCellColumns, columns = std::min(kCellColumns, h.columns - first);
      for (int64_t t = 0; t < tokens; ++t) {
        std::copy_n(problem.x + t * h.columns + first, columns, x[t]);
        std::fill(x[t] + columns, x[t] + kCellColumns, 0.0f);
      }
      float* to = packed + block * block_floats;
      if (h.kind == SparseKind::bitmap) {
        for (int64_t slot = 0; slot < kCellColumns; ++slot)
          for (int64_t t = 0; t < tokens; ++t) *to++ = x[t][slot];
        continue;
      }
      for (int64_t slot = 0; slot < problem.view.slots(block); slot += 4)
        for (int64_t t = 0; t < tokens; ++t) {
          if (h.kind == SparseKind::sparse24) {
            to = std::copy_n(x[t] + slot, 4, to);
          } else {
            problem.kernels.build_products(problem.view.codebook() + ((first + slot) << h.bits), static_cast<int>(h.bits),
                                           x[t] + slot, to);
            to += 4 << h.bits;
          }
        }
    }
  });
}

SparseKernels::Multiply few_multiply(const Problem& problem) {
  const SparseHeader& h = problem.header();
  const int64_t t = problem.tokens - 1;
  if (h.kind == SparseKind::codes) return problem.kernels.codes[h.bits - 2][t];
  const auto& table = h.kind == SparseKind::bitmap ? problem.kernels.bitmap : problem.kernels.sparse24;
  return table[static_cast<int>(h.values)][t];
}

// multiply(cell, block, sums) for each cell; sums [tokens, kTileRows] of its half.
template <class Multiply>
void run_cells(const Problem& problem, Multiply&& multiply) {
  const SparseHeader& h = problem.header();
  const int64_t tokens = problem.tokens;
  const double weights = static_cast<double>(h.rows) * static_cast<double>(h.columns);
  for_chunks(problem, weights * (kNsPerExpandedWeight + kNsPerMultiply * static_cast<double>(tokens)), [&](const Chunk& chunk) {
    alignas(64) float sums[kSparseStripTiles][kMostFewTokens * kTileRows];
    for (int64_t tile = 0; tile < chunk.tiles; ++tile) std::fill_n(sums[tile], tokens * kTileRows, 0.0f);
    for (int64_t block = 0; block < h.blocks; ++block)
      for (int64_t tile = 0; tile < chunk.tiles; ++tile)
        for (int half = 0; half < 2; ++half)
          multiply(problem.view.cell(chunk.tile + tile, block, half), block, sums[tile] + half * kCellRows);
    for (int64_t t = 0; t < tokens; ++t) {
      alignas(64) float row_sums[kSparseStripTiles * kTileRows];
      for (int64_t tile = 0; tile < chunk.tiles; ++tile)
        std::copy_n(sums[tile] + t * kTileRows, kTileRows, row_sums + tile * kTileRows);
      store_rows(problem, t, chunk, row_sums, true);
    }
  });
}

void run_few(const Problem& problem, float* packed) {
  const SparseHeader& h = problem.header();
  const int64_t block_floats = kCellColumns * problem.tokens * x_floats(h);
  pack_few(problem, packed);
  const SparseKernels::Multiply multiply = few_multiply(problem);
  run_cells(problem, [&](const uint8_t* cell, int64_t block, float* sums) {
    multiply({cell, h.order, problem.view.slots(block), packed + block * block_floats, sums});
  });
}

// Tables [block, token] and their units; false where some x or its range leaves the fixed point.
bool build_code_tables(const Problem& problem, TableKind kind, uint8_t* tables, float* units) {
  const SparseHeader& h = problem.header();
  const int64_t bytes = code_table_bytes(kind, h.bits);
  const double cost = kNsPerPackedElement * static_cast<double>(problem.tokens * h.columns << h.bits);
  std::atomic<bool> fits{true};
  parallel_for(h.blocks * problem.tokens, 1, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / problem.tokens * kCellColumns, columns = std::min(kCellColumns, h.columns - first);
      float x[kCellColumns] = {};
      std::copy_n(problem.x + i % problem.tokens * h.columns + first, columns, x);
      if (!problem.kernels.code_tables[static_cast<int>(kind)].build(
              static_cast<int>(h.bits), problem.view.codebook() + (first << h.bits), x, problem.view.slots(i / problem.tokens),
              tables + i * bytes, units + i))
        fits.store(false, std::memory_order_relaxed);
    }
  });
  return fits.load();
}

// workspace: few_code_bytes.
void run_few_codes(const Problem& problem, Precision precision, uint8_t* workspace) {
  const SparseHeader& h = problem.header();
  const TableKind kind = table_kind(precision, problem.dtype, h.order);
  const int64_t bytes = code_table_bytes(kind, h.bits);
  auto* units = reinterpret_cast<float*>(workspace + h.blocks * problem.tokens * bytes);
  if (!build_code_tables(problem, kind, workspace, units)) {
    for (int64_t t = 0; t < problem.tokens; ++t)
      run_few({.view = problem.view,
               .kernels = kSparseScalar,
               .conversions = problem.conversions,
               .dtype = problem.dtype,
               .bias = problem.bias,
               .tokens = 1,
               .x = problem.x + t * h.columns,
               .y = problem.y + t * h.rows * element_bytes(problem.dtype)},
              reinterpret_cast<float*>(workspace));
    return;
  }
  const auto look_up = problem.kernels.code_tables[static_cast<int>(kind)].lookup[h.bits - 2];
  run_cells(problem, [&](const uint8_t* cell, int64_t block, float* sums) {
    TokenTables tokens[kMostFewTokens];
    for (int64_t t = 0; t < problem.tokens; ++t) {
      const int64_t i = block * problem.tokens + t;
      tokens[t] = {workspace + i * bytes, units[i], sums + t * kTileRows};
    }
    look_up({cell, problem.view.slots(block), tokens, problem.tokens});
  });
}

int64_t few_code_bytes(const SparseHeader& h, TableKind kind, int64_t tokens) {
  return std::max(h.blocks * tokens * (code_table_bytes(kind, h.bits) + int64_t{sizeof(float)}),
                  h.blocks * kCellColumns * x_floats(h) * int64_t{sizeof(float)});
}

// --- more tokens ---------------------------------------------------------------------------------------------------

// One half of a tile in a block, outliers included, row scale not: fp32 [slots, 16].
void expand_cell(const SparseView& view, const SparseKernels& kernels, int64_t tile, int64_t block, int half, float* weights) {
  const SparseHeader& h = view.header();
  const uint8_t* cell = view.cell(tile, block, half);
  const int64_t slots = view.slots(block);
  if (h.kind == SparseKind::bitmap) return kernels.expand_bitmap[static_cast<int>(h.values)](cell, slots, weights);
  if (h.kind == SparseKind::sparse24) return kernels.expand_24[static_cast<int>(h.values)](cell, slots, weights);
  kernels.expand_codes[h.bits - 2](cell, h.order, slots, view.codebook() + (block * kCellColumns << h.bits), weights);
  if (h.outliers == 0) return;
  const uint32_t* columns = view.outlier_columns();
  const int64_t first_row = tile * kTileRows + half * kCellRows, first = block * kCellColumns;
  for (int r = 0; r < kCellRows && first_row + r < h.rows; ++r) {
    const uint32_t* offsets = view.outlier_row_offsets() + first_row + r;
    const uint32_t* i = std::lower_bound(columns + offsets[0], columns + offsets[1], static_cast<uint32_t>(first));
    for (; i < columns + offsets[1] && *i < first + kCellColumns; ++i)
      weights[(*i - first) * kCellRows + r] = fp16_to_fp32(view.outlier_values()[i - columns]);
  }
}

void pack_more(const Problem& problem, const DecodeKernels& product, const BFloat16Tiles* tiles, uint8_t* packed) {
  const SparseHeader& h = problem.header();
  const TokenGroups groups{problem.tokens, product.token_group};
  const double cost = kNsPerPackedElement * static_cast<double>(problem.tokens * h.columns);
  parallel_for(h.blocks, 1, cost, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kCellColumns, columns = std::min(kCellColumns, h.columns - first);
      const int64_t slots = problem.view.slots(block);
      if (tiles != nullptr) {
        tiles->pack_x(problem.bf16 + first, h.columns, problem.tokens, columns, slots,
                      reinterpret_cast<uint16_t*>(packed + block * tiles->packed_bytes(problem.tokens)));
        continue;
      }
      uint8_t* to = packed + block * product.packed_bytes(problem.tokens);
      for (int64_t g = 0; g < groups.count(); ++g) {
        alignas(64) float x[kMostTokenGroup * kDecodedColumns];
        for (int64_t t = 0; t < groups.size(g); ++t) {
          std::copy_n(problem.x + (groups.begin(g) + t) * h.columns + first, columns, x + t * kDecodedColumns);
          std::fill(x + t * kDecodedColumns + columns, x + (t + 1) * kDecodedColumns, 0.0f);
        }
        pack_fp32(x, slots, nullptr, groups, g, to);
      }
    }
  });
}

void run_more(const Problem& problem, const DecodeKernels& product, const BFloat16Tiles* tiles, const uint8_t* packed) {
  static_assert(kDecodedColumns == kCellColumns && kHalfRows == kCellRows, "cells are what the product multiplies");
  const SparseHeader& h = problem.header();
  const int64_t tokens = problem.tokens;
  const double weights = static_cast<double>(h.rows) * static_cast<double>(h.columns);
  const double cost = weights * (kNsPerExpandedWeight + kNsPerMultiply * static_cast<double>(tokens));
  for_chunks(problem, cost, [&](const Chunk& chunk) {
    const int64_t tile_sums = (tokens + kMostTokenGroup) * kTileRows;  // the last group of tokens may be written whole
    thread_local Workspace workspace;
    workspace.reserve(Workspace::need<float>(kDecodedWeights) + Workspace::need<uint16_t>(kDecodedWeights) +
                      Workspace::need<float>(kSparseStripTiles * tile_sums));
    auto* expanded = workspace.take<float>(kDecodedWeights);
    auto* pairs = workspace.take<uint16_t>(kDecodedWeights);
    auto* sums = workspace.take<float>(kSparseStripTiles * tile_sums);
    std::fill_n(sums, chunk.tiles * tile_sums, 0.0f);
    if (tiles != nullptr) tiles->begin_chunk();
    for (int64_t block = 0; block < h.blocks; ++block)
      for (int64_t tile = 0; tile < chunk.tiles; ++tile) {
        const int64_t slots = problem.view.slots(block);
        for (int half = 0; half < 2; ++half) {
          uint16_t* pairs_of_half = pairs + half * kCellColumns * kCellRows;
          if (tiles != nullptr && h.values == ValueType::bf16) {
            (h.kind == SparseKind::bitmap ? tiles->expand_bitmap : tiles->expand_24)(
                problem.view.cell(chunk.tile + tile, block, half), slots, pairs_of_half);
            continue;
          }
          float* weights_of_half = expanded + half * kCellColumns * kCellRows;
          expand_cell(problem.view, problem.kernels, chunk.tile + tile, block, half, weights_of_half);
          if (tiles != nullptr) tiles->pack_weights(weights_of_half, slots, pairs_of_half);
        }
        if (tiles != nullptr)
          tiles->multiply(pairs, reinterpret_cast<const uint16_t*>(packed + block * tiles->packed_bytes(tokens)), slots, tokens,
                          sums + tile * tile_sums);
        else
          product.multiply(reinterpret_cast<uint8_t*>(expanded), packed + block * product.packed_bytes(tokens), slots, tokens,
                           sums + tile * tile_sums);
      }
    if (tiles != nullptr) tiles->end_chunk();
    for (int64_t t = 0; t < tokens; ++t) {
      alignas(64) float row_sums[kSparseStripTiles * kTileRows];
      for (int64_t tile = 0; tile < chunk.tiles; ++tile)
        std::copy_n(sums + tile * tile_sums + t * kTileRows, kTileRows, row_sums + tile * kTileRows);
      store_rows(problem, t, chunk, row_sums, false);
    }
  });
}

// --- few kept weights ----------------------------------------------------------------------------------------------

// transposed: as `put_side_by_side` made it; null where one token after the other costs less.
void run_columns(const Problem& problem, const float* transposed) {
  const SparseHeader& h = problem.header();
  const double cost = kNsPerGather * static_cast<double>(h.kept) * static_cast<double>(problem.tokens);
  const auto dot = problem.kernels.dot_columns[static_cast<int>(h.values)];
  const auto dot_tokens = problem.kernels.dot_tokens[static_cast<int>(h.values)];
  const int bytes = problem.view.column_bytes();
  for_chunks(problem, cost, [&](const Chunk& chunk) {
    const int32_t* offsets = problem.view.row_offsets() + chunk.row;
    const auto values = [&](int64_t r) { return problem.view.values() + offsets[r] * value_bytes(h.values); };
    const auto columns = [&](int64_t r) { return problem.view.columns() + int64_t{offsets[r]} * bytes; };
    alignas(64) float sums[kTokensSideBySide][kSparseStripTiles * kTileRows];
    const int64_t group = transposed == nullptr ? 1 : kTokensSideBySide;
    for (int64_t begin = 0; begin < problem.tokens; begin += group) {
      for (int64_t r = 0; r < chunk.rows; ++r) {
        const int64_t count = offsets[r + 1] - offsets[r];
        if (transposed == nullptr) {
          sums[0][r] = dot(values(r), columns(r), bytes, count, problem.x + begin * h.columns);
        } else {
          alignas(64) float of_tokens[kTokensSideBySide];
          dot_tokens(values(r), columns(r), bytes, count, transposed + begin * h.columns, of_tokens);
          for (int64_t t = 0; t < kTokensSideBySide; ++t) sums[t][r] = of_tokens[t];
        }
      }
      for (int64_t t = 0; t < std::min(group, problem.tokens - begin); ++t) store_rows(problem, begin + t, chunk, sums[t], false);
    }
  });
}

}  // namespace

void sparse_linear(const SparseView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype,
                   void* y, Precision precision) {
  const SparseHeader& h = view.header();
  Problem problem{.view = view, .kernels = sparse_kernels(h), .conversions = row_kernels(), .dtype = x_dtype};
  const DecodeKernels& product = decode_kernels(native_order(), Precision::exact);
  const int64_t few = h.kind == SparseKind::codes ? problem.kernels.few_code_tokens : problem.kernels.few_tokens;
  const bool is_few = tokens <= few;
  const bool in_tables = is_few && h.kind == SparseKind::codes && problem.kernels.code_tables != nullptr;
  const BFloat16Tiles* tiles = is_few || h.kind == SparseKind::columns ? nullptr : bfloat16_tiles(view, x_dtype);
  const int64_t passes = ceil_div(tokens, kMostTokens), most = ceil_div(tokens, passes);
  int64_t packed = 0;
  const bool transposes = h.kind == SparseKind::columns && tokens >= kFewestTransposed;
  if (transposes)
    packed = rounded_up(most, kTokensSideBySide) * h.columns * 4;
  else if (in_tables)
    packed = few_code_bytes(h, table_kind(precision, x_dtype, h.order), tokens);
  else if (h.kind != SparseKind::columns)
    packed = h.blocks * (is_few             ? kCellColumns * tokens * x_floats(h) * 4
                         : tiles != nullptr ? tiles->packed_bytes(most)
                                            : product.packed_bytes(most));
  const int64_t converted = x_dtype == DType::fp32 || tiles != nullptr ? 0 : most * h.columns;

  thread_local Workspace workspace;
  workspace.reserve(Workspace::need<uint8_t>(packed) + Workspace::need<float>(h.rows) + Workspace::need<float>(converted));
  auto* packed_x = workspace.take<uint8_t>(packed);
  auto* bias_fp32 = workspace.take<float>(h.rows);
  auto* x_fp32 = workspace.take<float>(converted);
  if (bias != nullptr) problem.bias = rows_in_fp32(problem.conversions, bias, bias_dtype, 0, 1, h.rows, bias_fp32);

  for (int64_t begin = 0; begin < tokens; begin += most) {
    problem.tokens = std::min(most, tokens - begin);
    problem.y = static_cast<uint8_t*>(y) + begin * h.rows * element_bytes(x_dtype);
    if (tiles != nullptr)
      problem.bf16 = static_cast<const uint16_t*>(x) + begin * h.columns;
    else
      problem.x = rows_in_fp32(problem.conversions, x, x_dtype, begin, problem.tokens, h.columns, x_fp32);
    if (h.kind == SparseKind::columns) {
      if (transposes) put_side_by_side(problem.x, problem.tokens, h.columns, reinterpret_cast<float*>(packed_x));
      run_columns(problem, transposes ? reinterpret_cast<const float*>(packed_x) : nullptr);
    } else if (in_tables) {
      run_few_codes(problem, precision, packed_x);
    } else if (is_few) {
      run_few(problem, reinterpret_cast<float*>(packed_x));
    } else {
      pack_more(problem, product, tiles, packed_x);
      run_more(problem, product, tiles, packed_x);
    }
  }
}

void sparse_dequantize(const SparseView& view, void* out, DType dtype) {
  const SparseHeader& h = view.header();
  const SparseKernels& kernels = sparse_kernels(h);
  const RowKernels& conversions = row_kernels();
  const int64_t element = element_bytes(dtype);
  auto* bytes = static_cast<uint8_t*>(out);
  parallel_for(h.tiles, 1, 0.5 * h.rows * h.columns, [&](int64_t begin, int64_t end) {
    alignas(64) static thread_local float weights[kCellColumns * kCellRows], rows[kCellRows * kCellColumns];
    for (int64_t tile = begin; tile < end; ++tile)
      for (int half = 0; half < 2; ++half)
        for (int64_t block = 0; block < h.blocks; ++block) {
          const int64_t first_row = tile * kTileRows + half * kCellRows, first = block * kCellColumns;
          if (h.kind == SparseKind::columns) {
            std::fill_n(weights, kCellColumns * kCellRows, 0.0f);
          } else {
            expand_cell(view, kernels, tile, block, half, weights);
          }
          const int64_t columns = std::min(kCellColumns, h.columns - first);
          conversions.transpose(weights, kCellColumns, rows, kCellColumns);
          for (int r = 0; r < kCellRows && first_row + r < h.rows; ++r) {
            float* row = rows + r * kCellColumns;
            if (const float* scale = view.scale())
              for (int64_t c = 0; c < columns; ++c) row[c] *= scale[first_row + r];
            conversions.from_fp32[static_cast<int>(dtype)](row, bytes + ((first_row + r) * h.columns + first) * element, columns);
          }
        }
    if (h.kind != SparseKind::columns) return;
    for (int64_t r = begin * kTileRows; r < std::min(h.rows, end * kTileRows); ++r)
      for (int64_t i = view.row_offsets()[r]; i < view.row_offsets()[r + 1]; ++i) {
        const int64_t column = column_at(view.columns(), view.column_bytes(), i);
        float value = value_at(h.values, view.values(), i);
        if (view.scale() != nullptr) value *= view.scale()[r];
        conversions.from_fp32[static_cast<int>(dtype)](&value, bytes + (r * h.columns + column) * element, 1);
      }
  });
}

}  // namespace pyllmq::cpu

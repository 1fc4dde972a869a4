#include "cpu/codebook_linear_decode.h"

#include <algorithm>
#include <vector>

#include "cpu/codebook_linear.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kChunkTiles = 8;
constexpr int64_t kPackedBytes = int64_t{16} << 20;  // of x alive at a time, a share of the L3 cache
constexpr int64_t kFewestTokens = 64, kMostTokens = 512;
// Single-thread estimates for the thread pool.
constexpr double kNsPerPackedElement = 0.5;
constexpr double kNsPerMultiply = 0.02;
constexpr double kNsPerDecodedWeight = 0.1;

const DecodeKernels& decode_kernels(StepOrder order) {
#if defined(__x86_64__)
  if (active_isa() != Isa::scalar && order == StepOrder::rows) return kDecodeAvx2;
#endif
  return kDecodeScalar;
}

// The part of a panel that lies in a block of 256 slots; widths 5..8 have panels of 32 columns.
struct Piece {
  const PanelRecord* panel;
  int64_t panel_slot;  // first slot, counted within the panel
  int64_t block_slot;  // and within the block
  int64_t slots;

  int width() const { return static_cast<int>(panel->width); }
  int64_t columns() const { return std::clamp<int64_t>(panel->columns - panel_slot, 0, slots); }  // without padding
};

struct Block {
  int64_t first_slot, slots;
  std::vector<Piece> pieces;
};

// Outliers of a chunk, sorted by (block, tile): they replace decoded weights.
struct Outlier {
  float value;
  int32_t place;  // in the decoded weights of the tile
};

struct Problem {
  const LayoutView& view;
  const DecodeKernels& kernels;
  const RowKernels& conversions;
  DType dtype;
  std::vector<Block> blocks;
  std::vector<uint32_t> slot_of;  // by column; empty without outliers
  const float* bias;              // [rows] or null

  int64_t tokens;
  const float* x;  // [tokens, columns]
  float* packed;   // [block, token group, slot, token]
  uint8_t* y;      // [tokens, rows]
};

std::vector<Block> make_blocks(const LayoutView& view) {
  std::vector<Block> blocks;
  for (int64_t p = 0; p < view.header().panels; ++p) {
    const PanelRecord& panel = view.panel(p);
    for (int64_t done = 0; done < panel.slots;) {
      const int64_t slot = panel.first_slot + done;
      if (slot % kDecodedColumns == 0) blocks.push_back({slot, 0, {}});
      Block& block = blocks.back();
      const int64_t slots = std::min(panel.slots - done, kDecodedColumns - block.slots);
      block.pieces.push_back({&panel, done, block.slots, slots});
      block.slots += slots;
      done += slots;
    }
  }
  return blocks;
}

std::vector<uint32_t> slots_by_column(const LayoutView& view) {
  std::vector<uint32_t> slot_of(view.header().columns);
  for (int64_t p = 0; p < view.header().panels; ++p) {
    const PanelRecord& panel = view.panel(p);
    for (int64_t i = 0; i < panel.columns; ++i)
      slot_of[view.columns(panel)[i]] = static_cast<uint32_t>(panel.first_slot + i);
  }
  return slot_of;
}

// --- phase 1: x in the order in which the multiply reads it ---------------------------------------------------------

template <int Tokens>
void pack_group(const float* x, int64_t x_stride, const uint32_t* columns, int64_t count, int64_t slots,
                float* packed) {
  for (int64_t i = 0; i < count; ++i)
    for (int t = 0; t < Tokens; ++t) packed[i * Tokens + t] = x[t * x_stride + columns[i]];
  std::fill(packed + count * Tokens, packed + slots * Tokens, 0.0f);
}

constexpr void (*kPackGroup[kTokenGroup + 1])(const float*, int64_t, const uint32_t*, int64_t, int64_t, float*) = {
    nullptr, pack_group<1>, pack_group<2>, pack_group<3>, pack_group<4>, pack_group<5>, pack_group<6>};

void pack_block(const Problem& problem, const Block& block) {
  const int64_t stride = problem.view.header().columns;
  for (int64_t g = 0; g < token_groups(problem.tokens); ++g) {
    const int64_t begin = group_begin(problem.tokens, g), count = group_begin(problem.tokens, g + 1) - begin;
    float* group = problem.packed + block.first_slot * problem.tokens + begin * block.slots;
    for (const Piece& piece : block.pieces)
      kPackGroup[count](problem.x + begin * stride, stride, problem.view.columns(*piece.panel) + piece.panel_slot,
                        piece.columns(), piece.slots, group + piece.block_slot * count);
  }
}

// --- phase 2: decode and multiply -----------------------------------------------------------------------------------

class ChunkOutliers {
 public:
  void gather(const Problem& problem, const TileChunk& chunk) {
    const int64_t row_begin = chunk.row_begin, row_end = chunk.row_begin + chunk.rows, tiles = chunk.tiles;
    tiles_ = tiles;
    if (problem.slot_of.empty()) return;
    const LayoutView& view = problem.view;
    const uint32_t* offsets = view.outlier_row_offsets();
    const auto bucket_of = [&](int64_t row, uint32_t slot) {
      return static_cast<int64_t>(slot) / kDecodedColumns * tiles + (row - row_begin) / kTileRows;
    };
    ends_.assign(problem.blocks.size() * tiles + 1, 0);
    outliers_.resize(offsets[row_end] - offsets[row_begin]);
    for (int64_t row = row_begin; row < row_end; ++row)
      for (uint32_t i = offsets[row]; i < offsets[row + 1]; ++i)
        ++ends_[bucket_of(row, problem.slot_of[view.outlier_columns()[i]]) + 1];
    for (size_t b = 1; b < ends_.size(); ++b) ends_[b] += ends_[b - 1];
    // Filling moves each bucket's begin to its end, which is the begin of the next one.
    for (int64_t row = row_begin; row < row_end; ++row)
      for (uint32_t i = offsets[row]; i < offsets[row + 1]; ++i) {
        const uint32_t slot = problem.slot_of[view.outlier_columns()[i]];
        const int64_t tile_row = (row - row_begin) % kTileRows;
        const int64_t place =
            (tile_row / kHalfRows * kDecodedColumns + slot % kDecodedColumns) * kHalfRows + tile_row % kHalfRows;
        const float value = fp16_to_fp32(view.outlier_values()[i]);
        outliers_[ends_[bucket_of(row, slot)]++] = {value, static_cast<int32_t>(place)};
      }
  }

  void replace(int64_t block, int64_t tile, float* weights) const {
    if (ends_.empty()) return;
    const int64_t bucket = block * tiles_ + tile;
    for (int64_t i = bucket == 0 ? 0 : ends_[bucket - 1]; i < ends_[bucket]; ++i)
      weights[outliers_[i].place] = outliers_[i].value;
  }

  void clear() { ends_.clear(); }

 private:
  int64_t tiles_ = 0;
  std::vector<int64_t> ends_;
  std::vector<Outlier> outliers_;
};

struct ChunkMemory {
  float* weights;  // [2, kDecodedColumns, kHalfRows]
  uint8_t* split;  // of the columns of a block
  float* scale;    // [tiles, 32]
  float* sums;     // [tiles, tokens, 32]
  float* row;      // [tiles, 32]
};

void multiply_block(const Problem& problem, int64_t b, const TileChunk& chunk, const ChunkOutliers& outliers,
                    const ChunkMemory& memory) {
  const LayoutView& view = problem.view;
  const Block& block = problem.blocks[b];
  uint8_t* split = memory.split;
  for (const Piece& piece : block.pieces) {
    const int64_t entries = entries_per_lookup(piece.width()) / columns_per_lookup(piece.width());
    problem.kernels.split_codebook(piece.width(),
                                   view.codebook(*piece.panel, chunk.segment) + piece.panel_slot * entries, piece.slots,
                                   split);
    split += piece.slots * split_bytes(piece.width());
  }
  for (int64_t tile = 0; tile < chunk.tiles; ++tile) {
    split = memory.split;
    for (const Piece& piece : block.pieces) {
      problem.kernels.decode(piece.width(), view.header().order, view.codes(*piece.panel, chunk.tile_begin + tile),
                             piece.panel_slot, split, piece.slots,
                             view.row_scale() ? memory.scale + tile * kTileRows : nullptr,
                             memory.weights + piece.block_slot * kHalfRows);
      split += piece.slots * split_bytes(piece.width());
    }
    outliers.replace(b, tile, memory.weights);
    problem.kernels.multiply(memory.weights, problem.packed + block.first_slot * problem.tokens, block.slots,
                             problem.tokens, memory.sums + tile * problem.tokens * kTileRows);
  }
}

void store_token(const Problem& problem, int64_t token, const TileChunk& chunk, const ChunkMemory& memory) {
  for (int64_t tile = 0; tile < chunk.tiles; ++tile) {
    const float* sums = memory.sums + (tile * problem.tokens + token) * kTileRows;
    std::copy(sums, sums + kTileRows, memory.row + tile * kTileRows);
  }
  if (problem.bias != nullptr)
    for (int64_t r = 0; r < chunk.rows; ++r) memory.row[r] += problem.bias[chunk.row_begin + r];
  const int64_t first = token * problem.view.header().rows + chunk.row_begin;
  problem.conversions.from_fp32[static_cast<int>(problem.dtype)](
      memory.row, problem.y + first * element_bytes(problem.dtype), chunk.rows);
}

void run_chunk(const Problem& problem, const TileChunk& chunk) {
  const int64_t sums = chunk.tiles * problem.tokens * kTileRows;

  thread_local Workspace workspace;
  thread_local ChunkOutliers outliers;
  constexpr int64_t split = kDecodedColumns * split_bytes(8);
  workspace.reserve(Workspace::need<float>(kDecodedWeights) + Workspace::need<uint8_t>(split) +
                    2 * Workspace::need<float>(chunk.tiles * kTileRows) + Workspace::need<float>(sums));
  ChunkMemory memory;
  memory.weights = workspace.take<float>(kDecodedWeights);
  memory.split = workspace.take<uint8_t>(split);
  memory.scale = workspace.take<float>(chunk.tiles * kTileRows);
  memory.row = workspace.take<float>(chunk.tiles * kTileRows);
  memory.sums = workspace.take<float>(sums);

  std::fill(memory.sums, memory.sums + sums, 0.0f);
  if (const float* scale = problem.view.row_scale()) {
    std::copy(scale + chunk.row_begin, scale + chunk.row_begin + chunk.rows, memory.scale);
    std::fill(memory.scale + chunk.rows, memory.scale + chunk.tiles * kTileRows, 1.0f);
  }
  outliers.clear();
  outliers.gather(problem, chunk);
  for (size_t b = 0; b < problem.blocks.size(); ++b)
    multiply_block(problem, static_cast<int64_t>(b), chunk, outliers, memory);
  for (int64_t t = 0; t < problem.tokens; ++t) store_token(problem, t, chunk, memory);
}

void run_tokens(const Problem& problem, const std::vector<TileChunk>& chunks) {
  const LayoutHeader& header = problem.view.header();
  const double tokens = static_cast<double>(problem.tokens);
  const double slots = static_cast<double>(header.slots), rows = static_cast<double>(header.tiles * kTileRows);
  parallel_for(static_cast<int64_t>(problem.blocks.size()), 1, kNsPerPackedElement * tokens * slots,
               [&](int64_t begin, int64_t end) {
                 for (int64_t b = begin; b < end; ++b) pack_block(problem, problem.blocks[b]);
               });
  parallel_for(static_cast<int64_t>(chunks.size()), 1,
               rows * slots * (kNsPerDecodedWeight + kNsPerMultiply * tokens), [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) run_chunk(problem, chunks[i]);
               });
}

}  // namespace

void codebook_linear_decode(const LayoutView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias,
                            DType bias_dtype, void* y, Precision) {
  const LayoutHeader& header = view.header();
  Problem problem{view,
                  decode_kernels(header.order),
                  row_kernels(),
                  x_dtype,
                  make_blocks(view),
                  header.outliers > 0 ? slots_by_column(view) : std::vector<uint32_t>(),
                  nullptr,
                  0,
                  nullptr,
                  nullptr,
                  nullptr};
  const int64_t most_tiles = std::clamp<int64_t>(header.tiles / (4 * num_threads()), 1, kChunkTiles);
  const std::vector<TileChunk> chunks = tile_chunks(view, most_tiles);
  const int64_t most = std::clamp<int64_t>(kPackedBytes / (4 * header.slots), kFewestTokens, kMostTokens);
  const int64_t passes = (tokens + most - 1) / most, block = (tokens + passes - 1) / passes;
  const int64_t converted = x_dtype == DType::fp32 ? 0 : block * header.columns;

  thread_local Workspace workspace;
  workspace.reserve(Workspace::need<float>(block * header.slots) + Workspace::need<float>(header.rows) +
                    Workspace::need<float>(converted));
  problem.packed = workspace.take<float>(block * header.slots);
  auto* bias_fp32 = workspace.take<float>(header.rows);
  auto* x_fp32 = workspace.take<float>(converted);
  if (bias != nullptr) problem.bias = rows_in_fp32(problem.conversions, bias, bias_dtype, 0, 1, header.rows, bias_fp32);

  for (int64_t begin = 0; begin < tokens; begin += block) {
    problem.tokens = std::min(block, tokens - begin);
    problem.x = rows_in_fp32(problem.conversions, x, x_dtype, begin, problem.tokens, header.columns, x_fp32);
    problem.y = static_cast<uint8_t*>(y) + begin * header.rows * element_bytes(x_dtype);
    run_tokens(problem, chunks);
  }
}

}  // namespace pyllmq::cpu

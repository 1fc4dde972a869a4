#include "codebook/cpu/decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <vector>

#include "codebook/cpu/linear.h"
#include "codebook/cpu/decode_int16.h"
#include "runtime/counting.h"
#include "runtime/isa.h"
#include "runtime/thread_pool.h"
#include "runtime/workspace.h"

namespace pyllmq::cpu {
namespace {

// Codebooks are split once per chunk: with chunks of 8 tiles decoding takes 29 ps per weight in place of 22 (AMX).
constexpr int64_t kChunkTiles = kStripTiles;
// Tokens of a pass: so many that what they need (packed x, x for outliers, sums) stays below a part of weight and y, or this
// much. A prompt of 256 tokens of a 1.1 B model (AVX2): passes of 64 in place of 32 take 8 % off, of 128 12 %.
constexpr int64_t kBytesPerExtra = 28, kSmallExtra = 640 << 10, kFewestTokens = 32, kMostTokens = 256;
// Single-thread estimates for the thread pool.
constexpr double kNsPerPackedElement = 0.5;
constexpr double kNsPerMultiply = 0.02;
constexpr double kNsPerDecodedWeight = 0.1;

// Weights of so few rows or columns are multiplied in fp32: rounding errors need company to average out.
constexpr int64_t kFewestRows = 32, kFewestColumns = 64;

bool weights_fit(const LayoutView& view, const DecodeKernels& kernels) {
  return !kernels.relative || (view.header().rows >= kFewestRows && view.header().columns >= kFewestColumns);
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
  std::array<uint8_t, kDecodedColumns> order;  // of layouts in fours, by place of a quad: the slot, counted within its 64
};

struct Outlier {
  float value;
  int32_t slot, row;  // within the block, within the tile
};

struct Problem {
  const LayoutView& view;
  const DecodeKernels* kernels;
  const RowKernels& conversions;
  DType dtype;
  std::vector<Block> blocks;
  std::vector<uint32_t> slot_of;  // by column; empty without outliers
  std::vector<TileChunk> chunks;
  const float* bias = nullptr;  // [rows] or null

  int64_t tokens = 0;
  const void* x = nullptr;        // [tokens, columns] of dtype
  const float* x_fp32 = nullptr;  // the same where outliers are added to the sums
  uint8_t* packed = nullptr;      // [block], each as `pack` writes it
  float* outlier_x = nullptr;     // [group of kTokensSideBySide, column, token]
  uint8_t* y = nullptr;           // [tokens, rows]

  TokenGroups groups() const { return {tokens, kernels->token_group}; }
  uint8_t* packed_block(int64_t b) const { return packed + b * kernels->packed_bytes(tokens); }
  bool adds_outliers() const { return !slot_of.empty() && kernels->relative; }
  bool scales_weights() const { return view.row_scale() != nullptr && !kernels->relative; }
};

std::vector<Block> make_blocks(const LayoutView& view) {
  std::vector<Block> blocks;
  for (int64_t p = 0; p < view.header().panels; ++p) {
    const PanelRecord& panel = view.panel(p);
    for (int64_t done = 0; done < panel.slots;) {
      const int64_t slot = panel.first_slot + done;
      if (slot % kDecodedColumns == 0) blocks.push_back({slot, 0, {}, {}});
      Block& block = blocks.back();
      const int64_t slots = std::min(panel.slots - done, kDecodedColumns - block.slots);
      block.pieces.push_back({&panel, done, block.slots, slots});
      for (int64_t i = 0; i < slots && view.header().order == StepOrder::fours; ++i)
        block.order[block.slots + quad_place(static_cast<int>(panel.width), i)] = static_cast<uint8_t>((block.slots + i) % 64);
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
    for (int64_t i = 0; i < panel.columns; ++i) slot_of[view.columns(panel)[i]] = static_cast<uint32_t>(panel.first_slot + i);
  }
  return slot_of;
}

// --- phase 1: x in the order in which the multiply reads it ---------------------------------------------------------

float element_in_fp32(const void* x, DType dtype, int64_t i) {
  if (dtype == DType::fp32) return static_cast<const float*>(x)[i];
  const uint16_t bits = static_cast<const uint16_t*>(x)[i];
  return dtype == DType::bf16 ? bf16_to_fp32(bits) : fp16_to_fp32(bits);
}

// x [count, 256] of the tokens from `begin` on: the columns of a block in the order of its slots, the rest zero.
void pick_block(const Problem& problem, const Block& block, int64_t segment, int64_t begin, int64_t count, float* picked) {
  const LayoutView& view = problem.view;
  const int64_t bytes = element_bytes(problem.dtype);
  const auto to_fp32 = problem.conversions.to_fp32[static_cast<int>(problem.dtype)];
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* x = static_cast<const uint8_t*>(problem.x) + (begin + t) * view.header().columns * bytes;
    float* row = picked + t * kDecodedColumns;
    for (const Piece& piece : block.pieces) {
      float* to = row + piece.block_slot;
      const int64_t columns = piece.columns();
      if (piece.panel->first_column >= 0) {
        to_fp32(x + (piece.panel->first_column + piece.panel_slot) * bytes, to, columns);
      } else {
        const uint32_t* from = view.columns(*piece.panel) + piece.panel_slot;
        for (int64_t i = 0; i < columns; ++i) to[i] = element_in_fp32(x, problem.dtype, from[i]);
      }
      if (problem.kernels->relative) {
        const float* magnitude = view.max_magnitude(*piece.panel, segment) + piece.panel_slot;
        for (int64_t i = 0; i < columns; ++i) to[i] *= magnitude[i];
      }
      std::fill(to + columns, to + piece.slots, 0.0f);
    }
    std::fill(row + block.slots, row + kDecodedColumns, 0.0f);
  }
}

bool pack_tokens(const Problem& problem, int64_t segment) {
  const TokenGroups groups = problem.groups();
  const int64_t blocks = static_cast<int64_t>(problem.blocks.size());
  const double elements = static_cast<double>(problem.tokens * problem.view.header().slots);
  std::atomic<bool> fits{true};
  parallel_for(blocks * groups.count(), 1, kNsPerPackedElement * elements, [&](int64_t begin, int64_t end) {
    alignas(64) float picked[kMostTokenGroup * kDecodedColumns];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / groups.count(), g = i % groups.count();
      const Block& block = problem.blocks[b];
      pick_block(problem, block, segment, groups.begin(g), groups.size(g), picked);
      const int64_t slots = rounded_up(block.slots, problem.kernels->slot_unit);
      if (!problem.kernels->pack(picked, slots, block.order.data(), groups, g, problem.packed_block(b))) fits = false;
    }
  });
  return fits;
}

// --- phase 2: decode and multiply -----------------------------------------------------------------------------------

// The outliers of a chunk that replace decoded weights, sorted by (block, tile).
class ChunkOutliers {
 public:
  void gather(const Problem& problem, const TileChunk& chunk) {
    const int64_t row_begin = chunk.row_begin, row_end = chunk.row_begin + chunk.rows, tiles = chunk.tiles;
    tiles_ = tiles;
    ends_.clear();
    if (problem.slot_of.empty() || problem.adds_outliers()) return;
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
        outliers_[ends_[bucket_of(row, slot)]++] = {fp16_to_fp32(view.outlier_values()[i]),
                                                    static_cast<int32_t>(slot % kDecodedColumns),
                                                    static_cast<int32_t>((row - row_begin) % kTileRows)};
      }
  }

  void put(int64_t block, int64_t tile, float* weights) const {
    if (ends_.empty()) return;
    const int64_t bucket = block * tiles_ + tile;
    for (int64_t i = bucket == 0 ? 0 : ends_[bucket - 1]; i < ends_[bucket]; ++i) {
      const auto& [value, slot, row] = outliers_[i];
      weights[(row / kHalfRows * kDecodedColumns + slot) * kHalfRows + row % kHalfRows] = value;
    }
  }

 private:
  int64_t tiles_ = 0;
  std::vector<int64_t> ends_;
  std::vector<Outlier> outliers_;
};

struct ChunkMemory {
  uint8_t* weights;  // [planes, 2, kDecodedColumns, kHalfRows]
  uint8_t* split;    // of the columns of a block
  float* scale;      // [tiles, 32]
  float* sums;       // [tiles, tokens + 1, 32]
  float* row;        // [tiles, 32]
};

// Slots of the last block that are multiplied but hold no columns.
void clear_weights(const DecodeKernels& kernels, int64_t begin, int64_t end, uint8_t* weights) {
  const int64_t slot_bytes = kHalfRows * kernels.weight_bytes;
  for (int64_t half = 0; begin < end && half < 2 * kernels.planes; ++half)
    std::memset(weights + (half * kDecodedColumns + begin) * slot_bytes, 0, (end - begin) * slot_bytes);
}

void multiply_block(const Problem& problem, int64_t b, const TileChunk& chunk, const ChunkOutliers& outliers,
                    const ChunkMemory& memory) {
  const LayoutView& view = problem.view;
  const DecodeKernels& kernels = *problem.kernels;
  const Block& block = problem.blocks[b];
  const int64_t slots = rounded_up(block.slots, kernels.slot_unit);
  uint8_t* split = memory.split;
  for (const Piece& piece : block.pieces) {
    const int64_t entries = entries_per_lookup(piece.width()) / columns_per_lookup(piece.width());
    kernels.split_codebook(piece.width(), view.codebook(*piece.panel, chunk.segment) + piece.panel_slot * entries,
                           view.max_magnitude(*piece.panel, chunk.segment) + piece.panel_slot, piece.slots, split);
    split += piece.slots * split_bytes(piece.width());
  }
  clear_weights(kernels, block.slots, slots, memory.weights);
  for (int64_t tile = 0; tile < chunk.tiles; ++tile) {
    split = memory.split;
    for (const Piece& piece : block.pieces) {
      kernels.decode(piece.width(), view.header().order, view.codes(*piece.panel, chunk.tile_begin + tile), piece.panel_slot,
                     split, piece.slots, problem.scales_weights() ? memory.scale + tile * kTileRows : nullptr,
                     memory.weights + piece.block_slot * kHalfRows * kernels.weight_bytes);
      split += piece.slots * split_bytes(piece.width());
    }
    outliers.put(b, tile, reinterpret_cast<float*>(memory.weights));
    kernels.multiply(memory.weights, problem.packed_block(b), slots, problem.tokens,
                     memory.sums + tile * (problem.tokens + 1) * kTileRows);
  }
}

void scale_sums(const Problem& problem, const TileChunk& chunk, const ChunkMemory& memory) {
  for (int64_t tile = 0; tile < chunk.tiles; ++tile)
    for (int64_t t = 0; t < problem.tokens; ++t) {
      float* sums = memory.sums + (tile * (problem.tokens + 1) + t) * kTileRows;
      for (int64_t r = 0; r < kTileRows; ++r) sums[r] *= memory.scale[tile * kTileRows + r];
    }
}

void add_outliers(const Problem& problem, const TileChunk& chunk, const ChunkMemory& memory) {
  const LayoutView& view = problem.view;
  for (int64_t begin = 0; begin < problem.tokens; begin += kTokensSideBySide)
    for (int64_t tile = 0; tile < chunk.tiles; ++tile) {
      const int64_t row = tile * kTileRows;
      problem.kernels->add_outliers(
          {std::min<int64_t>(kTileRows, chunk.rows - row), view.outlier_row_offsets() + chunk.row_begin + row,
           view.outlier_columns(), view.outlier_deltas()},
          problem.outlier_x + begin * view.header().columns, std::min(kTokensSideBySide, problem.tokens - begin),
          memory.sums + (tile * (problem.tokens + 1) + begin) * kTileRows);
    }
}

void store_token(const Problem& problem, int64_t token, const TileChunk& chunk, const ChunkMemory& memory) {
  for (int64_t tile = 0; tile < chunk.tiles; ++tile) {
    const float* sums = memory.sums + (tile * (problem.tokens + 1) + token) * kTileRows;
    std::copy(sums, sums + kTileRows, memory.row + tile * kTileRows);
  }
  if (problem.bias != nullptr)
    for (int64_t r = 0; r < chunk.rows; ++r) memory.row[r] += problem.bias[chunk.row_begin + r];
  const int64_t first = token * problem.view.header().rows + chunk.row_begin;
  problem.conversions.from_fp32[static_cast<int>(problem.dtype)](memory.row, problem.y + first * element_bytes(problem.dtype),
                                                                 chunk.rows);
}

void run_chunk(const Problem& problem, const TileChunk& chunk) {
  const DecodeKernels& kernels = *problem.kernels;
  const int64_t sums = chunk.tiles * (problem.tokens + 1) * kTileRows;
  const int64_t weights = kernels.planes * kDecodedWeights * kernels.weight_bytes;
  int64_t split = 0;
  for (const Block& block : problem.blocks) {
    int64_t bytes = 0;
    for (const Piece& piece : block.pieces) bytes += piece.slots * split_bytes(piece.width());
    split = std::max(split, bytes);
  }

  thread_local Workspace workspace;
  thread_local ChunkOutliers outliers;
  workspace.reserve(Workspace::need<uint8_t>(weights) + Workspace::need<uint8_t>(split) +
                    2 * Workspace::need<float>(chunk.tiles * kTileRows) + Workspace::need<float>(sums));
  ChunkMemory memory;
  memory.weights = workspace.take<uint8_t>(weights);
  memory.split = workspace.take<uint8_t>(split);
  memory.scale = workspace.take<float>(chunk.tiles * kTileRows);
  memory.row = workspace.take<float>(chunk.tiles * kTileRows);
  memory.sums = workspace.take<float>(sums);

  std::fill(memory.sums, memory.sums + sums, 0.0f);
  if (const float* scale = problem.view.row_scale()) {
    std::copy(scale + chunk.row_begin, scale + chunk.row_begin + chunk.rows, memory.scale);
    std::fill(memory.scale + chunk.rows, memory.scale + chunk.tiles * kTileRows, 1.0f);
  }
  outliers.gather(problem, chunk);
  if (kernels.begin_chunk != nullptr) kernels.begin_chunk(problem.tokens);
  for (size_t b = 0; b < problem.blocks.size(); ++b) multiply_block(problem, static_cast<int64_t>(b), chunk, outliers, memory);
  if (kernels.end_chunk != nullptr) kernels.end_chunk();
  if (problem.view.row_scale() != nullptr && kernels.relative) scale_sums(problem, chunk, memory);
  if (problem.adds_outliers()) add_outliers(problem, chunk, memory);
  for (int64_t t = 0; t < problem.tokens; ++t) store_token(problem, t, chunk, memory);
}

void run_chunks(const Problem& problem, size_t first, size_t end) {
  double rows = 0;
  for (size_t i = first; i < end; ++i) rows += static_cast<double>(problem.chunks[i].tiles * kTileRows);
  const double slots = static_cast<double>(problem.view.header().slots), tokens = static_cast<double>(problem.tokens);
  parallel_for(static_cast<int64_t>(end - first), 1, rows * slots * (kNsPerDecodedWeight + kNsPerMultiply * tokens),
               [&](int64_t begin, int64_t stop) {
                 for (int64_t i = begin; i < stop; ++i) run_chunk(problem, problem.chunks[first + i]);
               });
}

int64_t tokens_of_pass(const Problem& problem, int64_t tokens) {
  const LayoutHeader& header = problem.view.header();
  const int64_t fp32_copies = problem.adds_outliers() * (1 + (problem.dtype != DType::fp32));
  const int64_t packed = static_cast<int64_t>(problem.blocks.size()) * problem.kernels->packed_bytes(kMostTokens);
  const int64_t sums = num_threads() * std::min(kChunkTiles, header.tiles) * kTileRows * int64_t{sizeof(float)};
  const int64_t per_token = packed / kMostTokens + fp32_copies * header.columns * int64_t{sizeof(float)} + sums;
  const int64_t allowed = (header.bytes + tokens * header.rows * element_bytes(problem.dtype)) / kBytesPerExtra;
  return std::clamp(std::max(allowed, kSmallExtra) / per_token, kFewestTokens, kMostTokens);
}

// False: x or the weight is outside of what the kernels' arithmetic can hold, and y is not complete.
bool run_tokens(const Problem& problem) {
  if (problem.adds_outliers()) put_side_by_side(problem.x_fp32, problem.tokens, problem.view.header().columns, problem.outlier_x);
  if (!problem.kernels->relative) {
    if (!pack_tokens(problem, 0)) return false;
    run_chunks(problem, 0, problem.chunks.size());
    return true;
  }
  for (size_t first = 0, end; first < problem.chunks.size(); first = end) {
    const int64_t segment = problem.chunks[first].segment;
    for (end = first; end < problem.chunks.size() && problem.chunks[end].segment == segment;) ++end;
    if (!pack_tokens(problem, segment)) return false;
    run_chunks(problem, first, end);
  }
  return true;
}

}  // namespace

const DecodeKernels& decode_kernels(StepOrder order, Precision precision) {
#if defined(__x86_64__)
  const bool fp32 = precision == Precision::exact;
  const Isa isa = active_isa();
  if (isa == Isa::amx && order == StepOrder::fours && !fp32) return kDecodeAmx;
  if (isa >= Isa::avx512 && order == StepOrder::fours)
    return fp32 ? kDecodeAvx512 : precision == Precision::fast ? kDecodeInt8Avx512 : kDecodeInt16Avx512;
  if (isa >= Isa::avx2 && order == StepOrder::rows) {
    if (fp32) return kDecodeAvx2;
    if (isa == Isa::avx2) return precision == Precision::fast ? kDecodeInt8Avx2 : kDecodeInt16Avx2;
    return precision == Precision::fast ? kDecodeInt8AvxVnni : kDecodeInt16AvxVnni;
  }
#elif defined(__aarch64__)
  const Isa isa = active_isa();
  if (isa >= Isa::neon && order == StepOrder::rows) {
    if (precision != Precision::fast || isa == Isa::neon) return kDecodeNeon;
    return isa == Isa::neon_i8mm ? kDecodeInt8I8mm : kDecodeInt8Dotprod;
  }
#endif
  return kDecodeScalar;  // int16 was slower than fp32 there at every width
}

bool pack_fp32(const float* x, int64_t slots, const uint8_t*, const TokenGroups& groups, int64_t group, uint8_t* packed) {
  const int64_t count = groups.size(group);
  float* to = reinterpret_cast<float*>(packed) + groups.begin(group) * slots;
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int64_t t = 0; t < count; ++t) to[slot * count + t] = x[t * kDecodedColumns + slot];
  return true;
}

void put_side_by_side(const float* x, int64_t tokens, int64_t columns, float* to) {
  constexpr int64_t side = kTokensSideBySide;
  const double elements = static_cast<double>(tokens * columns);
  parallel_for(ceil_div(tokens, side), 1, kNsPerPackedElement * elements, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t count = std::min(side, tokens - g * side);
      const float* from = x + g * side * columns;
      float* group = to + g * side * columns;
      // Line by line: tokens may lie 4 KiB apart, and 16 lines with one place in the L1 cache would push each other out.
      if (count < side) std::fill_n(group, columns * side, 0.0f);
      for (int64_t line = 0; line < columns; line += side)
        for (int64_t t = 0; t < count; ++t)
          for (int64_t c = line; c < std::min(columns, line + side); ++c) group[c * side + t] = from[t * columns + c];
    }
  });
}

void codebook_linear_decode(const LayoutView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias,
                            DType bias_dtype, void* y, Precision precision) {
  const LayoutHeader& header = view.header();
  const DecodeKernels& exact = decode_kernels(header.order, Precision::exact);
  const DecodeKernels& fastest = decode_kernels(header.order, precision);
  const DecodeKernels& permitted = weights_fit(view, fastest) ? fastest : exact;
  Problem problem{
      .view = view,
      .kernels = &permitted,
      .conversions = row_kernels(),
      .dtype = x_dtype,
      .blocks = make_blocks(view),
      .slot_of = header.outliers > 0 ? slots_by_column(view) : std::vector<uint32_t>(),
      .chunks = tile_chunks(view, kChunkTiles, 1, num_threads()),
  };
  const int64_t most = tokens_of_pass(problem, tokens);
  const int64_t passes = ceil_div(tokens, most), block = ceil_div(tokens, passes);
  const int64_t converted = x_dtype == DType::fp32 || !problem.adds_outliers() ? 0 : block * header.columns;
  const int64_t outlier_x = problem.adds_outliers() ? rounded_up(block, kTokensSideBySide) * header.columns : 0;
  const int64_t packed =
      static_cast<int64_t>(problem.blocks.size()) * std::max(permitted.packed_bytes(block), exact.packed_bytes(block));

  thread_local Workspace workspace;
  workspace.reserve(Workspace::need<uint8_t>(packed) + Workspace::need<float>(header.rows) + Workspace::need<float>(converted) +
                    Workspace::need<float>(outlier_x));
  problem.packed = workspace.take<uint8_t>(packed);
  auto* bias_fp32 = workspace.take<float>(header.rows);
  auto* x_fp32 = workspace.take<float>(converted);
  problem.outlier_x = workspace.take<float>(outlier_x);
  if (bias != nullptr) problem.bias = rows_in_fp32(problem.conversions, bias, bias_dtype, 0, 1, header.rows, bias_fp32);

  for (int64_t begin = 0; begin < tokens; begin += block) {
    problem.tokens = std::min(block, tokens - begin);
    problem.x = static_cast<const uint8_t*>(x) + begin * header.columns * element_bytes(x_dtype);
    if (problem.adds_outliers())
      problem.x_fp32 = rows_in_fp32(problem.conversions, x, x_dtype, begin, problem.tokens, header.columns, x_fp32);
    problem.y = static_cast<uint8_t*>(y) + begin * header.rows * element_bytes(x_dtype);
    problem.kernels = &permitted;
    if (run_tokens(problem)) continue;
    problem.kernels = &exact;
    run_tokens(problem);
  }
}

}  // namespace pyllmq::cpu

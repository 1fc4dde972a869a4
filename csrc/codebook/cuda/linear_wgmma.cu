// codebook_linear for many tokens on compute capability 9.0: some warps decode the weight into shared memory, two warp groups
// multiply it there by wgmma.
//
// A first kernel brings x into the order of the layout's slots, as fp16, in pieces of 64 columns that a single copy takes into
// shared memory as wgmma wants them; meanwhile the second begins. There a block takes 128 or 256 rows, up to 256 tokens and a
// range of steps of K, 64 columns each, and passes the steps through a ring of stages:
//
//   decoders   4 or 8 warps: each decodes a group of 16 columns, from a ring of its own; outliers take the place of what was
//              decoded; one of them asks for x
//   consumers  8 warps: the sums of 64 rows are in the registers of four; a step begins before the one before has ended
//
// Nothing is transposed: wgmma takes W with the 64 rows of a column one after the other, and which row stands where is the
// layout's choice (layout.h), so the 8 rows of a column that a lane decodes are 16 bytes of shared memory. A weight is decoded
// once for all tokens of a block. Blocks that share outputs add their sums as in linear.cu.
//
// bf16 tokens become fp16 as in linear.cu, by a power of two for each token, which is exact.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "codebook/cuda/decode.cuh"
#include "codebook/cuda/operand.h"
#include "codebook/cuda/token_scale.cuh"
#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kStepGroups = 4;  // of 16 columns
constexpr int kStepColumns = kStepGroups * kGroupColumns;
constexpr int kGroupBytes = kTileRows * kGroupColumns * 2;  // of a group's decoded tile
constexpr int kTileBytes = kStepGroups * kGroupBytes;       // of a step's
constexpr int kConsumers = 2;                               // warp groups
constexpr int kOrderThreads = 256;                          // that bring a token's x into order
constexpr int kMostSharedBytes = 227 << 10;
constexpr int kMatrixAlignment = 1024;
constexpr int kCodeStages = 4;  // of a warp's ring
constexpr int kMostStages = 4;
constexpr int kTableRoom = kGroupColumns * 2 << 4;  // of a ring's stage

struct Arguments {
  LinearCall call;
  int block_tokens, token_blocks, splits;
  float* unscale;  // [token blocks, tokens of a block]
  uint16_t* x;     // fp16 [token blocks, steps][tokens of a block, columns of a step], swizzled
};

// What a block is made of, for so many tokens.
template <int kTokens>
struct Shape {
  static constexpr int kTiles = kTokens == 256 ? 2 : 4;     // of 64 rows
  static constexpr int kDecoders = kTokens >= 128 ? 1 : 2;  // of four warps; beside 128 sums a thread there is room for one
  static constexpr int kDecodeWarps = 4 * kDecoders;
  static constexpr int kThreads = 32 * (kDecodeWarps + 4 * kConsumers);
  static constexpr int kRows = kTiles * kTileRows;

  static constexpr int kCodeStageBytes = kTableRoom + kRows * kGroupColumns / 2;  // of 4 bits
  static constexpr int kRingBytes = std::max(kCodeStages * kCodeStageBytes, kGroupColumns * 2 << 8);
  static constexpr int kXBytes = kTokens * kStepColumns * 2;
  static constexpr int kStageBytes = kTiles * kTileBytes + kXBytes;
  static constexpr int kBesides = 2048 + kMatrixAlignment + kDecodeWarps * kRingBytes;
  static constexpr int kStages = std::min((kMostSharedBytes - kBesides) / kStageBytes, kMostStages);
  static constexpr int kSharedBytes = kBesides + kStages * kStageBytes;
  static constexpr int kSumStride = kRows + 1;  // two lanes of a warp meet in a bank
  static_assert(kStages >= 2 && kSumStride * kTokens * 4 <= kStages * kStageBytes);
};

template <int kTokens>
constexpr int kConsumerTiles = Shape<kTokens>::kTiles / kConsumers;

// What one block computes.
struct Work {
  RowBlock block;
  int first_row, rows;  // within the row block; no rows: nothing to do
  int first_step, end_step, split, token_block;
};

// Shared memory: this, the decoders' rings, the stages (after the loop: the sums).
struct Shared {
  Work work;
  uint32_t arrived;
  ptx::Barrier full[kMostStages], empty[kMostStages];
  LayoutHeader header;
};
static_assert(sizeof(Shared) <= 2048);

PYLLMQ_DEVICE int steps_of(const LayoutHeader& h) { return static_cast<int>((h.slots + kStepColumns - 1) / kStepColumns); }

[[maybe_unused]] PYLLMQ_DEVICE int fewer(int a, int b) { return a < b ? a : b; }

// ---- x -------------------------------------------------------------------------------------------------------------------

// A block takes a token, which may be one of those that fill up the last block of tokens: 0, as where no column is.
PYLLMQ_KERNEL void __launch_bounds__(kOrderThreads, 8) codebook_linear_wgmma_x_kernel(const Arguments a) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto* of_warps = reinterpret_cast<float*>(memory);
  ptx::let_next_begin();
  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.call.layout);
  if (!describes(h, a.call.layout_bytes, a.call.rows, a.call.columns)) return;
  const int thread = ptx::thread();
  const int64_t token = ptx::block();
  const bool is_token = token < a.call.tokens;
  const auto dtype = static_cast<DType>(a.call.dtype);
  const auto x_of = [&](int64_t column) { return load_element(a.call.x, dtype, token * h.columns + column); };

  const int exponent = is_token ? token_exponent<kOrderThreads>(a.call, token, of_warps) : 0;
  const float scale = power_of_two(exponent);
  if (thread == 0) a.unscale[token] = power_of_two(-exponent);

  constexpr int kChunk = 8, kChunks = kStepColumns / kChunk;  // 16 bytes, of a row of a piece
  const int steps = steps_of(h), n = static_cast<int>(token % a.block_tokens);
  const int32_t* column_of = section<int32_t>(h, h.columns_offset);
  const int64_t piece = int64_t{a.block_tokens} * kStepColumns;
  uint16_t* pieces = a.x + token / a.block_tokens * steps * piece + n * kStepColumns;
  for (int at = thread; at < steps * kChunks; at += kOrderThreads) {
    const int chunk = at % kChunks, k = chunk * kChunk % kGroupColumns;
    const int64_t step = at / kChunks, first_slot = step * kStepColumns + chunk * kChunk - k;
    Words<4> words{};
    unrolled<kChunk>([&](int i) {
      const int64_t slot = first_slot + column_of_tile(k + i);
      if (!is_token || slot >= h.slots || column_of[slot] < 0) return;
      words.word[i / 2] |= static_cast<uint32_t>(ptx::fp32_to_fp16(x_of(column_of[slot]) * scale)) << (i % 2 * 16);
    });
    *reinterpret_cast<Words<4>*>(pieces + step * piece + (chunk ^ n % 8) * kChunk) = words;
  }
}

// ---- W -------------------------------------------------------------------------------------------------------------------

// 8 rows of one column of a group: 16 bytes of shared memory.
struct Chunk {
  int k, g;  // tile_column of the column; rows 16i + 2g + h
};

// The four chunks of a tile that a lane decodes. The fewer columns they are of, the fewer codebooks it reads; the words of its
// codes lie beside those of other lanes, and eight lanes store to different banks.
template <int kWidth>
PYLLMQ_DEVICE Chunk chunk_of(int lane, int i) {
  const int t = lane % 4, g = lane / 4, pair = t * 2 + i % 2;
  if constexpr (kWidth == 4) return {tile_column(lane / 2), 2 * i + lane % 2};  // a word each
  if constexpr (kWidth == 3) return {g % 2 * 8 + pair, g ^ i / 2};  // two columns, with the lane beside that has others
  if constexpr (kWidth == 2) return {g / 2 % 2 * 8 + pair, i / 2 * 4 + g / 4 * 2 + g % 2};  // two words of two columns
  return {i / 2 * 8 + pair, g};                                                             // all that the lane has in the layout
}

// The codes of its chunks.
template <int kWidth>
PYLLMQ_DEVICE void chunk_codes(const uint8_t* tile, int lane, uint32_t (&codes)[4]) {
  const auto* words = reinterpret_cast<const uint32_t*>(tile);
  const int t = lane % 4, g = lane / 4;
  if constexpr (kWidth == 4) {
    const auto* from = words + lane % 2 * 16 + lane / 2 % 4 * 4 + lane / 8;
    unrolled<4>([&](int i) { codes[i] = from[32 * i]; });
  } else if constexpr (kWidth == 3) {
    uint32_t own[2][2];  // by half of the group
    unrolled<2>([&](int half) { column_codes<3>(tile, lane, half, own[half]); });
    const bool last = g % 2 != 0;
    unrolled<2>([&](int i) {
      codes[i] = last ? own[1][i] : own[0][i];
      codes[2 + i] = ptx::shuffle(last ? own[0][i] : own[1][i], lane ^ 4);
    });
  } else if constexpr (kWidth == 2) {
    const auto* from = words + (g / 4 * 2 + g % 2) * 8 + t * 2 + g / 2 % 2;
    unrolled<2>([&](int i) {
      codes[2 * i] = from[32 * i] & 0x33333333u;
      codes[2 * i + 1] = from[32 * i] >> 2 & 0x33333333u;
    });
  } else {
    unrolled<2>([&](int half) {
      uint32_t pair[2];
      column_codes<1>(tile, lane, half, pair);
      unrolled<2>([&](int i) { codes[2 * half + i] = pair[i]; });
    });
  }
}

// Stores kTiles decoded tiles of a group: decode(tile, put) gives put(number of the chunk, its rows in pairs).
template <int kWidth, int kTiles, class Decode>
PYLLMQ_DEVICE void store_group(uint8_t* group, const Decode& decode) {
  uint8_t* to[4];
  unrolled<4>([&](int i) {
    const Chunk chunk = chunk_of<kWidth>(ptx::thread() & 31, i);
    to[i] = group + chunk.k * 128 + (chunk.g ^ chunk.k % 8) * 16;
  });
#pragma unroll(kTiles / 2)
  for (int tile = 0; tile < kTiles; ++tile)
    decode(tile, [&](int i, const Words<4>& rows) { *reinterpret_cast<Words<4>*>(to[i] + tile * kTileBytes) = rows; });
}

// A group of up to 4 bits, from a stage of the ring.
template <int kWidth, int kTiles>
PYLLMQ_DEVICE void decode_group(const uint8_t* stage, uint8_t* group) {
  constexpr int kColumns = kWidth == 4 ? 1 : kWidth == 1 ? 4 : 2;  // of a lane
  const int lane = ptx::thread() & 31;
  RegisterTable<kWidth> table[kColumns];
  unrolled<kColumns>([&](int i) { table[i].load(stage, column_of_tile(chunk_of<kWidth>(lane, i).k)); });
  store_group<kWidth, kTiles>(group, [&](int tile, const auto& put) {
    uint32_t codes[4];
    chunk_codes<kWidth>(stage + kTableRoom + tile * tile_bytes(kWidth), lane, codes);
    unrolled<4>([&](int i) {
      Words<4> rows;
      table[i % kColumns].decode(codes[i], rows.word);
      put(i, rows);
    });
  });
}

// A group of 5 to 8 bits: codebooks into the ring, codes straight from global memory.
template <int kWidth, int kTiles>
PYLLMQ_DEVICE void decode_wide_group(const uint8_t* tables, const uint8_t* codes, int tiles, uint8_t* ring, uint8_t* group) {
  const int lane = ptx::thread() & 31;
  for (int at = lane * 16; at < table_bytes(kWidth); at += 512) ptx::copy_async_16(ring + at, tables + at);
  ptx::commit_async();
  ptx::wait_async<0>();
  ptx::sync_warp();
  const auto* entries = reinterpret_cast<const uint16_t*>(ring) + (lane % 4 << kWidth);
  store_group<kWidth, kTiles>(group, [&](int tile, const auto& put) {
    const uint8_t* at = codes + (tile < tiles ? tile : 0) * tile_bytes(kWidth);  // behind the last tile nothing may be read
    unrolled<2>([&](int half) {
      uint32_t low[2], high[2];
      column_codes<4>(at, lane, half, low);
      column_codes<kWidth - 4>(at + tile_bytes(4), lane, half, high);
      unrolled<2>([&](int i) {
        Words<4> rows;
        MemoryTable<kWidth>{entries + ((8 * half + 4 * i) << kWidth)}.decode(low[i], high[i], rows.word);
        put(2 * half + i, rows);
      });
    });
  });
}

// A warp's groups of a block's work, one of every kStride, through a ring for those of up to 4 bits.
template <int kTokens>
class Decoder {
  using S = Shape<kTokens>;
  static constexpr int kStride = S::kDecoders * kStepGroups;

 public:
  PYLLMQ_MEMBER Decoder(const uint8_t* layout, const Shared& shared, uint8_t* ring, int first_group)
      : layout_(layout),
        h_(shared.header),
        w_(shared.work),
        ring_(ring),
        tiles_((w_.rows + kTileRows - 1) / kTileRows),
        end_(fewer(w_.end_step * kStepGroups, static_cast<int>(h_.slots / kGroupColumns))),
        fetched_(first_group),
        group_(first_group) {
    for (int ahead = 0; ahead < kCodeStages - 1; ++ahead) fetch();
    find_patches(group_);
  }

  // Asks for a group that is needed later.
  PYLLMQ_MEMBER void fetch() {
    const int width = width_of(fetched_, fetched_width_);
    if (width >= 1 && width <= 4) {
      if (width != fetched_width_) {
        tables_ = tables_of(width, fetched_);
        codes_ = codes_of(width, fetched_);
        fetched_width_ = width;
      }
      uint8_t* const to = ring_ + filled_;
      const int table = static_cast<int>(table_bytes(width)), codes = tiles_ * static_cast<int>(tile_bytes(width));
      for (int at = (ptx::thread() & 31) * 16; at < table; at += 512) ptx::copy_async_16(to + at, tables_ + at);
      for (int at = (ptx::thread() & 31) * 16; at < codes; at += 512) ptx::copy_async_16(to + kTableRoom + at, codes_ + at);
      tables_ += kStride * table;
      codes_ += kStride * block_tiles(w_.block) * tile_bytes(width);
    }
    ptx::commit_async();
    fetched_ += kStride;
    filled_ = following(filled_);
  }

  // Decodes the next group to where its tiles stand in a stage.
  PYLLMQ_MEMBER void decode(uint8_t* to) {
    ptx::wait_async<kCodeStages - 1>();
    ptx::sync_warp();
    width_ = width_of(group_, width_);
    const uint8_t* const stage = ring_ + used_;
    switch (width_) {
      case 0: store_group<1, S::kTiles>(to, [](int, const auto& put) { unrolled<4>([&](int i) { put(i, {}); }); }); break;
      case 1: decode_group<1, S::kTiles>(stage, to); break;
      case 2: decode_group<2, S::kTiles>(stage, to); break;
      case 3: decode_group<3, S::kTiles>(stage, to); break;
      case 4: decode_group<4, S::kTiles>(stage, to); break;
      case 5: decode_wide<5>(to); break;
      case 6: decode_wide<6>(to); break;
      case 7: decode_wide<7>(to); break;
      default: decode_wide<8>(to); break;
    }
    ptx::sync_warp();  // all that was decoded is there, and nobody reads the ring's stage any more
    for (uint32_t i = patch_ + (ptx::thread() & 31); i < patch_end_; i += 32) {
      const Patch patch = section<Patch>(header(), h_.patches_offset)[i];
      const int tile = (patch.place >> 10) - w_.first_row / kTileRows;
      *reinterpret_cast<uint16_t*>(to + tile * kTileBytes + (patch.place & 1023) * 2) = patch.half;
    }
    used_ = following(used_);
    group_ += kStride;
    find_patches(group_);
  }

 private:
  static PYLLMQ_MEMBER int following(int stage) {
    return stage == (kCodeStages - 1) * S::kCodeStageBytes ? 0 : stage + S::kCodeStageBytes;
  }
  PYLLMQ_MEMBER const LayoutHeader& header() const { return *reinterpret_cast<const LayoutHeader*>(layout_); }

  // Of a group behind one of width `before`; 0 behind the last.
  PYLLMQ_MEMBER int width_of(int group, int before) const {
    if (group >= end_) return 0;
    int width = before < 1 ? 1 : before;
    while (width < 8 && group >= h_.first_slot[width + 1] / kGroupColumns) ++width;
    return width;
  }
  PYLLMQ_MEMBER const uint8_t* tables_of(int width, int group) const {
    return layout_ + tables_offset(h_, width, w_.block.segment, group - h_.first_slot[width] / kGroupColumns);
  }
  PYLLMQ_MEMBER const uint8_t* codes_of(int width, int group) const {
    return layout_ + codes_offset(h_, width, w_.block, group - h_.first_slot[width] / kGroupColumns) +
           w_.first_row / kTileRows * tile_bytes(width);
  }
  PYLLMQ_MEMBER void find_patches(int group) {
    patch_ = patch_end_ = 0;
    if (h_.outliers == 0 || group >= end_) return;
    const uint32_t* begin =
        section<uint32_t>(header(), h_.patch_begin_offset) + group * h_.tiles + w_.block.tile_begin + w_.first_row / kTileRows;
    patch_ = begin[0];
    patch_end_ = begin[tiles_];
  }
  template <int kWidth>
  PYLLMQ_MEMBER void decode_wide(uint8_t* to) const {
    decode_wide_group<kWidth, S::kTiles>(tables_of(kWidth, group_), codes_of(kWidth, group_), tiles_, ring_, to);
  }
  const uint8_t* const layout_;
  const LayoutHeader& h_;  // in shared memory
  const Work& w_;
  uint8_t* const ring_;
  const int tiles_, end_;
  int fetched_, group_, fetched_width_ = 0, width_ = 0;
  int filled_ = 0, used_ = 0;        // offsets of stages
  const uint8_t* tables_ = nullptr;  // of the next group to be fetched
  const uint8_t* codes_ = nullptr;
  uint32_t patch_, patch_end_;  // of the next group to be decoded
};

// ---- the block -----------------------------------------------------------------------------------------------------------

template <int kTokens>
PYLLMQ_DEVICE int items(const Arguments& a, const LayoutHeader& h) {
  return static_cast<int>(h.blocks) * (kBlockTiles / Shape<kTokens>::kTiles) * a.token_blocks * a.splits;
}

template <int kTokens>
PYLLMQ_DEVICE void take(const Arguments& a, const LayoutHeader& h, int item, Work& w) {
  using S = Shape<kTokens>;
  constexpr int kParts = kBlockTiles / S::kTiles;
  const int row_parts = static_cast<int>(h.blocks) * kParts, cell = item / a.token_blocks, row_part = cell % row_parts;
  w.split = cell / row_parts;
  w.token_block = item % a.token_blocks;  // neighbours read the same codes
  w.block = section<RowBlock>(h, h.blocks_offset)[row_part / kParts];
  w.first_row = row_part % kParts * S::kRows;
  w.rows = fewer(w.block.rows - w.first_row, S::kRows);
  const int64_t steps = steps_of(h);
  w.first_step = static_cast<int>(w.split * steps / a.splits);
  w.end_step = static_cast<int>((w.split + 1) * steps / a.splits);
}

// passed: steps of the work before, so that stages and phases go on where they were.
template <int kTokens>
PYLLMQ_DEVICE void decode_steps(const Arguments& a, Shared& shared, uint8_t* rings, uint8_t* stages, int passed) {
  using S = Shape<kTokens>;
  const Work& w = shared.work;
  const int warp = ptx::thread() / 32, group = warp % kStepGroups, first = w.first_step + warp / kStepGroups;
  const bool asks = ptx::thread() % (32 * kStepGroups) == 0;
  const auto* x = reinterpret_cast<const uint8_t*>(a.x) + int64_t{w.token_block} * steps_of(shared.header) * S::kXBytes;
  Decoder<kTokens> decoder(a.call.layout, shared, rings + warp * S::kRingBytes, first * kStepGroups + group);
  ptx::wait_for_previous();  // codes are under way while x is brought into order
#pragma unroll 1
  for (int step = first; step < w.end_step; step += S::kDecoders) {
    const int turn = passed + step - w.first_step, stage = turn % S::kStages;
    uint8_t* const to = stages + stage * S::kStageBytes;
    decoder.fetch();
    ptx::barrier_wait(&shared.empty[stage], (turn / S::kStages & 1) ^ 1);
    if (asks) {
      ptx::barrier_arrive_and_expect(&shared.full[stage], S::kXBytes);
      ptx::copy_bulk(to + S::kTiles * kTileBytes, x + int64_t{step} * S::kXBytes, S::kXBytes, &shared.full[stage]);
    }
    decoder.decode(to + group * kGroupBytes);
    ptx::fence_async();
    ptx::sync_warp();
    if (ptx::thread() % 32 == 0) ptx::barrier_arrive(&shared.full[stage]);
  }
  ptx::wait_async<0>();  // for groups without copies
}

template <int kTokens>
using Sums = float[kConsumerTiles<kTokens>][kTokens / 2];

template <int kTokens>
PYLLMQ_DEVICE void multiply_steps(Shared& shared, const uint8_t* stages, int consumer, int passed, Sums<kTokens>& sums) {
  using S = Shape<kTokens>;
  const int steps = shared.work.end_step - shared.work.first_step;
  const auto free = [&](int turn) {
    if (ptx::thread() % 32 == 0) ptx::barrier_arrive(&shared.empty[turn % S::kStages]);
  };
  unrolled<kConsumerTiles<kTokens>>([&](int i) { ptx::hold(sums[i]); });
#pragma unroll 1
  for (int turn = passed; turn < passed + steps; ++turn) {
    const uint8_t* const stage = stages + turn % S::kStages * S::kStageBytes;
    ptx::barrier_wait(&shared.full[turn % S::kStages], turn / S::kStages & 1);
    ptx::wgmma_begin();
    const uint64_t w = ptx::matrix_at(stage + consumer * kConsumerTiles<kTokens> * kTileBytes, kMatrixAlignment);
    const uint64_t x = ptx::matrix_at(stage + S::kTiles * kTileBytes, kMatrixAlignment);
    // A descriptor's address is in units of 16 bytes. 16 columns of W are rows of its matrix, of x they are 32 bytes of a row.
    unrolled<kStepGroups, kConsumerTiles<kTokens>>([&](int group, int i) {
      ptx::wgmma<kTokens>(sums[i], w + static_cast<uint64_t>(i * kTileBytes + group * kGroupBytes) / 16,
                          x + static_cast<uint64_t>(group * kGroupColumns * 2) / 16);
    });
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (turn > passed) free(turn - 1);
  }
  ptx::wgmma_wait<0>();
  unrolled<kConsumerTiles<kTokens>>([&](int i) { ptx::hold(sums[i]); });
  free(passed + steps - 1);
}

// [token, row] in place of the stages.
template <int kTokens>
PYLLMQ_DEVICE void store_sums(const Sums<kTokens>& sums, int consumer, float* total) {
  using S = Shape<kTokens>;
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32 % 4;
  unrolled<kConsumerTiles<kTokens>, kTokens / 2>([&](int i, int e) {
    const int token = e / 4 * 8 + lane % 4 * 2 + e % 2, m = warp * 16 + lane / 4 + e / 2 % 2 * 8;
    total[token * S::kSumStride + (consumer * kConsumerTiles<kTokens> + i) * kTileRows + tile_row(m)] = sums[i][e];
  });
}

template <int kTokens>
PYLLMQ_DEVICE void finish(const Arguments& a, Shared& shared, const float* total) {
  using S = Shape<kTokens>;
  const Work& w = shared.work;
  const LayoutHeader& h = *reinterpret_cast<const LayoutHeader*>(a.call.layout);
  const int64_t row_begin = w.block.row_begin + w.first_row, token_begin = int64_t{w.token_block} * kTokens;
  const int64_t left = a.call.tokens - token_begin;
  const int tokens = static_cast<int>(left < kTokens ? left : kTokens);
  const auto for_each_output = [&](const auto& body) {
    for (int at = ptx::thread(); at < tokens * S::kRows; at += S::kThreads)
      if (at % S::kRows < w.rows) body(at / S::kRows, at % S::kRows);
  };
  const auto sum_of = [&](int token, int row) {
    float sum = total[token * S::kSumStride + row] * a.unscale[token_begin + token];
    if (h.row_scale_offset != 0) sum *= ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[row_begin + row]);
    return sum;
  };
  uint32_t* counter = counter_of(a.call, h, w.token_block, h.tiles, w.block.tile_begin + w.first_row / kTileRows);
  store_outputs(a.call, a.splits, w.split, counter, token_begin, row_begin, shared.arrived, for_each_output, sum_of);
}

template <int kTokens>
PYLLMQ_KERNEL void __launch_bounds__(Shape<kTokens>::kThreads, 1) codebook_linear_wgmma_kernel(const Arguments a) {
#ifdef PYLLMQ_NO_CODE
  PYLLMQ_NO_CODE
#else
  using S = Shape<kTokens>;
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* const rings = memory + 2048;
  uint8_t* stages = rings + S::kDecodeWarps * S::kRingBytes;
  stages += -static_cast<uint32_t>(ptx::shared_address(stages)) % kMatrixAlignment;
  const int thread = ptx::thread();
  const int consumer = thread / 128 - S::kDecoders;  // below 0: a decoder

  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.call.layout);
  if (!describes(h, a.call.layout_bytes, a.call.rows, a.call.columns) || h.patched == 0)
    return store_nan(a.call.y, static_cast<DType>(a.call.dtype), a.call.tokens * a.call.rows, S::kThreads);
  for (int i = thread; i < static_cast<int>(sizeof(LayoutHeader) / 8); i += S::kThreads)
    reinterpret_cast<uint64_t*>(&shared.header)[i] = reinterpret_cast<const uint64_t*>(&h)[i];
  if (thread == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::barrier_init(&shared.full[i], kStepGroups + 1);
      ptx::barrier_init(&shared.empty[i], 4 * kConsumers);
    }
    ptx::fence_async();
  }

  // body(steps passed before) for each piece of work.
  const auto for_each_item = [&](const auto& body) {
    int passed = 0;
    for (auto item = static_cast<int>(ptx::block()); item < items<kTokens>(a, h); item += static_cast<int>(ptx::blocks())) {
      ptx::fence_async();  // copies follow what the work before wrote to the stages
      ptx::sync_block();
      if (thread == 0) take<kTokens>(a, h, item, shared.work);
      ptx::sync_block();
      if (shared.work.rows <= 0) continue;
      body(passed);
      passed += shared.work.end_step - shared.work.first_step;
    }
  };
  auto* const total = reinterpret_cast<float*>(stages);
  if (consumer < 0) {
    for_each_item([&](int passed) {
      decode_steps<kTokens>(a, shared, rings, stages, passed);
      ptx::sync_block();
      ptx::sync_block();
      finish<kTokens>(a, shared, total);
    });
  } else {
    ptx::wait_for_previous();
    for_each_item([&](int passed) {
      Sums<kTokens> sums = {};
      multiply_steps<kTokens>(shared, stages, consumer, passed, sums);
      ptx::sync_block();  // nobody reads a stage any more
      store_sums<kTokens>(sums, consumer, total);
      ptx::sync_block();
      finish<kTokens>(a, shared, total);
    });
  }
#endif
}

// ---- the launch ----------------------------------------------------------------------------------------------------------

struct LinearPlan {
  int64_t block_tokens, token_blocks, splits, grid;
  int64_t x_floats, partials;  // of the workspace, behind the tokens' scales
};

// Tokens of a block: three times 128 are less than two times 256, of which a block makes ten percent more a clock.
int64_t block_tokens_of(int64_t tokens) {
  for (const int64_t few : {16, 32, 64, 128})
    if (tokens <= few) return few;
  const int64_t halves = ceil_div(tokens, 128);
  return halves % 2 == 1 && halves < 9 ? 128 : 256;
}

// By shape alone: nothing on the device is read.
LinearPlan plan_linear(int64_t rows, int64_t columns, int64_t tokens) {
  LinearPlan plan{};
  plan.block_tokens = block_tokens_of(tokens);
  plan.token_blocks = ceil_div(tokens, plan.block_tokens);
  const int64_t steps = ceil_div(columns, kStepColumns), slots = multiprocessors();
  const int64_t cells = ceil_div(rows, plan.block_tokens == 256 ? Shape<256>::kRows : Shape<128>::kRows) * plan.token_blocks;
  // The time of a slot in steps. To begin and to end a piece of work costs four; to leave its sums in memory and to read them
  // again one for every 16 tokens.
  const auto time = [&](int64_t splits) {
    return ceil_div(cells * splits, slots) * (ceil_div(steps, splits) + 4 + (splits > 1 ? plan.block_tokens / 16 : 0));
  };
  plan.splits = 1;
  for (int64_t splits = 2; splits <= std::min(steps, slots); ++splits)
    if (time(splits) < time(plan.splits)) plan.splits = splits;
  plan.grid = std::min(slots, cells * plan.splits);
  // Each of 8 widths may fill up a group.
  const int64_t most_steps = ceil_div(ceil_div(columns, kGroupColumns) + 7, kStepGroups);
  plan.x_floats = plan.token_blocks * most_steps * plan.block_tokens * kStepColumns / 2;
  if (plan.splits > 1) plan.partials = plan.splits * tokens * rows;
  return plan;
}

template <int kTokens>
void launch(const Arguments& arguments, const LinearPlan& plan, uintptr_t stream) {
  using S = Shape<kTokens>;
  const auto kernel = codebook_linear_wgmma_kernel<kTokens>;
  allow_shared(reinterpret_cast<const void*>(kernel), S::kSharedBytes);
  PYLLMQ_LAUNCH(codebook_linear_wgmma_x_kernel, plan.token_blocks * kTokens, kOrderThreads, kOrderThreads / 32 * 4, stream,
                arguments);
  PYLLMQ_LAUNCH_EARLY(kernel, plan.grid, S::kThreads, S::kSharedBytes, stream, arguments);
  check_launch("codebook_linear_wgmma");
}

}  // namespace

bool CodebookWgmma::runs() { return has_code(reinterpret_cast<const void*>(codebook_linear_wgmma_kernel<16>)); }

int64_t CodebookWgmma::find_room(int64_t tokens, int) const {
  const LinearPlan plan = plan_linear(rows, columns, tokens);
  return plan.token_blocks * plan.block_tokens + plan.x_floats + plan.partials;
}

void CodebookWgmma::run(const LinearCall& call, uintptr_t stream) const {
  if (static_cast<DType>(call.dtype) == DType::fp32)
    throw std::invalid_argument("wgmma takes tokens in fp16 and bf16, not fp32; bind the layout as a CodebookOperand");
  const LinearPlan plan = plan_linear(rows, columns, call.tokens);
  if (call.rows * plan.token_blocks * plan.splits > std::numeric_limits<int32_t>::max())
    refuse_work("codebook_linear_wgmma", call);  // each piece of work has at least one row
  const int64_t padded = plan.token_blocks * plan.block_tokens;
  Arguments arguments{call,
                      static_cast<int>(plan.block_tokens),
                      static_cast<int>(plan.token_blocks),
                      static_cast<int>(plan.splits),
                      call.partials,
                      reinterpret_cast<uint16_t*>(call.partials + padded)};
  arguments.call.partials = call.partials + padded + plan.x_floats;
  if (plan.block_tokens == 16) launch<16>(arguments, plan, stream);
  if (plan.block_tokens == 32) launch<32>(arguments, plan, stream);
  if (plan.block_tokens == 64) launch<64>(arguments, plan, stream);
  if (plan.block_tokens == 128) launch<128>(arguments, plan, stream);
  if (plan.block_tokens == 256) launch<256>(arguments, plan, stream);
}

}  // namespace pyllmq::cuda

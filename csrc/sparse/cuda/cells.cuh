// What one cell of a strip (layout.h) adds to the sums of its 64 rows, for each format; and its weights one by one.
//
//   kColumns, kStages   of a cell; how many cells a warp holds in its ring
//   kTableBytes         codebooks of a cell, fetched beside the first strip's cell
//   kBlocks             of a multiprocessor, that registers must leave room for
//   kOwnBytes           memory of a warp that begin_cell fills from them
//   multiply            `x(step, fragments)` gives the second operand for a step of 32 columns
//   spread_step         put(row of the strip, column of the cell, fp16 or bf16); `next` is the state of a bitmap's walk
#pragma once
#include "codebook/cuda/decode.cuh"
#include "runtime/cuda/words.cuh"
#include "sparse/cuda/layout.h"
#include "split_of_k.cuh"

namespace pyllmq::cuda {

// The first outlier of a row at or beyond a column: they ascend.
PYLLMQ_DEVICE uint32_t outlier_from(const SparseHeader& h, int64_t row, int64_t column) {
  const auto* of_row = section<uint32_t>(h, h.outlier_row_offsets_offset) + row;
  uint32_t begin = of_row[0], end = of_row[1];
  while (begin < end) {
    const uint32_t middle = begin + (end - begin) / 2;
    if (section<uint32_t>(h, h.outlier_columns_offset)[middle] < column)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// What a block works on.
struct Strips {
  int begin, count;  // of 64 rows
  Range cells;
  int strip_cells;
  const uint8_t* data;  // of the weight, and its codebooks: here, since a loop has no registers for them
  const uint8_t* codebooks;

  PYLLMQ_MEMBER void take(const SparseHeader& h, int first, int most, int splits, int split) {
    begin = first;
    count = h.strips - begin < most ? static_cast<int>(h.strips - begin) : most;
    strip_cells = static_cast<int>(h.cells);
    cells = of_split(strip_cells, splits, split);
    data = section<uint8_t>(h, h.data_offset);
    codebooks = section<uint8_t>(h, h.codebook_offset);
  }
  PYLLMQ_MEMBER int64_t row_begin() const { return int64_t{begin} * kStripRows; }
  PYLLMQ_MEMBER int rows(const SparseHeader& h) const {
    const int64_t left = h.rows - row_begin();
    return left < count * kStripRows ? static_cast<int>(left) : count * kStripRows;
  }
};

template <int kTokenTiles>
using StripSums = float[kStripTiles][kTokenTiles][4];
template <int kTokenTiles>
using StepX = uint32_t[kTokenTiles][4];

// x of this lane's column of the product in a step; columns that do not exist are 0.
template <int kTokenTiles>
PYLLMQ_DEVICE void load_x(const uint16_t* x_step, int columns, int lane, StepX<kTokenTiles>& x) {
  unrolled<kTokenTiles>([&](int tile) {
    const int column = tile * 8 + lane / 4;
    Words<4> words = {};
    if (column < columns) words = load_words<4>(x_step + column * kStepColumns + lane % 4 * 8);
    unrolled<4>([&](int i) { x[tile][i] = words[i]; });
  });
}

constexpr int kWeightsOfLane = 8;  // in a tile x step of what is kept

// Four int8 -> two pairs of fp16: a byte above 0x64 is 1024 + byte.
PYLLMQ_DEVICE void int8_to_fp16(uint32_t bytes, uint32_t& first, uint32_t& second) {
  bytes ^= 0x80808080u;
  first = ptx::subtract_fp16x2(ptx::permute(bytes, 0x64646464u, 0x4140), 0x64806480u);
  second = ptx::subtract_fp16x2(ptx::permute(bytes, 0x64646464u, 0x4342), 0x64806480u);
}

PYLLMQ_DEVICE int row_of(int tile, int lane, int r) { return tile * 16 + lane / 4 + r % 2 * 8; }
PYLLMQ_DEVICE int group_column(int step, int lane, int r) { return step * kStepColumns + (lane % 4 + r / 2 * 4) * 4; }

template <ValueType kType>
struct Values24Cells {
  static constexpr SparseKind kKind = SparseKind::sparse24;
  static constexpr bool kBf16 = kType == ValueType::bf16;
  static constexpr int kColumns = 2 * kStepColumns, kStages = 2, kTableBytes = 0, kOwnBytes = 0, kBlocks = 4;
  static constexpr int kValueBytes = kType == ValueType::int8 ? 1 : 2;
  static constexpr int kPositionsAt = 2 * kStripTiles * 32 * kWeightsOfLane * kValueBytes;

  PYLLMQ_MEMBER static void begin_cell(const uint8_t*, uint8_t*, int) {}

  template <int kTokenTiles, class X>
  PYLLMQ_MEMBER static void multiply(const uint8_t* cell, const uint8_t*, const uint8_t*, int lane, const X& x,
                                     StripSums<kTokenTiles>& sums) {
    uint32_t positions[kStripTiles];
    unrolled<kStripTiles>([&](int tile) { positions[tile] = position_words(cell)[tile * 32 + lane]; });
    multiply_step<0>(cell, lane, positions, x, sums);
    multiply_step<1>(cell, lane, positions, x, sums);
  }

  template <class Put>
  PYLLMQ_MEMBER static void spread_step(const uint8_t* cell, const uint8_t*, int step, int lane, const uint8_t*&,
                                        const Put& put) {
    for (int tile = 0; tile < kStripTiles; ++tile) {
      uint32_t pairs[4];
      load(cell, step * kStripTiles + tile, lane, pairs);
      unrolled<4>([&](int r) {
        const uint32_t word = position_words(cell)[tile * 32 + lane / 4 * 4 + 2 * step + r / 2];
        const uint32_t kept = word >> (lane % 4 * 4 + r % 2 * 16);
        put(row_of(tile, lane, r), group_column(step, lane, r) + static_cast<int>(kept & 3), static_cast<uint16_t>(pairs[r]));
        put(row_of(tile, lane, r), group_column(step, lane, r) + static_cast<int>(kept >> 2 & 3),
            static_cast<uint16_t>(pairs[r] >> 16));
      });
    }
  }

 private:
  PYLLMQ_MEMBER static const uint32_t* position_words(const uint8_t* cell) {
    return reinterpret_cast<const uint32_t*>(cell + kPositionsAt);
  }

  PYLLMQ_MEMBER static void load(const uint8_t* cell, int step_tile, int lane, uint32_t (&pairs)[4]) {
    const uint8_t* from = cell + (step_tile * 32 + lane) * kWeightsOfLane * kValueBytes;
    if constexpr (kType == ValueType::int8) {
      const Words<2> bytes = load_words<2>(from);
      int8_to_fp16(bytes[0], pairs[0], pairs[1]);
      int8_to_fp16(bytes[1], pairs[2], pairs[3]);
    } else {
      const Words<4> words = load_words<4>(from);
      unrolled<4>([&](int r) { pairs[r] = words[r]; });
    }
  }

  template <int kStep, int kTokenTiles, class X>
  PYLLMQ_MEMBER static void multiply_step(const uint8_t* cell, int lane, const uint32_t (&positions)[kStripTiles], const X& x,
                                          float (&sums)[kStripTiles][kTokenTiles][4]) {
    StepX<kTokenTiles> fragments;
    x(kStep, fragments);
    unrolled<kStripTiles>([&](int tile) {
      uint32_t pairs[4];
      load(cell, kStep * kStripTiles + tile, lane, pairs);
      unrolled<kTokenTiles>(
          [&](int i) { ptx::mma_sp_m16n8k32<kBf16, kStep>(sums[tile][i], pairs, fragments[i], positions[tile]); });
    });
  }
};

// Positions of a lane's groups, from the two words of its quad for a step: byte r = first | second << 2, and 4 bits of others.
PYLLMQ_DEVICE uint32_t kept_of_lane(const Words<2>& quad, int lane) {
  const int shift = lane % 4 * 4;
  return ptx::permute(quad[0] >> shift, quad[1] >> shift, 0x6420);
}

// Codes of 2 bits: code and position are an index into the 16 entries of the group's four columns, which sit in registers and
// are looked up by byte permutation, four a time.
struct Codes2Cells {
  static constexpr SparseKind kKind = SparseKind::codes;
  static constexpr bool kBf16 = false;
  static constexpr int kColumns = 2 * kStepColumns, kStages = 4, kTableBytes = 16 * 32, kOwnBytes = 0, kBlocks = 4;

  PYLLMQ_MEMBER static void begin_cell(const uint8_t*, uint8_t*, int) {}

  template <int kTokenTiles, class X>
  PYLLMQ_MEMBER static void multiply(const uint8_t* cell, const uint8_t* tables, const uint8_t*, int lane, const X& x,
                                     StripSums<kTokenTiles>& sums) {
    multiply_step<0>(cell, tables, lane, x, sums);
    multiply_step<1>(cell, tables, lane, x, sums);
  }

  template <class Put>
  PYLLMQ_MEMBER static void spread_step(const uint8_t* cell, const uint8_t* tables, int step, int lane, const uint8_t*&,
                                        const Put& put) {
    for (int tile = 0; tile < kStripTiles; ++tile) {
      const uint32_t kept = indices(cell, step, tile, lane);
      unrolled<kWeightsOfLane>([&](int n) {
        const int r = n / 2;
        const uint32_t index = kept >> (4 * n) & 15;
        const uint8_t* table = tables + (step * 8 + lane % 4 + r / 2 * 4) * 32;
        put(row_of(tile, lane, r), group_column(step, lane, r) + static_cast<int>(index >> 2),
            static_cast<uint16_t>(table[index] | table[16 + index] << 8));
      });
    }
  }

  // Nibble 2 r + j: code + 4 position.
  PYLLMQ_MEMBER static uint32_t indices(const uint8_t* cell, int step, int tile, int lane) {
    const auto* words = reinterpret_cast<const uint32_t*>(cell);
    const uint32_t codes = words[tile * 32 + lane] >> (2 * step);
    const uint32_t kept = kept_of_lane(load_words<2>(words + 128 + tile * 32 + lane / 4 * 4 + 2 * step), lane);
    return (codes & 0x33333333u) | (kept << 2 & 0x0C0C0C0Cu) | (kept << 4 & 0xC0C0C0C0u);
  }

 private:
  template <int kStep, int kTokenTiles, class X>
  PYLLMQ_MEMBER static void multiply_step(const uint8_t* cell, const uint8_t* tables, int lane, const X& x,
                                          float (&sums)[kStripTiles][kTokenTiles][4]) {
    StepX<kTokenTiles> fragments;
    x(kStep, fragments);
    RegisterTable<4> near, far;  // of the lane's two groups
    near.load(tables, kStep * 8 + lane % 4);
    far.load(tables, kStep * 8 + lane % 4 + 4);
    unrolled<kStripTiles>([&](int tile) {
      const uint32_t kept = indices(cell, kStep, tile, lane);
      uint32_t pairs[4];
      near.decode_four(kept, 0, kNeighbours, pairs[0], pairs[1]);
      far.decode_four(kept, 16, kNeighbours, pairs[2], pairs[3]);
      const uint32_t positions = reinterpret_cast<const uint32_t*>(cell)[128 + tile * 32 + lane];
      unrolled<kTokenTiles>([&](int i) { ptx::mma_sp_m16n8k32<kBf16, kStep>(sums[tile][i], pairs, fragments[i], positions); });
    });
  }
};

// Codes of 3 and 4 bits: 64 entries a group are too many for registers. Every lane has its own table in shared memory, so that
// the lanes of a lookup meet in no bank; an entry holds both of its groups.
struct Codes4Cells {
  static constexpr SparseKind kKind = SparseKind::codes;
  static constexpr bool kBf16 = false;
  static constexpr int kColumns = kStepColumns, kStages = 4, kTableBytes = kStepColumns * 32, kOwnBytes = 64 * 32 * 4;
  static constexpr int kBlocks = 4;

  PYLLMQ_MEMBER static void begin_cell(const uint8_t* tables, uint8_t* own, int lane) {
    const uint8_t* near = tables + lane % 4 * 4 * 32;
    const uint8_t* far = near + 16 * 32;
    auto* to = reinterpret_cast<uint32_t*>(own) + lane;
#pragma unroll 2
    for (int i = 0; i < 64; i += 8) {
      const Words<4> a = load_words<4>(near + 2 * i), b = load_words<4>(far + 2 * i);
      unrolled<4>([&](int k) {
        to[(i + 2 * k) * 32] = ptx::permute(a[k], b[k], 0x5410);
        to[(i + 2 * k + 1) * 32] = ptx::permute(a[k], b[k], 0x7632);
      });
    }
  }

  template <int kTokenTiles, class X>
  PYLLMQ_MEMBER static void multiply(const uint8_t* cell, const uint8_t*, const uint8_t* own, int lane, const X& x,
                                     StripSums<kTokenTiles>& sums) {
    const ptx::SharedAddress entries = ptx::shared_address(own) + lane * 4;
    StepX<kTokenTiles> fragments;
    x(0, fragments);
    unrolled<kStripTiles>([&](int tile) {
      const Words<2> quad = quad_positions(cell, tile, lane);
      uint32_t indices[2], pairs[4];
      both_indices(cell, quad, tile, lane, indices);
      unrolled<4>([&](int r) {
        pairs[r] = ptx::permute(look_up(entries, indices[0], r), look_up(entries, indices[1], r), r < 2 ? 0x5410 : 0x7632);
      });
      const uint32_t positions = lane % 2 == 0 ? quad[0] : quad[1];
      unrolled<kTokenTiles>([&](int i) { ptx::mma_sp_m16n8k32<kBf16, 0>(sums[tile][i], pairs, fragments[i], positions); });
    });
  }

  template <class Put>
  PYLLMQ_MEMBER static void spread_step(const uint8_t* cell, const uint8_t* tables, int, int lane, const uint8_t*&,
                                        const Put& put) {
    for (int tile = 0; tile < kStripTiles; ++tile) {
      uint32_t indices[2];
      both_indices(cell, quad_positions(cell, tile, lane), tile, lane, indices);
      unrolled<kWeightsOfLane>([&](int n) {
        const int r = n / 2;
        const uint32_t index = indices[n % 2] >> (8 * r) & 63;
        const int column = group_column(0, lane, r) + static_cast<int>(index >> 4);
        put(row_of(tile, lane, r), column, reinterpret_cast<const uint16_t*>(tables)[column * 16 + (index & 15)]);
      });
    }
  }

 private:
  PYLLMQ_MEMBER static Words<2> quad_positions(const uint8_t* cell, int tile, int lane) {
    return load_words<2>(cell + 512 + (tile * 16 + lane / 4 * 2) * 4);
  }

  // Byte r of the first and of the second: code + 16 position.
  PYLLMQ_MEMBER static void both_indices(const uint8_t* cell, const Words<2>& quad, int tile, int lane, uint32_t (&indices)[2]) {
    const uint32_t codes = reinterpret_cast<const uint32_t*>(cell)[tile * 32 + lane];
    const uint32_t kept = kept_of_lane(quad, lane);
    indices[0] = (codes & 0x0F0F0F0Fu) | (kept << 4 & 0x30303030u);
    indices[1] = (codes >> 4 & 0x0F0F0F0Fu) | (kept << 2 & 0x30303030u);
  }

  PYLLMQ_MEMBER static uint32_t look_up(ptx::SharedAddress entries, uint32_t indices, int r) {
    const uint32_t row = (r == 0 ? indices << 7 : indices >> (8 * r - 7)) & 63u << 7;
    return ptx::load_shared_word(entries + row);
  }
};

// Masks spread the lane's values into operands of dense tensor core instructions.
template <ValueType kType>
struct BitmapCells {
  static constexpr SparseKind kKind = SparseKind::bitmap;
  static constexpr bool kBf16 = kType == ValueType::bf16;
  static constexpr int kColumns = 4 * kStepColumns, kStages = 2, kTableBytes = 0, kOwnBytes = 0, kBlocks = 3;
  static constexpr int kValueBytes = kType == ValueType::int8 ? 1 : 2;

  PYLLMQ_MEMBER static void begin_cell(const uint8_t*, uint8_t*, int) {}

  template <int kTokenTiles, class X>
  PYLLMQ_MEMBER static void multiply(const uint8_t* cell, const uint8_t*, const uint8_t*, int lane, const X& x,
                                     StripSums<kTokenTiles>& sums) {
    const uint8_t* next = cell + kMaskBytes + lane * kValueBytes;
#pragma unroll 1
    for (int step = 0; step < kColumns / kStepColumns; ++step) {
      StepX<kTokenTiles> fragments;
      x(step, fragments);
      unrolled<2>([&](int half) {
        const uint32_t mask = reinterpret_cast<const uint32_t*>(cell)[(step * 2 + half) * 32 + lane];
        unrolled<kStripTiles>([&](int tile) {
          uint32_t pairs[4];
          take(mask >> (8 * tile), next, pairs);
          unrolled<kTokenTiles>([&](int i) {
            ptx::mma_m16n8k16<kBf16>(sums[tile][i], pairs[0], pairs[1], pairs[2], pairs[3], fragments[i][2 * half],
                                     fragments[i][2 * half + 1]);
          });
        });
      });
    }
  }

  template <class Put>
  PYLLMQ_MEMBER static void spread_step(const uint8_t* cell, const uint8_t*, int step, int lane, const uint8_t*& next,
                                        const Put& put) {
    if (step == 0) next = cell + kMaskBytes + lane * kValueBytes;
    for (int half = 0; half < 2; ++half) {
      const uint32_t mask = reinterpret_cast<const uint32_t*>(cell)[(step * 2 + half) * 32 + lane];
      for (int tile = 0; tile < kStripTiles; ++tile) {
        uint32_t pairs[4];
        take(mask >> (8 * tile), next, pairs);
        unrolled<8>([&](int n) {
          put(row_of(tile, lane, n / 2), step * kStepColumns + half * 16 + n / 4 * 8 + lane % 4 * 2 + n % 2,
              static_cast<uint16_t>(pairs[n / 2] >> (n % 2 * 16)));
        });
      }
    }
  }

 private:
  // The eight weights of a tile and half step whose bits come first; what is not kept is 0.
  PYLLMQ_MEMBER static void take(uint32_t mask, const uint8_t*& next, uint32_t (&pairs)[4]) {
    uint32_t weights[8];
    unrolled<8>([&](int n) {
      weights[n] = 0;
      if ((mask >> n & 1) != 0) {
        weights[n] = kType == ValueType::int8 ? *next : *reinterpret_cast<const uint16_t*>(next);
        next += 32 * kValueBytes;
      }
    });
    if constexpr (kType == ValueType::int8) {
      PYLLMQ_UNROLL
      for (int r = 0; r < 4; r += 2)
        int8_to_fp16(weights[2 * r] | weights[2 * r + 1] << 8 | weights[2 * r + 2] << 16 | weights[2 * r + 3] << 24, pairs[r],
                     pairs[r + 1]);
    } else {
      unrolled<4>([&](int r) { pairs[r] = ptx::permute(weights[2 * r], weights[2 * r + 1], 0x5410); });
    }
  }
};

// Calls run(cells) with the cells of a kind and type of values; `bits` of codes.
template <class Run>
void with_cells(SparseKind kind, ValueType values, int64_t bits, const Run& run) {
  if (kind == SparseKind::codes) return bits == 2 ? run(Codes2Cells{}) : run(Codes4Cells{});
  const bool is_24 = kind == SparseKind::sparse24;
  if (values == ValueType::bf16) return is_24 ? run(Values24Cells<ValueType::bf16>{}) : run(BitmapCells<ValueType::bf16>{});
  if (values == ValueType::fp16) return is_24 ? run(Values24Cells<ValueType::fp16>{}) : run(BitmapCells<ValueType::fp16>{});
  return is_24 ? run(Values24Cells<ValueType::int8>{}) : run(BitmapCells<ValueType::int8>{});
}

}  // namespace pyllmq::cuda

// Cells of W (cells.cuh) times x, by the warps of a block, for sparse_linear and the experts: W is the first operand of tensor
// core instructions, spread or looked up in registers, or 2:4 sparse as it is (mma.sp); x is the second.
//
// A block has up to 256 rows (four strips) and a range of cells of K; each of its warps takes every fourth cell, streams it strip
// by strip through a ring in shared memory of its own, and keeps the sums of all rows in registers.
#pragma once
#include "sparse/cuda/cells.cuh"

namespace pyllmq::cuda {

constexpr int kMostWarps = 4;
constexpr int kBlockStrips = 4;  // with one tile of 8 columns of the product, two with two
constexpr int kItemCost = 8;     // what starts and ends an item, in cells of a strip (predicted)

// Of a block's product.
template <int kTokenTiles>
constexpr int kStripsOf = kBlockStrips / kTokenTiles;
template <int kTokenTiles>
constexpr int kSumStride = kStripsOf<kTokenTiles> * kStripRows + 4;  // of a column; the lanes of a store meet in no bank
template <int kTokenTiles>
using BlockSums = StripSums<kTokenTiles>[kStripsOf<kTokenTiles>];

// Bytes of a cell of a strip, 0 where they differ.
template <class Cells>
constexpr int kCellBytes = 512 + kPositionBytes * Cells::kColumns / (2 * kStepColumns);  // codes
template <ValueType kType>
constexpr int kCellBytes<Values24Cells<kType>> = Values24Cells<kType>::kPositionsAt + kPositionBytes;
template <ValueType kType>
constexpr int kCellBytes<BitmapCells<kType>> = 0;

// Of a warp: its ring and codebooks, and after the loop its sums.
template <class Cells, int kTokenTiles>
PYLLMQ_HOST_DEVICE int64_t cell_ring_bytes(int64_t stage_bytes) {
  const int64_t ring = Cells::kStages * (stage_bytes + Cells::kTableBytes) + Cells::kOwnBytes;
  const int64_t sums = kSumStride<kTokenTiles> * kTokenTiles * 8 * 4;
  return ring > sums ? ring : sums;
}

// Where x of a slot and a column of the product stands, as fragments: [step][column][t][i][2] hold columns 8i + 2t and the next.
PYLLMQ_DEVICE int place_of_x(int slot, int column, int columns) {
  const int in_step = slot % kStepColumns;
  return (slot / kStepColumns * columns + column) * kStepColumns + in_step % 8 / 2 * 8 + in_step / 8 * 2 + in_step % 2;
}

// By a warp. A loop of as many turns as bytes ask for would keep their number in a register.
template <int kBytes, bool kOnce>
PYLLMQ_DEVICE void copy_async(uint8_t* to, const uint8_t* from, int lane) {
  unrolled<(kBytes + 511) / 512>([&](int i) {
    const int at = i * 512 + lane * 16;
    if (i < kBytes / 512 || at < kBytes) ptx::copy_async_16<kOnce>(to + at, from + at);
  });
}

// Where a warp's next cells come from: its cells one after the other, of each the strips of the block. kOnce: no other block
// reads them. References, since a loop has no registers for what stands in shared memory or is a kernel's argument.
template <class Cells, bool kOnce>
struct CellCursor {
  const SparseHeader& h;
  const Strips& w;
  const Range& cells;
  const int& warps;
  int turn = 0, strip = 0;

  PYLLMQ_MEMBER int cell() const { return cells.begin + ptx::thread() / 32 + turn * warps; }

  // body(where the cell of a strip of the block begins, its bytes)
  template <class Body>
  PYLLMQ_MEMBER void at_cell(int of_strip, const Body& body) const {
    const int64_t in_strip = int64_t{w.begin + of_strip};
    if constexpr (Cells::kKind == SparseKind::bitmap) {
      const uint32_t* begin = section<uint32_t>(h, h.begin_offset) + in_strip * (w.strip_cells + 1) + cell();
      body(w.data + int64_t{begin[0]} * 16, static_cast<int>(begin[1] - begin[0]) * 16);
    } else {
      body(w.data + (in_strip * w.strip_cells + cell()) * kCellBytes<Cells>, kCellBytes<Cells>);
    }
  }

  // The first cells leave memory while x is brought into order.
  PYLLMQ_MEMBER void prefetch(int lane) const {
    constexpr int kLine = 128;
    for (int of_strip = 0; cell() < cells.end && of_strip < w.count; ++of_strip)
      at_cell(of_strip, [&](const uint8_t* from, int bytes) {
        for (int at = lane * kLine; at < bytes; at += 32 * kLine) ptx::prefetch(from + at);
      });
  }

  // Copies the next cell of a strip, and with the first strip's the codebooks, if there is any left.
  PYLLMQ_MEMBER void fetch(uint8_t* to, uint8_t* tables, int lane) {
    if (cell() < cells.end) {
      at_cell(strip, [&](const uint8_t* from, int bytes) {
        if constexpr (kCellBytes<Cells> > 0)
          copy_async<kCellBytes<Cells>, kOnce>(to, from, lane);
        else
          for (int at = lane * 16; at < bytes; at += 512) ptx::copy_async_16<kOnce>(to + at, from + at);
      });
      if (Cells::kTableBytes > 0 && strip == 0)
        copy_async<Cells::kTableBytes, false>(tables + turn % Cells::kStages * Cells::kTableBytes,
                                              w.codebooks + int64_t{cell()} * Cells::kTableBytes, lane);
      if (++strip == w.count) {
        strip = 0;
        ++turn;
      }
    }
    ptx::commit_async();
  }
};

// Adds a warp's cells to its sums. x: of the range, placed by place_of_x; columns(): of the product.
template <class Cells, bool kOnce, int kTokenTiles, class Columns>
PYLLMQ_DEVICE void accumulate(CellCursor<Cells, kOnce>& cursor, uint8_t* ring, const int& stage_bytes, const uint16_t* x_shared,
                              const Columns& columns, BlockSums<kTokenTiles>& sums) {
  constexpr int kSteps = Cells::kColumns / kStepColumns, kStages = Cells::kStages;
  const Strips& w = cursor.w;
  const Range& cells = cursor.cells;
  const int lane = ptx::thread() % 32;
  uint8_t* tables = ring + kStages * stage_bytes;
  uint8_t* own = tables + kStages * Cells::kTableBytes;
  for (int ahead = 0; ahead < kStages - 1; ++ahead) cursor.fetch(ring + ahead * stage_bytes, tables, lane);
  int stage = 0;  // as many slots of codebooks as stages, since a stage may be a whole cell
  for (CellCursor<Cells, kOnce> now{cursor.h, w, cells, cursor.warps}; now.cell() < cells.end; ++now.turn) {
    const auto x = [&](int step, StepX<kTokenTiles>& fragments) {
      const int of_product = columns();
      load_x<kTokenTiles>(x_shared + ((now.cell() - cells.begin) * kSteps + step) * of_product * kStepColumns, of_product, lane,
                          fragments);
    };
    unrolled<kStripsOf<kTokenTiles>>([&](int strip) {
      if (strip >= w.count) return;
      cursor.fetch(ring + (stage + kStages - 1) % kStages * stage_bytes, tables, lane);
      ptx::wait_async<kStages - 1>();
      ptx::sync_warp();  // all lanes' copies are there
      const uint8_t* cell_tables = tables + now.turn % kStages * Cells::kTableBytes;
      if (strip == 0) Cells::begin_cell(cell_tables, own, lane);
      Cells::template multiply<kTokenTiles>(ring + stage * stage_bytes, cell_tables, own, lane, x, sums[strip]);
      ptx::sync_warp();  // the next fetch overwrites this stage
      stage = (stage + 1) % kStages;
    });
  }
}

// A warp's sums in place of its ring: [column of the product, row].
template <int kTokenTiles>
PYLLMQ_DEVICE void store_sums(const BlockSums<kTokenTiles>& sums, int columns, uint8_t* ring) {
  const int lane = ptx::thread() % 32;
  auto* part = reinterpret_cast<float*>(ring);
  unrolled<kStripsOf<kTokenTiles>, kStripTiles>([&](int strip, int tile) {
    unrolled<kTokenTiles, 4>([&](int i, int e) {
      const int column = i * 8 + lane % 4 * 2 + e % 2, row = strip * kStripRows + tile * 16 + lane / 4 + e / 2 * 8;
      if (column < columns) part[column * kSumStride<kTokenTiles> + row] = sums[strip][tile][i][e];
    });
  });
}

// That of all warps, in order.
template <int kTokenTiles>
PYLLMQ_DEVICE float sum_of_warps(const uint8_t* rings, int64_t ring_bytes, int warps, int column, int row) {
  float sum = 0.0f;
  for (int warp = 0; warp < warps; ++warp)
    sum += reinterpret_cast<const float*>(rings + warp * ring_bytes)[column * kSumStride<kTokenTiles> + row];
  return sum;
}

}  // namespace pyllmq::cuda

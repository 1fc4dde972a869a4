// bitmap_linear, sparse24_linear and sparse24_codebook_linear for few tokens: W is the first operand of tensor core instructions,
// spread or looked up in registers, or 2:4 sparse as it is (mma.sp); x is the second. The frame is that of streamed_linear.cuh.
//
// A block takes up to 256 rows (four strips) and a range of cells of K; each of its warps takes every fourth cell, streams it
// strip by strip through a ring in shared memory of its own, and keeps the sums of all rows in registers.
#include "sparse/cuda/stream.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kMostWarps = 4;
constexpr int kBlockStrips = 4;  // with one tile of tokens, two with two
constexpr int kMostTokens = 16;  // columns of the product
constexpr int kItemCost = 8;     // what starts and ends an item, in cells of a strip (predicted)

struct Arguments : StreamArguments {
  int stage_bytes, warps, x_bytes, warp_bytes;
};

// Shared memory: this, x, the warps' rings and tables (after the loop: the sums).
struct alignas(16) Shared {
  Item item;
  Strips work;
  XScales<kMostTokens, kMostWarps> scales;
  uint32_t arrived;
};

// Bytes of a cell of a strip, 0 where they differ.
template <class Cells>
constexpr int kCellBytes = 512 + kPositionBytes * Cells::kColumns / (2 * kStepColumns);  // codes
template <ValueType kType>
constexpr int kCellBytes<Values24Cells<kType>> = Values24Cells<kType>::kPositionsAt + kPositionBytes;
template <ValueType kType>
constexpr int kCellBytes<BitmapCells<kType>> = 0;

// By a warp. A loop of as many turns as bytes ask for would keep their number in a register.
template <int kBytes, bool kOnce>
PYLLMQ_DEVICE void copy_async(uint8_t* to, const uint8_t* from, int lane) {
  unrolled<(kBytes + 511) / 512>([&](int i) {
    const int at = i * 512 + lane * 16;
    if (i < kBytes / 512 || at < kBytes) ptx::copy_async_16<kOnce>(to + at, from + at);
  });
}

// Where a warp's next cells come from: its cells one after the other, of each the strips of the block. kOnce: no other block
// reads them.
template <class Cells, bool kOnce>
struct CellCursor {
  const Arguments& a;
  const SparseHeader& h;
  const Strips& w;
  int turn = 0, strip = 0;

  PYLLMQ_MEMBER int cell() const { return w.cells.begin + ptx::thread() / 32 + turn * a.warps; }

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
    for (int of_strip = 0; cell() < w.cells.end && of_strip < w.count; ++of_strip)
      at_cell(of_strip, [&](const uint8_t* from, int bytes) {
        for (int at = lane * kLine; at < bytes; at += 32 * kLine) ptx::prefetch(from + at);
      });
  }

  // Copies the next cell of a strip, and with the first strip's the codebooks, if there is any left.
  PYLLMQ_MEMBER void fetch(uint8_t* to, uint8_t* tables, int lane) {
    if (cell() < w.cells.end) {
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

template <class Cells, int kTokenTiles>
struct FewTokens : SparseStream<Cells, kBlockStrips / kTokenTiles, Shared, Arguments> {
  static constexpr int kStrips = kBlockStrips / kTokenTiles;
  static constexpr int kSumStride = kStrips * kStripRows + 4;  // the lanes of a store meet in no bank
  static constexpr int kSumBytes = kSumStride * kTokenTiles * 8 * 4;
  using Base = SparseStream<Cells, kStrips, Shared, Arguments>;
  using Base::a, Base::h, Base::shared;
  using Cursor = CellCursor<Cells, kTokenTiles == 1>;  // so few tokens are one block's

  PYLLMQ_MEMBER static bool serves(const SparseHeader& h, const Arguments& a) {
    return Base::describes_cells(h, a, a.stage_bytes);
  }

  PYLLMQ_MEMBER void multiply() const {
    const Strips& w = shared.work;
    const Item& item = shared.item;
    const int lane = ptx::thread() % 32;
    auto* x_shared = reinterpret_cast<uint16_t*>(&shared + 1);
    uint8_t* ring = of_warp(ptx::thread() / 32);
    Cursor cursor{a, h, w};
    cursor.prefetch(lane);

    // As fragments: 16 bits [step][column of the product][t][i][2] hold columns 8i + 2t and the next.
    const int64_t begin = int64_t{w.cells.begin} * Cells::kColumns;
    const int slots = (w.cells.end - w.cells.begin) * Cells::kColumns;
    const auto for_each_slot = [&](const auto& body) {
      for (int slot = ptx::thread(); slot < slots; slot += a.warps * 32)
        body(slot, begin + slot < a.call.columns ? begin + slot : -1);
    };
    const auto place = [&](int slot, int column) {
      const int in_step = slot % kStepColumns;
      return (slot / kStepColumns * item.columns() + column) * kStepColumns + in_step % 8 / 2 * 8 + in_step / 8 * 2 + in_step % 2;
    };
    stage_x<Cells::kBf16>(a.call, item, a.warps, shared.scales, x_shared, for_each_slot, place);

    StripSums<kTokenTiles> sums[kStrips] = {};
    accumulate(cursor, ring, x_shared, sums);
    store_sums(reinterpret_cast<float*>(ring), sums);
  }

  PYLLMQ_MEMBER float sum(int token, int row) {
    const auto of_warps = [&](int column) {
      float sum = 0.0f;
      for (int warp = 0; warp < a.warps; ++warp) sum += reinterpret_cast<const float*>(of_warp(warp))[column * kSumStride + row];
      return sum;
    };
    return Base::finished(token, row, sum_of_planes<Cells::kBf16>(shared.item, shared.scales, token, of_warps));
  }
  PYLLMQ_MEMBER float* place(int token, int row) const {
    return reinterpret_cast<float*>(of_warp(0)) + token * shared.item.planes * kSumStride + row;
  }

 private:
  PYLLMQ_MEMBER uint8_t* of_warp(int warp) const {
    return reinterpret_cast<uint8_t*>(&shared + 1) + a.x_bytes + warp * a.warp_bytes;
  }

  // Adds all cells of this warp to the sums.
  PYLLMQ_MEMBER void accumulate(Cursor& cursor, uint8_t* ring, const uint16_t* x_shared,
                                StripSums<kTokenTiles> (&sums)[kStrips]) const {
    constexpr int kSteps = Cells::kColumns / kStepColumns;
    const Strips& w = shared.work;
    const int lane = ptx::thread() % 32;
    uint8_t* tables = ring + Cells::kStages * a.stage_bytes;
    uint8_t* own = tables + Cells::kStages * Cells::kTableBytes;
    for (int ahead = 0; ahead < Cells::kStages - 1; ++ahead) cursor.fetch(ring + ahead * a.stage_bytes, tables, lane);
    int stage = 0;  // as many slots of codebooks as stages, since a stage may be a whole cell
    for (Cursor now{a, h, w}; now.cell() < w.cells.end; ++now.turn) {
      const auto x = [&](int step, StepX<kTokenTiles>& fragments) {
        const int columns = shared.item.columns();
        load_x<kTokenTiles>(x_shared + ((now.cell() - w.cells.begin) * kSteps + step) * columns * kStepColumns, columns, lane,
                            fragments);
      };
      unrolled<kStrips>([&](int strip) {
        if (strip >= w.count) return;
        cursor.fetch(ring + (stage + Cells::kStages - 1) % Cells::kStages * a.stage_bytes, tables, lane);
        ptx::wait_async<Cells::kStages - 1>();
        ptx::sync_warp();
        const uint8_t* cell_tables = tables + now.turn % Cells::kStages * Cells::kTableBytes;
        if (strip == 0) Cells::begin_cell(cell_tables, own, lane);
        Cells::template multiply<kTokenTiles>(ring + stage * a.stage_bytes, cell_tables, own, lane, x, sums[strip]);
        ptx::sync_warp();  // the next fetch overwrites this stage
        stage = (stage + 1) % Cells::kStages;
      });
    }
    ptx::wait_async<0>();
    ptx::sync_warp();
  }

  // A warp's sums in place of its ring: [column of the product, row].
  PYLLMQ_MEMBER void store_sums(float* part, const StripSums<kTokenTiles> (&sums)[kStrips]) const {
    const int lane = ptx::thread() % 32;
    unrolled<kStrips, kStripTiles>([&](int strip, int tile) {
      unrolled<kTokenTiles, 4>([&](int i, int e) {
        const int column = i * 8 + lane % 4 * 2 + e % 2, row = strip * kStripRows + tile * 16 + lane / 4 + e / 2 * 8;
        if (column < shared.item.columns()) part[column * kSumStride + row] = sums[strip][tile][i][e];
      });
    });
  }
};

template <class Cells, int kTokenTiles>
PYLLMQ_KERNEL void __launch_bounds__(kMostWarps * 32, Cells::kBlocks) sparse_linear_kernel(const Arguments a) {
  run_items<FewTokens<Cells, kTokenTiles>>(a, a.warps * 32);
}

struct SparseLinearPlan : LinearPlan {
  int64_t x_bytes, warp_bytes;
};

template <class Cells>
SparseLinearPlan plan_linear(const SparseOperand& operand, int64_t tokens, int dtype) {
  const int64_t planes = planes_of(Cells::kBf16, static_cast<DType>(dtype)), shared_limit = shared_bytes();
  SparseLinearPlan plan{};
  plan.token_tiles = tokens * planes <= 8 ? 1 : 2;
  plan.set_tokens(tokens, 8 * plan.token_tiles / planes);
  plan.row_parts = ceil_div(ceil_div(operand.rows, kStripRows), kBlockStrips / plan.token_tiles);
  const int64_t cells = ceil_div(operand.columns, Cells::kColumns), cell_x = Cells::kColumns * plan.tokens_per_block * planes * 2;
  const int64_t rings = Cells::kStages * (operand.stage_bytes + Cells::kTableBytes) + Cells::kOwnBytes;
  plan.warp_bytes =
      std::max<int64_t>(rings, plan.token_tiles == 1 ? FewTokens<Cells, 1>::kSumBytes : FewTokens<Cells, 2>::kSumBytes);
  const auto bytes = [&](int64_t warps, int64_t x_bytes) { return int64_t{sizeof(Shared)} + x_bytes + warps * plan.warp_bytes; };

  const int64_t most_x = std::min(kMostXBytes, cells * cell_x);
  int64_t warps = kMostWarps;
  while (warps > 1 && bytes(warps, most_x) > shared_limit) warps /= 2;
  plan.threads = static_cast<int>(warps * 32);
  // 1 KiB of every block, and of the device's limit, is the driver's.
  const int64_t resident = std::clamp<int64_t>((shared_limit + 1024) / (bytes(warps, most_x) + 1024), 1, Cells::kBlocks);
  plan.slots = multiprocessors() * resident;
  const int64_t strips = kBlockStrips / plan.token_tiles;
  plan.set_splits(cells, ceil_div(cells, kMostXBytes / cell_x), kItemCost,
                  [&](int64_t of_item) { return ceil_div(of_item, warps) * strips; });
  plan.x_bytes = ceil_div(cells, plan.splits) * cell_x;
  plan.shared_bytes = bytes(warps, plan.x_bytes);
  return plan;
}

}  // namespace

int64_t SparseOperand::find_room(int64_t tokens, int dtype) const {
  if (kind == SparseKind::columns) return plan_columns(tokens).partials;
  int64_t room = 0;
  with_cells(kind, values, bits,
             [&](auto cells) { room = plan_linear<decltype(cells)>(*this, tokens, dtype).partials(tokens, rows); });
  return room;
}

void SparseOperand::run(const LinearCall& call, uintptr_t stream) const {
  if (kind == SparseKind::columns) return run_columns(call, stream);
  with_cells(kind, values, bits, [&](auto cells) {
    using Cells = decltype(cells);
    const SparseLinearPlan plan = plan_linear<Cells>(*this, call.tokens, call.dtype);
    const Arguments arguments{plan.arguments(call), static_cast<int>(stage_bytes), plan.threads / 32,
                              static_cast<int>(plan.x_bytes), static_cast<int>(plan.warp_bytes)};
    launch_items("sparse_linear", plan.token_tiles == 1 ? sparse_linear_kernel<Cells, 1> : sparse_linear_kernel<Cells, 2>, plan,
                 arguments, stream);
  });
}

}  // namespace pyllmq::cuda

// sparse24_codebook_linear for one token and codes of 2 bits: what a kept weight adds is one of 16 products of its group of four
// columns, an integer whose bytes go from a table lookup straight into integer tensor cores.
//
// Each warp multiplies the codebooks of its columns with x once, as integers of 16 bits of a unit of its own, in two planes of
// bytes; code + 4 position selects one of a group's 16 as in codebook's linear_byte_planes.cu. One permutation looks up a plane
// for the two kept of rows g and g + 8 of a tile, and what comes out is a register of the first operand of mma.m16n8k32, whose
// other operand only adds: ones for the first two of four slots in one output, for the last two in the next, and two outputs more
// for the other plane:
//
//           slots 4t..4t+3                                       n = 0  1  2  3
//   row g [ row g: first, second; row g + 8: first, second ]         1  .  .  .     low bytes; of the high bytes 2 and 3
//                                                                    1  .  .  .
//                                                                    .  1  .  .
//                                                                    .  1  .  .
//
// A block of 8 warps takes 512 rows (eight strips) and a split of K, of which each warp takes every 8th cell, at most four, and
// streams it strip by strip through a ring of its own. Sums are exact; errors are those of the products (`high`).
#include <stdexcept>
#include <string>

#include "sparse/cuda/stream.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kBlockStrips = 8;
constexpr int kRows = kBlockStrips * kStripRows;
constexpr int kMostWarpCells = 4;  // what a unit spans, and products in shared memory
constexpr int kStages = 4;
constexpr int kCellBytes = 512 + kPositionBytes;
constexpr int kTableBytes = Codes2Cells::kTableBytes;
constexpr int kGroupTableBytes = 32;     // of 16 entries: low bytes, high bytes
constexpr int kMostProduct = 126 * 257;  // either byte is at most 126
constexpr int kPartStride = kRows + 16;  // floats: the two planes lie in different banks

struct Shared {
  Item item;
  Strips work;
  uint32_t arrived;
  float down[kWarps][2];
  alignas(16) uint8_t products[kWarps][kMostWarpCells][kTableBytes];
  alignas(16) uint8_t ring[kWarps][kStages * kCellBytes + 128];
};
static_assert(sizeof(Shared) <= 99 << 10, "what a block gets on compute capability 8.6");
static_assert(sizeof(Shared::ring[0]) >= 2 * kPartStride * 4, "a warp's sums take the place of its ring");

// A permutation gives the sign of what it would select where the selector's top bit is set, 0 or -1: a byte whose fellow in the
// other half of the table is negative is stored larger by one (store_halves in codebook's layout.cpp).
PYLLMQ_DEVICE void store_fellows(int first, int second, uint8_t* to) {
  const bool second_is_negative = second < -1 || (second == -1 && first >= 0);
  first += second_is_negative;
  to[0] = static_cast<uint8_t>(first);
  to[8] = static_cast<uint8_t>(second + (first < 0));
}

// The products of a warp's cells, every 8th from `first` on.
PYLLMQ_DEVICE void multiply_codebooks(const SparseHeader& h, const LinearCall& call, int first, int end, Shared& shared) {
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  const auto product = [&](int cell, int group, int entry) {
    const int64_t column = int64_t{cell} * Codes2Cells::kColumns + group * 4 + entry / 4;
    if (column >= h.columns) return 0.0f;
    const uint8_t* table = section<uint8_t>(h, h.codebook_offset) + int64_t{cell} * kTableBytes + group * kGroupTableBytes;
    return load_element(call.x, static_cast<DType>(call.dtype), column) *
           ptx::fp16_to_fp32(static_cast<uint16_t>(table[entry] | table[16 + entry] << 8));
  };
  const auto for_each_pair = [&](const auto& body) {  // body(number of the warp's cell, group, entry): and its fellow, entry + 8
    for (int cell = first; cell < end; cell += kWarps)
      for (int at = lane; at < kTableBytes / kGroupTableBytes * 8; at += 32) body(cell, at / 8, at % 8);
  };
  float largest = 0.0f, poison = 0.0f;  // a maximum does not see what is not a number
  for_each_pair([&](int cell, int group, int entry) {
    const float one = product(cell, group, entry), other = product(cell, group, entry + 8);
    largest = fmaxf(largest, fmaxf(ptx::magnitude(one), ptx::magnitude(other)));
    poison += (one + other) * 0.0f;
  });
  for (int mask = 16; mask > 0; mask /= 2) {
    largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
    poison += ptx::shuffle_xor(poison, mask);
  }
  const Unit unit = unit_of(largest, kMostProduct);
  for_each_pair([&](int cell, int group, int entry) {
    const auto integer = [&](int e) { return ptx::nearest_integer(product(cell, group, e) * unit.up[0] * unit.up[1]); };
    const int one = integer(entry), other = integer(entry + 8), one_high = (one + 128) >> 8, other_high = (other + 128) >> 8;
    uint8_t* to = shared.products[warp][(cell - first) / kWarps] + group * kGroupTableBytes + entry;
    const auto low = [](int all, int high) { return all - 256 * high < 126 ? all - 256 * high : 126; };  // room for one more
    store_fellows(low(one, one_high), low(other, other_high), to);
    store_fellows(one_high, other_high, to + 16);
  });
  if (lane == 0) {
    shared.down[warp][0] = unit.down[0] + poison;
    shared.down[warp][1] = unit.down[1];
  }
}

// Of a warp: tiles of 16 rows in pairs, by strip.
using ProductSums = int[kBlockStrips][kStripTiles / 2][4];

// A warp's cells through its ring, strip by strip.
PYLLMQ_DEVICE void accumulate(const SparseHeader& h, const LinearCall& call, Shared& shared, ProductSums& sums) {
  const Strips& w = shared.work;
  const int lane = ptx::thread() & 31, warp = ptx::thread() / 32, first = w.cells.begin + warp;
  uint8_t* const ring = shared.ring[warp];
  const auto* base = section<uint8_t>(h, h.data_offset) + int64_t{w.begin} * h.cells * kCellBytes;
  int next_cell = first, next_strip = 0, filled = 0, used = 0;
  const auto fetch = [&] {
    if (next_cell < w.cells.end) {
      const uint8_t* from = base + (int64_t{next_strip} * h.cells + next_cell) * kCellBytes;
      for (int at = lane * 16; at < kCellBytes; at += 512) ptx::copy_async_16<true>(ring + filled + at, from + at);
      if (++next_strip == w.count) {
        next_strip = 0;
        next_cell += kWarps;
      }
    }
    ptx::commit_async();
    filled = filled == (kStages - 1) * kCellBytes ? 0 : filled + kCellBytes;
  };
  for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch();
  ptx::wait_for_previous();
  multiply_codebooks(h, call, first, w.cells.end, shared);
  const uint8_t* products = shared.products[warp][0];
  // Ones for the slots of row g, of row g + 8, for the outputs of a plane.
  const auto ones = [&](int plane) { return lane / 4 == 2 * plane ? 0x0101u : lane / 4 == 2 * plane + 1 ? 0x01010000u : 0u; };
  const uint32_t adds[2][2] = {{ones(0), ones(0)}, {ones(1), ones(1)}};
#pragma unroll 1
  for (int cell = first; cell < w.cells.end; cell += kWarps, products += kTableBytes)
    unrolled<kBlockStrips>([&](int strip) {
      if (strip >= w.count) return;
      fetch();
      ptx::wait_async<kStages - 1>();
      ptx::sync_warp();
      const uint8_t* const stage = ring + used;
      unrolled<2>([&](int step) {
        Words<4> near[2], far[2];  // by plane
        unrolled<2>([&](int plane) {
          near[plane] = load_words<4>(products + (step * 8 + lane % 4) * kGroupTableBytes + 16 * plane);
          far[plane] = load_words<4>(products + (step * 8 + lane % 4 + 4) * kGroupTableBytes + 16 * plane);
        });
        unrolled<kStripTiles / 2>([&](int pair) {
          uint32_t kept[2];
          unrolled<2>([&](int i) { kept[i] = Codes2Cells::indices(stage, step, 2 * pair + i, lane); });
          unrolled<2>([&](int half) {
            if (half == 1) unrolled<2>([&](int i) { kept[i] ^= 0x88888888u; });
            unrolled<2>([&](int plane) {
              uint32_t bytes[4];
              unrolled<2>([&](int i) {
                bytes[i] = ptx::permute(near[plane][2 * half], near[plane][2 * half + 1], kept[i]);
                bytes[2 + i] =
                    ptx::permute(far[plane][2 * half], far[plane][2 * half + 1], ptx::shift_by_multiplying<16>(kept[i]));
              });
              ptx::mma_m16n8k32(sums[strip][pair], bytes, adds[plane]);
            });
          });
        });
      });
      ptx::sync_warp();  // the next fetch overwrites this stage
      used = used == (kStages - 1) * kCellBytes ? 0 : used + kCellBytes;
    });
  ptx::wait_async<0>();  // for groups without copies
  ptx::sync_warp();      // the ring is free
}

// A warp's sums in place of its ring, without units: [plane, row].
PYLLMQ_DEVICE void store_sums(const ProductSums& sums, float* part) {
  const int lane = ptx::thread() % 32, plane = lane % 4;
  if (plane >= 2) return;  // outputs that add nothing
  unrolled<kBlockStrips, kStripTiles / 2>([&](int strip, int pair) {
    unrolled<4>([&](int e) {
      const int row = strip * kStripRows + (2 * pair + e / 2) * 16 + e % 2 * 8 + lane / 4;
      part[plane * kPartStride + row] = static_cast<float>(sums[strip][pair][e]);
    });
  });
}

struct OneToken : SparseStream<Codes2Cells, kBlockStrips, Shared> {
  PYLLMQ_MEMBER static bool serves(const SparseHeader& h, const StreamArguments& a) { return describes_cells(h, a, kCellBytes); }

  PYLLMQ_MEMBER void multiply() const {
    ProductSums sums = {};
    accumulate(h, a.call, shared, sums);
    store_sums(sums, reinterpret_cast<float*>(shared.ring[ptx::thread() / 32]));
  }

  PYLLMQ_MEMBER float sum(int token, int row) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      const float* part = reinterpret_cast<const float*>(shared.ring[warp]) + row;
      sum += (part[kPartStride] * 256.0f + part[0]) * shared.down[warp][0] * shared.down[warp][1];
    }
    return finished(token, row, sum);
  }
  PYLLMQ_MEMBER float* place(int, int row) const { return reinterpret_cast<float*>(shared.ring[0]) + row; }
};

PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) sparse_linear_products_kernel(const StreamArguments a) {
  run_items<OneToken>(a, kThreads);
}

LinearPlan plan_linear(int64_t rows, int64_t columns) {
  LinearPlan plan{};
  plan.set_tokens(1, 1);
  plan.threads = kThreads;
  plan.shared_bytes = sizeof(Shared);
  plan.slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  plan.row_parts = ceil_div(rows, kRows);
  // In a warp's cells; beginning and ending an item cost as much as two.
  const int64_t cells = ceil_div(columns, Codes2Cells::kColumns);
  plan.set_splits(cells, ceil_div(cells, kMostWarpCells * kWarps), 2, [](int64_t of_item) { return ceil_div(of_item, kWarps); });
  return plan;
}

}  // namespace

int64_t SparseProducts::find_room(int64_t tokens, int) const { return plan_linear(rows, columns).partials(tokens, rows); }

void SparseProducts::run(const LinearCall& call, uintptr_t stream) const {
  if (call.tokens > 1) throw std::invalid_argument("products serve one token, here " + std::to_string(call.tokens));
  const LinearPlan plan = plan_linear(rows, columns);
  launch_items("sparse_linear_products", sparse_linear_products_kernel, plan, plan.arguments(call), stream);
}

}  // namespace pyllmq::cuda

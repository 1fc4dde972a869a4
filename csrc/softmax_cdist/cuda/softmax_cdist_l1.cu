// Distances: a block holds a tile of 64 rows of either side x 32 columns of probabilities in shared memory, a thread 4 x 4
// pairs; two additions a pair and column. Gradient: a thread holds one column of 16 rows, one exponential serves 16 pairs.
// Sums of blocks are added in order by one more launch: the same call gives the same bits.
#include "runtime/counting.h"
#include "softmax_cdist/cuda/softmax_cdist_l1.h"

#include <algorithm>

#include "runtime/cuda/runtime.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileRows = 64, kTileColumns = 32;
constexpr int kStride = kTileColumns + 4;  // floats; 8 lanes that read 16 bytes of a row each meet 32 different banks
constexpr int kChunkTiles = 32;            // a sum of 1024 columns joins the total: one chain of 128k would lose 5 bits
constexpr int kSignRows = 16, kStagedOthers = 32;
constexpr int64_t kMostBlocks = 1 << 16;
constexpr int64_t kBlocksPerMultiprocessor = 4;
constexpr int64_t kStagedElements = 8 << 20;  // of h, where the gradient is not fp32: 32 MiB

struct Side {
  const void* logits;
  DType dtype;
  int64_t rows;
  float* statistics;
};

struct Arguments {
  Side x, y;
  int64_t batch, columns;
  float scale;
};

PYLLMQ_DEVICE float probability(const Side& side, int64_t row, int64_t column, int64_t columns, float scale, float top,
                                float inverse_sum) {
  return ptx::exp((load_element(side.logits, side.dtype, row * columns + column) - top) * scale) * inverse_sum;
}

PYLLMQ_DEVICE float larger(float a, float b) { return a > b ? a : b; }

// Of what every thread of the block brings; `shared` has room for kWarps.
template <bool kMaximum>
PYLLMQ_DEVICE float reduce_block(float value, float* shared) {
  PYLLMQ_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = ptx::shuffle_xor(value, mask);
    value = kMaximum ? larger(value, other) : value + other;
  }
  ptx::sync_block();  // an earlier reduction has been read
  if (ptx::thread() % 32 == 0) shared[ptx::thread() / 32] = value;
  ptx::sync_block();
  float all = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) all = kMaximum ? larger(all, shared[warp]) : all + shared[warp];
  return all;
}

// A NaN is passed over by the maximum and comes back through the sum.
PYLLMQ_KERNEL void __launch_bounds__(kThreads)
    row_statistics_kernel(const Side side, int64_t rows, int64_t columns, float scale) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<float*>(memory);
  for (int64_t row = ptx::block(); row < rows; row += ptx::blocks()) {
    float largest = ptx::bits_to_fp32(0xFF800000u);
    for (int64_t column = ptx::thread(); column < columns; column += kThreads)
      largest = larger(load_element(side.logits, side.dtype, row * columns + column), largest);
    largest = reduce_block<true>(largest, shared);
    float sum = 0;
    for (int64_t column = ptx::thread(); column < columns; column += kThreads)
      sum += probability(side, row, column, columns, scale, largest, 1.0f);
    sum = reduce_block<false>(sum, shared);
    if (ptx::thread() == 0) {
      side.statistics[2 * row] = largest;
      side.statistics[2 * row + 1] = 1.0f / sum;
    }
  }
}

struct Shared {
  float p[kTileRows][kStride], q[kTileRows][kStride];
};

PYLLMQ_DEVICE void fill_tile(const Side& side, int64_t batch, int64_t first_row, int64_t first_column, int64_t columns,
                             float scale, float (*tile)[kStride]) {
  const int64_t column = first_column + ptx::thread() % kTileColumns;
  for (int r = ptx::thread() / kTileColumns; r < kTileRows; r += kThreads / kTileColumns) {
    float value = 0;
    if (first_row + r < side.rows && column < columns) {
      const int64_t row = batch * side.rows + first_row + r;
      value = probability(side, row, column, columns, scale, side.statistics[2 * row], side.statistics[2 * row + 1]);
    }
    tile[r][ptx::thread() % kTileColumns] = value;
  }
}

PYLLMQ_KERNEL void __launch_bounds__(kThreads, 2)
    distances_kernel(const Arguments a, float* parts, int64_t splits, int64_t tiles_each) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t x_blocks = (a.x.rows + kTileRows - 1) / kTileRows, y_blocks = (a.y.rows + kTileRows - 1) / kTileRows;
  const int64_t tiles = (a.columns + kTileColumns - 1) / kTileColumns;
  const int mine = ptx::thread() / 16, other = ptx::thread() % 16;
  for (int64_t item = ptx::block(); item < a.batch * x_blocks * y_blocks * splits; item += ptx::blocks()) {
    const int64_t split = item % splits, block = item / splits;
    const int64_t batch = block / (x_blocks * y_blocks);
    const int64_t x_row = block / y_blocks % x_blocks * kTileRows, y_row = block % y_blocks * kTileRows;
    const int64_t tile_end = tiles < (split + 1) * tiles_each ? tiles : (split + 1) * tiles_each;
    float total[4][4] = {}, chunk[4][4] = {};
    for (int64_t tile = split * tiles_each; tile < tile_end; ++tile) {
      ptx::sync_block();  // the tile before has been read
      fill_tile(a.x, batch, x_row, tile * kTileColumns, a.columns, a.scale, shared.p);
      fill_tile(a.y, batch, y_row, tile * kTileColumns, a.columns, a.scale, shared.q);
      ptx::sync_block();
      PYLLMQ_UNROLL
      for (int v = 0; v < kTileColumns; v += 4) {
        Words<4> p[4], q[4];
        unrolled<4>([&](int i) {
          p[i] = load_words<4>(&shared.p[mine + 16 * i][v]);
          q[i] = load_words<4>(&shared.q[other + 16 * i][v]);
        });
        unrolled<4, 4>([&](int i, int j) {
          unrolled<4>([&](int k) { chunk[i][j] += ptx::magnitude(ptx::bits_to_fp32(p[i][k]) - ptx::bits_to_fp32(q[j][k])); });
        });
      }
      if (tile % kChunkTiles == kChunkTiles - 1 || tile == tile_end - 1)
        unrolled<4, 4>([&](int i, int j) {
          total[i][j] += chunk[i][j];
          chunk[i][j] = 0;
        });
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const int64_t row = x_row + mine + 16 * i, column = y_row + other + 16 * j;
        if (row < a.x.rows && column < a.y.rows)
          parts[((split * a.batch + batch) * a.x.rows + row) * a.y.rows + column] = total[i][j];
      }
  }
}

// sums[i] = parts[0][i] + parts[1][i] + ...
PYLLMQ_KERNEL void __launch_bounds__(kThreads)
    add_parts_kernel(const float* parts, float* sums, int64_t parts_count, int64_t count) {
  for (int64_t i = ptx::block() * kThreads + ptx::thread(); i < count; i += ptx::blocks() * kThreads) {
    float sum = 0;
    for (int64_t part = 0; part < parts_count; ++part) sum += parts[part * count + i];
    sums[i] = sum;
  }
}

// Groups of kSignRows rows, counted through the batches; `held` is where h of a row lies.
struct RowGroup {
  int64_t batch, first_row, held;
  int rows;
};
PYLLMQ_DEVICE RowGroup row_group(const Arguments& a, int64_t first_group, int64_t group, bool in_place) {
  const int64_t groups = (a.x.rows + kSignRows - 1) / kSignRows;
  const int64_t batch = (first_group + group) / groups, row = (first_group + group) % groups * kSignRows;
  const int64_t left = a.x.rows - row;
  return {batch, row, in_place ? batch * a.x.rows + row : group * kSignRows,
          static_cast<int>(left < kSignRows ? left : kSignRows)};
}

struct SignShared {
  float weight[kStagedOthers][kSignRows];
  float top[kStagedOthers], inverse_sum[kStagedOthers];
  float dots[kWarps][kSignRows];
};

PYLLMQ_KERNEL void __launch_bounds__(kThreads, 3) signs_kernel(const Arguments a, const float* gradient, float* h, float* dots,
                                                               int64_t first_group, int64_t groups, bool in_place) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  SignShared& shared = *reinterpret_cast<SignShared*>(memory);
  const int64_t column_blocks = (a.columns + kThreads - 1) / kThreads;
  for (int64_t item = ptx::block(); item < groups * column_blocks; item += ptx::blocks()) {
    const RowGroup group = row_group(a, first_group, item / column_blocks, in_place);
    const int64_t column = item % column_blocks * kThreads + ptx::thread();
    const int64_t x_row = group.batch * a.x.rows + group.first_row;
    float p[kSignRows], sums[kSignRows];
    unrolled<kSignRows>([&](int r) {
      sums[r] = p[r] = 0;
      if (r < group.rows && column < a.columns)
        p[r] = probability(a.x, x_row + r, column, a.columns, a.scale, a.x.statistics[2 * (x_row + r)],
                           a.x.statistics[2 * (x_row + r) + 1]);
    });
    for (int64_t first = 0; first < a.y.rows; first += kStagedOthers) {
      const int others = static_cast<int>(a.y.rows - first < kStagedOthers ? a.y.rows - first : kStagedOthers);
      const int64_t y_row = group.batch * a.y.rows + first;
      ptx::sync_block();  // what is staged has been read
      for (int i = ptx::thread(); i < kStagedOthers * kSignRows; i += kThreads) {
        const int r = i / kStagedOthers, j = i % kStagedOthers;
        shared.weight[j][r] = r < group.rows && j < others ? gradient[(x_row + r) * a.y.rows + first + j] : 0;
      }
      if (ptx::thread() < others) {
        shared.top[ptx::thread()] = a.y.statistics[2 * (y_row + ptx::thread())];
        shared.inverse_sum[ptx::thread()] = a.y.statistics[2 * (y_row + ptx::thread()) + 1];
      }
      ptx::sync_block();
      if (column >= a.columns) continue;
      for (int j = 0; j < others; ++j) {
        const float q = probability(a.y, y_row + j, column, a.columns, a.scale, shared.top[j], shared.inverse_sum[j]);
        unrolled<kSignRows>([&](int r) {
          const float difference = p[r] - q;
          const uint32_t negative = ptx::fp32_to_bits(difference) & 0x80000000u;
          const float weight = ptx::bits_to_fp32(ptx::fp32_to_bits(shared.weight[j][r]) ^ negative);
          sums[r] += difference == 0 ? 0 : weight;
        });
      }
    }
    ptx::sync_block();  // the sums of the item before have been read
    unrolled<kSignRows>([&](int r) {
      if (r < group.rows && column < a.columns) h[(group.held + r) * a.columns + column] = sums[r];
      float dot = p[r] * sums[r];
      PYLLMQ_UNROLL
      for (int mask = 16; mask > 0; mask /= 2) dot += ptx::shuffle_xor(dot, mask);
      if (ptx::thread() % 32 == 0) shared.dots[ptx::thread() / 32][r] = dot;
    });
    ptx::sync_block();
    if (ptx::thread() < group.rows) {
      float dot = 0;
      for (int warp = 0; warp < kWarps; ++warp) dot += shared.dots[warp][ptx::thread()];
      dots[item % column_blocks * a.batch * a.x.rows + x_row + ptx::thread()] = dot;
    }
  }
}

PYLLMQ_KERNEL void __launch_bounds__(kThreads)
    softmax_gradient_kernel(const Arguments a, const float* h, const float* dots, void* out, int64_t first_group, int64_t groups,
                            bool in_place) {
  const int64_t column_blocks = (a.columns + kThreads - 1) / kThreads;
  for (int64_t item = ptx::block(); item < groups * column_blocks; item += ptx::blocks()) {
    const RowGroup group = row_group(a, first_group, item / column_blocks, in_place);
    const int64_t column = item % column_blocks * kThreads + ptx::thread();
    if (column >= a.columns) continue;
    for (int r = 0; r < group.rows; ++r) {
      const int64_t row = group.batch * a.x.rows + group.first_row + r;
      const float p = probability(a.x, row, column, a.columns, a.scale, a.x.statistics[2 * row], a.x.statistics[2 * row + 1]);
      store_element(out, a.x.dtype, row * a.columns + column,
                    p * (h[(group.held + r) * a.columns + column] - dots[row]) * a.scale);
    }
  }
}

Arguments arguments(const CdistCall& call) {
  return {{call.x, static_cast<DType>(call.x_dtype), call.x_rows, call.x_statistics},
          {call.y, static_cast<DType>(call.y_dtype), call.y_rows, call.y_statistics},
          call.batch,
          call.columns,
          call.scale};
}

struct ForwardPlan {
  int64_t blocks, splits, tiles_each;
};

ForwardPlan plan_forward(const CdistCall& call) {
  const int64_t blocks = call.batch * ceil_div(call.x_rows, kTileRows) * ceil_div(call.y_rows, kTileRows);
  const int64_t tiles = ceil_div(call.columns, kTileColumns);
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * multiprocessors(), blocks);
  const int64_t tiles_each = ceil_div(tiles, std::min(wanted, tiles));
  return {blocks, ceil_div(tiles, tiles_each), tiles_each};
}

struct BackwardPlan {
  bool in_place;
  int64_t groups, at_once, column_blocks;
};

BackwardPlan plan_backward(const CdistCall& call) {
  const bool in_place = call.x_dtype == 0;
  const int64_t groups = call.batch * ceil_div(call.x_rows, kSignRows);
  const int64_t fit = std::max<int64_t>(1, kStagedElements / (kSignRows * call.columns));
  return {in_place, groups, in_place ? groups : std::min(groups, fit), ceil_div(call.columns, kThreads)};
}

void add_parts(const float* parts, float* sums, int64_t parts_count, int64_t count, uintptr_t stream) {
  PYLLMQ_LAUNCH(add_parts_kernel, std::min(ceil_div(count, kThreads), kMostBlocks), kThreads, 0, stream, parts, sums, parts_count,
                count);
}

}  // namespace

int64_t softmax_cdist_l1_workspace(const CdistCall& call) {
  return plan_forward(call).splits * call.batch * call.x_rows * call.y_rows;
}

int64_t softmax_cdist_l1_backward_workspace(const CdistCall& call) {
  const BackwardPlan plan = plan_backward(call);
  const int64_t staged = plan.in_place ? 0 : plan.at_once * kSignRows * call.columns;
  return staged + (plan.column_blocks + 1) * call.batch * call.x_rows;
}

void softmax_cdist_l1(const CdistCall& call, float* distances, float* workspace, uintptr_t stream) {
  const Arguments a = arguments(call);
  for (const Side& side : {a.x, a.y}) {
    const int64_t rows = a.batch * side.rows;
    PYLLMQ_LAUNCH(row_statistics_kernel, std::min(rows, kMostBlocks), kThreads, kWarps * sizeof(float), stream, side, rows,
                  a.columns, a.scale);
  }
  const ForwardPlan plan = plan_forward(call);
  PYLLMQ_LAUNCH(distances_kernel, std::min(plan.blocks * plan.splits, kMostBlocks), kThreads, sizeof(Shared), stream, a,
                workspace, plan.splits, plan.tiles_each);
  add_parts(workspace, distances, plan.splits, a.batch * a.x.rows * a.y.rows, stream);
  check_launch("softmax_cdist_l1");
}

void softmax_cdist_l1_backward(const CdistCall& call, const float* gradient, void* x_gradient, float* workspace,
                               uintptr_t stream) {
  const Arguments a = arguments(call);
  const BackwardPlan plan = plan_backward(call);
  const int64_t rows = a.batch * a.x.rows;
  float* dots = workspace;
  float* dot_parts = dots + rows;
  float* h = plan.in_place ? static_cast<float*>(x_gradient) : dot_parts + plan.column_blocks * rows;
  for (int64_t first = 0; first < plan.groups; first += plan.at_once) {
    const int64_t groups = std::min(plan.at_once, plan.groups - first);
    const int64_t grid = std::min(groups * plan.column_blocks, kMostBlocks);
    PYLLMQ_LAUNCH(signs_kernel, grid, kThreads, sizeof(SignShared), stream, a, gradient, h, dot_parts, first, groups,
                  plan.in_place);
    add_parts(dot_parts, dots, plan.column_blocks, rows, stream);  // of rows not yet done, too: they are written again
    PYLLMQ_LAUNCH(softmax_gradient_kernel, grid, kThreads, 0, stream, a, h, dots, x_gradient, first, groups, plan.in_place);
  }
  check_launch("softmax_cdist_l1_backward");
}

}  // namespace pyllmq::cuda

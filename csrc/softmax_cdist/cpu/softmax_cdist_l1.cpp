#include "softmax_cdist/cpu/softmax_cdist_l1.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "codebook/cpu/linear.h"
#include "runtime/counting.h"
#include "runtime/isa.h"
#include "runtime/thread_pool.h"
#include "runtime/workspace.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kRows = kCdistTileRows, kColumns = kCdistTileColumns;
constexpr double kNsPerExponential = 0.4, kNsPerPair = 0.05, kNsPerSign = 0.08;
constexpr int64_t kWantedTasks = 64;  // so that many cores share one 64 x 64 block of distances
// h of a gradient that is not fp32 lies in a buffer of its own: this many rows of it at a time (or as many as fit in
// kStagedBytes), because a buffer for all of them would be as large as the gradient.
constexpr int64_t kStagedRows = 16, kStagedBytes = 4 << 20;

const SoftmaxCdistKernels& cdist_kernels() {
  return by_isa([]<Isa isa>() -> const SoftmaxCdistKernels& { return softmax_cdist_kernels<isa>(); });
}

int whole_groups(int64_t rows) { return static_cast<int>(rounded_up(rows, kCdistRowGroup)); }

// Columns [begin, begin + count) of a row in fp32: where they lie, or converted into `converted`.
const float* row_in_fp32(const Logits& logits, int64_t row, int64_t columns, int64_t begin, int64_t count, float* converted) {
  const auto* from = static_cast<const uint8_t*>(logits.values) + (row * columns + begin) * element_bytes(logits.dtype);
  if (logits.dtype == DType::fp32) return reinterpret_cast<const float*>(from);
  row_kernels().to_fp32[static_cast<int>(logits.dtype)](from, converted, count);
  return converted;
}

void row_statistics(const SoftmaxCdistProblem& problem, const SoftmaxCdistKernels& kernels, const Logits& logits) {
  const int64_t rows = problem.batch * logits.rows, columns = problem.columns;
  parallel_for(rows, 1, kNsPerExponential * rows * columns, [&](int64_t row_begin, int64_t row_end) {
    alignas(64) float converted[kColumns];
    for (int64_t row = row_begin; row < row_end; ++row) {
      const auto tiles = [&](auto&& visit) {
        for (int64_t begin = 0; begin < columns; begin += kColumns) {
          const int64_t count = std::min(kColumns, columns - begin);
          visit(row_in_fp32(logits, row, columns, begin, count, converted), count);
        }
      };
      float largest = -std::numeric_limits<float>::infinity();
      tiles([&](const float* x, int64_t count) { largest = std::max(largest, kernels.largest(x, count)); });
      double sum = 0;
      tiles([&](const float* x, int64_t count) {
        sum += kernels.sum_of_exponentials(x, count, largest, problem.inverse_temperature);
      });
      logits.statistics[row] = {largest, static_cast<float>(1 / sum)};
    }
  });
}

// Probabilities of rows [first, first + rows) of one batch, padded with zeros to whole groups and kColumns.
void fill_tile(const SoftmaxCdistProblem& problem, const SoftmaxCdistKernels& kernels, const Logits& logits, int64_t first,
               int64_t rows, int64_t begin, int64_t count, float* tile) {
  for (int64_t r = 0; r < whole_groups(rows); ++r) {
    float* p = tile + r * kColumns;
    const int64_t filled = r < rows ? count : 0;
    if (filled > 0) {
      const float* x = row_in_fp32(logits, first + r, problem.columns, begin, count, p);
      kernels.probabilities(x, count, logits.statistics[first + r], problem.inverse_temperature, p);
    }
    std::fill(p + filled, p + kColumns, 0.0f);
  }
}

// A stretch of tiles of columns, for a block of rows of x and one of y.
struct ForwardTask {
  int64_t batch, x_row, y_row, tile_begin, tile_end;
};

void add_distances(const SoftmaxCdistProblem& problem, const SoftmaxCdistKernels& kernels, const ForwardTask& task,
                   double* distances) {
  thread_local Workspace workspace;
  workspace.reserve(2 * Workspace::need<float>(kRows * kColumns) + Workspace::need<float>(kRows * kRows) +
                    2 * Workspace::need<float>(kRows));
  auto *p = workspace.take<float>(kRows * kColumns), *q = workspace.take<float>(kRows * kColumns);
  auto* overlaps = workspace.take<float>(kRows * kRows);
  auto *p_sums = workspace.take<float>(kRows), *q_sums = workspace.take<float>(kRows);
  const int64_t x_rows = std::min(kRows, problem.x.rows - task.x_row);
  const int64_t y_rows = std::min(kRows, problem.y.rows - task.y_row);
  for (int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
    const int64_t begin = tile * kColumns, count = std::min(kColumns, problem.columns - begin);
    fill_tile(problem, kernels, problem.x, task.batch * problem.x.rows + task.x_row, x_rows, begin, count, p);
    fill_tile(problem, kernels, problem.y, task.batch * problem.y.rows + task.y_row, y_rows, begin, count, q);
    kernels.row_sums(p, static_cast<int>(x_rows), p_sums);
    kernels.row_sums(q, static_cast<int>(y_rows), q_sums);
    kernels.overlaps(p, whole_groups(x_rows), q, whole_groups(y_rows), overlaps);
    for (int64_t i = 0; i < x_rows; ++i)
      for (int64_t j = 0; j < y_rows; ++j)
        distances[i * kRows + j] += static_cast<double>(p_sums[i]) + q_sums[j] - 2.0 * overlaps[i * kRows + j];
  }
}

}  // namespace

void softmax_cdist_l1(const SoftmaxCdistProblem& problem, float* distances) {
  const SoftmaxCdistKernels& kernels = cdist_kernels();
  row_statistics(problem, kernels, problem.x);
  row_statistics(problem, kernels, problem.y);

  const int64_t tiles = ceil_div(problem.columns, kColumns);
  const int64_t x_blocks = ceil_div(problem.x.rows, kRows), y_blocks = ceil_div(problem.y.rows, kRows);
  const int64_t blocks = problem.batch * x_blocks * y_blocks;
  if (blocks == 0) return;
  const int64_t tiles_each = ceil_div(tiles, std::clamp<int64_t>(kWantedTasks / blocks, 1, tiles));
  const int64_t stretches = ceil_div(tiles, tiles_each);
  const auto task_of = [&](int64_t block, int64_t stretch) {
    return ForwardTask{block / (x_blocks * y_blocks), block / y_blocks % x_blocks * kRows, block % y_blocks * kRows,
                       stretch * tiles_each, std::min(tiles, (stretch + 1) * tiles_each)};
  };
  const double cost_ns = static_cast<double>(problem.batch) * problem.columns *
                         (kNsPerPair * problem.x.rows * problem.y.rows +
                          kNsPerExponential * (problem.x.rows * y_blocks + problem.y.rows * x_blocks));
  const auto store = [&](const ForwardTask& task, const double* sums) {
    for (int64_t i = 0; i < std::min(kRows, problem.x.rows - task.x_row); ++i)
      for (int64_t j = 0; j < std::min(kRows, problem.y.rows - task.y_row); ++j)
        distances[(task.batch * problem.x.rows + task.x_row + i) * problem.y.rows + task.y_row + j] =
            static_cast<float>(sums[i * kRows + j]);
  };
  if (stretches == 1) {
    parallel_for(blocks, 1, cost_ns, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(kRows * kRows);
      for (int64_t block = begin; block < end; ++block) {
        std::fill(sums.begin(), sums.end(), 0.0);
        const ForwardTask task = task_of(block, 0);
        add_distances(problem, kernels, task, sums.data());
        store(task, sums.data());
      }
    });
    return;
  }
  std::vector<double> parts(blocks * stretches * kRows * kRows);  // at most 64 of 32 KiB
  parallel_for(blocks * stretches, 1, cost_ns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      add_distances(problem, kernels, task_of(i / stretches, i % stretches), &parts[i * kRows * kRows]);
  });
  for (int64_t block = 0; block < blocks; ++block) {
    double* sums = &parts[block * stretches * kRows * kRows];
    for (int64_t stretch = 1; stretch < stretches; ++stretch)
      for (int64_t i = 0; i < kRows * kRows; ++i) sums[i] += sums[stretch * kRows * kRows + i];
    store(task_of(block, 0), sums);
  }
}

// --- backward ------------------------------------------------------------------------------------------------------

namespace {

// Rows of x of one batch that are done together.
struct RowBlock {
  int64_t batch, x_row, rows;
};

// One tile of h, and the part of <p, h> that lies in it.
void write_h(const SoftmaxCdistProblem& problem, const SoftmaxCdistKernels& kernels, const RowBlock& block, int64_t tile,
             const float* gradient, float* h_rows, double* dots) {
  thread_local Workspace workspace;
  workspace.reserve(3 * Workspace::need<float>(kRows * kColumns) + Workspace::need<float>(kRows * kRows));
  auto *p = workspace.take<float>(kRows * kColumns), *q = workspace.take<float>(kRows * kColumns);
  auto *h = workspace.take<float>(kRows * kColumns), *weights = workspace.take<float>(kRows * kRows);
  const int64_t begin = tile * kColumns, count = std::min(kColumns, problem.columns - begin);
  const int64_t x_first = block.batch * problem.x.rows + block.x_row, y_first = block.batch * problem.y.rows;
  fill_tile(problem, kernels, problem.x, x_first, block.rows, begin, count, p);
  std::fill(h, h + kRows * kColumns, 0.0f);
  std::fill(weights, weights + kRows * kRows, 0.0f);
  for (int64_t y_row = 0; y_row < problem.y.rows; y_row += kRows) {
    const int64_t y_rows = std::min(kRows, problem.y.rows - y_row);
    fill_tile(problem, kernels, problem.y, y_first + y_row, y_rows, begin, count, q);
    for (int64_t i = 0; i < block.rows; ++i)
      std::copy_n(gradient + (x_first + i) * problem.y.rows + y_row, y_rows, weights + i * kRows);
    kernels.add_signs(p, whole_groups(block.rows), q, static_cast<int>(y_rows), weights, h);
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    dots[i] = kernels.dot(p + i * kColumns, h + i * kColumns);
    std::copy_n(h + i * kColumns, count, h_rows + i * problem.columns + begin);
  }
}

// h -> gradient, one row.
void finish_row(const SoftmaxCdistProblem& problem, const SoftmaxCdistKernels& kernels, int64_t row, const float* h, double dot,
                void* x_gradient) {
  const DType dtype = problem.x.dtype;
  const int64_t columns = problem.columns;
  auto* to = static_cast<uint8_t*>(x_gradient) + row * columns * element_bytes(dtype);
  alignas(64) float p[kColumns], staged[kColumns];
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t count = std::min(kColumns, columns - begin);
    const float* x = row_in_fp32(problem.x, row, columns, begin, count, p);
    kernels.probabilities(x, count, problem.x.statistics[row], problem.inverse_temperature, p);
    float* out = dtype == DType::fp32 ? reinterpret_cast<float*>(to) + begin : staged;
    kernels.softmax_gradient(p, h + begin, count, static_cast<float>(dot), problem.inverse_temperature, out);
    if (dtype != DType::fp32) row_kernels().from_fp32[static_cast<int>(dtype)](staged, to + begin * element_bytes(dtype), count);
  }
}

}  // namespace

void softmax_cdist_l1_backward(const SoftmaxCdistProblem& problem, const float* gradient, void* x_gradient) {
  const SoftmaxCdistKernels& kernels = cdist_kernels();
  const bool in_place = problem.x.dtype == DType::fp32;
  const int64_t columns = problem.columns, tiles = ceil_div(columns, kColumns);
  const int64_t rows_each = in_place ? kRows : kStagedRows;
  std::vector<RowBlock> blocks;
  for (int64_t batch = 0; batch < problem.batch; ++batch)
    for (int64_t row = 0; row < problem.x.rows; row += rows_each)
      blocks.push_back({batch, row, std::min(rows_each, problem.x.rows - row)});
  const int64_t all = static_cast<int64_t>(blocks.size());
  const int64_t at_once =
      in_place ? all : std::max<int64_t>(1, kStagedBytes / static_cast<int64_t>(sizeof(float) * kStagedRows * columns));

  std::vector<float> staged(in_place ? 0 : std::min(at_once, all) * kStagedRows * columns);
  for (int64_t first = 0; first < all; first += at_once) {
    const int64_t count = std::min(at_once, all - first);
    const auto h_of = [&](int64_t i) {
      const RowBlock& block = blocks[first + i];
      return in_place ? static_cast<float*>(x_gradient) + (block.batch * problem.x.rows + block.x_row) * columns
                      : staged.data() + i * kStagedRows * columns;
    };
    std::vector<double> dots(count * tiles * rows_each);
    const double pairs = static_cast<double>(count) * rows_each * columns * problem.y.rows;
    parallel_for(count * tiles, 1, kNsPerSign * pairs, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        write_h(problem, kernels, blocks[first + i / tiles], i % tiles, gradient, h_of(i / tiles), &dots[i * rows_each]);
    });
    const double elements = static_cast<double>(count) * rows_each * columns;
    parallel_for(count * rows_each, 1, kNsPerExponential * elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const RowBlock& block = blocks[first + i / rows_each];
        const int64_t r = i % rows_each;
        if (r >= block.rows) continue;
        double dot = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) dot += dots[(i / rows_each * tiles + tile) * rows_each + r];
        finish_row(problem, kernels, block.batch * problem.x.rows + block.x_row + r, h_of(i / rows_each) + r * columns, dot,
                   x_gradient);
      }
    });
  }
}

}  // namespace pyllmq::cpu

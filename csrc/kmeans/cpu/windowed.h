// Nearly optimal 1-D k-means at a small part of the cost: optimal over cells of points, then optimal within windows
// around the cells' bounds, moved until no bound touches the edge of its window.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kmeans/cpu/points.h"
#include "kmeans/cpu/program.h"

namespace pyllmq::cpu {

constexpr int64_t kCells = 128;      // at least
constexpr int64_t kCellsPerK = 12;   // at least
constexpr int64_t kWindowCells = 3;  // a window reaches that many cells to both sides
constexpr int64_t kMinReach = 4;     // and at least that many points

inline int64_t cells_for(int k_max) { return std::max<int64_t>(kCells, kCellsPerK * k_max); }

// x^(2/3) for x > 0 within a few percent, by its exponent: a float's bits are nearly its logarithm.
inline float two_thirds_power(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = static_cast<int32_t>(static_cast<float>(bits) * (2.0f / 3.0f)) + 0x152AAAAA;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float sum_of_eight(const float* x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

// Bounds of at most `cells` cells, from edges[0] = 0 to edges[result] = points.count. Optimal clusters lie as densely as
// the cube root of the density of points, which is a sum of gaps^(2/3); a far outlier would get all cells by that, so
// every fourth is one of equal numbers of points. `steps` is scratch of points.count.
inline int64_t cell_edges(const Points& points, int64_t cells, float* steps, int64_t* edges) {
  const int64_t m = points.count, eights = (m - 1) / 8 * 8;
  for (int64_t i = 0; i < m - 1; ++i) steps[i] = two_thirds_power(points.value[i + 1] - points.value[i]);
  double total = 0;
  for (int64_t i = 0; i < eights; i += 8) total += sum_of_eight(steps + i);
  for (int64_t i = eights; i < m - 1; ++i) total += steps[i];
  const double width = total / (cells - cells / 4), number = static_cast<double>(m) / (cells / 4);
  double sum = 0, next_width = width, next_number = number;
  int64_t count = 0;
  edges[0] = 0;
  for (int64_t i = 1; i < m && count < cells - 1;) {
    if (i + 7 < m) {  // most eights hold no edge
      const double after = sum + sum_of_eight(steps + i - 1);
      if (after < next_width && i + 7 < next_number) {
        sum = after;
        i += 8;
        continue;
      }
    }
    for (const int64_t stop = std::min(i + 8, m); i < stop && count < cells - 1; ++i) {
      sum += steps[i - 1];
      if (sum < next_width && i < next_number) continue;
      edges[++count] = i;
      if (sum >= next_width) next_width += width * std::floor((sum - next_width) / width + 1);
      if (i >= next_number) next_number += number;
    }
  }
  edges[++count] = m;
  return count;
}

// Cells and their dynamic program, run once, then bounds for any number of clusters.
template <typename Index>
class Windowed {
 public:
  static int64_t bytes(int64_t count, int k_max) {
    const int64_t cells = cells_for(k_max);
    return Program<uint16_t>::bytes(cells, k_max) + Program<Index>::bytes(count, k_max) + Workspace::need<float>(count) +
           3 * Workspace::need<int64_t>(cells + 1) + 4 * Workspace::need<int64_t>(k_max + 1) +
           2 * Workspace::need<double>(cells + 1 + kLanes);
  }

  // k_max at most the number of cells, and that below the number of points.
  Windowed(const Points& points, const double* inverse, int k_max, const SplitKernels& kernels, const SplitKernels& cell_kernels,
           Workspace& workspace)
      : points_(points),
        edges_(workspace.take<int64_t>(cells_for(k_max) + 1)),
        low_(workspace.take<int64_t>(k_max + 1)),
        high_(workspace.take<int64_t>(k_max + 1)),
        below_(workspace.take<int64_t>(k_max + 1)),
        above_(workspace.take<int64_t>(k_max + 1)),
        cells_(cell_edges(points, cells_for(k_max), workspace.take<float>(points.count), edges_)),
        cell_program_(cell_bounds(workspace, k_max), k_max, cell_kernels, workspace),
        program_({points.count, points.sum, points.mass, points.uniform ? inverse : nullptr}, k_max, kernels, workspace) {
    cell_program_.run(static_cast<int>(std::min<int64_t>(k_max, cells_)));
  }

  int64_t cells() const { return cells_; }

  void solve(int k, int64_t* bounds) {
    const int64_t m = points_.count;
    cell_program_.trace(k, bounds);
    for (int c = 1; c < k; ++c) {
      const int64_t cell = bounds[c];
      bounds[c] = edges_[cell];
      below_[c] = std::max(kMinReach, bounds[c] - edges_[std::max<int64_t>(cell - kWindowCells, 0)]);
      above_[c] = std::max(kMinReach, edges_[std::min(cell + kWindowCells, cells_)] - bounds[c]);
    }
    bounds[k] = m;
    for (bool moved = true; moved;) {
      low_[0] = 0;
      for (int c = 1; c < k; ++c) {
        low_[c] = std::max({bounds[c] - below_[c], low_[c - 1] + 1});
        high_[c] = std::min(bounds[c] + above_[c], m - (k - c));
      }
      low_[k] = high_[k] = m;
      program_.run_within(k, low_, high_);
      program_.trace(k, bounds);
      moved = false;
      for (int c = 1; c < k; ++c) {
        const bool at_low = bounds[c] == low_[c] && low_[c] > c, at_high = bounds[c] == high_[c] && high_[c] < m - (k - c);
        if (!at_low && !at_high) continue;
        below_[c] *= 2;
        above_[c] *= 2;
        moved = true;
      }
    }
  }

 private:
  Bounds cell_bounds(Workspace& workspace, int k_max) {
    auto* sum = workspace.take<double>(cells_for(k_max) + 1 + kLanes);
    auto* mass = workspace.take<double>(cells_for(k_max) + 1 + kLanes);
    for (int64_t i = 0; i <= cells_; ++i) {
      sum[i] = points_.sum[edges_[i]];
      mass[i] = points_.mass[edges_[i]];
    }
    return {cells_, sum, mass, nullptr};
  }

  const Points& points_;
  int64_t *edges_, *low_, *high_, *below_, *above_;
  int64_t cells_;
  Program<uint16_t> cell_program_;
  Program<Index> program_;
};

}  // namespace pyllmq::cpu

// Nearly optimal 1-D k-means at a small part of the cost: optimal over cells of points, then optimal within windows
// around the cells' bounds, moved until no bound touches the edge of its window.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kmeans_1d_points.h"
#include "cpu/kmeans_1d_program.h"

namespace pyllmq::cpu {

constexpr int64_t kCells = 128;      // at least; half of equal mass, half of equal width, so that tails get cells, too
constexpr int64_t kCellsPerK = 12;   // at least
constexpr int64_t kWindowCells = 4;  // a window reaches that many cells to both sides
constexpr int64_t kMinReach = 4;     // points

inline int64_t cells_for(int k_max) { return std::max<int64_t>(kCells, kCellsPerK * k_max); }

// How many entries of `ascending` are below `value`; without branches, since they would be mispredicted.
template <typename T>
int64_t count_below(const T* ascending, int64_t count, double value) {
  const T* at = ascending;
  while (count > 1) {
    const int64_t half = count / 2;
    at += at[half - 1] < value ? half : 0;
    count -= half;
  }
  return at - ascending + (count == 1 && *at < value);
}

// Bounds of at most `cells` cells, from edges[0] = 0 to edges[result] = points.count.
inline int64_t cell_edges(const Points& points, int64_t cells, int64_t* edges) {
  const int64_t m = points.count, half = cells / 2;
  const double low = points.value[0], width = (static_cast<double>(points.value[m - 1]) - low) / half;
  const double mass = points.mass[m] / half;
  const auto by_mass = [&](int64_t i) { return count_below(points.mass, m, mass * i); };
  const auto by_width = [&](int64_t i) { return count_below(points.value, m, low + width * i); };
  int64_t count = 0;
  edges[0] = 0;
  for (int64_t i = 1, j = 1, of_mass = by_mass(1), of_width = by_width(1); i < half || j < half;) {
    const bool mass_next = j == half || (i < half && of_mass <= of_width);
    const int64_t edge = std::min(mass_next ? of_mass : of_width, m - 1);
    if (edge > edges[count]) edges[++count] = edge;
    if (mass_next) {
      if (++i < half) of_mass = by_mass(i);
    } else {
      if (++j < half) of_width = by_width(j);
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
    return Program<uint16_t>::bytes(cells, k_max) + Program<Index>::bytes(count, k_max) +
           3 * Workspace::need<int64_t>(cells + 1) + 4 * Workspace::need<int64_t>(k_max + 1) +
           2 * Workspace::need<double>(cells + 1 + kLanes);
  }

  // k_max at most the number of cells, and that below the number of points.
  Windowed(const Points& points, const double* inverse, int k_max, const SplitKernels& kernels, Workspace& workspace)
      : points_(points),
        edges_(workspace.take<int64_t>(cells_for(k_max) + 1)),
        low_(workspace.take<int64_t>(k_max + 1)),
        high_(workspace.take<int64_t>(k_max + 1)),
        below_(workspace.take<int64_t>(k_max + 1)),
        above_(workspace.take<int64_t>(k_max + 1)),
        cells_(cell_edges(points, cells_for(k_max), edges_)),
        cell_program_(cell_bounds(workspace, k_max), k_max, kernels, workspace),
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

// The dynamic program of optimal 1-D k-means, over points or over cells of points.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kmeans/cpu/split.h"
#include "runtime/workspace.h"

namespace pyllmq::cpu {

constexpr int64_t kWideRange = 64;  // a group of ends with more candidates than this is halved once more

// Prefix sums at `count` + 1 possible bounds; mass[i] = i and `inverse` is given, or `mass` is read.
struct Bounds {
  int64_t count;
  const double* sum;
  const double* mass;
  const double* inverse;
};

// One layer: for the ends lo .. hi the best last cluster, one cluster more than `terms.gain` has.
template <typename Index>
struct Layer {
  SplitTerms terms;
  const SplitKernels& kernels;
  double* next_gain;
  const Index* before;  // best splits of the layer before, a lower bound on this one's; or null
  Index* best;

  // The best splits lie in first .. last, first < lo.
  void solve(int64_t lo, int64_t hi, int64_t first, int64_t last) const {
    while (lo <= hi) {
      const int64_t ends = hi - lo + 1;
      // The bound by the layer before saves 25 % of the candidates at k = 16.
      const int64_t from = before ? std::max<int64_t>(first, before[lo]) : first;
      if (ends <= kGroup && last < lo && last - from <= kWideRange) return solve_group(lo, hi, std::min(from, last), last);
      // A middle that leaves whole groups of 8 with a single end between two of them.
      const int64_t step = kGroup + 1;
      const int64_t end = ends <= kGroup ? lo + ends / 2 : lo + std::max<int64_t>(1, (ends + 1) / step / 2) * step - 1;
      const Split split = solve_one(end, first, last);
      solve(lo, end - 1, first, split.at);
      lo = end + 1;
      first = split.at;
    }
  }

  Split solve_one(int64_t end, int64_t first, int64_t last) const {
    const int64_t to = std::min(last, end - 1);
    const int64_t from = before ? std::max<int64_t>(first, before[end]) : first;
    const Split split = kernels.one(terms, end, std::min(from, to), to);
    next_gain[end] = split.gain;
    best[end] = static_cast<Index>(split.at);
    return split;
  }

  void solve_group(int64_t lo, int64_t hi, int64_t first, int64_t last) const {
    double gains[kGroup];
    int64_t ats[kGroup];
    kernels.group(terms, lo, first, last, gains, ats);
    for (int64_t i = 0; i <= hi - lo; ++i) {
      next_gain[lo + i] = gains[i];
      best[lo + i] = static_cast<Index>(ats[i]);
    }
  }
};

// Every layer up to k_max clusters, and the optimal bounds of each number of clusters.
template <typename Index>
class Program {
 public:
  static int64_t bytes(int64_t count, int k_max) {
    return 2 * Workspace::need<double>(count + 1 + kGroup) + Workspace::need<Index>((count + 1) * (k_max + 1));
  }
  Program(const Bounds& bounds, int k_max, const SplitKernels& kernels, Workspace& workspace)
      : bounds_(bounds),
        kernels_(kernels),
        gain_(workspace.take<double>(bounds.count + 1 + kGroup)),
        next_gain_(workspace.take<double>(bounds.count + 1 + kGroup)),
        best_(workspace.take<Index>((bounds.count + 1) * (k_max + 1))) {}

  // All layers up to k_max <= count clusters.
  void run(int k_max) {
    const int64_t m = bounds_.count;
    first_layer(1, m);
    for (int clusters = 2; clusters <= k_max; ++clusters) {
      const Index* before = clusters > 2 ? row(clusters - 1) : nullptr;
      const Layer<Index> layer{terms(), kernels_, next_gain_, before, row(clusters)};
      if (clusters < k_max) {
        layer.solve(clusters, m, clusters - 1, m - 1);
      } else {
        layer.solve_one(m, clusters - 1, m - 1);
      }
      std::swap(gain_, next_gain_);
    }
  }

  // bounds[1 .. k - 1] within low .. high, each range non-empty, low rising strictly, high < the next high.
  void run_within(int k, const int64_t* low, const int64_t* high) {
    first_layer(low[1], high[1]);
    for (int clusters = 2; clusters <= k; ++clusters) {
      const Layer<Index> layer{terms(), kernels_, next_gain_, nullptr, row(clusters)};
      layer.solve(low[clusters], high[clusters], low[clusters - 1], high[clusters - 1]);
      std::swap(gain_, next_gain_);
    }
  }

  // Writes bounds[0 .. k]: cluster c is [bounds[c], bounds[c + 1]).
  void trace(int k, int64_t* bounds) const {
    bounds[k] = bounds_.count;
    for (int clusters = k; clusters >= 2; --clusters) bounds[clusters - 1] = row(clusters)[bounds[clusters]];
    bounds[0] = 0;
  }

 private:
  Index* row(int clusters) const { return best_ + clusters * (bounds_.count + 1); }
  SplitTerms terms() const { return {gain_, bounds_.sum, bounds_.mass, bounds_.inverse}; }

  void first_layer(int64_t low, int64_t high) {
    gain_[0] = 0;
    for (int64_t i = low; i <= high; ++i) {
      gain_[i] = bounds_.sum[i] * bounds_.sum[i] / (bounds_.inverse ? static_cast<double>(i) : bounds_.mass[i]);
    }
  }

  Bounds bounds_;
  const SplitKernels& kernels_;
  double *gain_, *next_gain_;
  Index* best_;
};

}  // namespace pyllmq::cpu

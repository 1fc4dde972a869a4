// The sorted values of one k-means problem and their prefix sums.
#pragma once

#include <cstdint>

#include "runtime/workspace.h"

namespace pyllmq::cpu {

constexpr int64_t kLanes = 8;  // entries behind the prefix sums and gains that vector loads may touch

// The distinct values of positive weight, ascending. Cluster [a, b) has the mass mass[b] - mass[a].
struct Points {
  int64_t count;
  const float* value;
  const double* weight;  // null: no weights were given, point i weighs mass[i + 1] - mass[i], exactly
  const double* mass;    // [count + 1]
  const double* sum;     // [count + 1], of weight * (value - shift)
  double shift;          // a float near the mean, so that value - shift is exact and sums do not cancel
  bool uniform;          // mass[i] = i

  double weight_of(int64_t i) const { return weight ? weight[i] : mass[i + 1] - mass[i]; }
  double centered(int64_t i) const { return value[i] - shift; }
};

int64_t points_bytes(int64_t n, bool weighted);
Points gather_points(const float* values, const float* weights, int64_t n, Workspace& workspace);

}  // namespace pyllmq::cpu

// Batches of problems that share a vector, one to a lane.
#pragma once
#include <algorithm>
#include <cstdint>

#include "runtime/counting.h"
#include "runtime/thread_pool.h"
#include "runtime/workspace.h"
#include "sinkhorn/cpu/sinkhorn.h"

namespace pyllmq::cpu {

constexpr double kNsPerEntry = 0.15;  // of a matrix in one pass over it, on one thread

// body(first problem, how many lanes have one, room), which is so many floats, for each group of the batch.
template <class Body>
void for_lane_groups(int64_t problems, int64_t floats, double cost_ns, const Body& body) {
  constexpr int64_t grain = 4;
  const int64_t width = sinkhorn_kernels().small_width;
  parallel_for(ceil_div(problems, width), grain, cost_ns, [&](int64_t begin, int64_t end) {
    thread_local Workspace workspace;
    for (int64_t first = begin * width; first < std::min(end * width, problems); first += width) {
      workspace.reserve(Workspace::need<float>(floats));
      body(first, std::min(width, problems - first), workspace.take<float>(floats));
    }
  });
}

}  // namespace pyllmq::cpu

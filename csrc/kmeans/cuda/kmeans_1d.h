// The layers of the dynamic program of 1-D k-means, a block per problem; docs/kernels-kmeans.md.
#pragma once
#include <cstdint>

namespace pyllmq::cuda {

// sums, masses: [problems, n + 1] prefix sums of sorted points. best: out [problems, k_max + 1, n + 1]; entry (l, end) is
// where the last of l clusters of the first `end` points begins, for 2 <= l <= end. gains: [problems, 2, n + 1], scratch.
void kmeans_1d_layers(const double* sums, const double* masses, double* gains, int32_t* best, int64_t problems, int64_t n,
                      int k_max, uintptr_t stream);

}  // namespace pyllmq::cuda

// One-dimensional k-means of many independent problems: optimal by dynamic programming, or k-means++ with Lloyd.
#pragma once

#include <cstdint>

namespace pyllmq::cpu {

enum class KMeans1dMethod { exact, lloyd };

struct KMeans1dArguments {
  const float* values;     // [problems, n], finite
  const float* weights;    // null, or [problems, n] with weights_stride = n, or [n] with weights_stride = 0
  int64_t weights_stride;  // each finite and >= 0, each problem with at least one > 0
  int64_t problems;
  int64_t n;  // 1 .. 2^32 - 1
  int k;      // 1 .. 256
  KMeans1dMethod method;
  uint64_t seed;     // of k-means++; the exact method has no randomness
  bool half_centroids;  // round them to fp16 before codes are assigned; beyond 65504 they become infinite
  float* centroids;  // out [problems, k], ascending; repeats the last where there are fewer distinct values than k
  uint8_t* codes;    // out [problems, n], the nearest centroid, the lower one at a tie
};

// Throws std::bad_alloc if the back-pointer table, (k - 2) * (n + 1) entries of 2 or 4 bytes per thread, does not fit.
void kmeans_1d(const KMeans1dArguments& arguments);

// The last cluster [at, end) that maximises gain[at] + (sum[end] - sum[at])^2 / (mass[end] - mass[at]).
struct Split {
  double gain;
  int64_t at;
};

// Candidates are at = first .. last (first <= last < end); the lowest one wins a tie, in every instruction set.
using SplitSearch = Split (*)(const double* gain, const double* sum, const double* mass, int64_t end, int64_t first,
                              int64_t last);
Split best_split_scalar(const double* gain, const double* sum, const double* mass, int64_t end, int64_t first,
                        int64_t last);
Split best_split_avx2(const double* gain, const double* sum, const double* mass, int64_t end, int64_t first,
                      int64_t last);

}  // namespace pyllmq::cpu

// One-dimensional k-means of many independent problems, each for one or several numbers of clusters.
#pragma once

#include <cstdint>

namespace pyllmq::cpu {

enum class KMeans1dMethod { exact = 0, windowed = 1, lloyd = 2 };

struct KMeans1dArguments {
  const float* values;     // [problems, n], finite
  const float* weights;    // null, or [problems, n] with weights_stride = n, or [n] with weights_stride = 0
  int64_t weights_stride;  // each finite and >= 0, each problem with at least one > 0
  int64_t problems;
  int64_t n;      // 1 .. 2^32 - 1
  int counts;     // how many numbers of clusters
  const int* ks;  // [counts], each 1 .. 256
  KMeans1dMethod method;
  uint64_t seed;            // of k-means++; the other methods have no randomness
  bool half_centroids;      // round them to fp16 before codes are assigned; beyond 65504 they become infinite
  bool packed;              // codes as dense streams of ceil(log2 k) bits, at least 1 (docs/formats.md), not as bytes
  float* const* centroids;  // out, null or one per k: [problems, k], ascending; where there are fewer distinct values
                            // than k the last one is repeated
  uint8_t* const* codes;    // out, with centroids: one per k, [problems, n or packed bytes]: the nearest centroid, the
                            // lower one at a tie
  double* errors;           // out, null or [problems, counts]: weighted sum of squares, before centroids are rounded
};

// Throws std::bad_alloc if a thread's back pointers, k * (n + 1) entries of 2 or 4 bytes, do not fit.
void kmeans_1d(const KMeans1dArguments& arguments);

// ceil(log2 k), at least 1.
int code_bits(int k);

}  // namespace pyllmq::cpu

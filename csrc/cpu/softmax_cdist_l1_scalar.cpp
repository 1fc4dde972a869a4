#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/softmax_cdist_l1.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kStride = kCdistTileColumns;

float largest(const float* x, int64_t count) {
  float found = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) found = std::max(found, x[i]);
  return found;
}

double sum_of_exponentials(const float* x, int64_t count, float largest, float scale) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp((x[i] - largest) * scale);
  return sum;
}

void probabilities(const float* x, int64_t count, RowStatistics row, float scale, float* p) {
  for (int64_t i = 0; i < count; ++i) p[i] = std::exp((x[i] - row.largest) * scale) * row.inverse_sum;
}

void row_sums(const float* p, int rows, float* sums) {
  for (int i = 0; i < rows; ++i) {
    float sum = 0;
    for (int64_t v = 0; v < kStride; ++v) sum += p[i * kStride + v];
    sums[i] = sum;
  }
}

void overlaps(const float* p, int p_rows, const float* q, int q_rows, float* overlaps) {
  for (int i = 0; i < p_rows; ++i)
    for (int j = 0; j < q_rows; ++j) {
      float sum = 0;
      for (int64_t v = 0; v < kStride; ++v) sum += std::min(p[i * kStride + v], q[j * kStride + v]);
      overlaps[i * kCdistTileRows + j] = sum;
    }
}

void add_signs(const float* p, int p_rows, const float* q, int q_rows, const float* weights, float* h) {
  for (int i = 0; i < p_rows; ++i)
    for (int j = 0; j < q_rows; ++j) {
      const float weight = weights[i * kCdistTileRows + j];
      for (int64_t v = 0; v < kStride; ++v) {
        const float mine = p[i * kStride + v], other = q[j * kStride + v];
        h[i * kStride + v] += weight * static_cast<float>((mine > other) - (mine < other));
      }
    }
}

void softmax_gradient(const float* p, const float* h, int64_t count, float dot, float scale, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = p[i] * (h[i] - dot) * scale;
}

}  // namespace

const SoftmaxCdistKernels kSoftmaxCdistScalar = {largest,  sum_of_exponentials, probabilities,   row_sums,
                                                 overlaps, add_signs,           softmax_gradient};

}  // namespace pyllmq::cpu

#include <algorithm>
#include <cmath>
#include <limits>

#include "softmax_cdist/cpu/softmax_cdist_l1.h"

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

// term(v) summed over the columns in chains of their own, as in a vector register: one long chain loses 3 more bits.
template <class Term>
float sum_of_columns(Term&& term) {
  constexpr int chains = 8;
  float sums[chains] = {};
  for (int64_t v = 0; v < kStride; v += chains)
    for (int c = 0; c < chains; ++c) sums[c] += term(v + c);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void row_sums(const float* p, int rows, float* sums) {
  for (int i = 0; i < rows; ++i) sums[i] = sum_of_columns([&](int64_t v) { return p[i * kStride + v]; });
}

void overlaps(const float* p, int p_rows, const float* q, int q_rows, float* overlaps) {
  for (int i = 0; i < p_rows; ++i)
    for (int j = 0; j < q_rows; ++j)
      overlaps[i * kCdistTileRows + j] =
          sum_of_columns([&](int64_t v) { return std::min(p[i * kStride + v], q[j * kStride + v]); });
}

float dot(const float* p, const float* h) {
  return sum_of_columns([&](int64_t v) { return p[v] * h[v]; });
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

const SoftmaxCdistKernels kSoftmaxCdistScalar = {largest,  sum_of_exponentials, probabilities, row_sums,
                                                 overlaps, add_signs,           dot,           softmax_gradient};

}  // namespace pyllmq::cpu

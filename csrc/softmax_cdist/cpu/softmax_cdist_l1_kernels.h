// The kernels of softmax_cdist_l1.h that differ in width only, for a vector type V of runtime/simd.h.
#pragma once
#include "runtime/simd.h"
#include "softmax_cdist/cpu/softmax_cdist_l1.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kStride = kCdistTileColumns;

template <class V>
float largest(const float* x, int64_t count) {
  auto found = V::set(-kInfinity);
  for (int64_t i = 0; i < count; i += V::width) found = V::max(V::load_part(x + i, count - i, -kInfinity), found);
  return V::most(found);
}

template <class V>
typename V::R exponentials(typename V::R x, float largest, float scale) {
  return exponential<V, true>(V::mul(V::sub(x, V::set(largest)), V::set(scale)));
}

template <class V>
double sum_of_exponentials(const float* x, int64_t count, float largest, float scale) {
  auto sum = V::set(0);
  for (int64_t i = 0; i < count; i += V::width)
    sum = V::add(sum, exponentials<V>(V::load_part(x + i, count - i, -kInfinity), largest, scale));
  return V::total(sum);
}

template <class V>
void probabilities(const float* x, int64_t count, RowStatistics row, float scale, float* p) {
  for (int64_t i = 0; i < count; i += V::width) {
    const auto value = exponentials<V>(V::load_part(x + i, count - i, row.largest), row.largest, scale);
    V::store_part(p + i, count - i, V::mul(value, V::set(row.inverse_sum)));
  }
}

template <class V>
float dot(const float* p, const float* h) {
  auto sum = V::set(0);
  for (int64_t v = 0; v < kStride; v += V::width) sum = V::fma(V::load(p + v), V::load(h + v), sum);
  return V::total(sum);
}

template <class V>
void softmax_gradient(const float* p, const float* h, int64_t count, float dot, float scale, float* out) {
  for (int64_t i = 0; i < count; i += V::width) {
    const auto centred = V::sub(V::load_part(h + i, count - i, 0), V::set(dot));
    const auto product = V::mul(V::load_part(p + i, count - i, 0), centred);
    V::store_part(out + i, count - i, V::mul(product, V::set(scale)));
  }
}

// constexpr: code that made the table at load time would be of that instruction set.
template <class V>
constexpr SoftmaxCdistKernels softmax_cdist_kernels(decltype(SoftmaxCdistKernels::row_sums) row_sums,
                                                    decltype(SoftmaxCdistKernels::overlaps) overlaps,
                                                    decltype(SoftmaxCdistKernels::add_signs) add_signs) {
  return {largest<V>, sum_of_exponentials<V>, probabilities<V>, row_sums, overlaps, add_signs, dot<V>, softmax_gradient<V>};
}

}  // namespace
}  // namespace pyllmq::cpu

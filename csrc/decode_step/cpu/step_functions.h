// The logistic function, the normal distribution and tanh for a vector type V, to two or three units in the last place.
#pragma once
#include "runtime/simd.h"

namespace pyllmq::cpu {
namespace {

// x^2 - square, exactly; `Scalar` has no fused multiply-add.
template <class V>
inline typename V::R square_error(typename V::R x, typename V::R square) {
  if constexpr (V::width == 1)
    return static_cast<float>(static_cast<double>(x) * x - square);
  else
    return V::fma(x, x, V::sub(V::set(0), square));
}

template <class V>
inline typename V::R sigmoid(typename V::R x) {
  const auto e = exponential<V, true>(V::min(x, V::sub(V::set(0), x)));
  const auto above_half = V::div(V::set(1), V::add(V::set(1), e));
  return V::select(V::above(V::set(0), x), V::mul(e, above_half), above_half);
}

// Phi(x) = (1 + erf(x / sqrt 2)) / 2. Near 0 an odd polynomial (rest 7e-10), elsewhere the tail
// exp(-x^2 / 2) t P(t), t = 1 / (1 + |x| / sqrt 8) (rest 4e-8), whose exponent is rounded once less by an exact square.
template <class V>
inline typename V::R normal_distribution(typename V::R x) {
  using R = typename V::R;
  const R square = V::mul(x, x);
  R odd = V::set(-7.65445475e-06f);
  for (const float c : {0.000113486945f, -0.00118633045f, 0.0099733239f, -0.0664903596f, 0.398942292f})
    odd = V::fma(odd, square, V::set(c));
  const R size = V::min(V::max(x, V::sub(V::set(0), x)), V::set(14));  // beyond 14 the tail is 0
  const R size_square = V::mul(size, size);
  const R missed = square_error<V>(size, size_square);
  const R t = V::div(V::set(1), V::fma(size, V::set(0.353553391f), V::set(1)));
  R tail = V::set(0.0385975167f);
  for (const float c : {-0.0895871371f, 0.0129965637f, 0.0486662127f, 0.0826362818f, 0.124930009f, 0.140854269f, 0.141056985f})
    tail = V::fma(tail, t, V::set(c));
  tail = V::mul(V::mul(tail, t), exponential<V, true>(V::mul(size_square, V::set(-0.5f))));
  tail = V::fma(V::mul(missed, V::set(-0.5f)), tail, tail);
  const R far = V::select(V::above(V::set(0), x), tail, V::sub(V::set(1), tail));
  return V::select(V::above(V::set(1), square), V::fma(odd, x, V::set(0.5f)), far);
}

// Near 0 an odd polynomial (Cephes' tanhf), elsewhere (1 - e) / (1 + e), e = exp(-2 |x|).
template <class V>
inline typename V::R hyperbolic_tangent(typename V::R x) {
  using R = typename V::R;
  const R square = V::mul(x, x);
  R odd = V::set(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    odd = V::fma(odd, square, V::set(c));
  odd = V::fma(V::mul(odd, square), x, x);
  const R minus_size = V::min(x, V::sub(V::set(0), x));
  const R e = exponential<V, true>(V::add(minus_size, minus_size));
  const R size = V::div(V::sub(V::set(1), e), V::add(V::set(1), e));
  const R far = V::select(V::above(V::set(0), x), V::sub(V::set(0), size), size);
  return V::select(V::above(V::set(0.390625f), square), odd, far);
}

}  // namespace
}  // namespace pyllmq::cpu

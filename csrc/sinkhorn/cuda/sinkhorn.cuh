// The arithmetic that every size of problem shares: entries of K, offsets that take scalings up, prices of missed marginals.
//
// Offsets are fp32 numbers in units of cost, and exact: what rounding one would lose stays in its scaling. So a
// scaling is off by its own rounding only, however large offset / epsilon is.
#pragma once
#include "sinkhorn/cuda/sinkhorn.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {
namespace {

constexpr float kTiny = 0x1p-126f;        // stands in for a sum of 0
constexpr float kLargeScaling = 0x1p36f;  // of the largest mass: beyond, the offsets take the scalings up
constexpr double kLargeLogarithm = 25;    // of 2^36

PYLLMQ_DEVICE float infinity() { return ptx::bits_to_fp32(0x7F800000u); }
PYLLMQ_DEVICE float larger(float x, float y) { return x > y ? x : y; }
PYLLMQ_DEVICE float smaller(float x, float y) { return x < y || x != x ? x : y; }  // NaN if either is

// The first offset of a line whose lowest reduced cost is `low`; a line that may send its mass nowhere loses it.
PYLLMQ_DEVICE float offset_of(float& mass, float low) {
  if (low == infinity()) mass = 0;
  if (!(mass > 0)) return -infinity();
  return low == -infinity() ? ptx::bits_to_fp32(0x7FC00000u) : low;  // a cost of -inf has no plan
}

// exp((u + v - cost) / epsilon), the sum exact but for one rounding; 0 where a line takes no part or cost is +inf.
PYLLMQ_DEVICE float entry_of_k(float u, float v, float cost, float inverse) {
  if (u == -infinity() || v == -infinity() || cost == infinity()) return 0;
  const float sum = u + v, of_v = sum - u;
  const float lost = (u - (sum - of_v)) + (v - of_v);
  const float difference = sum - cost, of_cost = difference - sum;
  if (difference == -infinity()) return 0;
  const float lost_again = (sum - (difference - of_cost)) - (cost + of_cost);
  return ptx::exp((difference + (lost + lost_again)) * inverse);
}

// The same scaling times exp(offset / epsilon), in another pair: the offset rounded, the rest left to the scaling.
struct Pair {
  float offset, scaling;
};
PYLLMQ_COLD Pair pair_of(double potential, float inverse) {
  const float offset = static_cast<float>(potential);
  return {offset, static_cast<float>(ptx::exp((potential - offset) * inverse))};
}
PYLLMQ_COLD Pair absorbed(float offset, float scaling, float inverse) {
  return pair_of(offset + ptx::log(static_cast<double>(scaling)) / inverse, inverse);
}
PYLLMQ_DEVICE void absorb(float& offset, float& scaling, float inverse) {
  if (scaling == 0) return;
  const Pair pair = absorbed(offset, scaling, inverse);
  offset = pair.offset;
  scaling = pair.scaling;
}

// What `Price` does where a marginal may be missed. In fp64, hundreds of instructions each: inlined they were most of the
// library.
PYLLMQ_COLD float damped_scaling(double damp, float mass, float sum, float offset, float inverse) {
  const double logarithm = ptx::log(static_cast<double>(mass)) - damp * ptx::log(static_cast<double>(larger(sum, kTiny))) +
                           (damp - 1) * offset * inverse;
  if (logarithm > kLargeLogarithm || logarithm < -kLargeLogarithm) return infinity();
  return static_cast<float>(ptx::exp(logarithm));
}
PYLLMQ_COLD Pair damped_pair(double damp, float mass, float sum, float offset, float inverse) {
  const double logarithms = ptx::log(static_cast<double>(mass)) - damp * ptx::log(static_cast<double>(larger(sum, kTiny)));
  return pair_of(damp * offset + logarithms / inverse, inverse);
}
PYLLMQ_COLD float damped_share(double damp, float rho, float gradient, float mass, float offset, float scaling, float inverse) {
  const double relative = ptx::log(static_cast<double>(scaling)) - ptx::log(static_cast<double>(mass));
  const double sum = mass * ptx::exp(-(offset + relative / inverse) / rho);
  return static_cast<float>(damp * gradient / sum);
}

// What one side's marginal costs to miss. damp = rho / (rho + epsilon), 1 where it is kept.
struct Price {
  double damp;
  float rho;  // infinite where the marginal is kept

  PYLLMQ_MEMBER bool kept() const { return rho == infinity(); }

  // mass / sum, damped; beyond the range of scalings it comes back as infinite.
  PYLLMQ_MEMBER float scaling(float mass, float sum, float offset, float inverse) const {
    if (mass == 0) return 0;
    if (kept()) return ptx::quotient(mass, larger(sum, kTiny));
    return damped_scaling(damp, mass, sum, offset, inverse);
  }

  // The same where the offset may move: for a sum that is near 1.
  PYLLMQ_MEMBER Pair moved(float mass, float sum, float offset, float inverse) const {
    if (mass == 0) return {offset, 0};
    if (kept()) return {offset, ptx::quotient(mass, larger(sum, kTiny))};
    return damped_pair(damp, mass, sum, offset, inverse);
  }

  // d scaling's logarithm / d sum's logarithm, over what the line of the plan sums to.
  PYLLMQ_MEMBER float share(float gradient, float mass, float offset, float scaling, float inverse) const {
    if (scaling == 0) return 0;
    if (kept()) return gradient / mass;
    return damped_share(damp, rho, gradient, mass, offset, scaling, inverse);
  }
};

struct Prices {
  Price a, b;
  float inverse;  // 1 / epsilon
};

PYLLMQ_DEVICE Price price_of(double rho, float epsilon) {
  const bool kept = rho > 1e300;
  return {kept ? 1 : rho / (rho + epsilon), kept ? infinity() : static_cast<float>(rho)};
}

PYLLMQ_DEVICE Prices prices_of(const SinkhornProblem& call, int64_t problem) {
  const float epsilon = call.epsilon[problem * call.epsilon_stride];
  return {price_of(call.rho_a, epsilon), price_of(call.rho_b, epsilon), 1.0f / epsilon};
}

PYLLMQ_DEVICE float potential(float offset, float scaling, float inverse) { return offset + ptx::log(scaling) / inverse; }

}  // namespace
}  // namespace pyllmq::cuda

// What sinkhorn takes on every device. All pointers are of the device that runs it.
#pragma once
#include <cstdint>

namespace pyllmq {

struct SinkhornProblem {
  const float* cost;  // [problems, n, m] with cost_stride = n * m, or one matrix for all with cost_stride = 0
  int64_t cost_stride;
  const float* a;  // [problems, n] with a_stride = n, or one for all with a_stride = 0
  int64_t a_stride;
  const float* b;  // likewise, [problems, m]
  int64_t b_stride;
  const float* epsilon;  // [problems], or one for all with epsilon_stride = 0
  int64_t epsilon_stride;
  int64_t problems, n, m;
  double rho_a, rho_b;  // prices of missing a marginal; infinite where it is kept
};

struct SinkhornForward {
  int64_t iterations;
  float tolerance;  // 0: none
  float* plan;      // out [problems, n, m]
  float* u;         // out [problems, n], -inf without mass
  float* v;         // out [problems, m]
  float* tape;      // out, what the backward pass wants of every iteration of every problem, or null
  int32_t* count;   // out [problems]: iterations taken; negated where offsets moved, so that f and g do not tell all
};

struct SinkhornBackward {
  int64_t iterations;  // of the tape
  const float* tape;   // null (CPU): the loop is run again
  const int32_t* count;
  const float* grad_plan;
  const float* grad_u;
  const float* grad_v;
  float* grad_cost;  // out [problems, n, m]
  float* grad_a;     // out [problems, n]
  float* grad_b;     // out [problems, m]
};

}  // namespace pyllmq

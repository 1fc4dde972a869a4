// Batched entropic optimal transport, as csrc/sinkhorn/cpu/sinkhorn.h: scalings f = a / (K g), g = b / (K^T f) of
// K = exp((u + v - cost) / epsilon). Integers and pointers only; all pointers are of the current device, all numbers fp32.
#pragma once
#include <cstdint>

namespace pyllmq::cuda {

constexpr int64_t kSinkhornMostRows = 1 << 16, kSinkhornMostColumns = 4096;

struct SinkhornCall {
  const float* cost;  // [problems, n, m] with cost_stride = n * m, or one matrix for all with cost_stride = 0
  int64_t cost_stride;
  const float* a;  // [problems, n] with a_stride = n, or one for all with a_stride = 0
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  const float* epsilon;  // [problems], or one for all with epsilon_stride = 0
  int64_t epsilon_stride;
  int64_t problems, n, m;  // at least 1 each
  double rho_a, rho_b;     // prices of missing a marginal; infinite where it is kept
};

struct SinkhornForward {
  int64_t iterations;
  float tolerance;  // 0: none
  float* plan;      // out [problems, n, m]
  float* u;         // out [problems, n], -inf without mass
  float* v;         // out [problems, m]
  float* tape;      // out, sinkhorn_tape numbers for each problem and iteration, or null
  int32_t* count;   // out [problems]: iterations taken; negated where offsets moved
};

struct SinkhornBackward {
  int64_t iterations;  // of the tape
  const float* tape;
  const int32_t* count;
  const float* grad_plan;
  const float* grad_u;
  const float* grad_v;
  float* grad_cost;  // out [problems, n, m]
  float* grad_a;     // out [problems, n]
  float* grad_b;     // out [problems, m]
};

struct SinkhornRoom {
  int64_t floats;    // of workspace, all overwritten
  int64_t counters;  // uint32, zero before and after
};

// Whether blocks of the current device have room for such matrices.
bool sinkhorn_fits(int64_t n, int64_t m);

// Numbers on the tape for one iteration of one problem: f, g, and the offsets u, v where they moved.
inline int64_t sinkhorn_tape(int64_t n, int64_t m) { return 2 * (n + m); }

SinkhornRoom sinkhorn_room(const SinkhornCall& call, int64_t backward_iterations);

// Values are not looked at: what no plan exists for comes out as NaN, or as zeros in a line that may not send its mass.
void sinkhorn(const SinkhornCall& call, const SinkhornForward& out, float* workspace, uint32_t* counters, uintptr_t stream);
void sinkhorn_backward(const SinkhornCall& call, const SinkhornBackward& out, float* workspace, uint32_t* counters,
                       uintptr_t stream);

// Matrices of up to kSinkhornSmall rows and columns, a thread each (sinkhorn_small.cu). They need no room.
constexpr int64_t kSinkhornSmall = 8;
inline bool sinkhorn_is_small(const SinkhornCall& call) { return call.n <= kSinkhornSmall && call.m <= kSinkhornSmall; }
void sinkhorn_small(const SinkhornCall& call, const SinkhornForward& out, uintptr_t stream);
void sinkhorn_small_backward(const SinkhornCall& call, const SinkhornBackward& out, uintptr_t stream);

}  // namespace pyllmq::cuda

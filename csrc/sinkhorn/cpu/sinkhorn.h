// Batched entropic optimal transport: scalings f = a / (K g), g = b / (K^T f) of K = exp((u + v - cost) / epsilon), where
// the offsets u, v take up what the scalings cannot hold. The tape is [problems, iterations, n + m]: f and g of every iteration.
// See docs/kernels-sinkhorn.md.
#pragma once
#include <cstdint>

#include "runtime/isa.h"
#include "sinkhorn/cpu/doubly_stochastic.h"
#include "sinkhorn/problem.h"

namespace pyllmq::cpu {

// Throws std::invalid_argument for values that no plan exists for.
void sinkhorn(const SinkhornProblem& problem, const SinkhornForward& forward);
void sinkhorn_backward(const SinkhornProblem& problem, const SinkhornBackward& backward);

// ---- what differs between instruction sets ----------------------------------------------------------------------------

constexpr int64_t kSmallEntries = 64;       // up to here one lane of a vector is one problem (transport.SMALL)
constexpr int64_t kSmallWidth = 32;         // at most so many lanes
constexpr int64_t kBothWays = 4096;         // padded entries up to which K^T is kept beside K: 32 KB together
constexpr int64_t kLanes = 16;              // arrays over columns are padded with zeros to a multiple of this
constexpr float kLargestUnshifted = 87.7f;  // a unit below the logarithm of the largest fp32 number
constexpr float kTiny = 0x1p-126f;          // stands in for a sum of 0
constexpr float kLargeScaling = 0x1p36f;    // of the largest mass: beyond, the offsets take the scalings up

// s = sum_j K_ij x_j per row i, then out_i = over_i / max(s, kTiny) (forward) or times_i * s + plus_i (adjoint). Arrays
// over rows are padded to a multiple of 4, with zeros where they are read.
struct RowUpdate {
  const float* over;
  const float* times;
  const float* plus;
};

// dL_ij = K_ij (first_ij - sum_t (f_t,i r_t,j + s_t,i g_t,j)); grad_cost (+)= -dL / epsilon
struct OuterSums {
  const float* grad_plan;  // null: first = 0, else first = grad_plan * last_f * last_g
  const float* last_f;
  const float* last_g;
  const float* f;  // [terms, f_stride] and so on
  const float* r;
  const float* s;
  const float* g;
  int64_t f_stride, s_stride, column_stride;
  int64_t f_terms, s_terms;
};

// `problems`, at most small_width of them, one to a lane.
struct SmallProblem : SinkhornProblem {
  bool full;  // all of a and b are above 0

  int64_t lanes() const { return problems; }
};

// A bit per lane: must be done over by the general loop; has a cost that is not finite.
struct SmallLanes {
  uint32_t again, not_finite;
};

struct SinkhornKernels {
  int64_t small_width;
  // min_j of cost_j + block_j; NaN if an entry is NaN
  float (*row_floor)(const float* cost, const float* block, int64_t m);
  // K [n, stride] = exp((u_i - cost_ij - block_j) / epsilon): u as first offsets are, exactly fp32; padding 0
  void (*build_first)(const float* cost, const double* u, const float* block, double inverse, int64_t n, int64_t m,
                      int64_t stride, float* k);
  // K [n, stride] = exp((u_i + v_j - cost_ij) * inverse), in fp64 up to the exponential; padding 0
  void (*build)(const float* cost, const double* u, const double* v, double inverse, int64_t n, int64_t m, int64_t stride,
                float* k);
  // out = log x, -inf of 0
  void (*logarithms)(const float* x, int64_t count, float* out);
  // row update, and column_sums = K^T out in the same pass over K. Returns the largest out.
  float (*pass)(const float* k, int64_t n, int64_t stride, const float* x, const RowUpdate& update, float* out,
                float* column_sums);
  void (*row_sums)(const float* k, int64_t n, int64_t stride, const float* x, float* out);
  void (*column_sums)(const float* k, int64_t n, int64_t stride, const float* x, float* out);
  // out = over / max(column sums, kTiny); returns the largest
  float (*scale_columns)(const float* k, int64_t n, int64_t stride, const float* x, const float* over, float* out);
  // out [stride, rows] = K^T, with zeros in its columns from n on
  void (*transpose)(const float* k, int64_t n, int64_t stride, int64_t rows, float* out);
  // out = over / max(sums, kTiny); returns the largest
  float (*divide)(const float* over, const float* sums, int64_t count, float* out);
  void (*plan)(const float* k, const float* f, const float* g, int64_t n, int64_t m, int64_t stride, float* out);
  // through_plan = grad * f K g: its row sums and its column sums
  void (*through_plan)(const float* k, const float* f, const float* g, const float* grad, int64_t n, int64_t m, int64_t stride,
                       float* row_sums, float* column_sums);
  void (*outer_sums)(const float* k, const OuterSums& sums, int64_t n, int64_t m, int64_t stride, float scale, bool add,
                     float* grad_cost);
  // One problem per lane. room: small_room floats. A tape is neither written nor read.
  SmallLanes (*small_forward)(const SmallProblem& problem, const SinkhornForward& out, float* room);
  // Returns a bit per lane that must be done over by the general loop.
  uint32_t (*small_backward)(const SmallProblem& problem, const SinkhornBackward& out, float* room);
  // doubly_stochastic of `lanes` problems from `first` on. Returns a bit per lane that must be refused, then out is untouched.
  uint32_t (*normalise)(const DoublyStochastic& call, int64_t first, int64_t lanes, float* room, float* out);
  void (*normalise_backward)(const DoublyStochastic& call, int64_t first, int64_t lanes, float* room, const float* gradient,
                             float* out);
};

inline int64_t small_room(int64_t n, int64_t m, int64_t iterations) {
  return kSmallWidth * (6 * n * m + 8 * (n + m) + (iterations + 1) * (n + m));
}

const SinkhornKernels& sinkhorn_kernels();  // of the instruction set in use

template <Isa isa>
const SinkhornKernels& sinkhorn_kernels_for();

}  // namespace pyllmq::cpu

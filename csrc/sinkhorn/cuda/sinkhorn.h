// Batched entropic optimal transport, as csrc/sinkhorn/cpu/sinkhorn.h: scalings f = a / (K g), g = b / (K^T f) of
// K = exp((u + v - cost) / epsilon). Integers and pointers only; all pointers are of the current device, all numbers fp32.
#pragma once
#include <cstdint>

#include "sinkhorn/problem.h"

namespace pyllmq::cuda {

constexpr int64_t kSinkhornMostRows = 1 << 16, kSinkhornMostColumns = 4096;

struct SinkhornRoom {
  int64_t floats;    // of workspace, all overwritten
  int64_t counters;  // uint32, zero before; none where no problem is shared by blocks
};

// Whether blocks of the current device have room for such matrices.
bool sinkhorn_fits(int64_t n, int64_t m);

SinkhornRoom sinkhorn_room(const SinkhornProblem& call, int64_t backward_iterations);

// Values are not looked at: what no plan exists for comes out as NaN, or as zeros in a line that may not send its mass.
void sinkhorn(const SinkhornProblem& call, const SinkhornForward& out, float* workspace, uint32_t* counters, uintptr_t stream);
void sinkhorn_backward(const SinkhornProblem& call, const SinkhornBackward& out, float* workspace, uint32_t* counters,
                       uintptr_t stream);

// Matrices of up to kSinkhornSmall rows and columns, a thread each (sinkhorn_small.cu). They need no room.
constexpr int64_t kSinkhornSmall = 8;
inline bool sinkhorn_is_small(const SinkhornProblem& call) { return call.n <= kSinkhornSmall && call.m <= kSinkhornSmall; }
void sinkhorn_small(const SinkhornProblem& call, const SinkhornForward& out, uintptr_t stream);
void sinkhorn_small_backward(const SinkhornProblem& call, const SinkhornBackward& out, uintptr_t stream);

}  // namespace pyllmq::cuda

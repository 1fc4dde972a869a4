// The experts of one layer for routed tokens on the device; what is computed: csrc/experts/routed_experts.h. Weights are layouts
// `cuda.codebook` (codebook/cuda/layout.h), each of its own widths. Pointers and integers only; all pointers are of the current
// device. Nothing waits for the device: which experts are chosen is known there alone.
#pragma once
#include <cstdint>
#include <limits>

#include "activation.h"

namespace pyllmq::cuda {

// One projection of all experts.
struct ExpertWeights {
  const int64_t* layouts;  // [experts, 2]: address and bytes of each layout
  const float* bias;       // [experts, rows] or null
  int64_t rows, columns;   // of each expert
  int64_t blocks;          // of rows, of the expert that has most (RowBlock)
};

struct RoutedExperts {
  int64_t experts;
  ExpertWeights up, down;
  int64_t units;  // width between the Linears
  // Row first + i * stride of h is unit i of gate and up; up_first < 0: not gated.
  int64_t gate_first, up_first, stride;
  Activation activation = Activation::silu;
  float limit = std::numeric_limits<float>::infinity();
  float alpha = 1, offset = 0;
  int64_t sum_bytes;  // of a call's sums at most, but for a single token: more tokens are taken in waves
};

struct RoutedTokens {
  const void* x;  // [tokens, hidden]
  void* y;        // the same
  int dtype;      // of both: 0 fp32, 1 bf16, 2 fp16
  int64_t tokens, choices;
  const int64_t* index;  // [tokens, choices]: 0 to experts - 1, or `experts`: none; y of a token with any other is NaN
  const float* weights;  // [tokens, choices]
};

// Throws std::invalid_argument where sizes do not fit each other.
void check_routed_experts(const RoutedExperts& experts);

// Bytes of workspace, at a multiple of 16; all that is read there is written before.
int64_t routed_experts_workspace(const RoutedExperts& experts, int64_t tokens, int64_t choices, int dtype);

// Of one expert's layout that does not hold a weight of that shape, the tokens sent to it become NaN.
void routed_experts(const RoutedExperts& experts, const RoutedTokens& tokens, void* workspace, uintptr_t stream);

}  // namespace pyllmq::cuda

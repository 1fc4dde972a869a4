// The experts of one layer for routed tokens on the device; what is computed: csrc/experts/routed_experts.h. Weights are layouts
// of codebooks (codebook/cuda/layout.h) and of the sparse formats (sparse/cuda/layout.h), each expert's of its own kind. Pointers
// and integers only; all pointers are of the current device. Nothing waits for the device: which experts are chosen is known
// there alone.
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

#include "activation.h"
#include "sparse/shape.h"

namespace pyllmq::cuda {

// What the experts of one launch have in common. Of a layout `columns` the kind is that, whatever the format.
struct WeightKind {
  bool is_codebook;
  SparseKind sparse;  // else
  ValueType values;   // of bitmap, sparse24 and columns
  int64_t bits;       // of sparse24 with codes: 2, or 4 for 3 and 4
  int64_t size;       // largest of an expert: blocks of rows (RowBlock) of a codebook, bytes of a cell of the others
};

struct ExpertLayout {
  int64_t address, bytes;
  int64_t kind;  // its number
};

// One projection of all experts.
struct ExpertWeights {
  const ExpertLayout* layouts;  // [experts]
  const float* bias;            // [experts, rows] or null
  int64_t rows, columns;        // of each expert
};

struct ExpertLayer {
  int64_t experts;
  ExpertWeights up, down;
  int64_t units;  // width between the Linears
  // Row first + i * stride of h is unit i of gate and up; up_first < 0: not gated.
  int64_t gate_first, up_first, stride;
  Activation activation = Activation::silu;
  float limit = std::numeric_limits<float>::infinity();
  float alpha = 1, offset = 0;
};

struct RoutedExperts : ExpertLayer {
  std::vector<WeightKind> up_kinds, down_kinds;  // by number
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

// Of one expert's layout that does not hold a weight of that shape and kind, the tokens sent to it become NaN.
void routed_experts(const RoutedExperts& experts, const RoutedTokens& tokens, void* workspace, uintptr_t stream);

}  // namespace pyllmq::cuda

// The experts of one layer for routed tokens, as one call. Of each token t and each of its choices (expert e, weight w):
//
//   h    = W_up[e] x[t] + up_bias[e]
//   a    = act(alpha * min(gate, limit)) / alpha * (clamp(up, -limit, limit) + offset)   gate and up: rows of h
//   y[t] += w * (W_down[e] a + down_bias[e])                                             by rising e
//
// Only the chosen experts are read. Tokens are sorted by expert: the weights of an expert are decoded once, however many
// tokens were sent to it. Everything between x and y is fp32.
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

#include "decode_step/mlp_step.h"
#include "linear_operand.h"

namespace pyllmq::cpu {

// Row first + i * stride of an up operand is unit i.
struct GateRows {
  int64_t first, stride;
};

struct RoutedExperts {
  std::vector<const LinearOperand*> up, down;  // one for each expert, owned by the caller
  std::vector<float> up_bias, down_bias;       // [experts, rows]; empty: none
  int64_t units;                               // width between the Linears
  GateRows gate_rows, up_rows;
  bool gated = true;  // false: a = act(gate) alone, up_rows is not read
  Activation activation = Activation::silu;
  float limit = std::numeric_limits<float>::infinity();
  float alpha = 1, offset = 0;
  Precision precision = Precision::high;
};

struct RoutedTokens {
  const void* x;  // [tokens, hidden]
  void* y;        // the same
  DType dtype;
  int64_t tokens, choices;
  const int64_t* index;  // [tokens, choices]: 0 to experts - 1, or `experts`: none
  const float* weights;  // [tokens, choices]
};

// Throws std::invalid_argument where sizes do not fit each other.
void check_routed_experts(const RoutedExperts& experts);

// Throws std::out_of_range, and writes nothing, where an index names no expert.
void routed_experts(const RoutedExperts& experts, const RoutedTokens& tokens);

}  // namespace pyllmq::cpu

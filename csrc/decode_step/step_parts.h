// What the attention step and the MLP step of a block share: norms, operands side by side, the way out.
#pragma once
#include <cstdint>
#include <vector>

#include "linear_operand.h"

namespace pyllmq::cpu {

enum class NormKind { none, rms, layer };

// rms:   y = x / sqrt(mean(x^2) + eps) * weight + bias
// layer: y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias
struct Norm {
  NormKind kind = NormKind::none;
  float eps = 0;
  std::vector<float> weight;  // empty: ones
  std::vector<float> bias;    // empty: zeros
};

// Linears of one input. Their outputs lie behind each other: [operand][token, row].
struct InputLinears {
  std::vector<const LinearOperand*> operands;  // owned by the caller
  std::vector<float> bias;                     // of all rows of all operands; empty: none
};

// y = residual + multiplier * norm(x W^T + bias), or with norm_last norm(residual + multiplier * (x W^T + bias))
struct OutputLinear {
  const LinearOperand* operand = nullptr;  // owned by the caller
  std::vector<float> bias;                 // empty: none
  Norm norm;
  float multiplier = 1;
  bool norm_last = false;
};

// x, y and residual [tokens, hidden] of one dtype. residual: null, or added to the result, x or anything else; y may lie
// where x or the residual lies.
struct StepCall {
  const void* x;
  const void* residual;
  void* y;
  DType dtype;
  int64_t tokens;
};

// call.y = norm of each row of call.x [tokens, size]; no residual. Throws std::invalid_argument where sizes do not fit.
void norm_step(const Norm& norm, const StepCall& call, int64_t size);

}  // namespace pyllmq::cpu

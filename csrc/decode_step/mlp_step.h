// The MLP module of a block, as one call:
//
//   h = norm(x)
//   a = activation(gate rows of the Linears of h) * up rows, or activation(gate rows) alone
//   y = residual + multiplier * norm(a W_down^T + bias)
#pragma once
#include <cstdint>

#include "activation.h"
#include "decode_step/step_parts.h"

namespace pyllmq::cpu {

// Row first_row + i * stride of an input operand is element i.
struct UnitRows {
  int64_t operand, first_row, stride;
};

struct MlpStep {
  Norm norm;
  InputLinears input;
  int64_t units;  // width between the Linears
  UnitRows gate_rows, up_rows;
  bool gated = true;  // false: up_rows is not read
  Activation activation = Activation::silu;
  OutputLinear output;
  Precision precision = Precision::high;
};

// Throws std::invalid_argument where sizes do not fit each other.
void check_mlp_step(const MlpStep& step);

void mlp_step(const MlpStep& step, const StepCall& call);

}  // namespace pyllmq::cpu

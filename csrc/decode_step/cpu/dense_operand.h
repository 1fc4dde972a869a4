// A dense weight beside packed ones, as an operand of a decode step: for few tokens, whose cost is to read W once.
#pragma once
#include "linear_operand.h"

namespace pyllmq::cpu {

class DenseOperand final : public LinearOperand {
 public:
  // weight [rows, columns] of dtype, owned by the caller.
  DenseOperand(const void* weight, DType dtype, int64_t rows, int64_t columns);

 private:
  void run(const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype, void* y,
           Precision precision) const override;

  const void* const weight_;
  const DType dtype_;
};

}  // namespace pyllmq::cpu

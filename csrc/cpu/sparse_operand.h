#pragma once
#include "cpu/sparse_linear.h"
#include "linear_operand.h"

namespace pyllmq::cpu {

class SparseOperand final : public LinearOperand {
 public:
  SparseOperand(const void* layout, int64_t bytes) : SparseOperand(SparseView(layout, bytes)) {}

 private:
  explicit SparseOperand(const SparseView& view)
      : LinearOperand(view.header().rows, view.header().columns, view.header().checksum), view_(view) {}
  void run(const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype, void* y,
           Precision precision) const override {
    sparse_linear(view_, x, x_dtype, tokens, bias, bias_dtype, y, precision);
  }
  const SparseView view_;
};

}  // namespace pyllmq::cpu

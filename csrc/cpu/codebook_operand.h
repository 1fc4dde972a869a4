#pragma once
#include "linear_operand.h"

namespace pyllmq::cpu {

class CodebookOperand final : public LinearOperand {
 public:
  CodebookOperand(const void* layout, int64_t bytes) : CodebookOperand(LayoutView(layout, bytes)) {}

 private:
  explicit CodebookOperand(const LayoutView& view)
      : LinearOperand(view.header().rows, view.header().columns, view.header().checksum), view_(view) {}
  void run(const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype, void* y,
           Precision precision) const override {
    codebook_linear(view_, x, x_dtype, tokens, bias, bias_dtype, y, LinearPath::automatic, precision);
  }
  const LayoutView view_;
};

}  // namespace pyllmq::cpu

// A bound layout of a sparse weight of any of the formats.
#pragma once
#include "sparse/cpu/layout.h"
#include "sparse/cpu/linear.h"
#include "linear_operand.h"

namespace pyllmq::cpu {

class SparseOperand final : public LinearOperand {
 public:
  // Throws std::invalid_argument when the header does not fit the bytes.
  SparseOperand(const void* layout, int64_t layout_bytes) : SparseOperand(SparseView(layout, layout_bytes)) {}

  bool is_native() const override {
    require_intact();
    return view_.header().order == native_order();
  }
  void dequantize(void* out, DType out_dtype) const {
    require_intact();
    sparse_dequantize(view_, out, out_dtype);
  }
  // Exactly what was packed, into the arrays of `checkpoint`.
  void unpack(const SparseCheckpoint& checkpoint) const {
    require_intact();
    sparse_layout_unpack(view_, checkpoint);
  }

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

// A bound layout of a `codebook` weight.
#pragma once
#include "codebook/cpu/dequantize.h"
#include "codebook/cpu/layout.h"
#include "codebook/cpu/linear.h"
#include "codebook/cpu/rows.h"
#include "linear_operand.h"

namespace pyllmq::cpu {

class CodebookOperand final : public LinearOperand {
 public:
  // Throws std::invalid_argument when the header does not fit the bytes.
  CodebookOperand(const void* layout, int64_t layout_bytes) : CodebookOperand(LayoutView(layout, layout_bytes)) {}

  void linear_by(LinearPath path, const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype, void* y,
                 Precision precision) const {
    if (may_run(x, tokens, y)) codebook_linear(view_, x, x_dtype, tokens, bias, bias_dtype, y, path, precision);
  }
  const LayoutView& view() const {
    require_intact();
    return view_;
  }
  bool is_native() const override {
    require_intact();
    return view_.header().order == native_order();
  }
  // What LinearPath::automatic is for this many tokens.
  LinearPath path(DType x_dtype, int64_t tokens, Precision precision) const {
    require_intact();
    return cheaper_path(view_, x_dtype, tokens, precision);
  }
  void dequantize(int64_t row_begin, int64_t row_end, void* out, DType out_dtype) const {
    require_intact();
    codebook_dequantize(view_, row_begin, row_end, out, out_dtype);
  }
  void row_values(const int64_t* ids, int64_t count, void* out, DType out_dtype) const {
    require_intact();
    codebook_rows(view_, ids, count, out, out_dtype);
  }
  void codes(uint8_t* codes_out) const {
    require_intact();
    codebook_layout_codes(view_, codes_out);
  }

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

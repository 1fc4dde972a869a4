// A bound layout `cuda.codebook` (layout.h).
#pragma once
#include "codebook/cuda/layout.h"
#include "linear_operand_cuda.h"

namespace pyllmq::cuda {

class CodebookOperand : public LinearOperand {
 public:
  CodebookOperand(const uint8_t* layout, int64_t layout_bytes, int64_t rows, int64_t columns)
      : LinearOperand(layout, layout_bytes, sizeof(LayoutHeader), rows, columns) {}

  void dequantize(void* weight, int dtype, uintptr_t stream) const override;

 private:
  LinearRoom find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;
};

// The same for exactly one token, by tables of partial products, on devices whose blocks get the shared memory for them.
class CodebookTables final : public CodebookOperand {
 public:
  using CodebookOperand::CodebookOperand;

  static bool fit();

 private:
  LinearRoom find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;
};

}  // namespace pyllmq::cuda

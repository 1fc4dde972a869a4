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
  // out [count, columns] of the rows that ids [count] on the device name; NaN for an id outside of the weight.
  void row_values(const int64_t* ids, int64_t count, void* out, int dtype, uintptr_t stream) const;

 private:
  int64_t find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;
};

// The same for one or two tokens and weights of at most 4 bits, by integer tensor cores; its errors are those of `high`.
class CodebookBytePlanes final : public CodebookOperand {
 public:
  // widest: the largest width of a column, as the layout's header says.
  CodebookBytePlanes(const uint8_t* layout, int64_t layout_bytes, int64_t rows, int64_t columns, int64_t widest);

 private:
  int64_t find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;

  const int64_t widest_;
};

// The same for many tokens in fp16 or bf16 on compute capability 9.0. Not of a weight whose layout has no patches.
class CodebookWgmma final : public CodebookOperand {
 public:
  using CodebookOperand::CodebookOperand;

  // Whether the current device is such a one, and the build is for it.
  static bool runs();

 private:
  int64_t most_tokens() const override { return 256 * kTokenBlocks; }
  int64_t find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;
};

// The same for 3 to 32 tokens, 16 in fp32, and weights of at most 4 bits on compute capability 9.0 (CodebookWgmma::runs).
class CodebookWgmmaRegisters final : public CodebookOperand {
 public:
  using CodebookOperand::CodebookOperand;

 private:
  int64_t most_tokens() const override;
  int64_t find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;
};

}  // namespace pyllmq::cuda

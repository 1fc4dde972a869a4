// A bound layout of a sparse weight (layout.h).
#pragma once
#include "linear_operand_cuda.h"
#include "sparse/cuda/layout.h"

namespace pyllmq::cuda {

struct SparsePlan {
  int token_tiles;  // columns of a block's product, in units of 8
  int warps;
  int64_t tokens_per_block, token_blocks;
  int64_t splits;  // of K
  int64_t grid;
  int64_t x_bytes, shared_bytes;  // of shared memory: for x, in all
  int64_t partials;               // elements of the workspace
};

class SparseOperand : public LinearOperand {
 public:
  // kind to stage_bytes: what the blob's header says.
  SparseOperand(const uint8_t* layout, int64_t layout_bytes, int64_t rows, int64_t columns, SparseKind kind, ValueType values,
                int64_t bits, int64_t stage_bytes)
      : LinearOperand(layout, layout_bytes, sizeof(SparseHeader), rows, columns),
        kind(kind),
        values(values),
        bits(bits),
        stage_bytes(stage_bytes) {}

  void dequantize(void* weight, int dtype, uintptr_t stream) const override;

  const SparseKind kind;
  const ValueType values;
  const int64_t bits, stage_bytes;

 private:
  int64_t find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;
  // Of the layout `columns`.
  SparsePlan plan_columns(int64_t tokens) const;
  void run_columns(const LinearCall& call, uintptr_t stream) const;
};

// The same of codes of 2 bits for one token, by integer tensor cores; its errors are those of `high`.
class SparseProducts final : public SparseOperand {
 public:
  SparseProducts(const uint8_t* layout, int64_t layout_bytes, int64_t rows, int64_t columns, int64_t stage_bytes)
      : SparseOperand(layout, layout_bytes, rows, columns, SparseKind::codes, ValueType::fp16, 2, stage_bytes) {}

 private:
  int64_t find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;
};

// The same of codes of 3 and 4 bits for one token, by products in shared memory, added in fp32.
class SparseTables final : public SparseOperand {
 public:
  SparseTables(const uint8_t* layout, int64_t layout_bytes, int64_t rows, int64_t columns, int64_t stage_bytes)
      : SparseOperand(layout, layout_bytes, rows, columns, SparseKind::codes, ValueType::fp16, 4, stage_bytes) {}

 private:
  int64_t find_room(int64_t tokens, int dtype) const override;
  void run(const LinearCall& call, uintptr_t stream) const override;
};

}  // namespace pyllmq::cuda

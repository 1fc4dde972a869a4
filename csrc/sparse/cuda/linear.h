// y[M, N] = x[M, K] W^T + bias for a weight in a sparse layout (layout.h), and its dense matrix; integers and pointers.
#pragma once
#include <cstdint>

#include "codebook/cuda/linear.h"
#include "sparse/shape.h"

namespace pyllmq::cuda {

// What kernels must know of a layout without reading the device; it must be what the blob's header says.
struct SparseOperand {
  SparseKind kind;
  ValueType values;
  int64_t bits;
  int64_t stage_bytes;
};

struct SparsePlan {
  int token_tiles;  // columns of a block's product, in units of 8
  int warps;
  int64_t tokens_per_block, token_blocks;
  int64_t splits;  // of K
  int64_t grid;
  int64_t x_bytes, shared_bytes;  // of shared memory: for x, in all
  int64_t partials, counters;     // workspace as in LinearPlan
};

SparsePlan plan_sparse_linear(const SparseOperand& operand, int64_t rows, int64_t columns, int64_t tokens, int dtype,
                              int multiprocessors, int64_t shared_limit);
void sparse_linear(const SparseOperand& operand, const LinearCall& call, uintptr_t stream);

// The same for the layout `columns`.
SparsePlan plan_sparse_columns_linear(int64_t rows, int64_t columns, int64_t tokens, int multiprocessors);
void sparse_columns_linear(ValueType values, const LinearCall& call, uintptr_t stream);

// weight [rows, columns] of dtype 0 fp32, 1 bf16, 2 fp16, from any sparse layout.
void sparse_dequantize(const SparseOperand& operand, const uint8_t* layout, int64_t layout_bytes, int64_t rows, int64_t columns,
                       void* weight, int dtype, uintptr_t stream);

}  // namespace pyllmq::cuda

// y[M, N] = x[M, K] W^T + bias for a weight in the layout `cuda` (layout.h); integers and pointers only.
#pragma once
#include <cstdint>

namespace pyllmq::cuda {

// What a call needs besides its operands, by shape alone: nothing on the device is read to make it.
struct LinearPlan {
  int token_tiles;  // columns of a block's product, in units of 4
  int64_t tokens_per_block, token_blocks;
  int64_t splits;  // of K
  int64_t grid;
  int64_t x_bytes;   // of shared memory
  int64_t partials;  // fp32 elements of workspace, all overwritten
  int64_t counters;  // uint32 elements of workspace, zero before the first call; each call leaves zeros
};

LinearPlan plan_linear(int64_t rows, int64_t columns, int64_t tokens, int dtype, int multiprocessors);

struct LinearCall {
  const uint8_t* layout;  // as are all pointers here, of the current device
  int64_t layout_bytes;
  int64_t rows, columns, tokens;
  const void* x;
  int dtype;         // of x and y: 0 fp32, 1 bf16, 2 fp16
  const void* bias;  // or null
  int bias_dtype;
  void* y;
  float* partials;
  uint32_t* counters;
};

// A layout that is not one of this shape gives NaN: what lies on the device cannot be refused without waiting for it.
void codebook_linear(const LinearCall& call, uintptr_t stream);

// The same for exactly one token, by tables of partial products, on devices whose blocks get the shared memory for them.
struct TablesPlan {
  int64_t partials, counters;  // workspace as above
};
TablesPlan plan_linear_tables(int64_t rows, int64_t columns);
bool linear_tables_fit();
void codebook_linear_tables(const LinearCall& call, uintptr_t stream);

}  // namespace pyllmq::cuda

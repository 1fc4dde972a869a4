// The power of two by which the kernels that bring x into order first turn a token's x to fp16.
#pragma once
#include "codebook/cuda/fp16_planes.cuh"
#include "linear_operand_cuda.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

// Of a token that exists; called by all threads of the block. of_warps [kThreads / 32] in shared memory.
template <int kThreads>
PYLLMQ_DEVICE int token_exponent(const LinearCall& call, int64_t token, float* of_warps) {
  const auto dtype = static_cast<DType>(call.dtype);
  if (dtype == DType::fp16) return 0;
  float largest = 0.0f;
  for (int64_t column = ptx::thread(); column < call.columns; column += kThreads)
    largest = fmaxf(largest, ptx::magnitude(load_element(call.x, dtype, token * call.columns + column)));
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
  if (ptx::thread() % 32 == 0) of_warps[ptx::thread() / 32] = largest;
  ptx::sync_block();
  for (int warp = 0; warp < kThreads / 32; ++warp) largest = fmaxf(largest, of_warps[warp]);
  return scale_exponent(largest);
}

}  // namespace pyllmq::cuda

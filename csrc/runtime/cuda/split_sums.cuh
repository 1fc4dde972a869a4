// Blocks that share outputs leave their sums in a workspace; the one that comes last adds them, in order.
#pragma once
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

// Called by all threads of a block that has stored its sums; true in the block that comes last. The counter is 0 again then.
PYLLMQ_DEVICE bool is_last_of(uint32_t splits, uint32_t* counter, uint32_t& shared_arrived) {
  ptx::fence();
  ptx::sync_block();
  if (ptx::thread() == 0) shared_arrived = ptx::count_to(counter, splits - 1);
  ptx::sync_block();
  ptx::fence();
  return shared_arrived == splits - 1;
}

PYLLMQ_DEVICE float sum_of_splits(const float* first, int64_t splits, int64_t stride) {
  float sum = 0.0f;
  for (int64_t split = 0; split < splits; ++split) sum += ptx::load_l2(first + split * stride);
  return sum;
}

}  // namespace pyllmq::cuda

// How the kernels of packed Linears store y: bias, rounding, and the sums of blocks that share outputs.
#pragma once
#include "linear_operand_cuda.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

PYLLMQ_DEVICE void store_y(const LinearCall& call, int64_t token, int64_t row, float sum) {
  if (call.bias != nullptr) sum += load_element(call.bias, static_cast<DType>(call.bias_dtype), row);
  store_element(call.y, static_cast<DType>(call.dtype), token * call.rows + row, sum);
}

// Called by all threads of a block that has stored its sums; true in the block that comes last. The counter is 0 again then.
PYLLMQ_DEVICE bool is_last_of(uint32_t splits, uint32_t* counter, uint32_t& shared_arrived) {
  ptx::sync_block();  // all sums of the block are there
  if (ptx::thread() == 0) shared_arrived = ptx::count_to(counter, splits - 1);
  ptx::sync_block();
  return shared_arrived == splits - 1;
}

// The counter of the blocks that share some tokens and the rows from a tile on.
template <class Header>
PYLLMQ_DEVICE uint32_t* counter_of(const LinearCall& call, const Header& h, int64_t token_block, int64_t tiles, int64_t tile) {
  auto* counters = const_cast<uint32_t*>(section<uint32_t>(h, h.counters_offset));
  return counters + (call.counter_set * kTokenBlocks + token_block) * tiles + tile;
}

// The outputs of a block from (token_begin, row_begin) on: sum_of(token, row) for what for_each(body) goes through. Blocks that
// share outputs leave their sums in the workspace; the one that comes last adds them, in order. Where they are a cluster, `split`
// is their rank, they leave them at place(token, row) of their shared memory, and each adds those of some rows, in the same
// order.
template <class ForEach, class SumOf, class Place>
PYLLMQ_DEVICE void store_outputs(const LinearCall& call, int splits, int split, uint32_t* counter, int64_t token_begin,
                                 int64_t row_begin, uint32_t& shared_arrived, const ForEach& for_each, const SumOf& sum_of,
                                 bool is_cluster, const Place& place) {
  const int64_t stride = call.tokens * call.rows;
  float* parts = call.partials + token_begin * call.rows + row_begin;
  for_each([&](int token, int row) {
    const float sum = sum_of(token, row);
    if (splits == 1)
      store_y(call, token_begin + token, row_begin + row, sum);
    else
      *(is_cluster ? place(token, row) : parts + split * stride + token * call.rows + row) = sum;
  });
  if (splits == 1) return;
  if (is_cluster)
    ptx::sync_cluster();
  else if (!is_last_of(static_cast<uint32_t>(splits), counter, shared_arrived))
    return;
  for_each([&](int token, int row) {
    if (is_cluster && row / 32 % splits != split) return;
    float sum = 0.0f;
    if (is_cluster)
      for (int i = 0; i < splits; ++i) sum += ptx::load_of_block(place(token, row), i);
    else
      for (int64_t i = 0; i < splits; ++i) sum += ptx::load_l2(parts + i * stride + token * call.rows + row);
    store_y(call, token_begin + token, row_begin + row, sum);
  });
  if (is_cluster) ptx::sync_cluster_after_reads();  // before anything else stands there, and before a block leaves
}
template <class ForEach, class SumOf>
PYLLMQ_DEVICE void store_outputs(const LinearCall& call, int splits, int64_t split, uint32_t* counter, int64_t token_begin,
                                 int64_t row_begin, uint32_t& shared_arrived, const ForEach& for_each, const SumOf& sum_of) {
  store_outputs(call, splits, static_cast<int>(split), counter, token_begin, row_begin, shared_arrived, for_each, sum_of, false,
                [](int, int) { return static_cast<float*>(nullptr); });
}

}  // namespace pyllmq::cuda

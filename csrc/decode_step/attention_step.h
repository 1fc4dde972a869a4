// The attention module of a block, as one call:
//
//   h       = norm(x)
//   q, k, v = rows of the Linears of h; norms of q, k and v; rotary positions of q and k
//   cache[past, past + queries) = k, v
//   c       = softmax(scale * q k^T, soft cap, mask, sinks) v      over the cache
//   y       = residual + multiplier * norm(c W_out^T + bias), or the norm of that sum
//
// Everything between two Linears is fp32. Keys and values are rounded to the dtype of the cache.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "decode_step/step_parts.h"

namespace pyllmq::cpu {

// Where q, k or v lies: row first_row + h * head_stride + d of an input operand is element d of head h.
struct HeadRows {
  int64_t operand, first_row, head_stride;
};

// How elements of q and k pair up: (d, d + rotary_size / 2) or (2 d, 2 d + 1), for d < rotary_size / 2. Elements from
// rotary_size on stay. A pair (p, q) becomes (p cos - q sin, q cos + p sin).
enum class Rotary { none, halves, interleaved };

struct AttentionStep {
  Norm norm;
  InputLinears input;
  HeadRows q_rows, k_rows, v_rows;
  int64_t heads, kv_heads;        // heads a multiple of kv_heads: `heads / kv_heads` of them share keys and values
  int64_t head_size, value_size;  // of q and k, and of v
  // Over each head (weight of one head, or of all heads where each has its own), or over all heads of a token at once.
  Norm q_norm, k_norm, v_norm;
  bool norms_span_heads = false;
  bool norms_after_rotary = false;
  Rotary rotary = Rotary::none;
  int64_t rotary_size = 0;
  float scale;               // of q k^T; a factor of q behind its Linear goes in here
  float soft_cap = 0;        // s becomes cap * tanh(s / cap); 0: none
  int64_t window = 0;        // a query sees so many keys, its own included; 0: all
  bool causal = true;        // a query sees no key behind its own position
  std::vector<float> sinks;  // [heads]: logits of a key without value; empty: none
  OutputLinear output;
  Precision precision = Precision::high;
};

// Keys [batch, kv_heads, capacity, head_size] and values [batch, kv_heads, capacity, value_size], owned by the caller.
struct KeyValueCache {
  void *keys, *values;
  DType dtype;
  int64_t batch, kv_heads, capacity, head_size, value_size;
  std::array<int64_t, 3> key_strides, value_strides;  // of batch, head and position, in elements; the last is 1
};

// What is the same for all blocks at one token: who sees what, and the rotary positions.
struct StepTokens {
  int64_t batch, queries;       // tokens = batch * queries
  const float *cos, *sin;       // [batch * queries, rotary_size / 2], null without rotary
  std::vector<int64_t> starts;  // [batch]: first key that is no padding; empty: 0
  // Added to the scores, [batch, queries, past + queries]; it alone then says who sees what: no window, no causality, no
  // starts. -inf hides a key; a query that sees no key gets 0. Null: none.
  const float* mask;
  int64_t mask_batch_stride, mask_query_stride;
};

// Throws std::invalid_argument where sizes do not fit each other.
void check_attention_step(const AttentionStep& step);

// past: keys in the cache before this call. All throw where `tokens`, `cache` or `past` do not fit the step.
void attention_step(const AttentionStep& step, const StepCall& call, const StepTokens& tokens, const KeyValueCache& cache,
                    int64_t past);

}  // namespace pyllmq::cpu

// The inner loops of the decode steps: one row of functions per instruction set.
#pragma once
#include <cstdint>

#include "runtime/half.h"
#include "runtime/isa.h"
#include "decode_step/mlp_step.h"
#include "decode_step/step_parts.h"

namespace pyllmq::cpu {

constexpr int64_t kLargestHead = 256;  // elements of a head
constexpr int64_t kBlockKeys = 64;     // keys and values of 64 elements and 64 positions fill the L1 cache

// Some positions of one head of keys and values, and the query rows that share it: row = query * group + head of the group.
// Rows are padded to whole groups of StepKernels::lanes, values to as many.
struct AttentionPart {
  int64_t rows, group;
  int64_t head_size, value_size;
  const float* q;                     // [rows / lanes, head_size, lanes], already scaled, padding 0
  const float *first, *last;          // [padded rows]: row r sees positions first[r] <= t < last[r]; exact up to 2^24
  float latest_first, earliest_last;  // of the rows that are no padding
  float soft_cap;                     // 0: none
  const float* mask;                  // of query 0 and position 0, or null
  int64_t mask_query_stride;

  int64_t begin, end;         // positions of this part
  int64_t ahead_end;          // up to here this thread goes on
  const void *keys, *values;  // of position 0
  DType dtype;
  int64_t key_stride, value_stride;                             // of a position, in elements
  void (*to_fp32)(const void* from, float* to, int64_t count);  // of dtype

  // Out. Over the positions of this part: largest score, sum of exp(score - largest), sum of exp(score - largest) * value.
  float *largest, *sums;  // [padded rows]; -inf and 0 where a row sees nothing
  float* weighted;        // [rows, padded value size]
};

struct StepKernels {
  int64_t lanes;
  // weight and bias [count] or null; y may be x.
  void (*norm)(NormKind kind, float eps, const float* weight, const float* bias, const float* x, int64_t count, float* y);
  void (*attend)(const AttentionPart& part);
  // y = activation(gate) * up, up null: 1; y may be one of them.
  void (*activate)(Activation activation, const float* gate, const float* up, int64_t count, float* y);
  // sums[t * kDotRows + r] += <w[r], x[t]>, r < rows <= kDotRows.
  void (*dot_rows)(const float* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride, int64_t tokens,
                   int64_t columns, float* sums);
};
constexpr int64_t kDotRows = 4;

template <Isa isa>
const StepKernels& step_kernels_for();
const StepKernels& step_kernels();  // of the active instruction set

}  // namespace pyllmq::cpu

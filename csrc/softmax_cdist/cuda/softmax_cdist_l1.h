// D[i, j] = sum over v of |softmax(x_i / T)[v] - softmax(y_j / T)[v]| and its gradient in x; integers and pointers only.
#pragma once
#include <cstdint>

namespace pyllmq::cuda {

struct CdistCall {
  const void *x, *y;     // [batch, x_rows, columns] and [batch, y_rows, columns], as all pointers here of the current device
  int x_dtype, y_dtype;  // 0 fp32, 1 bf16, 2 fp16
  int64_t batch, x_rows, y_rows, columns;  // at least 1 each
  float scale;                             // 1 / T
  float *x_statistics, *y_statistics;      // [batch, rows, 2]: largest logit, 1 / sum of exponentials
};

// fp32 elements of workspace of either call, all overwritten; by shape alone.
int64_t softmax_cdist_l1_workspace(const CdistCall& call);
int64_t softmax_cdist_l1_backward_workspace(const CdistCall& call);

// Fills the statistics and distances [batch, x_rows, y_rows].
void softmax_cdist_l1(const CdistCall& call, float* distances, float* workspace, uintptr_t stream);
// gradient [batch, x_rows, y_rows] of the distances; x_gradient of x's shape and dtype.
void softmax_cdist_l1_backward(const CdistCall& call, const float* gradient, void* x_gradient, float* workspace,
                               uintptr_t stream);

}  // namespace pyllmq::cuda

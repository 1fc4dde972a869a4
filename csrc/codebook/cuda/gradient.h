// dL/dcodebook from dL/dW: for each centroid the sum of row_scale * dL/dW over the weights that use it. Pointers are of the
// current device; nothing is read back from it.
#pragma once
#include <cstdint>

namespace pyllmq::cuda {

struct GradientCall {
  int64_t rows, columns, segments, entries;  // entries of a segment's codebook, for all columns
  const int64_t* segment_starts;             // [segments + 1], rows
  const int64_t* sorted_columns;             // [columns], by width, rising inside one
  const int64_t* width_starts;               // [9]: columns of b bits are sorted_columns[width_starts[b - 1]..width_starts[b])
  const int64_t* first_entry;                // [columns]
  const uint8_t* codes[9];                   // by width: [rows, code_bytes[b]]; null where there are none
  int64_t code_bytes[9];
  const void* row_scale;         // [rows] or null
  int row_scale_dtype;           // 0 fp32, 1 bf16, 2 fp16
  const float* weight_gradient;  // [rows, columns], 0 at outliers
};

// fp32 elements of workspace, all overwritten.
int64_t codebook_gradient_workspace(const GradientCall& call);
void codebook_gradient(const GradientCall& call, float* gradient, float* workspace, uintptr_t stream);

}  // namespace pyllmq::cuda

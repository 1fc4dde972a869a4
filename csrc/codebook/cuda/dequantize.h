// The dense matrix [N, K] of a weight in the layout `cuda`.
#pragma once
#include <cstdint>

namespace pyllmq::cuda {

// weight [rows, columns] of dtype 0 fp32, 1 bf16, 2 fp16; all pointers of the current device. A layout that is not one of
// this shape gives NaN.
void codebook_dequantize(const uint8_t* layout, int64_t layout_bytes, int64_t rows, int64_t columns, void* weight, int dtype,
                         uintptr_t stream);

}  // namespace pyllmq::cuda

// Rows of W of a `codebook` weight as a dense matrix: exact in fp32 (an fp16 codebook entry times an fp16 row scale has
// 22 bits), rounded to nearest even in bf16 and fp16. Decoded by the kernels of decode.h, then transposed.
#pragma once
#include "codebook/cpu/layout.h"
#include "runtime/half.h"

namespace pyllmq::cpu {

// Rows [row_begin, row_end) to out [row_end - row_begin, columns] of out_dtype.
void codebook_dequantize(const LayoutView& view, int64_t row_begin, int64_t row_end, void* out, DType out_dtype);

}  // namespace pyllmq::cpu

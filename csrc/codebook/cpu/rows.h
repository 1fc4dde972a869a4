// Chosen rows of W of a `codebook` weight: an embedding. Exact in fp32, rounded to nearest even in bf16 and fp16, as
// codebook_dequantize. Reads nothing but the codes of those rows.
#pragma once
#include "codebook/cpu/layout.h"
#include "runtime/half.h"

namespace pyllmq::cpu {

// Row ids[i] to row i of out [count, columns] of out_dtype. Throws std::out_of_range for an id outside of [0, rows).
void codebook_rows(const LayoutView& view, const int64_t* ids, int64_t count, void* out, DType out_dtype);

}  // namespace pyllmq::cpu

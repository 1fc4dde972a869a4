// Rows of W of a `codebook` weight as a dense matrix: exact in fp32 (an fp16 codebook entry times an fp16 row scale has
// 22 bits), rounded to nearest even in bf16 and fp16.
#pragma once
#include <cstdint>

#include "codebook/cpu/layout.h"
#include "runtime/half.h"

namespace pyllmq::cpu {

// One row per ISA.
struct DequantizeKernels {
  // The 8 columns from `slot` on of one tile, `codebook` theirs: fp32 values, out[row * out_stride + column], row scale
  // applied when not null.
  void (*block)(const uint8_t* tile_codes, StepOrder order, int64_t slot, int width, const uint16_t* codebook,
                const float* row_scale, float* out, int64_t out_stride);
};

extern const DequantizeKernels kDequantizeScalar;  // reads both orders of steps
extern const DequantizeKernels kDequantizeAvx2;    // rows
extern const DequantizeKernels kDequantizeAvx512;  // fours

// Rows [row_begin, row_end) to out [row_end - row_begin, columns] of out_dtype.
void codebook_dequantize(const LayoutView& view, int64_t row_begin, int64_t row_end, void* out, DType out_dtype);

}  // namespace pyllmq::cpu

// What the outliers add to the product of the codes.
#pragma once
#include "codebook/cuda/entries.cuh"
#include "linear_operand_cuda.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

// What the outliers of one row of a tile in panels [panel_begin, panel_end) add for one token.
PYLLMQ_DEVICE float outlier_sum(const LayoutHeader& h, const LinearCall& call, int64_t token, int64_t panel_begin,
                                int64_t panel_end, int64_t tile, int row) {
  float sum = 0.0f;
  for_outliers(h, panel_begin, panel_end, tile, row, [&](int64_t i) {
    sum += section<float>(h, h.outlier_deltas_offset)[i] *
           load_element(call.x, static_cast<DType>(call.dtype),
                        token * h.columns + section<int32_t>(h, h.outlier_columns_offset)[i]);
  });
  return sum;
}

}  // namespace pyllmq::cuda

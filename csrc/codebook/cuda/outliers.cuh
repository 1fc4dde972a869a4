// What the outliers add to the product of the codes.
#pragma once
#include "codebook/cuda/layout.h"
#include "linear_operand_cuda.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

// What the outliers of one row of a tile in panels [panel_begin, panel_end) add for one token.
PYLLMQ_DEVICE float outlier_sum(const LayoutHeader& h, const LinearCall& call, int64_t token, int64_t panel_begin,
                                int64_t panel_end, int64_t tile, int row) {
  float sum = 0.0f;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t bucket = panel * h.tiles + tile;
    const uint16_t* row_end = section<uint16_t>(h, h.outlier_row_end_offset) + bucket * kTileRows + row;
    const int64_t begin = section<uint32_t>(h, h.outlier_begin_offset)[bucket];
    const int64_t end = begin + row_end[0];
    for (int64_t i = begin + (row ? row_end[-1] : 0); i < end; ++i)
      sum += section<float>(h, h.outlier_deltas_offset)[i] *
             load_element(call.x, static_cast<DType>(call.dtype),
                          token * h.columns + section<int32_t>(h, h.outlier_columns_offset)[i]);
  }
  return sum;
}

}  // namespace pyllmq::cuda

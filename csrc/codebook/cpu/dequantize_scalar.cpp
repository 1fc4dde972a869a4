#include "codebook/cpu/dequantize.h"
#include "codebook/cpu/layout.h"

namespace pyllmq::cpu {
namespace {

void block(const uint8_t* tile_codes, StepOrder order, int64_t slot, int width, const uint16_t* codebook,
           const float* row_scale, float* out, int64_t out_stride) {
  const int entries = entries_per_lookup(width) / columns_per_lookup(width);
  for (int row = 0; row < kTileRows; ++row)
    for (int column = 0; column < kBlockColumns; ++column) {
      const float value = fp16_to_fp32(codebook[column * entries + read_code(tile_codes, order, width, slot + column, row)]);
      out[row * out_stride + column] = row_scale ? value * row_scale[row] : value;
    }
}

}  // namespace

const DequantizeKernels kDequantizeScalar = {block};

}  // namespace pyllmq::cpu

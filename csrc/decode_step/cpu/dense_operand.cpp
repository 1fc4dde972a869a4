#include "decode_step/cpu/dense_operand.h"

#include <algorithm>
#include <vector>

#include "codebook/cpu/linear.h"
#include "decode_step/cpu/step_kernels.h"
#include "runtime/counting.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

constexpr uint64_t kNoChecksum = 0;  // dense weights may change in place
constexpr int64_t kTileColumns = 512, kTokenBlock = 16, kChunkRows = 4 * kDotRows;
constexpr double kNsPerByte = 0.06;

}  // namespace

DenseOperand::DenseOperand(const void* weight, DType dtype, int64_t rows, int64_t columns)
    : LinearOperand(rows, columns, kNoChecksum), weight_(weight), dtype_(dtype) {
  if (weight == nullptr || rows < 1 || columns < 1)
    throw std::invalid_argument("a dense weight of shape [" + std::to_string(rows) + ", " + std::to_string(columns) +
                                "] needs an address, and rows and columns > 0");
}

void DenseOperand::run(const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype, void* y,
                       Precision) const {
  const RowKernels& conversions = row_kernels();
  const StepKernels& kernels = step_kernels();
  std::vector<float> x_room(x_dtype == DType::fp32 ? 0 : tokens * columns()), bias_room(bias == nullptr ? 0 : rows());
  const float* x_fp32 = rows_in_fp32(conversions, x, x_dtype, 0, tokens, columns(), x_room.data());
  const float* bias_fp32 =
      bias == nullptr ? nullptr : rows_in_fp32(conversions, bias, bias_dtype, 0, 1, rows(), bias_room.data());
  const int64_t chunks = ceil_div(rows(), kChunkRows);
  const int64_t blocks = ceil_div(tokens, kTokenBlock);
  const double cost = kNsPerByte * static_cast<double>(rows() * columns() * element_bytes(dtype_) * blocks);
  parallel_for(chunks, 1, cost, [&](int64_t chunk_begin, int64_t chunk_end) {
    alignas(64) float tile[kDotRows * kTileColumns];
    for (int64_t row = chunk_begin * kChunkRows; row < std::min(rows(), chunk_end * kChunkRows); row += kDotRows)
      for (int64_t first = 0; first < tokens; first += kTokenBlock) {
        const int64_t count = std::min(kDotRows, rows() - row), block = std::min(kTokenBlock, tokens - first);
        float sums[kTokenBlock * kDotRows] = {};
        for (int64_t c = 0; c < columns(); c += kTileColumns) {
          const int64_t width = std::min(kTileColumns, columns() - c);
          const auto* from = static_cast<const uint8_t*>(weight_) + (row * columns() + c) * element_bytes(dtype_);
          const float* w = reinterpret_cast<const float*>(from);
          int64_t stride = columns();
          if (dtype_ != DType::fp32) {
            for (int64_t r = 0; r < count; ++r)
              conversions.to_fp32[static_cast<int>(dtype_)](from + r * columns() * element_bytes(dtype_), tile + r * kTileColumns,
                                                            width);
            w = tile;
            stride = kTileColumns;
          }
          kernels.dot_rows(w, stride, count, x_fp32 + first * columns() + c, columns(), block, width, sums);
        }
        for (int64_t t = 0; t < block; ++t) {
          float* of_token = sums + t * kDotRows;
          if (bias_fp32 != nullptr)
            for (int64_t r = 0; r < count; ++r) of_token[r] += bias_fp32[row + r];
          conversions.from_fp32[static_cast<int>(x_dtype)](
              of_token, static_cast<uint8_t*>(y) + ((first + t) * rows() + row) * element_bytes(x_dtype), count);
        }
      }
  });
}

}  // namespace pyllmq::cpu

// Kernels that read the checkpoint form itself, for training: its codebook is a plain array that changes at every step,
// where a machine layout would have to be made anew.
#pragma once
#include <cstdint>

namespace pyllmq::cpu {

struct CodebookTensors {
  int64_t rows, columns, segments;
  const uint8_t* column_bits;   // [columns], 1 .. 8
  const int32_t* segment_rows;  // [segments], positive, in sum `rows`
  const uint8_t* codes[9];      // by width: uint8 [rows, ceil(columns_b * b / 8)]; null where the width does not occur
  const float* row_scale;       // [rows] or null
};

// weight [rows, columns] = row_scale * codebook[segment of the row][column][code]; codebook [segments, sum 2^bits].
void codebook_decode(const CodebookTensors& tensors, const float* codebook, float* weight);

// gradient [segments, sum 2^bits] = for each entry the sum of row_scale * weight_gradient over the weights that use it.
// Sums in fp64, each by one thread in the order of the rows: the result does not depend on the number of threads.
void codebook_gradient(const CodebookTensors& tensors, const float* weight_gradient, float* gradient);

}  // namespace pyllmq::cpu

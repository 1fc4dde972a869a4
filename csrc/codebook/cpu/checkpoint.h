// Kernels that read the checkpoint form itself, for training: its codebook is a plain array that changes at every step,
// where a machine layout would have to be made anew.
#pragma once
#include "codebook/shape.h"

namespace pyllmq::cpu {

// Of `checkpoint` shape, widths, segments and codes are read. row_scale [rows] or null.
// weight [rows, columns] = row_scale * codebook[segment of the row][column][code]; codebook [segments, sum 2^bits].
void codebook_decode(const CodebookCheckpoint& checkpoint, const float* row_scale, const float* codebook, float* weight);

// gradient [segments, sum 2^bits] = for each entry the sum of row_scale * weight_gradient over the weights that use it.
// Sums in fp64, each by one thread in the order of the rows: the result does not depend on the number of threads.
void codebook_gradient(const CodebookCheckpoint& checkpoint, const float* row_scale, const float* weight_gradient,
                       float* gradient);

}  // namespace pyllmq::cpu

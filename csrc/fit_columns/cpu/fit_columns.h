// Columns of a codebook weight fitted one after the other, each taking up what those before it changed: the inner loop of
// the column sweep and of block coordinate descent (pyllmq/compression/column_loop.py).
#pragma once

#include <cstdint>

#include "kmeans/cpu/kmeans_1d.h"

namespace pyllmq::cpu {

struct FitColumnsArguments {
  int64_t columns, rows;
  bool descend;  // false: sweep
  KMeans1dMethod method;
  float* block;           // in and out [columns, rows]: sweep: the values to fit; descent: the objective's gradient / 2
  const float* coupling;  // [columns, columns] in rows of coupling_stride; only entries right of the diagonal are read
  int64_t coupling_stride;
  const float* pivot;          // [columns]: sweep: U_jj; descent: H_jj. 0: the column stays as it is (descent only)
  const float* row_weights;    // [rows], > 0
  const float* row_scale;      // [rows], > 0
  const uint8_t* bits;         // [columns], 1 .. 8
  const int32_t* kept_counts;  // [columns]: how many weights stay as they are in fp16, less than rows
  float* stored;               // [columns, rows]: what a column decodes to; read by the descent, written by both
  uint8_t* codes;              // [columns, rows], likewise
  uint8_t* kept;               // [columns, rows], likewise: 1 where the weight stays in fp16
  float* centroids;            // [columns, 256], likewise: fp16 values, the first 2^bits of each
  float* moves;                // out [columns, rows]: sweep: (value - stored) / U_jj; descent: stored before - stored after
};

// For each column j: sweep: fit block_j. Descent: fit stored_j - block_j / H_jj, and take it if that lowers
// sum row_weights * (stored - target)^2. Then block_p -= coupling_jp * moves_j for the columns p after j.
// Returns by how much the descent lowered sum row_weights * e H e^T: never negative.
// Throws std::overflow_error with the column's index in the block if the sweep meets a value beyond fp16.
double fit_columns(const FitColumnsArguments& arguments);

}  // namespace pyllmq::cpu

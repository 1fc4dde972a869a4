// What the layouts of all devices are made from: a weight as a checkpoint holds it, and the check of its shape.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

namespace pyllmq {

// A weight as it stands in a checkpoint (docs/formats.md), all arrays row-major and contiguous, on the host.
struct CodebookCheckpoint {
  int64_t rows, columns, segments;
  const uint8_t* column_bits;          // [columns]
  const int32_t* segment_rows;         // [segments]
  const uint8_t* codes[9];             // by width; [rows, ceil(columns of that width * width / 8)]
  const uint16_t* codebook;            // fp16 [segments, sum 2^bits]
  const uint16_t* row_scale;           // fp16 [rows] or null
  const int32_t* outlier_row_offsets;  // [rows + 1] or null
  const void* outlier_columns;         // uint16 or int32, ascending within a row
  int outlier_columns_bytes;
  const uint16_t* outlier_values;  // fp16

  int64_t outlier_column(int64_t i) const {
    return outlier_columns_bytes == 2 ? static_cast<const uint16_t*>(outlier_columns)[i]
                                      : static_cast<const int32_t*>(outlier_columns)[i];
  }
};

// Calls refuse(why), which throws, unless rows, columns, widths, segments and the number of outliers are ones that a format
// can have. Returns that number.
inline int64_t check_codebook_shape(void (*refuse)(const std::string& why), const CodebookCheckpoint& c) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (c.rows < 1 || c.rows > most || c.columns < 1 || c.columns > most)
    refuse("the weight has shape [" + std::to_string(c.rows) + ", " + std::to_string(c.columns) + "]; allowed: 1.." +
           std::to_string(most) + " each");
  if (c.segments < 1 || c.segments > c.rows)
    refuse(std::to_string(c.segments) + " segments for " + std::to_string(c.rows) + " rows; allowed: 1..rows");
  if (c.column_bits == nullptr || c.segment_rows == nullptr) refuse("column_bits and segment_rows must not be null");
  const int64_t outliers = c.outlier_row_offsets == nullptr ? 0 : c.outlier_row_offsets[c.rows];
  if (outliers < 0 || outliers > c.rows * c.columns)
    refuse(std::to_string(outliers) + " outliers; allowed: 0.." + std::to_string(std::min(most, c.rows * c.columns)) +
           ", and outlier_row_offsets must not decrease");
  int64_t sum = 0;
  for (int64_t s = 0; s < c.segments; ++s) {
    if (c.segment_rows[s] < 1) refuse("segment_rows[" + std::to_string(s) + "] must be at least 1");
    sum += c.segment_rows[s];
  }
  if (sum != c.rows) refuse("segment_rows sum to " + std::to_string(sum) + ", not to the " + std::to_string(c.rows) + " rows");
  for (int64_t k = 0; k < c.columns; ++k)
    if (c.column_bits[k] < 1 || c.column_bits[k] > 8)
      refuse("column_bits[" + std::to_string(k) + "] = " + std::to_string(c.column_bits[k]) + "; allowed: 1..8");
  return outliers;
}

// The same of the arrays that a layout is packed from; `outliers` as returned above.
inline void check_codebook_arrays(void (*refuse)(const std::string& why), const CodebookCheckpoint& c, int64_t outliers) {
  for (int64_t k = 0; k < c.columns; ++k)
    if (c.codes[c.column_bits[k]] == nullptr)
      refuse("column " + std::to_string(k) + " has " + std::to_string(c.column_bits[k]) + " bits but codes_b" +
             std::to_string(c.column_bits[k]) + " is missing");
  if (c.codebook == nullptr) refuse("codebook must not be null");
  const int32_t* offsets = c.outlier_row_offsets;
  if (offsets == nullptr) return;
  if (offsets[0] != 0) refuse("outlier_row_offsets must start with 0, not " + std::to_string(offsets[0]));
  for (int64_t r = 0; r < c.rows; ++r)
    if (offsets[r + 1] < offsets[r]) refuse("outlier_row_offsets decrease at row " + std::to_string(r));
  if (outliers == 0) return;
  if (c.outlier_columns_bytes != 2 && c.outlier_columns_bytes != 4)
    refuse("outlier_columns_bytes = " + std::to_string(c.outlier_columns_bytes) + "; allowed: 2 (uint16), 4 (int32)");
  if (c.outlier_columns == nullptr || c.outlier_values == nullptr)
    refuse("outlier_columns and outlier_values must not be null when there are outliers");
  for (int64_t r = 0; r < c.rows; ++r) {
    int64_t previous = -1;
    for (int64_t i = offsets[r]; i < offsets[r + 1]; previous = c.outlier_column(i++))
      if (c.outlier_column(i) <= previous || c.outlier_column(i) >= c.columns)
        refuse("outlier_columns of row " + std::to_string(r) + " must ascend without repeats within 0.." +
               std::to_string(c.columns - 1) + "; found " + std::to_string(c.outlier_column(i)) + " after " +
               std::to_string(previous));
  }
}

}  // namespace pyllmq

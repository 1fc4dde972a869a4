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

// Calls refuse(why), which throws, unless rows, columns, widths and segments are ones that a format can have.
inline void check_codebook_shape(void (*refuse)(const std::string& why), int64_t rows, int64_t columns,
                                 const uint8_t* column_bits, const int32_t* segment_rows, int64_t segments, int64_t outliers) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (rows < 1 || rows > most || columns < 1 || columns > most)
    refuse("the weight has shape [" + std::to_string(rows) + ", " + std::to_string(columns) + "]; allowed: 1.." +
           std::to_string(most) + " each");
  if (segments < 1 || segments > rows)
    refuse(std::to_string(segments) + " segments for " + std::to_string(rows) + " rows; allowed: 1..rows");
  if (column_bits == nullptr || segment_rows == nullptr) refuse("column_bits and segment_rows must not be null");
  if (outliers < 0 || outliers > most || outliers > rows * columns)
    refuse(std::to_string(outliers) + " outliers; allowed: 0.." + std::to_string(std::min(most, rows * columns)));
  int64_t sum = 0;
  for (int64_t s = 0; s < segments; ++s) {
    if (segment_rows[s] < 1) refuse("segment_rows[" + std::to_string(s) + "] must be at least 1");
    sum += segment_rows[s];
  }
  if (sum != rows) refuse("segment_rows sum to " + std::to_string(sum) + ", not to the " + std::to_string(rows) + " rows");
  for (int64_t k = 0; k < columns; ++k)
    if (column_bits[k] < 1 || column_bits[k] > 8)
      refuse("column_bits[" + std::to_string(k) + "] = " + std::to_string(column_bits[k]) + "; allowed: 1..8");
}

}  // namespace pyllmq

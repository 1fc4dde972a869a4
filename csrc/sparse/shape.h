// What the sparse layouts of all devices are made from: a weight as a checkpoint holds it, and how its arrays are read.
#pragma once
#include <cstdint>
#include <limits>
#include <string>

namespace pyllmq {

enum class SparseKind : int64_t { bitmap = 0, columns = 1, sparse24 = 2, codes = 3 };
enum class ValueType : int64_t { fp32 = 0, bf16 = 1, fp16 = 2, int8 = 3 };  // the first three as DType

static constexpr int64_t value_bytes(ValueType type) { return type == ValueType::fp32 ? 4 : type == ValueType::int8 ? 1 : 2; }

static inline int64_t sparse_groups(int64_t columns) { return (columns + 3) / 4; }

static inline uint32_t column_at(const uint8_t* columns, int bytes, int64_t i) {
  if (bytes == 4) return reinterpret_cast<const uint32_t*>(columns)[i];
  return reinterpret_cast<const uint16_t*>(columns)[i];
}

static inline void put_column(uint8_t* columns, int bytes, int64_t i, uint32_t column) {
  if (bytes == 4)
    reinterpret_cast<uint32_t*>(columns)[i] = column;
  else
    reinterpret_cast<uint16_t*>(columns)[i] = static_cast<uint16_t>(column);
}

// A row of 2:4 as it stands in a checkpoint; what is put over zeros is put once.
struct Row24 {
  uint8_t *positions, *values, *codes;
  int64_t value_bytes, bits;

  uint32_t position_pair(int64_t group) const {  // first | second << 2
    return positions[group / 2] >> (4 * (group % 2)) & 15;
  }
  void put_position_pair(int64_t group, uint32_t pair) const {  // over zeros
    positions[group / 2] |= static_cast<uint8_t>(pair << (4 * (group % 2)));
  }
  uint8_t* value(int64_t group, int which) const { return values + (2 * group + which) * value_bytes; }
  uint32_t code(int64_t group, int which) const {  // within two bytes
    const int64_t bit = (2 * group + which) * bits;
    const uint8_t* from = codes + bit / 8;
    const uint32_t high = bit % 8 + bits > 8 ? from[1] << (8 - bit % 8) : 0;
    return (from[0] >> (bit % 8) | high) & ((1u << bits) - 1);
  }
  void put_code(int64_t group, int which, uint32_t code) const {  // over zeros
    const int64_t bit = (2 * group + which) * bits;
    uint8_t* to = codes + bit / 8;
    to[0] |= static_cast<uint8_t>(code << (bit % 8));
    if (code << (bit % 8) >> 8) to[1] |= static_cast<uint8_t>(code << (bit % 8) >> 8);
  }
};

// A weight as it stands in a checkpoint (docs/formats.md), all arrays contiguous; what a format lacks is null.
struct SparseCheckpoint {
  SparseKind kind;  // bitmap, sparse24 or codes
  ValueType value_type;
  int64_t rows, columns, kept, bits, outliers;
  uint8_t* values;
  int32_t* row_offsets;
  uint8_t* mask;
  uint8_t* column_numbers;  // of kept weights
  int column_bytes;         // of those and of the outliers'
  uint8_t* positions;
  float* scale;
  uint8_t* codes;
  uint16_t* codebook;
  int32_t* outlier_row_offsets;
  uint8_t* outlier_columns;
  uint16_t* outlier_values;

  int64_t groups() const { return sparse_groups(columns); }
  int64_t mask_row_bytes() const { return (columns + 7) / 8; }
  int64_t position_row_bytes() const { return (groups() + 1) / 2; }
  int64_t code_row_bytes() const { return (2 * groups() * bits + 7) / 8; }

  // Of a bitmap: where the column of the `place`-th kept weight is; over zeros.
  void put_kept(int64_t row, int64_t column, int64_t place) const {
    if (mask == nullptr)
      put_column(column_numbers, column_bytes, place, static_cast<uint32_t>(column));
    else
      mask[row * mask_row_bytes() + column / 8] |= static_cast<uint8_t>(1 << column % 8);
  }
  Row24 row24(int64_t row) const {
    const int64_t size = values == nullptr ? 0 : value_bytes(value_type);
    return {positions + row * position_row_bytes(), values + row * 2 * groups() * size, codes + row * code_row_bytes(), size,
            bits};
  }
};

// Calls refuse(why), which throws, unless the shape is one that a format can have.
inline void check_sparse_shape(void (*refuse)(const std::string& why), const SparseCheckpoint& c) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (c.rows < 1 || c.rows > most || c.columns < 1 || c.columns > most)
    refuse("the weight has shape [" + std::to_string(c.rows) + ", " + std::to_string(c.columns) + "]; allowed: 1.." +
           std::to_string(most) + " each");
}

// Whether a bitmap keeps a smaller share of its weights than `share`.
inline bool keeps_few(const SparseCheckpoint& c, double share) {
  return c.kind == SparseKind::bitmap &&
         static_cast<double>(c.kept) < share * static_cast<double>(c.rows) * static_cast<double>(c.columns);
}

}  // namespace pyllmq

// What the sparse layouts of all devices are made from: a weight as a checkpoint holds it, and how its arrays are read.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

namespace pyllmq {

enum class SparseKind : int64_t { bitmap = 0, columns = 1, sparse24 = 2, codes = 3 };
enum class ValueType : int64_t { fp32 = 0, bf16 = 1, fp16 = 2, int8 = 3 };  // the first three as DType

static constexpr int64_t value_bytes(ValueType type) { return type == ValueType::fp32 ? 4 : type == ValueType::int8 ? 1 : 2; }

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
};

static inline int64_t sparse_groups(int64_t columns) { return (columns + 3) / 4; }

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

// Makes ready to be filled from a layout with this header: refuses unless the tensors are those of a weight of `kind` that was
// packed into it, and clears those that are filled bit by bit.
template <class Header>
void prepare_unpacking(void (*refuse)(const std::string& why), const Header& h, SparseKind kind, bool has_scale,
                       const SparseCheckpoint& to) {
  const bool as_columns = to.kind == SparseKind::bitmap && to.mask == nullptr;
  if (to.kind != kind || to.value_type != h.values || to.rows != h.rows || to.columns != h.columns || to.kept != h.kept ||
      to.bits != h.bits || to.outliers != h.outliers || as_columns != (h.checkpoint_columns != 0) ||
      (to.scale != nullptr) != has_scale)
    refuse("the tensors to unpack into are not those of the weight that was packed");
  const int64_t groups = sparse_groups(h.columns);
  if (to.mask != nullptr) std::memset(to.mask, 0, h.rows * ((h.columns + 7) / 8));
  if (to.positions != nullptr) std::memset(to.positions, 0, h.rows * ((groups + 1) / 2));
  if (to.codes != nullptr) std::memset(to.codes, 0, h.rows * ((2 * groups * h.bits + 7) / 8));
}

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

static inline int read_nibble(const uint8_t* row, int64_t i) { return row[i / 2] >> (4 * (i % 2)) & 15; }

static inline uint32_t code_at(const uint8_t* row, int64_t i, int64_t bits) {  // within two bytes
  const int64_t bit = i * bits;
  const uint32_t low = row[bit / 8] >> (bit % 8);
  const uint32_t high = bit % 8 + bits > 8 ? static_cast<uint32_t>(row[bit / 8 + 1]) << (8 - bit % 8) : 0;
  return (low | high) & ((1u << bits) - 1);
}

static inline void write_code(uint8_t* row, int64_t i, int64_t bits, uint32_t code) {  // over zeros
  const int64_t bit = i * bits;
  const uint32_t shifted = code << (bit % 8);
  row[bit / 8] |= static_cast<uint8_t>(shifted);
  if (shifted >> 8) row[bit / 8 + 1] |= static_cast<uint8_t>(shifted >> 8);
}

}  // namespace pyllmq

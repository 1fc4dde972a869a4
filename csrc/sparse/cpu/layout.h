// The machine layouts of the sparse formats: one relocatable blob (offsets, no pointers) made from the checkpoint once.
//
// Rows are cut into tiles of 32, each tile into two halves of 16, columns into blocks of 256. A cell is one half of a
// tile in one block; four tiles are a strip, and cells lie in the order strip, block, tile, half: a thread that takes a
// strip reads one contiguous stretch of memory, while x (or its tables) of one block stays in the L1 cache.
// In a cell 16 rows stand side by side, column after column, so that a register holds one column of 16 rows: x is
// broadcast, sums need no reduction, and the same order is what the multiplication of many tokens and AMX tiles read.
//
//   bitmap     masks of all columns, 2 bytes each, then the kept values in the same order, filled up to 8 bytes
//                bf16              by pairs of columns: bit 2 r + c of a 32-bit mask is row r of column 2 p + c; expanded,
//                                  a dword is one row of both columns
//                fp32, fp16, int8  by columns: bit r of a 16-bit mask is row r
//   sparse24   batches of 8 groups (32 columns): 16 dwords of positions, 4 bits for each group, then 8 x 16 rows x 2 values
//                bf16              a dword is the two values of one row
//                fp32, fp16, int8  16 first values, then 16 second values
//   codes      batches of 8 groups, in planes of 64 bytes. A row has 4 bytes of a plane, nibble g of them for group g.
//              2 bits: a plane for the first kept weights, code | position << 2, then one for the second ones. 3 and 4
//              bits: a plane of positions, then one of codes for the first and one for the second kept weights.
//              StepOrder::fours: byte b of row r at 4 r + b, a dword per row; rows: at 16 b + r, for byte shuffles (AVX2, NEON)
//   columns    for few kept weights: row by row a column number and a value for each, no cells
//
// Columns beyond the weight's are empty, values and codebook entries there zero.
#pragma once
#include <cstdint>

#include "codebook/cpu/layout.h"
#include "sparse/shape.h"

namespace pyllmq::cpu {

constexpr int kCellRows = 16;
constexpr int64_t kCellColumns = 256;
constexpr int64_t kBatchColumns = 32;  // 8 groups of four
constexpr int64_t kSparseStripTiles = 4;
constexpr int64_t kReadAhead = 128;  // bytes behind the last value that kernels may read

static constexpr int64_t batch_bytes(ValueType type) { return 4 * kCellRows + kBatchColumns / 2 * kCellRows * value_bytes(type); }
static constexpr int64_t code_batch_bytes(int bits) { return (bits == 2 ? 2 : 3) * 4 * kCellRows; }

struct SparseHeader {
  static constexpr uint64_t kMagic = 0x70732D716D6C6C79;  // "yllmq-sp"
  static constexpr uint64_t kVersion = 2;
  uint64_t magic = kMagic, version = kVersion, checksum;
  int64_t bytes, rows, columns, kept;
  SparseKind kind;
  ValueType values;
  int64_t bits;                // of codes
  StepOrder order;             // of the bytes of codes: that of the instruction set that packs the layout
  int64_t checkpoint_columns;  // bytes of a column number where the checkpoint holds those, else 0
  int64_t has_scale, outliers, tiles, blocks;
  int64_t cells_offset, row_offsets_offset, scale_offset, codebook_offset;
  int64_t outlier_row_offsets_offset, outlier_columns_offset, outlier_values_offset, outlier_deltas_offset;
  int64_t columns_offset, data_offset;
};

class SparseView {
 public:
  SparseView(const void* layout, int64_t layout_bytes);  // throws std::invalid_argument when the header does not fit

  const uint8_t* base() const { return base_; }
  const SparseHeader& header() const { return *at<SparseHeader>(0); }
  int64_t slots(int64_t block) const {  // columns of a block, filled up to what kernels read at once
    const int64_t rest = header().columns - block * kCellColumns, columns = rest < kCellColumns ? rest : kCellColumns;
    return (columns + kBatchColumns - 1) / kBatchColumns * kBatchColumns;
  }
  const uint8_t* cell(int64_t tile, int64_t block, int half) const {
    return at<uint8_t>(0) + at<int64_t>(header().cells_offset)[(tile * header().blocks + block) * 2 + half];
  }
  const int32_t* row_offsets() const { return at<int32_t>(header().row_offsets_offset); }
  const float* scale() const { return header().has_scale ? at<float>(header().scale_offset) : nullptr; }
  const uint16_t* codebook() const { return at<uint16_t>(header().codebook_offset); }  // [columns, 2^bits], filled up
  const uint32_t* outlier_row_offsets() const { return at<uint32_t>(header().outlier_row_offsets_offset); }
  const uint32_t* outlier_columns() const { return at<uint32_t>(header().outlier_columns_offset); }
  const uint16_t* outlier_values() const { return at<uint16_t>(header().outlier_values_offset); }
  const float* outlier_deltas() const { return at<float>(header().outlier_deltas_offset); }
  int column_bytes() const { return header().columns <= 65536 ? 2 : 4; }
  const uint8_t* columns() const { return at<uint8_t>(header().columns_offset); }  // kind `columns`: [kept]
  const uint8_t* values() const { return at<uint8_t>(header().data_offset); }      // kind `columns`: [kept]

 private:
  template <class T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(base_ + offset);
  }
  const uint8_t* base_;
};

// sparse_columns: a bitmap with a smaller share of kept weights than this is laid out as `columns`.
int64_t sparse_layout_bytes(const SparseCheckpoint& checkpoint, double sparse_columns);
void sparse_layout_pack(void* layout, int64_t layout_bytes, const SparseCheckpoint& checkpoint, double sparse_columns);
// Exactly what was packed, into the arrays of `checkpoint`.
void sparse_layout_unpack(const SparseView& view, const SparseCheckpoint& checkpoint);

// Codes and positions of a group of four columns of one row.
struct GroupCodes {
  int position[2], code[2];
};
static inline int64_t code_byte(StepOrder order, int64_t group, int row) {  // its place in a plane of a batch
  const int64_t byte = group % 8 / 2;
  return order == StepOrder::rows ? byte * kCellRows + row : row * 4 + byte;
}
static inline GroupCodes read_group(const uint8_t* cell, StepOrder order, int64_t bits, int64_t group, int row) {
  const uint8_t* bytes = cell + group / 8 * code_batch_bytes(static_cast<int>(bits)) + code_byte(order, group, row);
  const auto nibble = [&](int plane) { return bytes[plane * 4 * kCellRows] >> (4 * (group % 2)) & 15; };
  if (bits == 2) return {{nibble(0) >> 2, nibble(1) >> 2}, {nibble(0) & 3, nibble(1) & 3}};
  return {{nibble(0) & 3, nibble(0) >> 2}, {nibble(1), nibble(2)}};
}

}  // namespace pyllmq::cpu

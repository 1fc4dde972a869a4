// The machine layouts `cuda.bitmap`, `cuda.sparse24`, `cuda.sparse24_codebook` and `cuda.columns` of the sparse formats: one
// relocatable blob (offsets, no pointers), made on the host at load.
//
// Rows are cut into strips of 64, four tiles of 16; columns into steps of 32 and cells of 1, 2 or 4 steps. A strip is one
// stretch of memory, cell after cell. With g = lane / 4 and t = lane % 4, register r of a lane stands for
//
//   bitmap      row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next of a half step of 16     as mma.m16n8k16 wants it
//   sparse24    row g + 8 (r % 2), the two kept of the group of columns 4 (t + 4 (r / 2))       as mma.sp.m16n8k32 wants it
//
// and within a cell of a strip lie
//
//   bitmap      cell of 4 steps   masks     uint32 [half step 8][lane]: bit 8 tile + 2 r + j
//                                 values    [n][lane], n = 0, 1, ..: each lane's own kept values one after the other, filled
//                                           up to the lane that keeps most, so that the lanes of a load lie side by side
//   sparse24    2 steps           values    [step][tile][lane][r][2]
//                                 positions uint32 [tile][lane]: lanes with t = 2 step + c hold groups 4c..4c+3 of rows g (low
//                                           half) and g + 8 of that step: mma.sp's metadata with selector `step`
//   2 bits      2 steps           codes     uint32 [tile][lane]: bits 2 step, 2 step + 1 of nibble 2 r + j: kept weight j
//                                 positions as above
//   3, 4 bits   1 step            codes     uint32 [tile][lane]: nibble 2 r + j
//                                 positions uint32 [tile][g][c]: as above
//
// Codebooks lie by cell: of 2 bits 16 entries a group, code + 4 position, their low bytes, then their high bytes; of 3 and
// 4 bits fp16 [column][16]. Columns and rows beyond the weight's are zero.
//
// columns: column numbers instead of masks, for few kept weights and for fp32. Columns are cut into panels of 4096; within
// a panel row by row values and uint8 steps: a value's column is the sum of the row's steps through its own. A step of 255
// only moves; rows are filled up to 8 entries with such steps.
#pragma once
#include <cstdint>

#include "codebook/cuda/layout.h"
#include "sparse/shape.h"

namespace pyllmq::cuda {

constexpr int kStripRows = 64;
constexpr int kStripTiles = 4;
constexpr int kStepColumns = 32;
constexpr int kPanelColumns = 4096;  // of `columns`: x of 4 tokens in fp32 is 64 KiB
constexpr int kEntryGroup = 8;       // what a lane takes at once in `columns`
constexpr int kMoveOnly = 255;

struct SparseHeader {
  static constexpr uint64_t kMagic = 0x73632D716D6C6C79;  // "yllmq-cs"
  static constexpr uint64_t kVersion = 1;
  uint64_t magic = kMagic, version = kVersion;
  int64_t bytes, rows, columns, kept;
  SparseKind kind;             // of the layout
  SparseKind checkpoint_kind;  // of what it was made from: `columns` serves bitmap and sparse24
  ValueType values;
  int64_t bits, outliers;
  int64_t checkpoint_columns;  // bytes of a column number where the checkpoint holds those, else 0
  int64_t strips, cells;       // cells of a strip; in `columns` panels
  int64_t stage_bytes;         // of the largest cell of a strip; in `columns` 0
  int64_t begin_offset;  // bitmap: uint32 [strips, cells + 1] in units of 16 bytes; columns: [panels, rows + 1] in units of 8
  int64_t row_offsets_offset;  // int32 [rows + 1], of a bitmap's checkpoint
  int64_t scale_offset;        // fp32 [rows]; 0: none
  int64_t codebook_offset;
  int64_t outlier_row_offsets_offset;  // uint32 [rows + 1]; 0: none of the four
  int64_t outlier_columns_offset;      // uint32 [outliers]
  int64_t outlier_values_offset;       // fp16 [outliers]
  int64_t outlier_deltas_offset;       // fp32 [outliers]: value - what the code under it stands for
  int64_t data_offset;
  int64_t steps_offset;     // columns: uint8 [entries]
  int64_t counters_offset;  // uint32 [counter sets, token blocks, strips] (linear_operand_cuda.h)
};

PYLLMQ_HOST_DEVICE bool describes(const SparseHeader& h, SparseKind kind, int64_t bytes, int64_t rows, int64_t columns) {
  return h.magic == h.kMagic && h.version == h.kVersion && h.kind == kind && h.bytes == bytes && h.rows == rows &&
         h.columns == columns;
}

PYLLMQ_HOST_DEVICE int cell_columns(SparseKind kind, int64_t bits) {
  return kStepColumns * (kind == SparseKind::bitmap ? 4 : kind == SparseKind::codes && bits > 2 ? 1 : 2);
}
constexpr int kMaskBytes = 8 * 32 * 4;      // of a cell of a bitmap
constexpr int kPositionBytes = 4 * 32 * 4;  // of two steps
static inline int64_t values24_bytes(ValueType type) { return kStripRows * 32 * value_bytes(type) + kPositionBytes; }
PYLLMQ_HOST_DEVICE int64_t codes24_bytes(int64_t bits) { return bits == 2 ? 512 + kPositionBytes : 512 + kPositionBytes / 2; }
PYLLMQ_HOST_DEVICE int64_t cell_table_bytes(int64_t bits) { return bits == 2 ? 16 * 32 : 32 * 32; }

// Host functions. They throw std::invalid_argument that says what does not fit. A bitmap that keeps a smaller share than
// `sparse_columns`, and whatever has fp32 values, is laid out as `columns`.
int64_t sparse_layout_bytes(const SparseCheckpoint& checkpoint, double sparse_columns);
void sparse_layout_pack(void* layout, int64_t layout_bytes, const SparseCheckpoint& checkpoint, double sparse_columns);
// Exactly what was packed, into the arrays of `checkpoint`.
void sparse_layout_unpack(const void* layout, int64_t layout_bytes, const SparseCheckpoint& checkpoint);
// `layout` needs to hold the header only.
const SparseHeader& sparse_header(const void* layout, int64_t layout_bytes);

}  // namespace pyllmq::cuda

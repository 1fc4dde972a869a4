// What packing into the sparse layouts, and unpacking from them, has in common on all devices.
#pragma once
#include <cstdint>
#include <cstring>

#include "layout_blob.h"
#include "runtime/half.h"
#include "sparse/shape.h"

namespace pyllmq {

// A number of a checkpoint to its place in a layout, or back from there.
enum class Way { pack, unpack };
template <Way way>
void move(void* in_layout, void* in_checkpoint, int64_t bytes) {
  std::memcpy(way == Way::pack ? in_layout : in_checkpoint, way == Way::pack ? in_checkpoint : in_layout, bytes);
}

// Makes ready to be filled from a layout with this header: refuses unless the tensors are those of a weight of `kind` that was
// packed into it, and clears those that are filled bit by bit.
template <class Header>
void prepare_unpacking(Refuse refuse, const Header& h, SparseKind kind, bool has_scale, const SparseCheckpoint& to) {
  const bool as_columns = to.kind == SparseKind::bitmap && to.mask == nullptr;
  if (to.kind != kind || to.value_type != h.values || to.rows != h.rows || to.columns != h.columns || to.kept != h.kept ||
      to.bits != h.bits || to.outliers != h.outliers || as_columns != (h.checkpoint_columns != 0) ||
      (to.scale != nullptr) != has_scale)
    refuse("the tensors to unpack into are not those of the weight that was packed");
  if (to.mask != nullptr) std::memset(to.mask, 0, h.rows * to.mask_row_bytes());
  if (to.positions != nullptr) std::memset(to.positions, 0, h.rows * to.position_row_bytes());
  if (to.codes != nullptr) std::memset(to.codes, 0, h.rows * to.code_row_bytes());
}

// What a checkpoint's codes say at a column; 0 where they keep nothing.
inline float decoded(const SparseCheckpoint& c, int64_t row, int64_t column) {
  const Row24 own = c.row24(row);
  for (int which = 0; which < 2; ++which)
    if ((own.position_pair(column / 4) >> (2 * which) & 3) == column % 4)
      return cpu::fp16_to_fp32(c.codebook[(column << c.bits) + own.code(column / 4, which)]);
  return 0.0f;
}

// Outliers lie row by row, as in the checkpoint; beside each the difference to what its code says.
template <class Header>
void pack_outliers(const SparseCheckpoint& c, const Header& h, uint8_t* base) {
  std::memcpy(base + h.outlier_row_offsets_offset, c.outlier_row_offsets, (h.rows + 1) * 4);
  std::memcpy(base + h.outlier_values_offset, c.outlier_values, h.outliers * 2);
  for (int64_t row = 0; row < h.rows; ++row)
    for (int64_t i = c.outlier_row_offsets[row]; i < c.outlier_row_offsets[row + 1]; ++i) {
      const uint32_t column = column_at(c.outlier_columns, c.column_bytes, i);
      at<uint32_t>(base, h.outlier_columns_offset)[i] = column;
      at<float>(base, h.outlier_deltas_offset)[i] = cpu::fp16_to_fp32(c.outlier_values[i]) - decoded(c, row, column);
    }
}

template <class Header>
void unpack_outliers(const Header& h, const uint8_t* base, const SparseCheckpoint& to) {
  std::memcpy(to.outlier_row_offsets, base + h.outlier_row_offsets_offset, (h.rows + 1) * 4);
  std::memcpy(to.outlier_values, base + h.outlier_values_offset, h.outliers * 2);
  for (int64_t i = 0; i < h.outliers; ++i)
    put_column(to.outlier_columns, to.column_bytes, i, at<uint32_t>(base, h.outlier_columns_offset)[i]);
}

}  // namespace pyllmq

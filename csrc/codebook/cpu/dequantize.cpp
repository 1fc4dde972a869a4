#include "codebook/cpu/dequantize.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "codebook/cpu/decode.h"
#include "codebook/cpu/layout.h"
#include "codebook/cpu/linear.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kStagedColumns = 128;  // 32 rows x 128 fp32 = 16 KiB, half of the L1 cache; whole lines go to `out`
constexpr double kNsPerWeight = 0.5;

struct RowRange {
  int64_t segment, tile;
  int64_t tile_row;            // the weight's row that is row 0 of the tile
  int64_t row_begin, row_end;  // the rows of the tile that are wanted, as rows of the weight
};

void store_columns(const LayoutView& view, const PanelRecord& panel, int64_t slot, int64_t columns, const float* staged,
                   void* out_row, DType dtype) {
  const auto* convert = row_kernels().from_fp32;
  const int64_t element = element_bytes(dtype);
  if (panel.first_column >= 0) {
    convert[static_cast<int>(dtype)](staged, static_cast<uint8_t*>(out_row) + (panel.first_column + slot) * element, columns);
    return;
  }
  const uint32_t* to = view.columns(panel) + slot;
  if (dtype == DType::fp32) {
    for (int64_t i = 0; i < columns; ++i) static_cast<float*>(out_row)[to[i]] = staged[i];
  } else {
    uint16_t halves[kStagedColumns];
    convert[static_cast<int>(dtype)](staged, halves, columns);
    for (int64_t i = 0; i < columns; ++i) static_cast<uint16_t*>(out_row)[to[i]] = halves[i];
  }
}

void store_outliers(const LayoutView& view, int64_t row, void* out_row, DType dtype) {
  if (view.header().outliers == 0) return;
  const uint32_t* offsets = view.outlier_row_offsets();
  for (uint32_t i = offsets[row]; i < offsets[row + 1]; ++i) {
    const uint16_t value = view.outlier_values()[i];
    const uint32_t column = view.outlier_columns()[i];
    if (dtype == DType::fp32) static_cast<float*>(out_row)[column] = fp16_to_fp32(value);
    if (dtype == DType::bf16) static_cast<uint16_t*>(out_row)[column] = fp32_to_bf16(fp16_to_fp32(value));
    if (dtype == DType::fp16) static_cast<uint16_t*>(out_row)[column] = value;
  }
}

void dequantize_tile(const LayoutView& view, const RowRange& range, uint8_t* out, DType dtype) {
  const LayoutHeader& header = view.header();
  const DecodeKernels& kernels = decode_kernels(header.order, Precision::exact);
  const int64_t row_bytes = header.columns * element_bytes(dtype);
  alignas(64) static thread_local float weights[kDecodedWeights], staged[kTileRows * kStagedColumns];
  alignas(64) static thread_local uint8_t split[kBytePanelColumns * split_bytes(8)];
  static_assert(sizeof split >= kStagedColumns * split_bytes(4), "panels of widths 5..8 are short");
  alignas(64) float scale[kTileRows] = {};
  if (view.row_scale())
    for (int64_t r = range.row_begin; r < range.row_end; ++r) scale[r - range.tile_row] = view.row_scale()[r];
  for (int64_t p = 0; p < header.panels; ++p) {
    const PanelRecord& panel = view.panel(p);
    const int width = static_cast<int>(panel.width);
    const int64_t entries = entries_per_lookup(width) / columns_per_lookup(width);
    for (int64_t slot = 0; slot < panel.columns; slot += kStagedColumns) {
      const int64_t slots = std::min(kStagedColumns, panel.slots - slot);
      kernels.split_codebook(width, view.codebook(panel, range.segment) + slot * entries,
                             view.max_magnitude(panel, range.segment) + slot, slots, split);
      kernels.decode(width, header.order, view.codes(panel, range.tile), slot, split, slots, view.row_scale() ? scale : nullptr,
                     reinterpret_cast<uint8_t*>(weights));
      for (int half = 0; half < 2; ++half)
        row_kernels().transpose(weights + half * kDecodedColumns * kHalfRows, slots, staged + half * kHalfRows * kStagedColumns,
                                kStagedColumns);
      for (int64_t r = range.row_begin; r < range.row_end; ++r)
        store_columns(view, panel, slot, std::min(kStagedColumns, panel.columns - slot),
                      staged + (r - range.tile_row) * kStagedColumns, out + (r - range.row_begin) * row_bytes, dtype);
    }
  }
  for (int64_t r = range.row_begin; r < range.row_end; ++r)
    store_outliers(view, r, out + (r - range.row_begin) * row_bytes, dtype);
}

// The tile of a row, and the part of it inside [row, row_end).
RowRange tile_at(const LayoutView& view, int64_t row, int64_t row_end) {
  const int64_t segment = view.segment_of(row);
  const SegmentRecord& s = view.segment(segment);
  const int64_t tile = (row - s.row_begin) / kTileRows;
  const int64_t tile_row = s.row_begin + tile * kTileRows;
  return {segment, s.tile_begin + tile, tile_row, row, std::min({row_end, tile_row + kTileRows, s.row_begin + s.rows})};
}

}  // namespace

void codebook_dequantize(const LayoutView& view, int64_t row_begin, int64_t row_end, void* out, DType out_dtype) {
  const LayoutHeader& header = view.header();
  if (row_begin < 0 || row_end < row_begin || row_end > header.rows)
    throw std::invalid_argument("rows [" + std::to_string(row_begin) + ", " + std::to_string(row_end) +
                                ") do not lie within the weight's 0.." + std::to_string(header.rows));
  if (row_begin == row_end) return;
  if (out == nullptr) throw std::invalid_argument("out must not be null");

  std::vector<RowRange> ranges;
  for (int64_t row = row_begin; row < row_end; row = ranges.back().row_end) ranges.push_back(tile_at(view, row, row_end));
  const int64_t row_bytes = header.columns * element_bytes(out_dtype);
  const int64_t tiles = static_cast<int64_t>(ranges.size());
  parallel_for(tiles, 1, kNsPerWeight * tiles * kTileRows * header.columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      dequantize_tile(view, ranges[i], static_cast<uint8_t*>(out) + (ranges[i].row_begin - row_begin) * row_bytes, out_dtype);
  });
}

}  // namespace pyllmq::cpu

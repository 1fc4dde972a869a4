// A sparse layout -> dense matrix. A warp spreads one step of 32 columns of a strip at a time, or one row of a panel of
// `columns`, over zeros in shared memory, and stores rows from there.
#include <algorithm>

#include "runtime/cuda/runtime.h"
#include "sparse/cuda/cells.cuh"
#include "sparse/cuda/operand.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerMultiprocessor = 6;
constexpr int kRowPitch = kStepColumns + 2;  // 17 words: the rows that a warp spreads into start in different banks

struct Arguments {
  const uint8_t* layout;
  int64_t layout_bytes, rows, columns;
  void* weight;
  DType dtype;
};

PYLLMQ_DEVICE float scale_of(const SparseHeader& h, int64_t row) {
  return h.scale_offset == 0 ? 1.0f : section<float>(h, h.scale_offset)[row];
}

// The outliers of the rows in a range of columns, over what was stored there: one lane a row.
PYLLMQ_DEVICE void store_outliers(const Arguments& a, const SparseHeader& h, int64_t row_begin, int64_t row_end, int64_t begin,
                                  int64_t end) {
  for (int64_t row = row_begin + ptx::thread() % 32; row < row_end; row += 32) {
    const uint32_t last = outlier_from(h, row, end);
    for (uint32_t i = outlier_from(h, row, begin); i < last; ++i)
      store_element(a.weight, a.dtype, row * h.columns + section<uint32_t>(h, h.outlier_columns_offset)[i],
                    ptx::fp16_to_fp32(section<uint16_t>(h, h.outlier_values_offset)[i]));
  }
}

template <class Cells>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) sparse_dequantize_kernel(const Arguments a) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  auto* staged = reinterpret_cast<uint16_t*>(memory) + warp * kStripRows * kRowPitch;
  const auto& h = *reinterpret_cast<const SparseHeader*>(a.layout);
  if (!describes(h, Cells::kKind, a.layout_bytes, a.rows, a.columns))
    return store_nan(a.weight, a.dtype, a.rows * a.columns, kThreads);
  for (int64_t item = ptx::block() * kWarps + warp; item < h.strips * h.cells; item += ptx::blocks() * kWarps) {
    const int64_t strip = item / h.cells, cell = item % h.cells, row_begin = strip * kStripRows;
    const int rows = h.rows - row_begin < kStripRows ? static_cast<int>(h.rows - row_begin) : kStripRows;
    const uint8_t* at = a.layout + h.data_offset + item * h.stage_bytes;
    if (Cells::kKind == SparseKind::bitmap)
      at = a.layout + h.data_offset + int64_t{section<uint32_t>(h, h.begin_offset)[strip * (h.cells + 1) + cell]} * 16;
    const uint8_t* tables = a.layout + h.codebook_offset + cell * Cells::kTableBytes;
    const uint8_t* next = nullptr;
    for (int step = 0; step < Cells::kColumns / kStepColumns; ++step) {
      for (int i = lane; i < kStripRows * kRowPitch / 2; i += 32) reinterpret_cast<uint32_t*>(staged)[i] = 0;
      ptx::sync_warp();
      Cells::spread_step(at, tables, step, lane, next,
                         [&](int row, int column, uint16_t weight) { staged[row * kRowPitch + column % kStepColumns] = weight; });
      ptx::sync_warp();
      const int64_t column = cell * Cells::kColumns + step * kStepColumns + lane;
      for (int row = 0; column < h.columns && row < rows; ++row) {
        const uint16_t half = staged[row * kRowPitch + lane];
        const float weight = Cells::kBf16 ? bf16_to_fp32(half) : ptx::fp16_to_fp32(half);
        store_element(a.weight, a.dtype, (row_begin + row) * h.columns + column, weight * scale_of(h, row_begin + row));
      }
      ptx::sync_warp();  // orders these stores before those of the outliers, too
    }
    if (Cells::kKind == SparseKind::codes && h.outliers != 0)
      store_outliers(a, h, row_begin, row_begin + rows, cell * Cells::kColumns, (cell + 1) * Cells::kColumns);
  }
}

PYLLMQ_DEVICE float value_at(const SparseHeader& h, const uint8_t* values, int64_t entry) {
  if (h.values == ValueType::int8) return static_cast<float>(reinterpret_cast<const int8_t*>(values)[entry]);
  return load_element(values, static_cast<DType>(h.values), entry);
}

// A warp spreads a row of a panel: 8 entries a lane in turns, whose columns a scan of the lanes' steps gives.
PYLLMQ_KERNEL void __launch_bounds__(kThreads, 3) sparse_columns_dequantize_kernel(const Arguments a) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  auto* staged = reinterpret_cast<float*>(memory) + warp * kPanelColumns;
  const auto& h = *reinterpret_cast<const SparseHeader*>(a.layout);
  if (!describes(h, SparseKind::columns, a.layout_bytes, a.rows, a.columns))
    return store_nan(a.weight, a.dtype, a.rows * a.columns, kThreads);
  for (int64_t item = ptx::block() * kWarps + warp; item < h.rows * h.cells; item += ptx::blocks() * kWarps) {
    const int64_t row = item % h.rows, panel = item / h.rows, left = h.columns - panel * kPanelColumns;
    const int columns = left < kPanelColumns ? static_cast<int>(left) : kPanelColumns;
    for (int column = lane; column < columns; column += 32) staged[column] = 0.0f;
    ptx::sync_warp();
    const uint32_t* begin = section<uint32_t>(h, h.begin_offset) + panel * (h.rows + 1) + row;
    int before = 0;
    for (uint32_t turn = begin[0]; turn < begin[1]; turn += 32) {
      const bool here = turn + lane < begin[1];
      const int64_t entry = (int64_t{turn} + lane) * kEntryGroup;
      uint32_t advance = 0;
      for (int i = 0; here && i < kEntryGroup; ++i) advance += a.layout[h.steps_offset + entry + i];
      uint32_t through = advance;
      for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t below = ptx::shuffle_up(through, distance);
        if (lane >= distance) through += below;
      }
      int column = before + static_cast<int>(through - advance);
      before += static_cast<int>(ptx::shuffle(through, 31));
      for (int i = 0; here && i < kEntryGroup; ++i) {
        const int step = a.layout[h.steps_offset + entry + i];
        column += step;
        if (step != kMoveOnly && column < columns) staged[column] = value_at(h, a.layout + h.data_offset, entry + i);
      }
    }
    ptx::sync_warp();
    for (int column = lane; column < columns; column += 32)
      store_element(a.weight, a.dtype, row * h.columns + panel * kPanelColumns + column, staged[column] * scale_of(h, row));
    ptx::sync_warp();
  }
}

}  // namespace

void SparseOperand::dequantize(void* weight, int dtype, uintptr_t stream) const {
  const Arguments arguments{layout, layout_bytes, rows, columns, weight, static_cast<DType>(dtype)};
  const int64_t most = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  if (kind == SparseKind::columns) {
    const int64_t bytes = kWarps * kPanelColumns * 4, items = rows * ((columns + kPanelColumns - 1) / kPanelColumns);
    allow_shared(reinterpret_cast<const void*>(sparse_columns_dequantize_kernel), bytes);
    PYLLMQ_LAUNCH(sparse_columns_dequantize_kernel, std::min(most, (items + kWarps - 1) / kWarps), kThreads, bytes, stream,
                  arguments);
  } else {
    with_cells(kind, values, bits, [&](auto cells) {
      using Cells = decltype(cells);
      const int64_t items = (rows + kStripRows - 1) / kStripRows * ((columns + Cells::kColumns - 1) / Cells::kColumns);
      const auto kernel = sparse_dequantize_kernel<Cells>;
      PYLLMQ_LAUNCH(kernel, std::min(most, (items + kWarps - 1) / kWarps), kThreads, kWarps * kStripRows * kRowPitch * 2, stream,
                    arguments);
    });
  }
  check_launch("sparse_dequantize");
}

}  // namespace pyllmq::cuda

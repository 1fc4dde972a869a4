// Rows of a weight by their ids: what an embedding looks up. A block has one id and 1024 columns of it: 64 bytes of codes for
// 16 columns of 4 bits, which the tile's other rows share, and the entries that they name. Outliers take the place of what the
// same block stored there. An id outside of the weight gives a row of NaN: nobody waits for the device to hear of it.
#include <algorithm>
#include <limits>

#include "codebook/cuda/entries.cuh"
#include "codebook/cuda/operand.h"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPartColumns = 1024;  // so that a single id fills more than one multiprocessor

struct Arguments {
  const uint8_t* layout;
  int64_t layout_bytes, rows, columns;
  const int64_t* ids;
  int64_t count;
  void* out;
  DType dtype;
  int parts;  // of a row
};

PYLLMQ_KERNEL void __launch_bounds__(kThreads, 4) codebook_rows_kernel(const Arguments a) {
  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.layout);
  if (!describes(h, a.layout_bytes, a.rows, a.columns)) return store_nan(a.out, a.dtype, a.count * a.columns, kThreads);
  for (int64_t item = ptx::block(); item < a.count * a.parts; item += ptx::blocks()) {
    const int64_t place = item / a.parts, row = a.ids[place], to = place * a.columns;
    const int64_t begin = item % a.parts * kPartColumns;
    const int64_t end = begin + kPartColumns < a.columns ? begin + kPartColumns : a.columns;
    if (row < 0 || row >= a.rows) {
      for (int64_t column = begin + ptx::thread(); column < end; column += kThreads)
        store_element(a.out, a.dtype, to + column, ptx::bits_to_fp32(0x7FC00000u));
      continue;
    }
    const RowBlock block = block_of_row(h, row);
    const int in_block = static_cast<int>(row - block.row_begin);
    const float scale = h.row_scale_offset == 0 ? 1.0f : ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[row]);
    for (int64_t column = begin + ptx::thread(); column < end; column += kThreads) {
      const Column c = column_at(h, section<int32_t>(h, h.slots_offset)[column]);
      store_element(a.out, a.dtype, to + column, scale * ptx::fp16_to_fp32(entry_at(h, c, block, in_block)));
    }
    if (h.outliers == 0) continue;
    ptx::sync_block();  // an outlier may lie in another thread's column
    for (int64_t panel = ptx::thread(); panel < h.panels; panel += kThreads)
      for_outliers(h, panel, panel + 1, block.tile_begin + in_block / kTileRows, in_block % kTileRows, [&](int64_t i) {
        const int32_t column = section<int32_t>(h, h.outlier_columns_offset)[i];
        if (column >= begin && column < end)
          store_element(a.out, a.dtype, to + column, ptx::fp16_to_fp32(section<uint16_t>(h, h.outlier_values_offset)[i]));
      });
  }
}

}  // namespace

void CodebookOperand::row_values(const int64_t* ids, int64_t count, void* out, int dtype, uintptr_t stream) const {
  if (count == 0) return;
  const int64_t parts = ceil_div(columns, kPartColumns), most = std::numeric_limits<int32_t>::max();
  const Arguments arguments{
      layout, layout_bytes, rows, columns, ids, count, out, static_cast<DType>(dtype), static_cast<int>(parts)};
  PYLLMQ_LAUNCH(codebook_rows_kernel, std::min(count * parts, most), kThreads, 0, stream, arguments);
  check_launch("codebook_rows");
}

}  // namespace pyllmq::cuda

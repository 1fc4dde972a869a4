// A row is one byte of each step of a tile, 32 bytes apart in layouts in rows: 4 bits of 384 columns are 192 lines of the
// cache. Codes are looked up one by one into fp16, whole panels of which become fp32 at a time. Rejected: decoding the tile
// with the kernels of decode.h, 32 times the work.
#include "codebook/cpu/rows.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "codebook/cpu/linear.h"
#include "runtime/instances.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

// Most of the time goes into fetching lines of which a row is 4 bytes, or 2: 128 rows of 384 columns at 8 bits take 45 us, at 4
// bits 22 (Zen 5). Rejected, no gain: asking for them 4 rows ahead; panel by panel for all rows.
constexpr double kNsPerLine = 3.6;

// A unit of columns begins a step of its own in either order. Places within it are constants, so that a byte is loaded once.
template <int Width, StepOrder Order>
void look_up_codes(const uint8_t* __restrict tile_codes, int row, const uint16_t* __restrict codebook, int64_t slots,
                   uint16_t* __restrict weights) {
  constexpr int unit = Order == StepOrder::fours && Width <= 3 ? 4 * kBlockColumns : kBlockColumns;
  for (; slots > 0;
       slots -= unit, weights += unit, codebook += unit << Width, tile_codes += unit / kBlockColumns * block_bytes(Width))
#pragma GCC unroll 32
    for (int slot = 0; slot < unit; ++slot)
      weights[slot] = codebook[slot << Width | read_code(tile_codes, Order, Width, slot, row)];
}

constexpr auto kLookUpRows = instances<1, 8>([]<int Width>() { return look_up_codes<Width, StepOrder::rows>; });
constexpr auto kLookUpFours = instances<1, 8>([]<int Width>() { return look_up_codes<Width, StepOrder::fours>; });

void decode_row(const LayoutView& view, int64_t row, float* out) {
  const LayoutHeader& header = view.header();
  const int64_t s = view.segment_of(row);
  const SegmentRecord& segment = view.segment(s);
  const int64_t in_segment = row - segment.row_begin, tile = segment.tile_begin + in_segment / kTileRows;
  const auto& look_up = header.order == StepOrder::rows ? kLookUpRows : kLookUpFours;
  uint16_t halves[kMaxPanelColumns];
  float scattered[kMaxPanelColumns];
  for (int64_t p = 0; p < header.panels; ++p) {
    const PanelRecord& panel = view.panel(p);
    look_up[panel.width](view.codes(panel, tile), static_cast<int>(in_segment % kTileRows), view.codebook(panel, s), panel.slots,
                         halves);
    float* weights = panel.first_column >= 0 ? out + panel.first_column : scattered;
    row_kernels().to_fp32[static_cast<int>(DType::fp16)](halves, weights, panel.columns);
    if (weights == scattered)
      for (int64_t i = 0; i < panel.columns; ++i) out[view.columns(panel)[i]] = scattered[i];
  }
  if (view.row_scale())
    for (int64_t column = 0; column < header.columns; ++column) out[column] *= view.row_scale()[row];
  if (header.outliers == 0) return;
  for (uint32_t i = view.outlier_row_offsets()[row]; i < view.outlier_row_offsets()[row + 1]; ++i)
    out[view.outlier_columns()[i]] = fp16_to_fp32(view.outlier_values()[i]);
}

}  // namespace

void codebook_rows(const LayoutView& view, const int64_t* ids, int64_t count, void* out, DType out_dtype) {
  const LayoutHeader& header = view.header();
  if (count < 0) throw std::invalid_argument("count = " + std::to_string(count) + "; must be >= 0");
  if (count > 0 && (ids == nullptr || out == nullptr)) throw std::invalid_argument("ids and out must not be null");
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= header.rows)
      throw std::out_of_range("id " + std::to_string(ids[i]) + " at place " + std::to_string(i) + "; allowed: 0 to " +
                              std::to_string(header.rows - 1));
  int64_t lines = 0;
  for (int64_t p = 0; p < header.panels; ++p)
    lines += view.panel(p).tile_bytes / kTileRows / (header.order == StepOrder::fours ? 4 : 2);
  const double cost = kNsPerLine * static_cast<double>(count * lines);
  parallel_for(count, 8, cost, [&](int64_t begin, int64_t end) {
    std::vector<float> row(out_dtype == DType::fp32 ? 0 : header.columns);
    for (int64_t i = begin; i < end; ++i) {
      if (out_dtype == DType::fp32) {
        decode_row(view, ids[i], static_cast<float*>(out) + i * header.columns);
        continue;
      }
      decode_row(view, ids[i], row.data());
      row_kernels().from_fp32[static_cast<int>(out_dtype)](row.data(), static_cast<uint16_t*>(out) + i * header.columns,
                                                           header.columns);
    }
  });
}

}  // namespace pyllmq::cpu

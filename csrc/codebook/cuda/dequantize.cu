// Codes -> dense matrix. A block decodes one tile of 64 rows for 8 column groups at a time, a group per warp, into shared
// memory as fp16, and stores whole rows from there: neighbouring columns mostly have one width, so stores are contiguous.
#include <algorithm>

#include "codebook/cuda/decode.cuh"
#include "codebook/cuda/operand.h"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStagedColumns = kWarps * kGroupColumns;
constexpr int kBlocksPerMultiprocessor = 6;

struct Shared {
  GroupRange groups[9];  // of the panel, by width
  int32_t columns[kStagedColumns];
  uint16_t weight[kTileRows][kStagedColumns + 2];  // 65 words a row: the rows of a warp's stores start in different banks
};

PYLLMQ_DEVICE void stage_pairs(const uint32_t (&pairs)[4], int lane, int column, uint16_t (*weight)[kStagedColumns + 2]) {
  unrolled<4>([&](int i) {
    const int row = 16 * i + lane / 4 * 2;
    weight[row][column] = static_cast<uint16_t>(pairs[i]);
    weight[row + 1][column] = static_cast<uint16_t>(pairs[i] >> 16);
  });
}

// One tile of one group into 16 staged columns from `first` on.
template <int kWidth>
PYLLMQ_DEVICE void decode_group(const uint8_t* codes, const uint8_t* tables, int lane, int first,
                                uint16_t (*weight)[kStagedColumns + 2]) {
  for (int half = 0; half < 2; ++half) {
    uint32_t low[2], pairs[4];
    column_codes<kWidth <= 4 ? kWidth : 4>(codes, lane, half, low);
    if constexpr (kWidth <= 4) {
      for (int i = 0; i < 2; ++i) {
        const int column = lane % 4 + 8 * half + 4 * i;
        RegisterTable<kWidth> table;
        table.load(tables, column);
        table.decode(low[i], pairs);
        stage_pairs(pairs, lane, first + column, weight);
      }
    } else {
      uint32_t high[2];
      column_codes<kWidth - 4>(codes + tile_bytes(4), lane, half, high);
      for (int i = 0; i < 2; ++i) {
        const int column = lane % 4 + 8 * half + 4 * i;
        const MemoryTable<kWidth> table{reinterpret_cast<const uint16_t*>(tables) + (column << kWidth)};
        table.decode(low[i], high[i], pairs);
        stage_pairs(pairs, lane, first + column, weight);
      }
    }
  }
}

PYLLMQ_DEVICE void decode_any(int width, const uint8_t* codes, const uint8_t* tables, int lane, int first,
                              uint16_t (*weight)[kStagedColumns + 2]) {
  switch (width) {
    case 1: return decode_group<1>(codes, tables, lane, first, weight);
    case 2: return decode_group<2>(codes, tables, lane, first, weight);
    case 3: return decode_group<3>(codes, tables, lane, first, weight);
    case 4: return decode_group<4>(codes, tables, lane, first, weight);
    case 5: return decode_group<5>(codes, tables, lane, first, weight);
    case 6: return decode_group<6>(codes, tables, lane, first, weight);
    case 7: return decode_group<7>(codes, tables, lane, first, weight);
    default: return decode_group<8>(codes, tables, lane, first, weight);
  }
}

struct Arguments {
  const uint8_t* layout;
  int64_t layout_bytes, rows, columns;
  void* weight;
  DType dtype;
};

// An outlier's value takes the place of what was decoded.
PYLLMQ_DEVICE void store_outliers(const Arguments& a, const LayoutHeader& h, int64_t bucket, int row, int64_t to) {
  const uint16_t* row_end = section<uint16_t>(h, h.outlier_row_end_offset) + bucket * kTileRows + row;
  const int64_t begin = section<uint32_t>(h, h.outlier_begin_offset)[bucket];
  for (int64_t i = begin + (row ? row_end[-1] : 0); i < begin + row_end[0]; ++i)
    store_element(a.weight, a.dtype, to + section<int32_t>(h, h.outlier_columns_offset)[i],
                  ptx::fp16_to_fp32(section<uint16_t>(h, h.outlier_values_offset)[i]));
}

PYLLMQ_KERNEL void __launch_bounds__(kThreads, 4) codebook_dequantize_kernel(const Arguments a) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.layout);
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  if (!describes(h, a.layout_bytes, a.rows, a.columns)) return store_nan(a.weight, a.dtype, a.rows * a.columns, kThreads);
  const int64_t tile_slots = h.blocks * kBlockTiles;
  for (int64_t item = ptx::block(); item < tile_slots * h.panels; item += ptx::blocks()) {
    const int64_t panel = item / tile_slots;
    const RowBlock block = section<RowBlock>(h, h.blocks_offset)[item % tile_slots / kBlockTiles];
    const int tile = static_cast<int>(item % kBlockTiles);
    if (tile >= block_tiles(block)) continue;
    const int first_row = tile * kTileRows;
    const int rows = block.rows - first_row < kTileRows ? block.rows - first_row : kTileRows;
    const int64_t row_begin = block.row_begin + first_row;

    ptx::sync_block();  // the item before is done with shared memory
    if (ptx::thread() >= 1 && ptx::thread() <= 8) shared.groups[ptx::thread()] = panel_groups(h, ptx::thread(), panel, panel + 1);
    ptx::sync_block();
    for (int width = 1; width <= 8; ++width) {
      const GroupRange range = shared.groups[width];
      for (int begin = range.begin; begin < range.end; begin += kWarps) {
        const int group = begin + warp;
        if (group < range.end) {
          decode_any(width, a.layout + codes_offset(h, width, block, group) + tile * tile_bytes(width),
                     a.layout + tables_offset(h, width, block.segment, group), lane, warp * kGroupColumns, shared.weight);
          if (lane < kGroupColumns)
            shared.columns[warp * kGroupColumns + lane] =
                section<int32_t>(h, h.columns_offset)[h.first_slot[width] + int64_t{group} * kGroupColumns + lane];
        }
        ptx::sync_block();
        const int columns = (range.end - begin < kWarps ? range.end - begin : kWarps) * kGroupColumns;
        for (int row = warp; row < rows; row += kWarps) {
          const float scale =
              h.row_scale_offset == 0 ? 1.0f : ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[row_begin + row]);
          for (int column = lane; column < columns; column += 32)
            if (shared.columns[column] >= 0)
              store_element(a.weight, a.dtype, (row_begin + row) * h.columns + shared.columns[column],
                            scale * ptx::fp16_to_fp32(shared.weight[row][column]));
        }
        ptx::sync_block();  // orders these stores before those of the outliers, too
      }
    }
    if (h.outliers != 0 && ptx::thread() < rows)
      store_outliers(a, h, panel * h.tiles + block.tile_begin + tile, ptx::thread(), (row_begin + ptx::thread()) * h.columns);
  }
}

}  // namespace

void CodebookOperand::dequantize(void* weight, int dtype, uintptr_t stream) const {
  const int64_t items = ceil_div(rows, kTileRows) * ceil_div(columns, kGroupColumns * kPanelGroups);
  const int64_t grid = std::min<int64_t>(items, int64_t{multiprocessors()} * kBlocksPerMultiprocessor);
  const Arguments arguments{layout, layout_bytes, rows, columns, weight, static_cast<DType>(dtype)};
  PYLLMQ_LAUNCH(codebook_dequantize_kernel, grid, kThreads, sizeof(Shared), stream, arguments);
  check_launch("codebook_dequantize");
}

}  // namespace pyllmq::cuda

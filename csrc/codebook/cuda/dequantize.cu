// Codes -> dense matrix. A warp takes 32 neighbouring columns, whatever their widths, and several blocks of rows. Each lane has
// the codebooks of 4 of the columns in registers, as bits of the type that is stored. It looks up two rows of a column at a
// time, and `transpose` turns two rows of a column into two columns of a row:
//
//   lane 4a + r, register k:   rows 2r, 2r + 1 of column 8 (a / 2) + 2k + a % 2   ->   columns 8r + 2k, 8r + 2k + 1 of row a
//
// So four registers are 8 neighbouring columns: one store of 16 bytes, but for fp32 and for rows that begin elsewhere. Outliers
// are stored by a second launch, each row's where the layout's index says; nothing is searched.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "codebook/cuda/decode.cuh"
#include "codebook/cuda/entries.cuh"
#include "codebook/cuda/operand.h"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 2;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerMultiprocessor = 4;  // 255 registers a thread: mixtures of widths need more than 168
constexpr int kStripColumns = 32;
constexpr int kLaneColumns = 4;  // of a strip
constexpr int kStoredColumns = 8;

struct Arguments {
  const uint8_t* layout;
  int64_t layout_bytes, rows, columns;
  void* weight;
  DType dtype;
  int parts;   // of the row blocks, for each strip
  bool whole;  // rows begin at multiples of 16 bytes, and 8 of them take less than 2^32 bytes
};

PYLLMQ_DEVICE uint32_t stored_bits(uint16_t half, DType stored) {
  return stored == DType::bf16 ? ptx::fp32_to_bf16(ptx::fp16_to_fp32(half)) : half;
}

template <int kBits>
PYLLMQ_DEVICE RegisterTable<kBits> table_of(const uint8_t* entries, int width, DType stored) {
  RegisterTable<kBits> table{};
  unrolled<1 << kBits>([&](int e) {
    const uint32_t bits = stored_bits(entry_of(entries, width, e & ((1 << width) - 1)), stored);
    table.word[e / 4] |= (bits & 255) << (e % 4 * 8);
    table.word[table.kWords / 2 + e / 4] |= (bits >> 8) << (e % 4 * 8);
  });
  return table;
}

// Where the words of a lane's column begin, in the first tile of a part (layout.h) of a group.
PYLLMQ_DEVICE const uint8_t* column_words(const uint8_t* tile, int part, int in_group, int lane) {
  const int j = in_group / 4, word = part == 4 ? j : part == 3 ? j % 3 : part == 2 ? j / 2 : 0;
  return tile + 4 * word_index(part, lane % 4 * 4 + in_group % 4, word);
}

// The codes of rows 16i + 8s + 2r + h, i < 4, h < 2, in nibbles that may have more bits than a code of 3 or 4 bits.
template <int kPart>
PYLLMQ_DEVICE uint32_t column_nibbles(const uint8_t* at, int j, int s) {
  const auto* words = reinterpret_cast<const uint32_t*>(at) + (kPart == 3 ? 16 : 16 * kPart) * s;
  if (kPart == 1) return words[0] >> j & 0x11111111u;
  if (kPart == 2) return words[0] >> (2 * (j % 2)) & 0x33333333u;
  if (kPart == 3 && j == 3)
    return (words[0] >> 3 & 0x11111111u) | (words[32] >> 2 & 0x22222222u) | (words[64] >> 1 & 0x44444444u);
  return words[0];
}

PYLLMQ_DEVICE uint32_t any_nibbles(const uint8_t* at, int part, int j, int s) {
  switch (part) {
    case 1: return column_nibbles<1>(at, j, s);
    case 2: return column_nibbles<2>(at, j, s);
    case 3: return column_nibbles<3>(at, j, s) & 0x77777777u;
    default: return column_nibbles<4>(at, j, s);
  }
}

// 8 rows of a column of any width.
PYLLMQ_DEVICE void decode_column(const Arguments& a, const LayoutHeader& h, const Column& c, const RegisterTable<4>& table,
                                 const uint8_t* tile, int64_t segment, int s, DType stored, uint32_t (&pairs)[4]) {
  const int lane = ptx::thread() % 32, low_bits = low_part(c.width), high_bits = c.width - low_bits;
  const uint32_t low = any_nibbles(column_words(tile, low_bits, c.in_group, lane), low_bits, c.in_group / 4, s);
  table.decode(low, pairs);
  if (high_bits == 0) return;
  const uint8_t* above = column_words(tile + tile_bytes(4), high_bits, c.in_group, lane);
  const uint32_t high = any_nibbles(above, high_bits, c.in_group / 4, s);
  const uint8_t* entries = a.layout + tables_offset(h, c.width, segment, c.group) + (c.in_group * 2 << c.width);
  MemoryTable<8>{reinterpret_cast<const uint16_t*>(entries)}.decode(low, high, pairs);
  unrolled<4>([&](int i) {
    pairs[i] = stored_bits(static_cast<uint16_t>(pairs[i]), stored) | stored_bits(static_cast<uint16_t>(pairs[i] >> 16), stored)
                                                                          << 16;
  });
}

// How a lane's 8 columns of a row are stored. plain: what tables hold is what is stored. scaled: times the row's scale.
// any_type: that, as fp32, too, and of rows that begin anywhere.
enum class Store { plain, scaled, any_type };

template <Store kStore>
PYLLMQ_DEVICE void store(const Arguments& a, const LayoutHeader& h, int64_t row, int64_t column, const uint32_t (&words)[4]) {
  const float scale = h.row_scale_offset == 0 ? 1.0f : ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[row]);
  const int64_t to = row * a.columns + column;
  if constexpr (kStore == Store::any_type) {
    unrolled<kStoredColumns>([&](int i) {
      if (column + i < a.columns)
        store_element(a.weight, a.dtype, to + i, scale * ptx::fp16_to_fp32(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))));
    });
    return;
  }
  Words<4> stored;
  unrolled<4>([&](int i) {
    const auto half = [&](int shift) -> uint32_t {
      const float value = scale * ptx::fp16_to_fp32(static_cast<uint16_t>(words[i] >> shift));
      return a.dtype == DType::fp16 ? ptx::fp32_to_fp16(value) : ptx::fp32_to_bf16(value);
    };
    stored.word[i] = half(0) | half(16) << 16;
  });
  *reinterpret_cast<Words<4>*>(static_cast<uint16_t*>(a.weight) + to) = stored;
}

struct Strip {
  int64_t column, block_begin, block_end;
  Column columns[kLaneColumns];
  uint32_t widths;  // that the strip has, a bit for each
};

PYLLMQ_DEVICE Strip take(const Arguments& a, const LayoutHeader& h, int64_t item) {
  const int lane = ptx::thread() % 32;
  const int64_t strips = (h.columns + kStripColumns - 1) / kStripColumns, part = item / strips;
  Strip strip{item % strips * kStripColumns, part * h.blocks / a.parts, (part + 1) * h.blocks / a.parts, {}, 0};
  unrolled<kLaneColumns>([&](int k) {
    const int64_t column = strip.column + lane / 8 * kStoredColumns + 2 * k + lane / 4 % 2;
    strip.columns[k] = column_at(h, section<int32_t>(h, h.slots_offset)[column < h.columns ? column : h.columns - 1]);
    strip.widths |= 1u << strip.columns[k].width;
  });
  for (int mask = 16; mask > 0; mask /= 2) strip.widths |= ptx::shuffle(strip.widths, lane ^ mask);
  return strip;
}

// The rows of a strip whose columns are all of kWidth bits; 0: of any.
template <int kWidth, Store kStore>
PYLLMQ_DEVICE void decode_strip(const Arguments& a, const LayoutHeader& h, const Strip& strip) {
  constexpr int kTableBits = kWidth >= 1 && kWidth <= 3 ? 3 : 4;
  const int lane = ptx::thread() % 32;
  const DType table_type = kStore == Store::plain ? a.dtype : DType::fp16;
  const int64_t column = strip.column + lane % 4 * kStoredColumns;
  const auto step = static_cast<uint32_t>(8 * a.columns * 2);  // of 8 rows, where rows are plain
  RegisterTable<kTableBits> table[kLaneColumns];
  const uint32_t top_bits = ptx::shuffle(0x44444444u, 0);  // a constant would be folded
  int64_t segment = -1;
  for (int64_t index = strip.block_begin; index < strip.block_end; ++index) {
    const RowBlock block = section<RowBlock>(h, h.blocks_offset)[index];
    const uint8_t* at[kLaneColumns];
    unrolled<kLaneColumns>([&](int k) {
      const Column& c = strip.columns[k];
      const int width = kWidth == 0 ? c.width : kWidth;
      at[k] = a.layout + codes_offset(h, width, block, c.group);
      if (kWidth != 0) at[k] = column_words(at[k], kWidth, c.in_group, lane);
      if (block.segment == segment) return;
      const uint8_t* entries = a.layout + tables_offset(h, width, block.segment, c.group) + (c.in_group * 2 << width);
      table[k] = table_of<kTableBits>(entries, width, table_type);
    });
    segment = block.segment;

    int64_t row = block.row_begin + lane / 4;
    auto* to = static_cast<uint8_t*>(a.weight) + (row * a.columns + column) * 2;
    const bool here = column < a.columns;
    int left = block.rows;
    const auto decode_tile = [&](auto whole_tile) {
      const auto decode_half = [&](int s) {
        uint32_t pairs[kLaneColumns][4];
        unrolled<kLaneColumns>([&](int k) {
          if constexpr (kWidth != 0)
            table[k].decode(column_nibbles<kWidth>(at[k], strip.columns[k].in_group / 4, s), pairs[k], top_bits);
          else
            decode_column(a, h, strip.columns[k], table[k], at[k], segment, s, table_type, pairs[k]);
        });
        if (kWidth == 0) ptx::sync_warp();
        unrolled<4>([&](int i) {
          uint32_t words[4];
          unrolled<4>([&](int k) { words[k] = ptx::transpose(pairs[k][i]); });
          const int below = 16 * i + 8 * s;
          if (!here || (!whole_tile.value && below + lane / 4 >= left)) return;
          if constexpr (kStore == Store::plain)
            ptx::store_16(to, step, static_cast<uint32_t>(2 * i + s), words);
          else
            store<kStore>(a, h, row + below, column, words);
        });
      };
      if constexpr (kWidth != 0) {
        unrolled<2>(decode_half);
      } else {
#pragma unroll 1
        for (int s = 0; s < 2; ++s) decode_half(s);
      }
      unrolled<kLaneColumns>([&](int k) { at[k] += tile_bytes(kWidth == 0 ? strip.columns[k].width : kWidth); });
      to += uint64_t{step} * 8;
      row += kTileRows;
    };
    if constexpr (kWidth != 0) {
#pragma unroll 1
      for (; left >= kTileRows; left -= kTileRows) decode_tile(std::true_type());
      if (left > 0) decode_tile(std::false_type());
    } else {
#pragma unroll 1
      for (; left > 0; left -= kTileRows) decode_tile(std::false_type());
    }
  }
}

template <bool kAnyType>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) codebook_dequantize_kernel(const Arguments a) {
  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.layout);
  if (!describes(h, a.layout_bytes, a.rows, a.columns)) return store_nan(a.weight, a.dtype, a.rows * a.columns, kThreads);
  const int64_t item = ptx::block() * kWarps + ptx::thread() / 32;
  if (item >= (h.columns + kStripColumns - 1) / kStripColumns * a.parts) return;
  const Strip strip = take(a, h, item);
  if (kAnyType) return decode_strip<0, Store::any_type>(a, h, strip);
  if (h.row_scale_offset != 0) return decode_strip<0, Store::scaled>(a, h, strip);
  switch (strip.widths) {
    case 1u << 1: return decode_strip<1, Store::plain>(a, h, strip);
    case 1u << 2: return decode_strip<2, Store::plain>(a, h, strip);
    case 1u << 3: return decode_strip<3, Store::plain>(a, h, strip);
    case 1u << 4: return decode_strip<4, Store::plain>(a, h, strip);
    default: return decode_strip<0, Store::plain>(a, h, strip);
  }
}

// An outlier's value takes the place of what was decoded. A thread has the outliers of one row in one panel.
PYLLMQ_KERNEL void __launch_bounds__(kThreads, 8) codebook_dequantize_outliers_kernel(const Arguments a) {
  const auto& h = *reinterpret_cast<const LayoutHeader*>(a.layout);
  if (!describes(h, a.layout_bytes, a.rows, a.columns) || h.outliers == 0) return;
  for (int64_t item = ptx::block() * kThreads + ptx::thread(); item < h.panels * h.blocks * kBlockRows;
       item += ptx::blocks() * kThreads) {
    const int row = static_cast<int>(item % kBlockRows);
    const RowBlock block = section<RowBlock>(h, h.blocks_offset)[item / kBlockRows % h.blocks];
    if (row >= block.rows) continue;
    const int64_t panel = item / kBlockRows / h.blocks, to = (block.row_begin + row) * h.columns;
    for_outliers(h, panel, panel + 1, block.tile_begin + row / kTileRows, row % kTileRows, [&](int64_t i) {
      store_element(a.weight, a.dtype, to + section<int32_t>(h, h.outlier_columns_offset)[i],
                    ptx::fp16_to_fp32(section<uint16_t>(h, h.outlier_values_offset)[i]));
    });
  }
}

}  // namespace

void CodebookOperand::dequantize(void* weight, int dtype, uintptr_t stream) const {
  const int64_t strips = ceil_div(columns, kStripColumns), slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  const int64_t parts = std::clamp<int64_t>(ceil_div(slots * kWarps, strips), 1, ceil_div(rows, kBlockRows));
  const bool whole = columns % kStoredColumns == 0 && columns * 16 <= std::numeric_limits<uint32_t>::max();
  const Arguments arguments{layout, layout_bytes, rows, columns, weight, static_cast<DType>(dtype), static_cast<int>(parts),
                            whole};
  const auto kernel =
      whole && arguments.dtype != DType::fp32 ? codebook_dequantize_kernel<false> : codebook_dequantize_kernel<true>;
  PYLLMQ_LAUNCH(kernel, ceil_div(strips * parts, kWarps), kThreads, 0, stream, arguments);
  const int64_t outlier_threads = rows * ceil_div(columns, kGroupColumns * kPanelGroups);
  PYLLMQ_LAUNCH(codebook_dequantize_outliers_kernel, std::clamp<int64_t>(ceil_div(outlier_threads, kThreads), 1, slots * 4),
                kThreads, 0, stream, arguments);
  check_launch("codebook_dequantize");
}

}  // namespace pyllmq::cuda

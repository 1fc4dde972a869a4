#include "codebook/cpu/layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "layout_blob.h"
#include "runtime/counting.h"
#include "runtime/half.h"
#include "runtime/instances.h"
#include "runtime/isa.h"
#include "codebook/cpu/pack_codes.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr double kPackNsPerWeight = 0.3;  // 0.1 at 2 and 4 bits, 1 at 5 to 7

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument("codebook layout: " + why); }

uint64_t checksum(LayoutHeader header, const void* segments, const void* panels) {
  header.checksum = 0;
  const uint64_t of_segments =
      hash_words(segments, header.segments * static_cast<int64_t>(sizeof(SegmentRecord)), hash_words(&header, sizeof header));
  return hash_words(panels, header.panels * static_cast<int64_t>(sizeof(PanelRecord)), of_segments);
}

struct LayoutPlan {
  LayoutHeader header{};
  std::vector<SegmentRecord> segments;
  std::vector<PanelRecord> panels;
  std::vector<uint32_t> columns;  // by slot; padding slots hold 0
};

void plan_segments(LayoutPlan& plan, const int32_t* segment_rows, int64_t segments) {
  SegmentRecord record{0, 0, 0, 0};
  for (int64_t s = 0; s < segments; ++s) {
    record = {record.row_begin + record.rows, segment_rows[s], record.tile_begin + record.tiles,
              (segment_rows[s] + kTileRows - 1) / kTileRows};
    plan.segments.push_back(record);
  }
  plan.header.tiles = record.tile_begin + record.tiles;
}

int64_t padding_unit(StepOrder order, int width) {
  return order == StepOrder::fours && width <= 3 ? 4 * kBlockColumns : kBlockColumns;
}

void plan_panels(LayoutPlan& plan, int64_t columns, const uint8_t* column_bits) {
  std::vector<uint32_t> of_width[9];
  for (int64_t k = 0; k < columns; ++k) of_width[column_bits[k]].push_back(static_cast<uint32_t>(k));
  for (int width = 1; width <= 8; ++width) {
    const std::vector<uint32_t>& all = of_width[width];
    const int64_t widest = width <= 4 ? kPanelLookups * columns_per_lookup(width) : kBytePanelColumns;
    for (int64_t first = 0; first < static_cast<int64_t>(all.size()); first += widest) {
      PanelRecord panel{};
      panel.width = width;
      panel.columns = std::min<int64_t>(widest, all.size() - first);
      const int64_t unit = padding_unit(plan.header.order, width);
      panel.slots = rounded_up(panel.columns, unit);
      panel.first_slot = plan.header.slots;
      panel.first_entry = plan.header.entries;
      panel.tile_bytes = panel.slots / kBlockColumns * block_bytes(width);
      const int64_t from = all[first], to = all[first + panel.columns - 1];
      panel.first_column = to - from == panel.columns - 1 ? from : -1;
      panel.bytes_before = plan.header.tile_bytes;
      plan.header.tile_bytes += panel.tile_bytes;
      plan.header.slots += panel.slots;
      plan.header.entries += panel.lookups() * entries_per_lookup(width);
      plan.columns.insert(plan.columns.end(), all.begin() + first, all.begin() + first + panel.columns);
      plan.columns.resize(plan.header.slots, 0);
      plan.panels.push_back(panel);
    }
  }
}

LayoutPlan make_plan(const CodebookCheckpoint& c) {
  const int64_t outliers = check_codebook_shape(refuse, c), rows = c.rows, segments = c.segments;
  LayoutPlan plan;
  LayoutHeader& h = plan.header;
  h.order = native_order();
  plan_segments(plan, c.segment_rows, segments);
  plan_panels(plan, c.columns, c.column_bits);
  h.rows = rows;
  h.columns = c.columns;
  h.segments = segments;
  h.panels = static_cast<int64_t>(plan.panels.size());
  h.outliers = outliers;
  h.has_row_scale = c.row_scale != nullptr;

  Sections section{sizeof(LayoutHeader), kAlignment};
  h.segments_offset = section(segments * sizeof(SegmentRecord));
  h.panels_offset = section(h.panels * sizeof(PanelRecord));
  h.columns_offset = section(h.slots * sizeof(uint32_t));
  h.max_magnitude_offset = section(segments * h.slots * sizeof(float));
  h.codebook_offset = section(segments * h.entries * sizeof(uint16_t));
  h.row_scale_offset = section(rows * sizeof(float));  // always there, so that the size does not depend on it
  h.outlier_row_offsets_offset = section(outliers > 0 ? (rows + 1) * sizeof(uint32_t) : 0);
  h.outlier_columns_offset = section(outliers * sizeof(uint32_t));
  h.outlier_deltas_offset = section(outliers * sizeof(float));
  h.outlier_values_offset = section(outliers * sizeof(uint16_t));
  h.codes_offset = section(h.tiles * h.tile_bytes);
  h.bytes = section(0);
  h.checksum = checksum(h, plan.segments.data(), plan.panels.data());
  return plan;
}

// The checkpoint keeps a row's codes of one width as a bit stream, and a step of widths 1, 2, 4 and 8 is a byte of that
// stream: packing turns rows of bytes into steps of rows, without looking at single codes.
constexpr int kMaxSteps = kPanelLookups / 2;  // of a panel; a nibble is a lookup
using TileSteps = uint8_t[kTileRows][kMaxSteps];

// The three bytes of a block of 8 columns (see StepOrder) from its 24 bits in the checkpoint.
uint32_t block_of_3bit(uint32_t v) {
  constexpr uint32_t one_a_byte = 1 << 17 | 1 << 10 | 1 << 3;  // times 3 bits, masked: bit i at place 3 of byte i
  const uint32_t nines = (v & 0x1FF) | (v & 0x3FE00) << 3;     // columns 0..2 and 3..5
  const uint32_t nibbles = (nines & 0x7007) | (nines & 0x38038) << 1 | (nines & 0x1C01C0) << 2;
  return nibbles | ((v >> 18 & 7) * one_a_byte & 0x080808) | ((v >> 21) * one_a_byte & 0x080808) << 4;
}

// `stream` holds slots * width bits, which are a multiple of 8.
void make_steps(const uint8_t* stream, StepOrder order, int width, int64_t slots, uint8_t* steps) {
  if (width == 3) {
    for (int64_t block = 0; block < slots / kBlockColumns; ++block, stream += 3) {
      const uint32_t bytes = block_of_3bit(stream[0] | stream[1] << 8 | stream[2] << 16);
      for (int i = 0; i < 3; ++i) steps[step_of_3bit(order, block, i)] = static_cast<uint8_t>(bytes >> 8 * i);
    }
  } else if (width <= 4) {
    std::memcpy(steps, stream, slots * width / 8);
  } else {
    unpack_row(stream, steps, slots, width);
  }
}

// 8 bytes of 8 rows -> 8 rows of each byte: swaps of 1, 2 and 4 bytes between 64-bit words.
void transpose_8x8(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte 0 of a row is the low byte of its word");
  uint64_t v[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&v[i], from + i * from_stride, 8);
  constexpr uint64_t low[3] = {0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF};
  for (int level = 0; level < 3; ++level) {
    const int apart = 1 << level, shift = 8 << level;
    for (int i = 0; i < 8; ++i) {
      if (i & apart) continue;
      const uint64_t a = v[i], b = v[i + apart];
      v[i] = (a & low[level]) | (b & low[level]) << shift;
      v[i + apart] = (a >> shift & low[level]) | (b & ~low[level]);
    }
  }
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &v[i], 8);
}

void write_steps(const TileSteps& rows, StepOrder order, int64_t steps, uint8_t* tile_codes) {
  if (order == StepOrder::fours) {
    for (int64_t step = 0; step < steps; step += 4)
      for (int row = 0; row < kTileRows; ++row) std::memcpy(tile_codes + step_place(order, step, row), &rows[row][step], 4);
    return;
  }
  int64_t step = 0;
  for (; step + 8 <= steps; step += 8)
    for (int row = 0; row < kTileRows; row += 8)
      transpose_8x8(&rows[row][step], kMaxSteps, tile_codes + step_place(order, step, row), kTileRows);
  for (; step < steps; ++step)
    for (int row = 0; row < kTileRows; ++row) tile_codes[step_place(order, step, row)] = rows[row][step];
}

template <int Width, StepOrder Order>
void read_tile(const uint8_t* tile_codes, const uint32_t* columns, int64_t slots, int64_t rows, uint8_t* out,
               int64_t out_stride) {
  for (int row = 0; row < rows; ++row)
    for (int64_t slot = 0; slot < slots; ++slot)
      out[row * out_stride + columns[slot]] = static_cast<uint8_t>(read_code(tile_codes, Order, Width, slot, row));
}

constexpr auto kReadRows = instances<1, 8>([]<int Width>() { return read_tile<Width, StepOrder::rows>; });
constexpr auto kReadFours = instances<1, 8>([]<int Width>() { return read_tile<Width, StepOrder::fours>; });

// Codebooks into panel order. A 2-bit lookup keeps its two columns' codebooks side by side, a 1-bit lookup its four.
void write_codebooks(const LayoutPlan& plan, const CodebookCheckpoint& c, uint8_t* base) {
  std::vector<int64_t> entry(c.columns + 1, 0);
  for (int64_t k = 0; k < c.columns; ++k) entry[k + 1] = entry[k] + (int64_t{1} << c.column_bits[k]);
  auto* codebook = reinterpret_cast<uint16_t*>(base + plan.header.codebook_offset);
  auto* magnitude = reinterpret_cast<float*>(base + plan.header.max_magnitude_offset);
  for (int64_t s = 0; s < c.segments; ++s)
    for (const PanelRecord& panel : plan.panels) {
      const int64_t entries = entries_per_lookup(panel.width) / columns_per_lookup(panel.width);
      for (int64_t slot = 0; slot < panel.columns; ++slot) {
        const int64_t column = plan.columns[panel.first_slot + slot];
        const uint16_t* from = c.codebook + s * entry[c.columns] + entry[column];
        const int64_t count = int64_t{1} << panel.width;
        std::memcpy(codebook + s * plan.header.entries + panel.first_entry + slot * entries, from, count * 2);
        float largest = 0;
        for (int64_t e = 0; e < count; ++e) {
          const float value = std::fabs(fp16_to_fp32(from[e]));
          largest = value <= largest ? largest : std::isnan(value) ? std::numeric_limits<float>::infinity() : value;
        }
        magnitude[s * plan.header.slots + panel.first_slot + slot] = largest;
      }
    }
}

class TileWriter {
 public:
  TileWriter(const LayoutPlan& plan, const CodebookCheckpoint& c, uint8_t* base)
      : plan_(plan), c_(c), base_(base), view_(base, plan.header.bytes), slot_of_(c.columns), panel_of_(c.columns) {
    for (int64_t p = 0; p < plan.header.panels; ++p) {
      const PanelRecord& panel = plan.panels[p];
      columns_of_width_[panel.width] += panel.columns;
      for (int64_t slot = 0; slot < panel.columns; ++slot) {
        const uint32_t column = plan.columns[panel.first_slot + slot];
        slot_of_[column] = static_cast<uint32_t>(slot);
        panel_of_[column] = static_cast<uint32_t>(p);
      }
    }
  }

  void write(int64_t segment, int64_t tile) const {
    const SegmentRecord& s = plan_.segments[segment];
    const int64_t row_begin = s.row_begin + (tile - s.tile_begin) * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, s.row_begin + s.rows - row_begin);
    int64_t first = 0;
    for (int64_t p = 0; p < plan_.header.panels; ++p) {
      const PanelRecord& panel = plan_.panels[p];
      first = p > 0 && plan_.panels[p - 1].width == panel.width ? first + plan_.panels[p - 1].columns : 0;
      write_panel(panel, first, tile, row_begin, rows);
    }
    if (plan_.header.outliers > 0)
      for (int64_t r = 0; r < rows; ++r) write_outliers(segment, tile, static_cast<int>(r), row_begin + r);
  }

 private:
  // `first`: the panel's first column, counted among those of its width. Panels begin at whole bytes of the stream.
  void write_panel(const PanelRecord& panel, int64_t first, int64_t tile, int64_t row_begin, int64_t rows) const {
    const int width = static_cast<int>(panel.width);
    const int64_t row_bytes = packed_row_bytes(columns_of_width_[width], width), bits = panel.columns * width;
    const uint8_t* packed = c_.codes[width] + row_begin * row_bytes + first * width / 8;
    uint8_t stream[kMaxSteps] = {};
    TileSteps steps;
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(stream, packed + r * row_bytes, (bits + 7) / 8);
      if (bits % 8 != 0) stream[bits / 8] &= (1 << bits % 8) - 1;  // nobody promises that padding is zero
      make_steps(stream, plan_.header.order, width, panel.slots, steps[r]);
    }
    for (int64_t r = rows; r < kTileRows; ++r) std::memset(steps[r], 0, kMaxSteps);
    write_steps(steps, plan_.header.order, panel.tile_bytes / kTileRows, const_cast<uint8_t*>(view_.codes(panel, tile)));
  }

  // The kernel adds x * (value - what the code stands for), so the code under an outlier stays as it was.
  void write_outliers(int64_t segment, int64_t tile, int row_in_tile, int64_t row) const {
    const float scale = c_.row_scale ? fp16_to_fp32(c_.row_scale[row]) : 1.0f;
    for (int64_t i = c_.outlier_row_offsets[row]; i < c_.outlier_row_offsets[row + 1]; ++i) {
      const int64_t column = c_.outlier_column(i);
      const PanelRecord& panel = plan_.panels[panel_of_[column]];
      const int width = static_cast<int>(panel.width);
      const int64_t slot = slot_of_[column];
      const int code = read_code(view_.codes(panel, tile), plan_.header.order, width, slot, row_in_tile);
      const int64_t entries = entries_per_lookup(width) / columns_per_lookup(width);
      const float coded = scale * fp16_to_fp32(view_.codebook(panel, segment)[slot * entries + code]);
      const_cast<uint32_t*>(view_.outlier_columns())[i] = static_cast<uint32_t>(column);
      const_cast<uint16_t*>(view_.outlier_values())[i] = c_.outlier_values[i];
      const_cast<float*>(view_.outlier_deltas())[i] = fp16_to_fp32(c_.outlier_values[i]) - coded;
    }
  }

  const LayoutPlan& plan_;
  const CodebookCheckpoint& c_;
  uint8_t* base_;
  LayoutView view_;
  std::vector<uint32_t> slot_of_, panel_of_;
  int64_t columns_of_width_[9] = {};
};

template <class Body>  // body(segment, tile)
void for_each_tile(const LayoutHeader& header, const SegmentRecord* segments, double ns_per_weight, Body&& body) {
  const double cost = ns_per_weight * static_cast<double>(header.tiles) * kTileRows * header.columns;
  parallel_for(header.tiles, 4, cost, [&](int64_t begin, int64_t end) {
    const SegmentRecord* s = std::upper_bound(segments, segments + header.segments, begin,
                                              [](int64_t t, const SegmentRecord& x) { return t < x.tile_begin; }) -
                             1;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (tile >= s->tile_begin + s->tiles) ++s;
      body(s - segments, tile);
    }
  });
}

}  // namespace

StepOrder native_order() { return active_isa() == Isa::avx512 || active_isa() == Isa::amx ? StepOrder::fours : StepOrder::rows; }

LayoutView::LayoutView(const void* layout, int64_t layout_bytes) : base_(static_cast<const uint8_t*>(layout)) {
  const auto& h = checked_header<LayoutHeader>(refuse, layout, layout_bytes, kAlignment);
  const auto fits = [&](int64_t offset, int64_t count, int64_t size) {
    return offset >= 0 && count >= 0 && offset <= layout_bytes && count <= (layout_bytes - offset) / size;
  };
  if (!fits(h.segments_offset, h.segments, sizeof(SegmentRecord)) || !fits(h.panels_offset, h.panels, sizeof(PanelRecord)) ||
      h.checksum != checksum(h, base_ + h.segments_offset, base_ + h.panels_offset))
    refuse("the header is damaged (checksum); pack the checkpoint again");
}

std::vector<TileChunk> tile_chunks(const LayoutView& view, int64_t most, int64_t least, int threads) {
  std::vector<TileChunk> chunks;
  int64_t rest = view.header().tiles;
  for (int64_t s = 0; s < view.header().segments; ++s) {
    const SegmentRecord& segment = view.segment(s);
    for (int64_t done = 0, tiles; done < segment.tiles; done += tiles) {
      const int64_t in_strip = kStripTiles - (segment.tile_begin + done) % kStripTiles, row = done * kTileRows;
      const auto share = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(rest / (2 * threads))));
      tiles = std::min({std::clamp(share, least, most), segment.tiles - done, in_strip});
      rest -= tiles;
      chunks.push_back(
          {s, segment.tile_begin + done, tiles, segment.row_begin + row, std::min(tiles * kTileRows, segment.rows - row)});
    }
  }
  return chunks;
}

int64_t codebook_layout_bytes(const CodebookCheckpoint& c) { return make_plan(c).header.bytes; }

void codebook_layout_pack(void* layout, int64_t layout_bytes, const CodebookCheckpoint& c) {
  const LayoutPlan plan = make_plan(c);
  const LayoutHeader& h = plan.header;
  check_codebook_arrays(refuse, c, h.outliers);
  check_room(refuse, layout, layout_bytes, h.bytes, kAlignment);
  auto* base = static_cast<uint8_t*>(layout);
  std::memset(base, 0, h.codes_offset);
  const int64_t end = h.codes_offset + h.tiles * h.tile_bytes;  // tiles write all of theirs, on all threads
  std::memset(base + end, 0, h.bytes - end);
  std::memcpy(base, &h, sizeof h);
  std::memcpy(base + h.segments_offset, plan.segments.data(), plan.segments.size() * sizeof(SegmentRecord));
  std::memcpy(base + h.panels_offset, plan.panels.data(), plan.panels.size() * sizeof(PanelRecord));
  std::memcpy(base + h.columns_offset, plan.columns.data(), plan.columns.size() * sizeof(uint32_t));
  write_codebooks(plan, c, base);
  auto* scale = reinterpret_cast<float*>(base + h.row_scale_offset);
  for (int64_t r = 0; r < c.rows; ++r) scale[r] = c.row_scale ? fp16_to_fp32(c.row_scale[r]) : 1.0f;
  if (h.outliers > 0)
    std::copy(c.outlier_row_offsets, c.outlier_row_offsets + c.rows + 1,
              reinterpret_cast<uint32_t*>(base + h.outlier_row_offsets_offset));

  const TileWriter writer(plan, c, base);
  for_each_tile(h, plan.segments.data(), kPackNsPerWeight, [&](int64_t segment, int64_t tile) { writer.write(segment, tile); });
}

void codebook_layout_codes(const LayoutView& view, uint8_t* codes_out) {
  if (codes_out == nullptr) refuse("codes_out must not be null");
  const LayoutHeader& h = view.header();
  for_each_tile(h, &view.segment(0), kPackNsPerWeight, [&](int64_t segment, int64_t tile) {
    const SegmentRecord& s = view.segment(segment);
    const int64_t row_begin = s.row_begin + (tile - s.tile_begin) * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, s.row_begin + s.rows - row_begin);
    for (int64_t p = 0; p < h.panels; ++p) {
      const PanelRecord& panel = view.panel(p);
      (h.order == StepOrder::rows ? kReadRows : kReadFours)[panel.width](
          view.codes(panel, tile), view.columns(panel), panel.columns, rows, codes_out + row_begin * h.columns, h.columns);
    }
  });
}

}  // namespace pyllmq::cpu

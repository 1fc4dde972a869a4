#include "codebook/cuda/layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout_blob.h"
#include "linear_operand_cuda.h"
#include "runtime/counting.h"
#include "runtime/cuda/host_threads.h"
#include "runtime/half.h"

namespace pyllmq::cuda {
namespace {

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument("codebook layout (cuda): " + why); }

struct Plan {
  LayoutHeader header{};
  std::vector<RowBlock> blocks;
  std::vector<int32_t> columns;  // by slot, -1 for padding
};

Plan make_plan(const CodebookCheckpoint& c) {
  const int64_t outliers = check_codebook_shape(refuse, c);
  Plan plan;
  LayoutHeader& h = plan.header;
  int32_t row = 0, tile = 0;
  for (int64_t s = 0; s < c.segments; ++s)
    for (int32_t end = row + c.segment_rows[s]; row < end;) {
      const RowBlock block{row, std::min<int32_t>(kBlockRows, end - row), static_cast<int32_t>(s), tile};
      plan.blocks.push_back(block);
      row += block.rows;
      tile += block_tiles(block);
    }

  int64_t entries = 0, planes = 0;  // bytes of one segment's tables and planes
  for (int width = 1; width <= 8; ++width) {
    h.first_slot[width] = static_cast<int64_t>(plan.columns.size());
    for (int64_t k = 0; k < c.columns; ++k)
      if (c.column_bits[k] == width) plan.columns.push_back(static_cast<int32_t>(k));
    const int64_t taken = static_cast<int64_t>(plan.columns.size()) - h.first_slot[width];
    h.groups[width] = ceil_div(taken, kGroupColumns);
    plan.columns.resize(h.first_slot[width] + h.groups[width] * kGroupColumns, -1);
    h.tables_offset[width] = entries;
    entries += h.groups[width] * table_bytes(width);
    if (taken > 0) h.widest = width;
    if (width > kMostPlaneBits) continue;
    h.planes_offset[width] = planes;
    planes += h.groups[width] * plane_bytes(width);
  }

  h.rows = c.rows;
  h.columns = c.columns;
  h.segments = c.segments;
  h.blocks = static_cast<int64_t>(plan.blocks.size());
  h.tiles = tile;
  h.slots = static_cast<int64_t>(plan.columns.size());
  h.panels = ceil_div(h.slots / kGroupColumns, kPanelGroups);
  h.segment_table_bytes = entries;
  h.outliers = outliers;
  h.patched = 1;

  Sections section{sizeof(LayoutHeader), kAlignment};
  h.blocks_offset = section(h.blocks * sizeof(RowBlock));
  h.columns_offset = section(h.slots * sizeof(int32_t));
  h.slots_offset = section(h.columns * sizeof(int32_t));
  if (c.row_scale != nullptr) h.row_scale_offset = section(c.rows * sizeof(uint16_t));
  if (outliers > 0) {
    h.outlier_begin_offset = section(h.panels * h.tiles * sizeof(uint32_t));
    h.outlier_row_end_offset = section(h.panels * h.tiles * kTileRows * sizeof(uint16_t));
    h.outlier_columns_offset = section(outliers * sizeof(int32_t));
    h.outlier_deltas_offset = section(outliers * sizeof(float));
    h.outlier_values_offset = section(outliers * sizeof(uint16_t));
    h.patch_begin_offset = section((h.slots / kGroupColumns * h.tiles + 1) * sizeof(uint32_t));
    h.patches_offset = section(outliers * sizeof(Patch));
  }
  h.tables_begin = section(c.segments * h.segment_table_bytes);
  if (h.widest <= kMostPlaneBits) {
    h.segment_plane_bytes = planes;
    h.planes_begin = section(c.segments * planes);
    h.spans_offset = section(c.segments * h.slots * sizeof(ColumnSpan));
  }
  for (int width = 1; width <= 8; ++width) h.codes_offset[width] = section(h.tiles * h.groups[width] * tile_bytes(width));
  section(kReadBeyond);
  h.counters_offset = section(counter_bytes(h.tiles));
  h.bytes = section(0);
  return plan;
}

// Where a row of a tile and a column of a group stand in a tile x group (layout.h).
struct Place {
  int width, lane, j, nibble;
  Place(int width, int row, int column)
      : width(width), lane(row % 16 / 2 * 4 + column % 4), j(column / 4), nibble(nibble_of(row / 16, row % 2)) {}
};

// A code of up to 4 bits into, or out of, the words of one part.
void put_part(uint32_t* words, int part, const Place& at, uint32_t code) {
  const auto word = [&](int w) -> uint32_t& { return words[word_index(part, at.lane, w)]; };
  const int shift = 4 * at.nibble;
  if (part == 4) word(at.j) |= code << shift;
  if (part == 3 && at.j < 3) word(at.j) |= code << shift;
  if (part == 3 && at.j == 3)
    for (int b = 0; b < 3; ++b) word(b) |= (code >> b & 1) << (shift + 3);
  if (part == 2) word(at.j / 2) |= code << (shift + 2 * (at.j % 2));
  if (part == 1) word(0) |= code << (shift + at.j);
}

uint32_t get_part(const uint32_t* words, int part, const Place& at) {
  const auto bits = [&](int w, int first, int count) {
    return words[word_index(part, at.lane, w)] >> (4 * at.nibble + first) & ((1u << count) - 1);
  };
  if (part == 4) return bits(at.j, 0, 4);
  if (part == 3) return at.j < 3 ? bits(at.j, 0, 3) : bits(0, 3, 1) | bits(1, 3, 1) << 1 | bits(2, 3, 1) << 2;
  return part == 2 ? bits(at.j / 2, 2 * (at.j % 2), 2) : bits(0, at.j, 1);
}

void put_code(uint32_t* tile, const Place& at, uint32_t code) {
  const int low = low_part(at.width);
  put_part(tile, low, at, code & ((1u << low) - 1));
  if (at.width > low) put_part(tile + 32 * low, at.width - low, at, code >> low);
}

uint32_t get_code(const uint32_t* tile, const Place& at) {
  const int low = low_part(at.width);
  const uint32_t code = get_part(tile, low, at);
  return at.width > low ? code | get_part(tile + 32 * low, at.width - low, at) << low : code;
}

uint32_t read_bits(const uint8_t* stream, int64_t index, int bits) {
  const int64_t first = index * bits;
  uint32_t value = stream[first / 8] >> (first % 8);
  if (first % 8 + bits > 8) value |= static_cast<uint32_t>(stream[first / 8 + 1]) << (8 - first % 8);
  return value & ((1u << bits) - 1);
}

template <class Body>  // body(width, group, column of the group, column of the weight)
void for_each_column(const LayoutHeader& h, const int32_t* columns, Body&& body) {
  for (int width = 1; width <= 8; ++width)
    for (int64_t slot = 0; slot < h.groups[width] * kGroupColumns; ++slot) {
      const int32_t column = columns[h.first_slot[width] + slot];
      if (column >= 0) body(width, slot / kGroupColumns, static_cast<int>(slot % kGroupColumns), column);
    }
}

template <class Body>  // body(width, segment, group, column of the group, the column's entries)
void for_each_codebook(const Plan& plan, const CodebookCheckpoint& c, Body&& body) {
  std::vector<int64_t> entry(c.columns + 1, 0);
  for (int64_t k = 0; k < c.columns; ++k) entry[k + 1] = entry[k] + (int64_t{1} << c.column_bits[k]);
  for (int64_t s = 0; s < c.segments; ++s)
    for_each_column(plan.header, plan.columns.data(), [&](int width, int64_t group, int in_group, int32_t column) {
      body(width, s, group, in_group, c.codebook + s * entry[c.columns] + entry[column]);
    });
}

void write_tables(const Plan& plan, const CodebookCheckpoint& c, uint8_t* base) {
  for_each_codebook(plan, c, [&](int width, int64_t segment, int64_t group, int in_group, const uint16_t* from) {
    const int count = 1 << width;
    uint8_t* to = base + tables_offset(plan.header, width, segment, group) + int64_t{in_group} * 2 * count;
    if (!has_split_bytes(width)) {
      std::memcpy(to, from, 2 * count);
    } else {
      for (int e = 0; e < count; ++e) {
        to[e] = static_cast<uint8_t>(from[e]);
        to[count + e] = static_cast<uint8_t>(from[e] >> 8);
      }
    }
  });
}

// What the lookups of two planes of 8 entries give for 16: code c of the first, c ^ 8 of the second, and their sum. Where a
// selector's top bit is set, a permutation gives the sign of the entry that it would select without, 0 or -1. So an entry is
// stored larger by one where its fellow in the other half is negative.
void store_halves(const int (&wanted)[16], uint8_t* stored) {
  for (int e = 0; e < 8; ++e)
    for (int signs = 0; signs < 4; ++signs) {
      const int low = wanted[e] + (signs >> 1), high = wanted[e + 8] + (signs & 1);
      if ((low < 0) != ((signs & 1) == 1) || (high < 0) != (signs >> 1 == 1)) continue;
      stored[e] = static_cast<uint8_t>(low);
      stored[e + 8] = static_cast<uint8_t>(high);
    }
}

// A column's codebook as integers, into its two planes.
ColumnSpan write_planes(const uint16_t* entries, int width, uint8_t* planes) {
  const int count = 1 << width;
  float least = cpu::fp16_to_fp32(entries[0]), most = least;
  for (int e = 1; e < count; ++e) {
    least = std::min(least, cpu::fp16_to_fp32(entries[e]));
    most = std::max(most, cpu::fp16_to_fp32(entries[e]));
  }
  const ColumnSpan span{(least + most) / 2, (most - least) / 2};
  int low[16] = {}, high[16] = {};
  for (int e = 0; e < count; ++e) {
    const float exact = (cpu::fp16_to_fp32(entries[e]) - span.middle) / span.half * kMostEntry;
    const int entry = std::isfinite(exact) ? static_cast<int>(std::lrint(exact)) : 0;  // 0 / 0 of equal entries
    high[e] = (entry + 128) >> 8;
    low[e] = std::min(entry - 256 * high[e], 126);  // 127 would have no room for the one that store_halves adds
  }
  for (int plane = 0; plane < 2; ++plane) {
    const auto& wanted = plane == 0 ? low : high;
    uint8_t* to = planes + plane * plane_entries(width);
    if (width == 4) store_halves(wanted, to);
    for (int e = 0; width < 4 && e < count; ++e) to[e] = static_cast<uint8_t>(wanted[e]);
  }
  return span;
}

void write_integer_codebooks(const Plan& plan, const CodebookCheckpoint& c, uint8_t* base) {
  const LayoutHeader& h = plan.header;
  for_each_codebook(plan, c, [&](int width, int64_t segment, int64_t group, int in_group, const uint16_t* entries) {
    uint8_t* planes = base + planes_offset(h, width, segment, group) + in_group * 2 * plane_entries(width);
    const int64_t slot = h.first_slot[width] + group * kGroupColumns + in_group;
    at<ColumnSpan>(base, h.spans_offset)[segment * h.slots + slot] = write_planes(entries, width, planes);
  });
}

uint32_t* tile_words(uint8_t* base, const LayoutHeader& h, int width, const RowBlock& block, int64_t group, int row) {
  return at<uint32_t>(base, codes_offset(h, width, block, group) + row / kTileRows * tile_bytes(width));
}
const uint32_t* tile_words(const uint8_t* base, const LayoutHeader& h, int width, const RowBlock& block, int64_t group, int row) {
  return tile_words(const_cast<uint8_t*>(base), h, width, block, group, row);
}

void write_codes(const Plan& plan, const CodebookCheckpoint& c, const RowBlock& block, uint8_t* base) {
  const LayoutHeader& h = plan.header;
  int64_t taken[9] = {};
  for (int64_t k = 0; k < c.columns; ++k) ++taken[c.column_bits[k]];
  for (int width = 1; width <= 8; ++width) {
    const int64_t row_bytes = (taken[width] * width + 7) / 8;
    for (int row = 0; row < block.rows; ++row) {
      const uint8_t* stream = c.codes[width] + (block.row_begin + row) * row_bytes;
      for (int64_t i = 0; i < taken[width]; ++i)
        put_code(tile_words(base, h, width, block, i / kGroupColumns, row),
                 Place(width, row % kTileRows, static_cast<int>(i % kGroupColumns)), read_bits(stream, i, width));
    }
  }
}

// Where a column of the weight went.
struct ColumnPlace {
  int32_t panel, group;
  int8_t width, in_group;
};

std::vector<ColumnPlace> column_places(const Plan& plan) {
  const LayoutHeader& h = plan.header;
  std::vector<ColumnPlace> places(h.columns);
  for (int width = 1; width <= 8; ++width)
    for (int64_t panel = 0; panel < h.panels; ++panel) {
      const GroupRange range = panel_groups(h, width, panel, panel + 1);
      for (int64_t slot = int64_t{range.begin} * kGroupColumns; slot < int64_t{range.end} * kGroupColumns; ++slot)
        if (const int32_t column = plan.columns[h.first_slot[width] + slot]; column >= 0)
          places[column] = {static_cast<int32_t>(panel), static_cast<int32_t>(slot / kGroupColumns), static_cast<int8_t>(width),
                            static_cast<int8_t>(slot % kGroupColumns)};
    }
  return places;
}

float table_entry(const uint8_t* table, int width, uint32_t code) {
  if (!has_split_bytes(width)) return cpu::fp16_to_fp32(at<uint16_t>(table, 0)[code]);
  return cpu::fp16_to_fp32(static_cast<uint16_t>(table[code] | table[(1 << width) + code] << 8));
}

template <class Body>  // body(outlier, block, row in the block)
void for_each_outlier(const Plan& plan, const CodebookCheckpoint& c, Body&& body) {
  for (const RowBlock& block : plan.blocks)
    for (int row = 0; row < block.rows; ++row)
      for (int64_t i = c.outlier_row_offsets[block.row_begin + row]; i < c.outlier_row_offsets[block.row_begin + row + 1]; ++i)
        body(i, block, row);
}

float row_scale(const CodebookCheckpoint& c, int64_t row) { return c.row_scale ? cpu::fp16_to_fp32(c.row_scale[row]) : 1.0f; }

// Counting sort of the checkpoint's outliers (by row, column) to group, tile.
void write_patches(const Plan& plan, const CodebookCheckpoint& c, const std::vector<ColumnPlace>& places, uint8_t* base) {
  LayoutHeader& h = *at<LayoutHeader>(base, 0);
  auto* begin = at<uint32_t>(base, h.patch_begin_offset);
  auto* patches = at<Patch>(base, h.patches_offset);
  const auto bucket_of = [&](int64_t i, const RowBlock& block, int row) {
    const ColumnPlace& place = places[c.outlier_column(i)];
    return (h.first_slot[place.width] / kGroupColumns + place.group) * h.tiles + block.tile_begin + row / kTileRows;
  };
  std::vector<uint32_t> next(h.slots / kGroupColumns * h.tiles + 1, 0);
  for_each_outlier(plan, c, [&](int64_t i, const RowBlock& block, int row) { ++next[bucket_of(i, block, row) + 1]; });
  for (size_t bucket = 1; bucket < next.size(); ++bucket) next[bucket] += next[bucket - 1];
  std::copy(next.begin(), next.end(), begin);
  for_each_outlier(plan, c, [&](int64_t i, const RowBlock& block, int row) {
    const float value = cpu::fp16_to_fp32(c.outlier_values[i]), scale = row_scale(c, block.row_begin + row);
    const uint16_t half = cpu::fp32_to_fp16(value == 0.0f ? 0.0f : value / scale);
    if (!std::isfinite(cpu::fp16_to_fp32(half))) h.patched = 0;
    const int place = half_in_tile(row % kTileRows, places[c.outlier_column(i)].in_group);
    patches[next[bucket_of(i, block, row)]++] = {static_cast<uint16_t>(row / kTileRows << 10 | place), half};
  });
}

// Counting sort of the checkpoint's outliers (by row, column) to panel, tile, row, column.
void write_outliers(const Plan& plan, const CodebookCheckpoint& c, const std::vector<ColumnPlace>& places, uint8_t* base) {
  const LayoutHeader& h = plan.header;
  auto* begin = at<uint32_t>(base, h.outlier_begin_offset);
  auto* row_end = at<uint16_t>(base, h.outlier_row_end_offset);
  auto* columns = at<int32_t>(base, h.outlier_columns_offset);
  auto* deltas = at<float>(base, h.outlier_deltas_offset);
  auto* values = at<uint16_t>(base, h.outlier_values_offset);

  const auto bucket_of = [&](int64_t i, const RowBlock& block, int row) {
    return places[c.outlier_column(i)].panel * h.tiles + block.tile_begin + row / kTileRows;
  };
  for_each_outlier(plan, c, [&](int64_t i, const RowBlock& block, int row) {
    ++row_end[bucket_of(i, block, row) * kTileRows + row % kTileRows];
  });
  uint32_t total = 0;
  for (int64_t bucket = 0; bucket < h.panels * h.tiles; ++bucket) {
    begin[bucket] = total;
    for (int row = 1; row < kTileRows; ++row) row_end[bucket * kTileRows + row] += row_end[bucket * kTileRows + row - 1];
    total += row_end[bucket * kTileRows + kTileRows - 1];
  }
  std::vector<uint16_t> filled(h.panels * h.tiles, 0);
  for_each_outlier(plan, c, [&](int64_t i, const RowBlock& block, int row) {
    const int64_t bucket = bucket_of(i, block, row);
    const int64_t column = c.outlier_column(i);
    const ColumnPlace& place = places[column];
    const uint32_t code =
        get_code(tile_words(base, h, place.width, block, place.group, row), Place(place.width, row % kTileRows, place.in_group));
    const uint8_t* table =
        base + tables_offset(h, place.width, block.segment, place.group) + (int64_t{place.in_group} * 2 << place.width);
    const float scale = row_scale(c, block.row_begin + row);
    const int64_t to = begin[bucket] + filled[bucket]++;
    columns[to] = static_cast<int32_t>(column);
    values[to] = c.outlier_values[i];
    deltas[to] = cpu::fp16_to_fp32(c.outlier_values[i]) - scale * table_entry(table, place.width, code);
  });
}

}  // namespace

const LayoutHeader& codebook_header(const void* layout, int64_t layout_bytes) {
  return checked_header<LayoutHeader>(refuse, layout, layout_bytes, kReadAlignment);
}

int64_t codebook_layout_bytes(const CodebookCheckpoint& c) { return make_plan(c).header.bytes; }

void codebook_layout_pack(void* layout, int64_t layout_bytes, const CodebookCheckpoint& c) {
  const Plan plan = make_plan(c);
  const LayoutHeader& h = plan.header;
  check_codebook_arrays(refuse, c, h.outliers);
  check_room(refuse, layout, layout_bytes, h.bytes, kReadAlignment);
  auto* base = static_cast<uint8_t*>(layout);
  std::memset(base, 0, layout_bytes);
  std::memcpy(base, &h, sizeof h);
  std::memcpy(base + h.blocks_offset, plan.blocks.data(), plan.blocks.size() * sizeof(RowBlock));
  std::memcpy(base + h.columns_offset, plan.columns.data(), plan.columns.size() * sizeof(int32_t));
  for (int64_t slot = 0; slot < h.slots; ++slot)
    if (const int32_t column = plan.columns[slot]; column >= 0)
      at<int32_t>(base, h.slots_offset)[column] = static_cast<int32_t>(slot);
  if (c.row_scale != nullptr) std::memcpy(base + h.row_scale_offset, c.row_scale, c.rows * sizeof(uint16_t));
  write_tables(plan, c, base);
  if (h.widest <= kMostPlaneBits) write_integer_codebooks(plan, c, base);
  in_parts(h.rows * h.columns, h.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) write_codes(plan, c, plan.blocks[block], base);
  });
  if (h.outliers == 0) return;
  const std::vector<ColumnPlace> places = column_places(plan);
  write_outliers(plan, c, places, base);
  write_patches(plan, c, places, base);
}

void codebook_layout_codes(const void* layout, int64_t layout_bytes, uint8_t* codes_out) {
  const LayoutHeader& h = codebook_header(layout, layout_bytes);
  if (codes_out == nullptr) refuse("codes_out must not be null");
  const auto* base = static_cast<const uint8_t*>(layout);
  in_parts(h.rows * h.columns, h.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const RowBlock& block = at<RowBlock>(base, h.blocks_offset)[index];
      for_each_column(h, at<int32_t>(base, h.columns_offset), [&](int width, int64_t group, int in_group, int32_t column) {
        for (int row = 0; row < block.rows; ++row)
          codes_out[(block.row_begin + row) * h.columns + column] = static_cast<uint8_t>(
              get_code(tile_words(base, h, width, block, group, row), Place(width, row % kTileRows, in_group)));
      });
    }
  });
}

}  // namespace pyllmq::cuda

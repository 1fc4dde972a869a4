#include "sparse/cuda/layout.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear_operand_cuda.h"
#include "runtime/counting.h"
#include "runtime/cuda/host_threads.h"
#include "sparse/packing.h"

namespace pyllmq::cuda {
namespace {

constexpr int64_t kHeaderAlignment = 8;
constexpr int kLanes = 32;
constexpr uint32_t kFirstTwo = 4;  // positions 0 and 1: of a group that is only there to fill up

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument("sparse layout (cuda): " + why); }

// --- where a weight stands in a cell of a strip ----------------------------------------------------------------------

struct Place {
  int tile, lane, r, j;
  int64_t step;  // of the cell
};

Place place_of_column(int row, int64_t column) {  // bitmap; step: half step of 16
  const int in_half = static_cast<int>(column % 16);
  return {row / 16, row % 8 * 4 + in_half % 8 / 2, row % 16 / 8 + 2 * (in_half / 8), in_half % 2, column / 16};
}

Place place_of_group(int row, int64_t group) {  // 2:4
  const int in_step = static_cast<int>(group % 8);
  return {row / 16, row % 8 * 4 + in_step % 4, row % 16 / 8 + 2 * (in_step / 4), 0, group / 8};
}

// The nibble of a group's positions.
struct PositionPlace {
  int64_t word;
  int shift;
};
PositionPlace position_place(int row, int64_t group, bool one_step) {
  const Place p = place_of_group(row, group);
  const int c = static_cast<int>(group % 8 / 4), lane = row % 8 * 4 + static_cast<int>(2 * p.step) + c;
  return {one_step ? p.tile * 16 + row % 8 * 2 + c : p.tile * kLanes + lane, static_cast<int>(group % 4 * 4) + row % 16 / 8 * 16};
}

// --- kept columns ----------------------------------------------------------------------------------------------------

template <class Visit>  // visit(column, place among the row's values), ascending
void for_each_kept(const SparseCheckpoint& c, int64_t row, Visit&& visit) {
  if (c.kind == SparseKind::sparse24) {
    const Row24 own = c.row24(row);
    for (int64_t group = 0, place = row * c.groups() * 2; group < c.groups(); ++group, place += 2) {
      visit(group * 4 + (own.position_pair(group) & 3), place);
      visit(group * 4 + (own.position_pair(group) >> 2), place + 1);
    }
    return;
  }
  int64_t next = c.row_offsets[row];
  if (c.mask == nullptr) {
    for (; next < c.row_offsets[row + 1]; ++next) visit(int64_t{column_at(c.column_numbers, c.column_bytes, next)}, next);
    return;
  }
  const uint8_t* mask = c.mask + row * c.mask_row_bytes();
  for (int64_t column = 0; column < c.columns; ++column)
    if (mask[column / 8] >> column % 8 & 1) visit(column, next++);
}

// --- the plan --------------------------------------------------------------------------------------------------------

struct Plan {
  SparseHeader header{};
  std::vector<uint32_t> begin;
};

// Values of each lane in each cell of a strip; what the fullest lane of a cell keeps is what the cell has room for.
std::vector<int> deepest_lanes(const SparseCheckpoint& c, const SparseHeader& h, int64_t strip) {
  const int width = cell_columns(h.kind, 0);
  std::vector<std::array<int, kLanes>> kept(h.cells, std::array<int, kLanes>{});
  for (int64_t row = strip * kStripRows; row < std::min(h.rows, (strip + 1) * kStripRows); ++row)
    for_each_kept(c, row, [&](int64_t column, int64_t) {
      ++kept[column / width][place_of_column(static_cast<int>(row % kStripRows), column % width).lane];
    });
  std::vector<int> deepest(h.cells);
  for (int64_t cell = 0; cell < h.cells; ++cell) deepest[cell] = *std::max_element(kept[cell].begin(), kept[cell].end());
  return deepest;
}

std::vector<uint32_t> plan_bitmap(const SparseCheckpoint& c, SparseHeader& h) {
  std::vector<uint32_t> begin(h.strips * (h.cells + 1));
  in_parts(h.rows * h.columns, h.strips, [&](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip) {
      const std::vector<int> deepest = deepest_lanes(c, h, strip);
      for (int64_t cell = 0; cell < h.cells; ++cell)
        begin[strip * (h.cells + 1) + cell] = static_cast<uint32_t>(
            (kMaskBytes + deepest[cell] * kLanes * value_bytes(h.values)) / 16);  // sizes first, summed below
    }
  });
  int64_t end = 0;
  for (int64_t strip = 0; strip < h.strips; ++strip)
    for (int64_t cell = 0; cell <= h.cells; ++cell) {
      const int64_t size = cell < h.cells ? begin[strip * (h.cells + 1) + cell] : 0;
      if (end > std::numeric_limits<uint32_t>::max()) refuse("the weight takes more than 64 GiB");
      begin[strip * (h.cells + 1) + cell] = static_cast<uint32_t>(end);
      h.stage_bytes = std::max(h.stage_bytes, size * 16);
      end += size;
    }
  return begin;
}

// Entries of a row in each panel: values, and steps that only move.
template <class Visit>  // visit(panel, step, place of the value or -1)
void for_each_entry(const SparseCheckpoint& c, int64_t row, int64_t panels, Visit&& visit) {
  int64_t panel = 0, previous = 0, entries = 0;
  const auto fill_up = [&](int64_t until) {
    for (; panel < until; ++panel, previous = 0, entries = 0)
      for (; entries % kEntryGroup != 0; ++entries) visit(panel, kMoveOnly, int64_t{-1});
  };
  for_each_kept(c, row, [&](int64_t column, int64_t place) {
    fill_up(column / kPanelColumns);
    const int64_t in_panel = column % kPanelColumns;
    for (; in_panel - previous >= kMoveOnly; previous += kMoveOnly, ++entries) visit(panel, kMoveOnly, int64_t{-1});
    visit(panel, static_cast<int>(in_panel - previous), place);
    previous = in_panel;
    ++entries;
  });
  fill_up(panels);
}

std::vector<uint32_t> plan_columns(const SparseCheckpoint& c, const SparseHeader& h) {
  std::vector<uint32_t> begin(h.cells * (h.rows + 1));
  in_parts(h.rows * h.columns, h.rows, [&](int64_t first, int64_t last) {
    std::vector<uint32_t> entries(h.cells);
    for (int64_t row = first; row < last; ++row) {
      std::fill(entries.begin(), entries.end(), 0);
      for_each_entry(c, row, h.cells, [&](int64_t panel, int, int64_t) { ++entries[panel]; });
      for (int64_t panel = 0; panel < h.cells; ++panel) begin[panel * (h.rows + 1) + row] = entries[panel] / kEntryGroup;
    }
  });
  uint32_t end = 0;
  for (int64_t panel = 0; panel < h.cells; ++panel)
    for (int64_t row = 0; row <= h.rows; ++row) {
      const uint32_t size = row < h.rows ? begin[panel * (h.rows + 1) + row] : 0;
      begin[panel * (h.rows + 1) + row] = end;
      end += size;
    }
  return begin;
}

Plan make_plan(const SparseCheckpoint& c, double sparse_columns) {
  check_sparse_shape(refuse, c);
  Plan plan;
  SparseHeader& h = plan.header;
  h.rows = c.rows;
  h.columns = c.columns;
  h.kept = c.kept;
  h.checkpoint_kind = h.kind = c.kind;
  h.values = c.value_type;
  h.bits = c.bits;
  h.outliers = c.outliers;
  if (c.kind == SparseKind::bitmap) h.checkpoint_columns = c.mask == nullptr ? c.column_bytes : 0;
  if (keeps_few(c, sparse_columns) || (c.kind != SparseKind::codes && c.value_type == ValueType::fp32))
    h.kind = SparseKind::columns;

  const bool columns = h.kind == SparseKind::columns;
  h.strips = ceil_div(h.rows, kStripRows);
  h.cells = ceil_div(h.columns, columns ? kPanelColumns : cell_columns(h.kind, h.bits));
  if (columns) plan.begin = plan_columns(c, h);
  if (h.kind == SparseKind::bitmap) plan.begin = plan_bitmap(c, h);
  if (h.kind == SparseKind::sparse24) h.stage_bytes = values24_bytes(h.values);
  if (h.kind == SparseKind::codes) h.stage_bytes = codes24_bytes(h.bits);

  Sections section{sizeof(SparseHeader), kAlignment};
  h.begin_offset = section(static_cast<int64_t>(plan.begin.size()) * 4);
  if (c.kind == SparseKind::bitmap) h.row_offsets_offset = section((h.rows + 1) * 4);
  if (c.scale != nullptr) h.scale_offset = section(h.rows * 4);
  if (h.kind == SparseKind::codes) h.codebook_offset = section(h.cells * cell_table_bytes(h.bits));
  if (h.outliers > 0) {
    h.outlier_row_offsets_offset = section((h.rows + 1) * 4);
    h.outlier_columns_offset = section(h.outliers * 4);
    h.outlier_values_offset = section(h.outliers * 2);
    h.outlier_deltas_offset = section(h.outliers * 4);
  }
  if (columns) {
    const int64_t entries = int64_t{plan.begin.back()} * kEntryGroup;
    h.data_offset = section(entries * value_bytes(h.values));
    h.steps_offset = section(entries);
  } else {
    h.data_offset = section(h.kind == SparseKind::bitmap ? int64_t{plan.begin.back()} * 16 : h.strips * h.cells * h.stage_bytes);
  }
  h.counters_offset = section(counter_bytes(h.strips));
  h.bytes = section(0);
  return plan;
}

// A cell of a strip, of kinds whose cells have one size.
uint8_t* cell_of(uint8_t* base, const SparseHeader& h, int64_t strip, int64_t cell) {
  return base + h.data_offset + (strip * h.cells + cell) * h.stage_bytes;
}

// --- bitmap ----------------------------------------------------------------------------------------------------------

int mask_bit(const Place& p) { return p.tile * 8 + p.r * 2 + p.j; }

// How many values of the lane stand before this place's: lanes keep theirs in the order of half steps and bits.
int values_before(const uint32_t* masks, const Place& p) {
  int n = __builtin_popcount(masks[p.step * kLanes + p.lane] & ((1u << mask_bit(p)) - 1));
  for (int64_t step = 0; step < p.step; ++step) n += __builtin_popcount(masks[step * kLanes + p.lane]);
  return n;
}

uint8_t* bitmap_cell(uint8_t* base, const SparseHeader& h, int64_t strip, int64_t cell) {
  return base + h.data_offset + int64_t{at<uint32_t>(base, h.begin_offset)[strip * (h.cells + 1) + cell]} * 16;
}

uint8_t* value_in_bitmap(uint8_t* cell, const SparseHeader& h, const Place& p) {
  return cell + kMaskBytes + (int64_t{values_before(at<uint32_t>(cell, 0), p)} * kLanes + p.lane) * value_bytes(h.values);
}

template <Way way>
void move_bitmap_strip(const SparseCheckpoint& c, const SparseHeader& h, uint8_t* base, int64_t strip) {
  const int64_t width = cell_columns(h.kind, 0), size = value_bytes(h.values);
  const int64_t begin = strip * kStripRows, end = std::min(h.rows, begin + kStripRows);
  const auto visit = [&](int64_t row, int64_t column, auto&& body) {  // body(cell, its place, the word of its mask)
    uint8_t* cell = bitmap_cell(base, h, strip, column / width);
    const Place p = place_of_column(static_cast<int>(row - begin), column % width);
    body(cell, p, at<uint32_t>(cell, 0)[p.step * kLanes + p.lane]);
  };
  for (int64_t row = begin; way == Way::pack && row < end; ++row)
    for_each_kept(c, row, [&](int64_t column, int64_t) {
      visit(row, column, [](uint8_t*, const Place& p, uint32_t& mask) { mask |= 1u << mask_bit(p); });
    });
  for (int64_t row = begin; row < end; ++row) {
    int64_t next = c.row_offsets[row];
    for (int64_t column = 0; column < h.columns; ++column)
      visit(row, column, [&](uint8_t* cell, const Place& p, uint32_t mask) {
        if ((mask >> mask_bit(p) & 1) == 0) return;
        move<way>(value_in_bitmap(cell, h, p), c.values + next * size, size);
        if (way == Way::unpack) c.put_kept(row, column, next);
        ++next;
      });
  }
}

// --- columns ---------------------------------------------------------------------------------------------------------

void pack_columns(const SparseCheckpoint& c, const Plan& plan, uint8_t* base) {
  const SparseHeader& h = plan.header;
  const int64_t size = value_bytes(h.values);
  in_parts(h.rows * h.columns, h.rows, [&](int64_t first, int64_t last) {
    std::vector<int64_t> next(h.cells);
    for (int64_t row = first; row < last; ++row) {
      for (int64_t panel = 0; panel < h.cells; ++panel)
        next[panel] = int64_t{plan.begin[panel * (h.rows + 1) + row]} * kEntryGroup;
      for_each_entry(c, row, h.cells, [&](int64_t panel, int step, int64_t place) {
        const int64_t entry = next[panel]++;
        base[h.steps_offset + entry] = static_cast<uint8_t>(step);
        if (place >= 0) std::memcpy(base + h.data_offset + entry * size, c.values + place * size, size);
      });
    }
  });
}

void unpack_columns(const uint8_t* base, const SparseHeader& h, const SparseCheckpoint& to) {
  const int64_t size = value_bytes(h.values);
  const auto* begin = at<uint32_t>(base, h.begin_offset);
  in_parts(h.rows * h.columns, h.rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const bool is_24 = h.checkpoint_kind == SparseKind::sparse24;
      int64_t place = is_24 ? row * 2 * to.groups() : to.row_offsets[row];
      for (int64_t panel = 0; panel < h.cells; ++panel) {
        int64_t column = panel * kPanelColumns;
        const uint32_t* range = begin + panel * (h.rows + 1) + row;
        for (int64_t entry = int64_t{range[0]} * kEntryGroup; entry < int64_t{range[1]} * kEntryGroup; ++entry) {
          const int step = base[h.steps_offset + entry];
          column += step;
          if (step == kMoveOnly) continue;
          std::memcpy(to.values + place * size, base + h.data_offset + entry * size, size);
          if (is_24)
            to.row24(row).put_position_pair(column / 4, static_cast<uint32_t>(column % 4 << 2 * (place % 2)));
          else
            to.put_kept(row, column, place);
          ++place;
        }
      }
    }
  });
}

// --- 2:4 -------------------------------------------------------------------------------------------------------------

template <class Visit>  // visit(row of the checkpoint, group, the cell, row of the strip, group of the cell)
void for_each_group(const SparseCheckpoint& c, const SparseHeader& h, uint8_t* base, int64_t strip, Visit&& visit) {
  const int64_t cell_groups = cell_columns(h.kind, h.bits) / 4, groups = c.groups();
  for (int64_t row = strip * kStripRows; row < std::min(h.rows, (strip + 1) * kStripRows); ++row) {
    const Row24 own = c.row24(row);
    for (int64_t group = 0; group < groups; ++group)
      visit(own, group, cell_of(base, h, strip, group / cell_groups), static_cast<int>(row % kStripRows), group % cell_groups);
  }
}

uint32_t* positions_in(uint8_t* cell, const SparseHeader& h) {
  return at<uint32_t>(cell, h.kind == SparseKind::codes ? 512 : values24_bytes(h.values) - kPositionBytes);
}
bool one_step(const SparseHeader& h) { return h.kind == SparseKind::codes && h.bits > 2; }

template <Way way>
void move_positions(uint8_t* cell, const SparseHeader& h, int in_strip, int64_t in_cell, const Row24& own, int64_t group) {
  const PositionPlace p = position_place(in_strip, in_cell, one_step(h));
  uint32_t& word = positions_in(cell, h)[p.word];
  if (way == Way::pack)
    word = (word & ~(15u << p.shift)) | own.position_pair(group) << p.shift;
  else
    own.put_position_pair(group, word >> p.shift & 15);
}

// Every group is a valid one for mma.sp, also those beyond the weight.
void fill_positions(const SparseHeader& h, uint8_t* base, int64_t strip) {
  const int words = one_step(h) ? kPositionBytes / 8 : kPositionBytes / 4;
  for (int64_t cell = 0; cell < h.cells; ++cell)
    std::fill_n(positions_in(cell_of(base, h, strip, cell), h), words, kFirstTwo * 0x11111111u);
}

uint8_t* value_in(uint8_t* cell, ValueType type, int row, int64_t group, int which) {
  const Place p = place_of_group(row, group);
  return cell + ((((p.step * kStripTiles + p.tile) * kLanes + p.lane) * 4 + p.r) * 2 + which) * value_bytes(type);
}

template <Way way>
void move_24_strip(const SparseCheckpoint& c, const SparseHeader& h, uint8_t* base, int64_t strip) {
  if (way == Way::pack) fill_positions(h, base, strip);
  for_each_group(c, h, base, strip, [&](const Row24& own, int64_t group, uint8_t* cell, int in_strip, int64_t in_cell) {
    move_positions<way>(cell, h, in_strip, in_cell, own, group);
    for (int which = 0; which < 2; ++which)
      move<way>(value_in(cell, h.values, in_strip, in_cell, which), own.value(group, which), own.value_bytes);
  });
}

// --- codes -----------------------------------------------------------------------------------------------------------

struct CodePlace {
  int64_t word;
  int shift;
};
CodePlace code_place(const SparseHeader& h, int row, int64_t group, int which) {
  const Place p = place_of_group(row, group);
  const int nibble = 4 * (2 * p.r + which);
  return {p.tile * kLanes + p.lane, h.bits == 2 ? nibble + 2 * static_cast<int>(p.step) : nibble};
}

template <Way way>
void move_codes_strip(const SparseCheckpoint& c, const SparseHeader& h, uint8_t* base, int64_t strip) {
  if (way == Way::pack) fill_positions(h, base, strip);
  for_each_group(c, h, base, strip, [&](const Row24& own, int64_t group, uint8_t* cell, int in_strip, int64_t in_cell) {
    move_positions<way>(cell, h, in_strip, in_cell, own, group);
    for (int which = 0; which < 2; ++which) {
      const CodePlace p = code_place(h, in_strip, in_cell, which);
      uint32_t& word = at<uint32_t>(cell, 0)[p.word];
      if (way == Way::pack)
        word |= own.code(group, which) << p.shift;
      else
        own.put_code(group, which, word >> p.shift & ((1u << h.bits) - 1));
    }
  });
}

template <Way way>
void move_codebook(const SparseCheckpoint& c, const SparseHeader& h, uint8_t* base) {
  const int width = cell_columns(h.kind, h.bits);
  for (int64_t column = 0; column < h.columns; ++column)
    for (int64_t code = 0; code < 1 << h.bits; ++code) {
      uint8_t* table = base + h.codebook_offset + column / width * cell_table_bytes(h.bits);
      auto* entry = reinterpret_cast<uint8_t*>(c.codebook + (column << h.bits) + code);
      const bool planes = h.bits == 2;
      table += planes ? column % width / 4 * 32 + code + 4 * (column % 4) : (column % width * 16 + code) * 2;
      move<way>(table, entry, 1);
      move<way>(table + (planes ? 16 : 1), entry + 1, 1);
    }
}

template <Way way>
void move_strips(const SparseCheckpoint& c, const SparseHeader& h, uint8_t* base) {
  in_parts(h.rows * h.columns, h.strips, [&](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip) {
      if (h.kind == SparseKind::bitmap) move_bitmap_strip<way>(c, h, base, strip);
      if (h.kind == SparseKind::sparse24) move_24_strip<way>(c, h, base, strip);
      if (h.kind == SparseKind::codes) move_codes_strip<way>(c, h, base, strip);
    }
  });
}

}  // namespace

const SparseHeader& sparse_header(const void* layout, int64_t layout_bytes) {
  return checked_header<SparseHeader>(refuse, layout, layout_bytes, kHeaderAlignment);
}

int64_t sparse_layout_bytes(const SparseCheckpoint& checkpoint, double sparse_columns) {
  return make_plan(checkpoint, sparse_columns).header.bytes;
}

void sparse_layout_pack(void* layout, int64_t layout_bytes, const SparseCheckpoint& c, double sparse_columns) {
  const Plan plan = make_plan(c, sparse_columns);
  const SparseHeader& h = plan.header;
  check_room(refuse, layout, layout_bytes, h.bytes, kReadAlignment);
  auto* base = static_cast<uint8_t*>(layout);
  std::memset(base, 0, layout_bytes);
  std::memcpy(base, &h, sizeof h);
  if (!plan.begin.empty()) std::memcpy(base + h.begin_offset, plan.begin.data(), plan.begin.size() * 4);
  if (c.row_offsets != nullptr) std::memcpy(base + h.row_offsets_offset, c.row_offsets, (h.rows + 1) * 4);
  if (h.scale_offset != 0) std::memcpy(base + h.scale_offset, c.scale, h.rows * 4);
  if (h.kind == SparseKind::codes) move_codebook<Way::pack>(c, h, base);
  if (h.outliers > 0) pack_outliers(c, h, base);
  if (h.kind == SparseKind::columns) return pack_columns(c, plan, base);
  move_strips<Way::pack>(c, h, base);
}

void sparse_layout_unpack(const void* layout, int64_t layout_bytes, const SparseCheckpoint& to) {
  const SparseHeader& h = sparse_header(layout, layout_bytes);
  auto* base = const_cast<uint8_t*>(static_cast<const uint8_t*>(layout));  // nothing is written there
  prepare_unpacking(refuse, h, h.checkpoint_kind, h.scale_offset != 0, to);
  if (to.scale != nullptr) std::memcpy(to.scale, base + h.scale_offset, h.rows * 4);
  if (to.codebook != nullptr) move_codebook<Way::unpack>(to, h, base);
  if (h.outliers > 0) unpack_outliers(h, base, to);
  if (to.row_offsets != nullptr) std::memcpy(to.row_offsets, base + h.row_offsets_offset, (h.rows + 1) * 4);
  if (h.kind == SparseKind::columns) return unpack_columns(base, h, to);
  move_strips<Way::unpack>(to, h, base);
}

}  // namespace pyllmq::cuda

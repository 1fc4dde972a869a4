#include "sparse/cpu/layout.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/counting.h"
#include "runtime/half.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

constexpr uint64_t kMagic = 0x70732D716D6C6C79;  // "yllmq-sp"
constexpr uint64_t kVersion = 2;
constexpr int64_t kAlignment = 64;
constexpr double kPackNsPerWeight = 1.5;
constexpr int kMaskBytes = kCellColumns / 8;

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument("sparse layout: " + why); }

uint64_t checksum(SparseHeader header) {
  header.checksum = 0;
  uint64_t hash = 0xCBF29CE484222325u, words[sizeof header / 8];
  std::memcpy(words, &header, sizeof header);
  for (uint64_t word : words) hash = (hash ^ word) * 0x100000001B3u;
  return hash;
}

// The kept columns of one row, block after block.
class RowMask {
 public:
  RowMask(const SparseCheckpoint& from, int64_t row) : from_(from), row_(row), next_(from.row_offsets[row]) {}

  // 256 bits; columns beyond the weight's are 0.
  void take(int64_t block, uint8_t* bits) {
    std::memset(bits, 0, kMaskBytes);
    if (from_.mask != nullptr) {
      const int64_t row_bytes = (from_.columns + 7) / 8, begin = block * kMaskBytes;
      std::memcpy(bits, from_.mask + row_ * row_bytes + begin, std::min<int64_t>(kMaskBytes, row_bytes - begin));
      const int64_t left = from_.columns - block * kCellColumns;
      if (left < kCellColumns && left % 8 != 0) bits[left / 8] &= static_cast<uint8_t>((1 << left % 8) - 1);
      return;
    }
    for (; next_ < from_.row_offsets[row_ + 1]; ++next_) {
      const int64_t column = column_at(from_.column_numbers, from_.column_bytes, next_) - block * kCellColumns;
      if (column >= kCellColumns) break;
      bits[column / 8] |= static_cast<uint8_t>(1 << column % 8);
    }
  }

 private:
  const SparseCheckpoint& from_;
  int64_t row_, next_;
};

int64_t bits_set(const uint8_t* bits) {
  int64_t count = 0;
  for (int i = 0; i < kMaskBytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    count += __builtin_popcountll(word);
  }
  return count;
}

struct Plan {
  SparseHeader header{};
  std::vector<int64_t> cells;  // offsets [tile, block, half]
};

// Kept weights of each cell of a bitmap, [tile, block, half].
std::vector<int64_t> kept_by_cell(const SparseCheckpoint& from, int64_t tiles, int64_t blocks) {
  std::vector<int64_t> kept(tiles * blocks * 2);
  parallel_for(tiles, 1, 0.1 * from.rows * from.columns, [&](int64_t begin, int64_t end) {
    uint8_t bits[kMaskBytes];
    for (int64_t row = begin * kTileRows; row < std::min(from.rows, end * kTileRows); ++row) {
      RowMask mask(from, row);
      for (int64_t block = 0; block < blocks; ++block) {
        mask.take(block, bits);
        kept[(row / kTileRows * blocks + block) * 2 + row % kTileRows / kCellRows] += bits_set(bits);
      }
    }
  });
  return kept;
}

Plan make_plan(const SparseCheckpoint& from, double sparse_columns) {
  check_sparse_shape(refuse, from);
  Plan plan;
  SparseHeader& h = plan.header;
  h.magic = kMagic;
  h.version = kVersion;
  h.rows = from.rows;
  h.columns = from.columns;
  h.kept = from.kept;
  h.kind = from.kind;
  h.values = from.value_type;
  h.bits = from.bits;
  h.order = native_order();
  h.outliers = from.outliers;
  h.has_scale = from.scale != nullptr;
  h.tiles = ceil_div(from.rows, kTileRows);
  h.blocks = ceil_div(from.columns, kCellColumns);
  if (from.kind == SparseKind::bitmap) {
    h.checkpoint_columns = from.mask == nullptr ? from.column_bytes : 0;
    if (keeps_few(from, sparse_columns)) h.kind = SparseKind::columns;
  }
  Sections section{sizeof(SparseHeader), kAlignment};
  const int64_t cells = h.kind == SparseKind::columns ? 0 : h.tiles * h.blocks * 2;
  h.cells_offset = section(cells * 8);
  h.row_offsets_offset = section(from.kind == SparseKind::bitmap ? (h.rows + 1) * 4 : 0);
  h.scale_offset = section(h.has_scale ? h.rows * 4 : 0);
  const int64_t slots = h.blocks * kCellColumns;
  h.codebook_offset = section(from.kind == SparseKind::codes ? slots << (h.bits + 1) : 0);
  h.outlier_row_offsets_offset = section(h.outliers ? (h.rows + 1) * 4 : 0);
  h.outlier_columns_offset = section(h.outliers * 4);
  h.outlier_values_offset = section(h.outliers * 2);
  h.outlier_deltas_offset = section(h.outliers * 4);
  h.columns_offset = section(h.kind == SparseKind::columns ? h.kept * (h.columns <= 65536 ? 2 : 4) : 0);
  h.data_offset = section(0);
  int64_t offset = h.data_offset;
  if (h.kind == SparseKind::columns) {
    offset += h.kept * value_bytes(h.values);
  } else {
    const std::vector<int64_t> kept =
        h.kind == SparseKind::bitmap ? kept_by_cell(from, h.tiles, h.blocks) : std::vector<int64_t>();
    plan.cells.resize(cells);
    for (int64_t strip = 0; strip < h.tiles; strip += kSparseStripTiles)
      for (int64_t block = 0; block < h.blocks; ++block) {
        const int64_t batches = (std::min(h.columns - block * kCellColumns, kCellColumns) + kBatchColumns - 1) / kBatchColumns;
        for (int64_t tile = strip; tile < std::min(h.tiles, strip + kSparseStripTiles); ++tile)
          for (int half = 0; half < 2; ++half) {
            const int64_t cell = (tile * h.blocks + block) * 2 + half;
            plan.cells[cell] = offset;
            if (h.kind == SparseKind::bitmap)
              offset += (batches * kBatchColumns * 2 + kept[cell] * value_bytes(h.values) + 7) / 8 * 8;
            else if (h.kind == SparseKind::sparse24)
              offset += batches * batch_bytes(h.values);
            else
              offset += batches * code_batch_bytes(static_cast<int>(h.bits));
          }
      }
  }
  h.bytes = rounded_up(offset + kReadAhead, kAlignment);
  h.checksum = checksum(h);
  return plan;
}

bool by_pairs(ValueType type) { return type == ValueType::bf16; }

// --- bitmap --------------------------------------------------------------------------------------------------------

template <class Visit>  // visit(row, slot, mask byte, bit) for the places of a cell in the order of its values
void walk_cell(ValueType type, int64_t slots, Visit&& visit) {
  if (by_pairs(type)) {
    for (int64_t pair = 0; pair < slots / 2; ++pair)
      for (int bit = 0; bit < 32; ++bit) visit(bit / 2, 2 * pair + bit % 2, pair * 4 + bit / 8, bit % 8);
  } else {
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int bit = 0; bit < 16; ++bit) visit(bit, slot, slot * 2 + bit / 8, bit % 8);
  }
}

void pack_bitmap_tile(const SparseCheckpoint& from, const Plan& plan, int64_t tile, uint8_t* layout) {
  const SparseHeader& h = plan.header;
  const int64_t size = value_bytes(h.values);
  for (int half = 0; half < 2; ++half) {
    const int64_t first = tile * kTileRows + half * kCellRows;
    std::vector<RowMask> masks;
    int64_t next[kCellRows] = {};
    for (int r = 0; r < kCellRows && first + r < h.rows; ++r) {
      masks.emplace_back(from, first + r);
      next[r] = from.row_offsets[first + r];
    }
    for (int64_t block = 0; block < h.blocks; ++block) {
      uint8_t bits[kCellRows][kMaskBytes] = {};
      for (size_t r = 0; r < masks.size(); ++r) masks[r].take(block, bits[r]);
      const int64_t columns = std::min(h.columns - block * kCellColumns, kCellColumns);
      const int64_t slots = rounded_up(columns, kBatchColumns);
      uint8_t* cell = layout + plan.cells[(tile * h.blocks + block) * 2 + half];
      uint8_t* value = cell + slots * 2;
      std::memset(cell, 0, slots * 2);
      walk_cell(h.values, slots, [&](int row, int64_t slot, int64_t byte, int bit) {
        if ((bits[row][slot / 8] >> slot % 8 & 1) == 0) return;
        cell[byte] |= static_cast<uint8_t>(1 << bit);
        std::memcpy(value, from.values + next[row]++ * size, size);
        value += size;
      });
      const int64_t used = value - cell;
      std::memset(value, 0, (used + 7) / 8 * 8 - used);
    }
  }
}

void unpack_bitmap_tile(const SparseView& view, const SparseCheckpoint& to, int64_t tile) {
  const SparseHeader& h = view.header();
  const int64_t size = value_bytes(h.values), row_bytes = (h.columns + 7) / 8;
  for (int half = 0; half < 2; ++half) {
    const int64_t first = tile * kTileRows + half * kCellRows;
    int64_t next[kCellRows] = {};
    for (int r = 0; r < kCellRows && first + r < h.rows; ++r) next[r] = view.row_offsets()[first + r];
    for (int64_t block = 0; block < h.blocks; ++block) {
      const int64_t slots = view.slots(block);
      const uint8_t* cell = view.cell(tile, block, half);
      const uint8_t* value = cell + slots * 2;
      walk_cell(h.values, slots, [&](int row, int64_t slot, int64_t byte, int bit) {
        if ((cell[byte] >> bit & 1) == 0) return;
        const int64_t column = block * kCellColumns + slot, place = next[row]++;
        std::memcpy(to.values + place * size, value, size);
        value += size;
        if (h.checkpoint_columns != 0)
          put_column(to.column_numbers, static_cast<int>(h.checkpoint_columns), place, static_cast<uint32_t>(column));
        else
          to.mask[(first + row) * row_bytes + column / 8] |= static_cast<uint8_t>(1 << column % 8);
      });
    }
  }
}

void pack_columns(const SparseCheckpoint& from, const Plan& plan, uint8_t* layout) {
  const SparseHeader& h = plan.header;
  std::memcpy(layout + h.data_offset, from.values, h.kept * value_bytes(h.values));
  const int bytes = h.columns <= 65536 ? 2 : 4;
  for (int64_t row = 0; row < h.rows; ++row) {
    RowMask mask(from, row);
    int64_t next = from.row_offsets[row];
    for (int64_t block = 0; block < h.blocks; ++block) {
      uint8_t bits[kMaskBytes];
      mask.take(block, bits);
      for (int slot = 0; slot < kCellColumns; ++slot)
        if (bits[slot / 8] >> slot % 8 & 1)
          put_column(layout + h.columns_offset, bytes, next++, static_cast<uint32_t>(block * kCellColumns + slot));
    }
  }
}

void unpack_columns(const SparseView& view, const SparseCheckpoint& to) {
  const SparseHeader& h = view.header();
  std::memcpy(to.values, view.values(), h.kept * value_bytes(h.values));
  for (int64_t row = 0; row < h.rows; ++row)
    for (int64_t i = view.row_offsets()[row]; i < view.row_offsets()[row + 1]; ++i) {
      const uint32_t column = column_at(view.columns(), view.column_bytes(), i);
      if (h.checkpoint_columns != 0)
        put_column(to.column_numbers, static_cast<int>(h.checkpoint_columns), i, column);
      else
        to.mask[row * ((h.columns + 7) / 8) + column / 8] |= static_cast<uint8_t>(1 << column % 8);
    }
}

// --- 2:4 -----------------------------------------------------------------------------------------------------------

// Place of value `which` of a row in the values of a group, in elements.
int64_t value_place(ValueType type, int row, int which) { return by_pairs(type) ? row * 2 + which : which * kCellRows + row; }

void pack_24_tile(const SparseCheckpoint& from, const Plan& plan, int64_t tile, uint8_t* layout) {
  const SparseHeader& h = plan.header;
  const int64_t groups = sparse_groups(h.columns), size = value_bytes(h.values), row_bytes = (groups + 1) / 2;
  for (int64_t row = tile * kTileRows; row < std::min(h.rows, (tile + 1) * kTileRows); ++row) {
    const int r = static_cast<int>(row % kCellRows), half = static_cast<int>(row % kTileRows / kCellRows);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t slot = group * 4, block = slot / kCellColumns, batch = slot % kCellColumns / kBatchColumns;
      uint8_t* at = layout + plan.cells[(tile * h.blocks + block) * 2 + half] + batch * batch_bytes(h.values);
      const uint32_t positions = static_cast<uint32_t>(read_nibble(from.positions + row * row_bytes, group));
      reinterpret_cast<uint32_t*>(at)[r] |= positions << (4 * (group % 8));
      uint8_t* values = at + 4 * kCellRows + group % 8 * 2 * kCellRows * size;
      for (int which = 0; which < 2; ++which)
        std::memcpy(values + value_place(h.values, r, which) * size, from.values + (row * groups * 2 + group * 2 + which) * size,
                    size);
    }
  }
}

void unpack_24_tile(const SparseView& view, const SparseCheckpoint& to, int64_t tile) {
  const SparseHeader& h = view.header();
  const int64_t groups = sparse_groups(h.columns), size = value_bytes(h.values), row_bytes = (groups + 1) / 2;
  for (int64_t row = tile * kTileRows; row < std::min(h.rows, (tile + 1) * kTileRows); ++row) {
    const int r = static_cast<int>(row % kCellRows), half = static_cast<int>(row % kTileRows / kCellRows);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t slot = group * 4, batch = slot % kCellColumns / kBatchColumns;
      const uint8_t* at = view.cell(tile, slot / kCellColumns, half) + batch * batch_bytes(h.values);
      const uint32_t positions = reinterpret_cast<const uint32_t*>(at)[r] >> (4 * (group % 8)) & 15;
      to.positions[row * row_bytes + group / 2] |= static_cast<uint8_t>(positions << (4 * (group % 2)));
      const uint8_t* values = at + 4 * kCellRows + group % 8 * 2 * kCellRows * size;
      for (int which = 0; which < 2; ++which)
        std::memcpy(to.values + (row * groups * 2 + group * 2 + which) * size, values + value_place(h.values, r, which) * size,
                    size);
    }
  }
}

// --- codes ---------------------------------------------------------------------------------------------------------

void pack_codes_tile(const SparseCheckpoint& from, const Plan& plan, int64_t tile, uint8_t* layout) {
  const SparseHeader& h = plan.header;
  const int bits = static_cast<int>(h.bits);
  const int64_t groups = sparse_groups(h.columns), position_bytes = (groups + 1) / 2, code_bytes = (2 * groups * bits + 7) / 8;
  for (int64_t row = tile * kTileRows; row < std::min(h.rows, (tile + 1) * kTileRows); ++row) {
    const int r = static_cast<int>(row % kCellRows), half = static_cast<int>(row % kTileRows / kCellRows);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t slot = group * 4, block = slot / kCellColumns, batch = slot % kCellColumns / kBatchColumns;
      uint8_t* bytes = layout + plan.cells[(tile * h.blocks + block) * 2 + half] + batch * code_batch_bytes(bits) +
                       code_byte(h.order, group, r);
      const auto positions = static_cast<uint32_t>(read_nibble(from.positions + row * position_bytes, group));
      const uint8_t* codes = from.codes + row * code_bytes;
      const uint32_t code[2] = {code_at(codes, 2 * group, bits), code_at(codes, 2 * group + 1, bits)};
      const auto put = [&](int plane, uint32_t nibble) {
        bytes[plane * 4 * kCellRows] |= static_cast<uint8_t>(nibble << (4 * (group % 2)));
      };
      if (bits == 2) {
        put(0, code[0] | (positions & 3) << 2);
        put(1, code[1] | positions >> 2 << 2);
      } else {
        put(0, positions);
        put(1, code[0]);
        put(2, code[1]);
      }
    }
  }
}

GroupCodes group_at(const SparseView& view, int64_t row, int64_t group) {
  const int64_t block = group * 4 / kCellColumns;
  const uint8_t* cell = view.cell(row / kTileRows, block, static_cast<int>(row % kTileRows / kCellRows));
  return read_group(cell, view.header().order, view.header().bits, group - block * (kCellColumns / 4),
                    static_cast<int>(row % kCellRows));
}

void unpack_codes_tile(const SparseView& view, const SparseCheckpoint& to, int64_t tile) {
  const SparseHeader& h = view.header();
  const int64_t groups = sparse_groups(h.columns), position_bytes = (groups + 1) / 2;
  const int64_t code_bytes = (2 * groups * h.bits + 7) / 8;
  for (int64_t row = tile * kTileRows; row < std::min(h.rows, (tile + 1) * kTileRows); ++row)
    for (int64_t group = 0; group < groups; ++group) {
      const GroupCodes found = group_at(view, row, group);
      to.positions[row * position_bytes + group / 2] |=
          static_cast<uint8_t>((found.position[0] | found.position[1] << 2) << (4 * (group % 2)));
      for (int which = 0; which < 2; ++which)
        write_code(to.codes + row * code_bytes, 2 * group + which, h.bits, static_cast<uint32_t>(found.code[which]));
    }
}

// What the codes of a row say at a column; 0 where they keep nothing.
float decoded(const SparseView& view, int64_t row, int64_t column) {
  const GroupCodes found = group_at(view, row, column / 4);
  for (int which = 0; which < 2; ++which)
    if (found.position[which] == column % 4)
      return fp16_to_fp32(view.codebook()[(column << view.header().bits) + found.code[which]]);
  return 0;
}

void pack_outliers(const SparseCheckpoint& from, const SparseView& view, const SparseHeader& h, uint8_t* layout) {
  std::memcpy(layout + h.outlier_row_offsets_offset, from.outlier_row_offsets, (h.rows + 1) * 4);
  std::memcpy(layout + h.outlier_values_offset, from.outlier_values, h.outliers * 2);
  auto* columns = reinterpret_cast<uint32_t*>(layout + h.outlier_columns_offset);
  auto* deltas = reinterpret_cast<float*>(layout + h.outlier_deltas_offset);
  for (int64_t row = 0; row < h.rows; ++row)
    for (int64_t i = from.outlier_row_offsets[row]; i < from.outlier_row_offsets[row + 1]; ++i) {
      columns[i] = column_at(from.outlier_columns, from.column_bytes, i);
      deltas[i] = fp16_to_fp32(from.outlier_values[i]) - decoded(view, row, columns[i]);
    }
}

}  // namespace

SparseView::SparseView(const void* layout, int64_t layout_bytes) : base_(static_cast<const uint8_t*>(layout)) {
  if (layout == nullptr || layout_bytes < static_cast<int64_t>(sizeof(SparseHeader)) ||
      reinterpret_cast<uintptr_t>(layout) % kAlignment != 0)
    refuse("needs a blob of at least " + std::to_string(sizeof(SparseHeader)) + " bytes, aligned to 64");
  if (header().magic != kMagic || header().version != kVersion || header().checksum != checksum(header()))
    refuse("the blob was not made by this version of pyllmq, or is damaged; pack the weight again");
  if (header().bytes != layout_bytes)
    refuse("the header says " + std::to_string(header().bytes) + " bytes, given: " + std::to_string(layout_bytes));
}

int64_t sparse_layout_bytes(const SparseCheckpoint& checkpoint, double sparse_columns) {
  return make_plan(checkpoint, sparse_columns).header.bytes;
}

void sparse_layout_pack(void* to, int64_t layout_bytes, const SparseCheckpoint& from, double sparse_columns) {
  const Plan plan = make_plan(from, sparse_columns);
  const SparseHeader& h = plan.header;
  if (layout_bytes != h.bytes)
    refuse("the layout takes " + std::to_string(h.bytes) + " bytes, given: " + std::to_string(layout_bytes));
  auto* layout = static_cast<uint8_t*>(to);
  std::memset(layout, 0, h.data_offset);
  std::memcpy(layout, &h, sizeof h);
  if (!plan.cells.empty()) std::memcpy(layout + h.cells_offset, plan.cells.data(), plan.cells.size() * 8);
  if (from.row_offsets != nullptr) std::memcpy(layout + h.row_offsets_offset, from.row_offsets, (h.rows + 1) * 4);
  if (h.has_scale) std::memcpy(layout + h.scale_offset, from.scale, h.rows * 4);
  if (h.kind == SparseKind::codes) std::memcpy(layout + h.codebook_offset, from.codebook, h.columns << (h.bits + 1));
  if (h.kind == SparseKind::columns) {
    pack_columns(from, plan, layout);
  } else {
    std::memset(layout + h.bytes - kReadAhead - kAlignment, 0, kReadAhead + kAlignment);
    parallel_for(h.tiles, 1, kPackNsPerWeight * h.rows * h.columns, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        if (h.kind == SparseKind::bitmap) {
          pack_bitmap_tile(from, plan, tile, layout);
          continue;
        }
        for (int64_t cell = tile * h.blocks * 2; cell < (tile + 1) * h.blocks * 2; ++cell) {
          const int64_t block = cell / 2 % h.blocks, columns = std::min(h.columns - block * kCellColumns, kCellColumns);
          const int64_t batches = ceil_div(columns, kBatchColumns);
          std::memset(
              layout + plan.cells[cell], 0,
              batches * (h.kind == SparseKind::sparse24 ? batch_bytes(h.values) : code_batch_bytes(static_cast<int>(h.bits))));
        }
        h.kind == SparseKind::sparse24 ? pack_24_tile(from, plan, tile, layout) : pack_codes_tile(from, plan, tile, layout);
      }
    });
  }
  if (h.outliers > 0) pack_outliers(from, SparseView(layout, layout_bytes), h, layout);
}

void sparse_layout_unpack(const SparseView& view, const SparseCheckpoint& to) {
  const SparseHeader& h = view.header();
  prepare_unpacking(refuse, h, h.kind == SparseKind::columns ? SparseKind::bitmap : h.kind, h.has_scale != 0, to);
  if (to.row_offsets != nullptr) std::memcpy(to.row_offsets, view.row_offsets(), (h.rows + 1) * 4);
  if (to.scale != nullptr) std::memcpy(to.scale, view.scale(), h.rows * 4);
  if (to.codebook != nullptr) std::memcpy(to.codebook, view.codebook(), h.columns << (h.bits + 1));
  if (h.outliers > 0) {
    std::memcpy(to.outlier_row_offsets, view.outlier_row_offsets(), (h.rows + 1) * 4);
    std::memcpy(to.outlier_values, view.outlier_values(), h.outliers * 2);
    for (int64_t i = 0; i < h.outliers; ++i) put_column(to.outlier_columns, to.column_bytes, i, view.outlier_columns()[i]);
  }
  if (h.kind == SparseKind::columns) return unpack_columns(view, to);
  parallel_for(h.tiles, 1, kPackNsPerWeight * h.rows * h.columns, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (h.kind == SparseKind::bitmap) unpack_bitmap_tile(view, to, tile);
      if (h.kind == SparseKind::sparse24) unpack_24_tile(view, to, tile);
      if (h.kind == SparseKind::codes) unpack_codes_tile(view, to, tile);
    }
  });
}

}  // namespace pyllmq::cpu

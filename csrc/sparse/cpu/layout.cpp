#include "sparse/cpu/layout.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/counting.h"
#include "runtime/thread_pool.h"
#include "sparse/packing.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr double kPackNsPerWeight = 1.5;
constexpr int kMaskBytes = kCellColumns / 8;

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument("sparse layout: " + why); }

uint64_t checksum(SparseHeader header) {
  header.checksum = 0;
  return hash_words(&header, sizeof header);
}

int64_t batch_bytes_of(const SparseHeader& h) {
  return h.kind == SparseKind::sparse24 ? batch_bytes(h.values) : code_batch_bytes(static_cast<int>(h.bits));
}

// The kept columns of one row, block after block.
class RowMask {
 public:
  RowMask(const SparseCheckpoint& from, int64_t row) : from_(from), row_(row), next_(from.row_offsets[row]) {}

  // 256 bits; columns beyond the weight's are 0.
  void take(int64_t block, uint8_t* bits) {
    std::memset(bits, 0, kMaskBytes);
    if (from_.mask != nullptr) {
      const int64_t row_bytes = from_.mask_row_bytes(), begin = block * kMaskBytes;
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
            else
              offset += batches * batch_bytes_of(h);
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

template <Way way>
void move_bitmap_tile(const SparseView& view, const SparseCheckpoint& c, int64_t tile) {
  const SparseHeader& h = view.header();
  const int64_t size = value_bytes(h.values);
  for (int half = 0; half < 2; ++half) {
    const int64_t first = tile * kTileRows + half * kCellRows;
    std::vector<RowMask> masks;
    int64_t next[kCellRows] = {};
    for (int r = 0; r < kCellRows && first + r < h.rows; ++r) {
      if (way == Way::pack) masks.emplace_back(c, first + r);
      next[r] = view.row_offsets()[first + r];
    }
    for (int64_t block = 0; block < h.blocks; ++block) {
      uint8_t bits[kCellRows][kMaskBytes] = {};
      for (size_t r = 0; r < masks.size(); ++r) masks[r].take(block, bits[r]);
      const int64_t slots = view.slots(block);
      auto* cell = const_cast<uint8_t*>(view.cell(tile, block, half));
      uint8_t* value = cell + slots * 2;
      if (way == Way::pack) std::memset(cell, 0, slots * 2);
      walk_cell(h.values, slots, [&](int row, int64_t slot, int64_t byte, int bit) {
        if (((way == Way::pack ? bits[row][slot / 8] >> slot % 8 : cell[byte] >> bit) & 1) == 0) return;
        const int64_t place = next[row]++;
        move<way>(value, c.values + place * size, size);
        value += size;
        if (way == Way::pack)
          cell[byte] |= static_cast<uint8_t>(1 << bit);
        else
          c.put_kept(first + row, block * kCellColumns + slot, place);
      });
      const int64_t used = value - cell;
      if (way == Way::pack) std::memset(value, 0, rounded_up(used, 8) - used);
    }
  }
}

void pack_columns(const SparseCheckpoint& from, const SparseHeader& h, uint8_t* layout) {
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
    for (int64_t i = view.row_offsets()[row]; i < view.row_offsets()[row + 1]; ++i)
      to.put_kept(row, column_at(view.columns(), view.column_bytes(), i), i);
}

// --- 2:4 -----------------------------------------------------------------------------------------------------------

template <class Visit>  // visit(row of the checkpoint, group, its batch, row of the cell)
void for_each_group(const SparseView& view, const SparseCheckpoint& c, int64_t tile, const Visit& visit) {
  const int64_t bytes = batch_bytes_of(view.header()), groups = c.groups(), end = std::min(c.rows, (tile + 1) * kTileRows);
  constexpr int64_t batch_groups = kBatchColumns / 4, cell_batches = kCellColumns / kBatchColumns;
  for (int64_t row = tile * kTileRows; row < end; ++row) {
    const Row24 own = c.row24(row);
    for (int64_t batch = 0; batch * batch_groups < groups; ++batch) {
      const uint8_t* cell = view.cell(tile, batch / cell_batches, static_cast<int>(row % kTileRows / kCellRows));
      auto* at = const_cast<uint8_t*>(cell) + batch % cell_batches * bytes;
      for (int64_t group = batch * batch_groups; group < std::min(groups, (batch + 1) * batch_groups); ++group)
        visit(own, group, at, static_cast<int>(row % kCellRows));
    }
  }
}

// Place of value `which` of a row in the values of a group, in elements.
int64_t value_place(ValueType type, int row, int which) { return by_pairs(type) ? row * 2 + which : which * kCellRows + row; }

template <Way way>
void move_24_tile(const SparseView& view, const SparseCheckpoint& c, int64_t tile) {
  const ValueType type = view.header().values;
  const int64_t size = value_bytes(type);
  for_each_group(view, c, tile, [=](const Row24& own, int64_t group, uint8_t* batch, int r) {
    uint32_t& positions = reinterpret_cast<uint32_t*>(batch)[r];
    const int shift = static_cast<int>(4 * (group % 8));
    if (way == Way::pack)
      positions |= own.position_pair(group) << shift;
    else
      own.put_position_pair(group, positions >> shift & 15);
    uint8_t* values = batch + 4 * kCellRows + group % 8 * 2 * kCellRows * size;
    for (int which = 0; which < 2; ++which) move<way>(values + value_place(type, r, which) * size, own.value(group, which), size);
  });
}

// --- codes -----------------------------------------------------------------------------------------------------------

void pack_codes_tile(const SparseView& view, const SparseCheckpoint& from, int64_t tile) {
  const StepOrder order = view.header().order;
  for_each_group(view, from, tile, [=](const Row24& own, int64_t group, uint8_t* batch, int r) {
    uint8_t* bytes = batch + code_byte(order, group, r);
    const auto put = [&](int plane, uint32_t nibble) {
      bytes[plane * 4 * kCellRows] |= static_cast<uint8_t>(nibble << (4 * (group % 2)));
    };
    const uint32_t positions = own.position_pair(group), first = own.code(group, 0), second = own.code(group, 1);
    if (own.bits == 2) {
      put(0, first | (positions & 3) << 2);
      put(1, second | positions >> 2 << 2);
    } else {
      put(0, positions);
      put(1, first);
      put(2, second);
    }
  });
}

void unpack_codes_tile(const SparseView& view, const SparseCheckpoint& to, int64_t tile) {
  const StepOrder order = view.header().order;
  for_each_group(view, to, tile, [=](const Row24& own, int64_t group, const uint8_t* batch, int r) {
    const GroupCodes found = read_group(batch, order, own.bits, group % 8, r);
    own.put_position_pair(group, static_cast<uint32_t>(found.position[0] | found.position[1] << 2));
    for (int which = 0; which < 2; ++which) own.put_code(group, which, static_cast<uint32_t>(found.code[which]));
  });
}

// All tiles write all of theirs.
template <Way way>
void move_tiles(const SparseView& view, const SparseCheckpoint& c) {
  const SparseHeader& h = view.header();
  parallel_for(h.tiles, 1, kPackNsPerWeight * h.rows * h.columns, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t cell = 0; way == Way::pack && h.kind != SparseKind::bitmap && cell < 2 * h.blocks; ++cell)
        std::memset(const_cast<uint8_t*>(view.cell(tile, cell / 2, static_cast<int>(cell % 2))), 0,
                    view.slots(cell / 2) / kBatchColumns * batch_bytes_of(h));
      if (h.kind == SparseKind::bitmap) move_bitmap_tile<way>(view, c, tile);
      if (h.kind == SparseKind::sparse24) move_24_tile<way>(view, c, tile);
      if (h.kind == SparseKind::codes) (way == Way::pack ? pack_codes_tile : unpack_codes_tile)(view, c, tile);
    }
  });
}

}  // namespace

SparseView::SparseView(const void* layout, int64_t layout_bytes) : base_(static_cast<const uint8_t*>(layout)) {
  const auto& h = checked_header<SparseHeader>(refuse, layout, layout_bytes, kAlignment);
  if (h.checksum != checksum(h)) refuse("the header is damaged (checksum); pack the weight again");
}

int64_t sparse_layout_bytes(const SparseCheckpoint& checkpoint, double sparse_columns) {
  return make_plan(checkpoint, sparse_columns).header.bytes;
}

void sparse_layout_pack(void* to, int64_t layout_bytes, const SparseCheckpoint& from, double sparse_columns) {
  const Plan plan = make_plan(from, sparse_columns);
  const SparseHeader& h = plan.header;
  check_room(refuse, to, layout_bytes, h.bytes, kAlignment);
  auto* layout = static_cast<uint8_t*>(to);
  std::memset(layout, 0, h.data_offset);
  std::memcpy(layout, &h, sizeof h);
  if (!plan.cells.empty()) std::memcpy(layout + h.cells_offset, plan.cells.data(), plan.cells.size() * 8);
  if (from.row_offsets != nullptr) std::memcpy(layout + h.row_offsets_offset, from.row_offsets, (h.rows + 1) * 4);
  if (h.has_scale) std::memcpy(layout + h.scale_offset, from.scale, h.rows * 4);
  if (h.kind == SparseKind::codes) std::memcpy(layout + h.codebook_offset, from.codebook, h.columns << (h.bits + 1));
  const SparseView view(layout, layout_bytes);
  if (h.kind == SparseKind::columns) return pack_columns(from, h, layout);
  std::memset(layout + h.bytes - kReadAhead - kAlignment, 0, kReadAhead + kAlignment);
  move_tiles<Way::pack>(view, from);
  if (h.outliers > 0) pack_outliers(from, h, layout);
}

void sparse_layout_unpack(const SparseView& view, const SparseCheckpoint& to) {
  const SparseHeader& h = view.header();
  prepare_unpacking(refuse, h, h.kind == SparseKind::columns ? SparseKind::bitmap : h.kind, h.has_scale != 0, to);
  if (to.row_offsets != nullptr) std::memcpy(to.row_offsets, view.row_offsets(), (h.rows + 1) * 4);
  if (to.scale != nullptr) std::memcpy(to.scale, view.scale(), h.rows * 4);
  if (to.codebook != nullptr) std::memcpy(to.codebook, view.codebook(), h.columns << (h.bits + 1));
  if (h.outliers > 0) unpack_outliers(h, view.base(), to);
  if (h.kind == SparseKind::columns) return unpack_columns(view, to);
  move_tiles<Way::unpack>(view, to);
}

}  // namespace pyllmq::cpu

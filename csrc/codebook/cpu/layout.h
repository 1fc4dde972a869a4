// The machine layout of a `codebook` weight: one relocatable blob (offsets, no pointers) made from the checkpoint once.
//
// Rows are cut into tiles of 32 (each segment starts a new tile), columns are sorted by width, each width is cut into
// panels. Codes are stored in strips of 16 tiles; within a strip panel by panel, within a panel tile by tile. A thread
// that takes a strip reads one contiguous stretch of memory (at 4096 columns of 4 bits 1 MiB) while the tables of one
// panel stay in its L1 cache. Rejected: all tiles of a panel before the next panel: 64 KiB stretches, 30 % slower from
// memory (345 against 246 us, AVX-512, 4096 x 4096 at 4 bits).
//
//   widths 1, 2, 4   a nibble is a lookup of 4, 2 or 1 columns; a step is one byte for each of the 32 rows, its low
//                    nibble = lookup 2i, its high nibble = lookup 2i+1
//   width 3          8 columns are 3 bytes a row: columns 0..5 sit in the low 3 bits of the six nibbles, the six spare
//                    bits carry columns 6 (bit 3 of the three bytes) and 7 (bit 7)
//   widths 5..8      a step is one column, one byte a code
//
// The order of the steps is that of the instruction set that packs the layout:
//
//   rows    byte r of step i at 32 i + r: 32 rows side by side, for shuffles that look up one table per register (AVX2, NEON)
//   fours   byte r of step i at 128 (i / 4) + 4 r + i % 4: four steps of a row side by side, for registers that hold
//           four tables, and multiply-add that sums four bytes (AVX-512). Width 3: steps of four blocks side by side.
//
// Every panel is padded to blocks of 8 columns (32 where widths 1..3 are in fours) whose code and codebook are zero.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "codebook/shape.h"

namespace pyllmq::cpu {

constexpr int kTileRows = 32;
constexpr int64_t kStripTiles = 16;
constexpr int kBlockColumns = 8;
constexpr int kPanelLookups = 256;     // what 16-bit accumulators of 7-bit planes hold: 256 * 127 < 2^15
constexpr int kBytePanelColumns = 32;  // widths 5..8: 32 codebooks of 256 fp16 entries are half of an L1 cache
constexpr int kMaxPanelColumns = 4 * kPanelLookups;

enum class StepOrder : int64_t { rows = 1, fours = 4 };

static constexpr int columns_per_lookup(int width) { return width == 1 ? 4 : width == 2 ? 2 : 1; }
static constexpr int entries_per_lookup(int width) { return width <= 3 ? 8 : 1 << width; }  // fp16 entries kept per lookup
static constexpr int64_t block_bytes(int width) {                                           // one tile x 8 columns
  return width <= 4 ? int64_t{width} * kBlockColumns * kTileRows / 8 : kBlockColumns * kTileRows;
}

StepOrder native_order();  // of the active instruction set

struct SegmentRecord {
  int64_t row_begin, rows, tile_begin, tiles;
};

struct PanelRecord {
  int64_t width;
  int64_t columns;  // true columns; slots = columns rounded up to 8
  int64_t slots;
  int64_t first_slot;    // into LayoutView::columns and max_magnitude
  int64_t first_entry;   // into one segment's codebook
  int64_t tile_bytes;    // of this panel's codes for one tile
  int64_t bytes_before;  // and of those of all panels before it
  int64_t first_column;  // >= 0: the panel's columns are this one and its successors; -1: scattered

  int64_t lookups() const { return slots / columns_per_lookup(static_cast<int>(width)); }
};

struct LayoutHeader {
  static constexpr uint64_t kMagic = 0x746C2D716D6C6C79;  // "yllmq-lt"
  static constexpr uint64_t kVersion = 2;
  uint64_t magic = kMagic, version = kVersion, checksum;  // the checksum covers this header and the two record tables
  int64_t bytes, rows, columns, segments, tiles, panels, slots, entries, outliers, has_row_scale;
  StepOrder order;
  int64_t segments_offset, panels_offset, columns_offset, max_magnitude_offset, codebook_offset, row_scale_offset;
  int64_t outlier_row_offsets_offset, outlier_columns_offset, outlier_deltas_offset, outlier_values_offset;
  int64_t codes_offset, tile_bytes;  // of all panels for one tile
};

// A checked look at a blob; throws std::invalid_argument when the header does not fit the bytes.
class LayoutView {
 public:
  LayoutView(const void* layout, int64_t layout_bytes);

  const LayoutHeader& header() const { return *at<LayoutHeader>(0); }
  const SegmentRecord& segment(int64_t s) const { return at<SegmentRecord>(header().segments_offset)[s]; }
  int64_t segment_of(int64_t row) const {
    const SegmentRecord* first = &segment(0);
    const auto before = [](int64_t r, const SegmentRecord& s) { return r < s.row_begin; };
    return std::upper_bound(first, first + header().segments, row, before) - first - 1;
  }
  const PanelRecord& panel(int64_t p) const { return at<PanelRecord>(header().panels_offset)[p]; }
  const uint32_t* columns(const PanelRecord& p) const { return at<uint32_t>(header().columns_offset) + p.first_slot; }
  const float* max_magnitude(const PanelRecord& p, int64_t segment) const {  // max |codebook| of each column
    return at<float>(header().max_magnitude_offset) + segment * header().slots + p.first_slot;
  }
  const uint16_t* codebook(const PanelRecord& p, int64_t segment) const {
    return at<uint16_t>(header().codebook_offset) + segment * header().entries + p.first_entry;
  }
  const uint8_t* codes(const PanelRecord& p, int64_t tile) const {  // contiguous up to the end of the strip
    const int64_t strip = tile / kStripTiles * kStripTiles, rest = header().tiles - strip;
    const int64_t tiles = rest < kStripTiles ? rest : kStripTiles;
    return at<uint8_t>(header().codes_offset) + strip * header().tile_bytes + tiles * p.bytes_before +
           (tile - strip) * p.tile_bytes;
  }
  const float* row_scale() const { return header().has_row_scale ? at<float>(header().row_scale_offset) : nullptr; }
  const uint32_t* outlier_row_offsets() const { return at<uint32_t>(header().outlier_row_offsets_offset); }
  const uint32_t* outlier_columns() const { return at<uint32_t>(header().outlier_columns_offset); }
  const float* outlier_deltas() const { return at<float>(header().outlier_deltas_offset); }
  const uint16_t* outlier_values() const { return at<uint16_t>(header().outlier_values_offset); }

 private:
  template <class T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(base_ + offset);
  }
  const uint8_t* base_;
};

// Consecutive tiles of one segment and one strip, and the rows of the weight that they hold: what one task of a thread
// works on.
struct TileChunk {
  int64_t segment, tile_begin, tiles, row_begin, rows;
};

// All tiles in chunks of at most `most` tiles, which become smaller towards the end, down to `least`: a thread that is done waits
// for a small one.
std::vector<TileChunk> tile_chunks(const LayoutView& view, int64_t most, int64_t least, int threads);

// Where the byte of a row in a step of a tile is.
static inline int64_t step_place(StepOrder order, int64_t step, int row) {
  return order == StepOrder::rows ? step * kTileRows + row : step / 4 * (4 * kTileRows) + 4 * row + step % 4;
}

// Width 3: byte i of the three of a block of 8 columns.
static inline int64_t step_of_3bit(StepOrder order, int64_t block, int i) {
  return order == StepOrder::rows ? 3 * block + i : (block / 4 * 3 + i) * 4 + block % 4;
}

// Code of column `slot` (counted within the panel) and row `row` of a tile.
static inline int read_code(const uint8_t* tile_codes, StepOrder order, int width, int64_t slot, int row) {
  if (width >= 5) return tile_codes[step_place(order, slot, row)] & ((1 << width) - 1);
  if (width != 3) {
    const int64_t bit = slot * width;
    return tile_codes[step_place(order, bit / 8, row)] >> (bit % 8) & ((1 << width) - 1);
  }
  const int64_t block = slot / kBlockColumns;
  const int column = static_cast<int>(slot % kBlockColumns);
  const auto byte = [&](int i) { return tile_codes[step_place(order, step_of_3bit(order, block, i), row)]; };
  if (column < 6) return byte(column / 2) >> (4 * (column % 2)) & 7;
  const int bit = 4 * (column - 6) + 3;
  return (byte(0) >> bit & 1) | (byte(1) >> bit & 1) << 1 | (byte(2) >> bit & 1) << 2;
}

int64_t codebook_layout_bytes(const CodebookCheckpoint& checkpoint);
void codebook_layout_pack(void* layout, int64_t layout_bytes, const CodebookCheckpoint& checkpoint);
// codes_out uint8 [rows, columns]: exactly the codes that were packed, also under the outliers.
void codebook_layout_codes(const LayoutView& view, uint8_t* codes_out);

}  // namespace pyllmq::cpu

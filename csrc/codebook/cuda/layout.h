// The machine layout `cuda` of a `codebook` weight: one relocatable blob (offsets, no pointers), made on the host at load.
//
// Rows are cut into tiles of 64 and blocks of 8 tiles; each segment starts a new block. Columns are sorted by width and
// each width is cut into groups of 16. A tile x group of width b is b words for each of a warp's 32 lanes, in the order in
// which tensor cores want them: with g = lane / 4 and t = lane % 4, a lane holds columns t, t+4, t+8, t+12 and rows
// 16i + 2g + h of the tile, i = 0..3, h = 0..1. A nibble stands for a row, the same at every width:
//
//   4 bits   word j = column t + 4j; nibble = code
//   3 bits   word j = column t + 4j for j < 3 in the low 3 bits of the nibbles; their spare bits are column t + 12
//   2 bits   word j = columns t + 8j (low bits of the nibbles) and t + 8j + 4 (high bits)
//   1 bit    one word; bit j of the nibbles = column t + 4j
//   5..8     four words as for 4 bits (the low nibbles of the codes), then b - 4 words as for width b - 4
//
// Codes lie by width, block, group, tile: for a range of groups a warp reads contiguous bytes. Work is split over K by
// *panels*: panel p of P holds groups [p*n/P, (p+1)*n/P) of each width's n groups, so that every panel has the same mix of
// widths, and kernels find a panel by arithmetic. Outliers are sorted by panel, tile, row, column.
//
// Weights of at most 4 bits have their codebooks a second time, as integers: an entry is middle + half * e / kMostEntry of its
// column, e = 256 high + low, and the low and the high bytes are a plane each (linear_byte_planes.cu).
//
// Outliers stand a second time as patches of decoded tiles (linear_wgmma.cu): where in shared memory, and the value over its
// row's scale, by group of columns, in the order of the slots, and tile.
#pragma once
#include <cstdint>

#include "codebook/shape.h"

#ifdef __CUDACC__
#define PYLLMQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYLLMQ_HOST_DEVICE static inline
#endif

namespace pyllmq::cuda {

constexpr int kTileRows = 64;
constexpr int kGroupColumns = 16;
constexpr int kBlockTiles = 8;
constexpr int kBlockRows = kBlockTiles * kTileRows;
constexpr int kPanelGroups = 16;
constexpr int kReadBeyond = 2048;      // what kernels may read behind the last codes
constexpr int kMostPlaneBits = 4;      // widths that have byte planes
constexpr int kMostEntry = 126 * 257;  // of a codebook as integers: either byte is at most 126

struct RowBlock {
  int32_t row_begin, rows, segment, tile_begin;
};

// Of a column within one segment: the middle of its codebook and half the distance between its ends.
struct ColumnSpan {
  float middle, half;
};

// The weight that takes the place of a decoded one. place: the tile within its block in the highest 3 bits, then half_in_tile.
struct Patch {
  uint16_t place, half;
};

struct LayoutHeader {
  static constexpr uint64_t kMagic = 0x67632D716D6C6C79;  // "yllmq-cg"
  static constexpr uint64_t kVersion = 3;
  uint64_t magic = kMagic, version = kVersion;
  int64_t bytes, rows, columns, segments, blocks, tiles, panels, slots;
  int64_t widest;            // width that has columns
  int64_t groups[9];         // by width
  int64_t first_slot[9];     // of a width, into columns
  int64_t codes_offset[9];   // of a width
  int64_t tables_offset[9];  // of a width, within one segment's tables
  int64_t tables_begin, segment_table_bytes;
  int64_t planes_offset[kMostPlaneBits + 1];  // of a width, within one segment's planes
  int64_t planes_begin, segment_plane_bytes;  // 0: the widest column has none
  int64_t spans_offset;                       // ColumnSpan [segments, slots]; with the planes
  int64_t blocks_offset;                      // RowBlock [blocks]
  int64_t columns_offset;                     // int32 [slots]: the column of a slot, -1 for padding
  int64_t slots_offset;                       // int32 [columns]: the slot of a column
  int64_t row_scale_offset;                   // fp16 [rows]; 0: none
  int64_t outliers;                           // 0: the four arrays below do not exist
  int64_t outlier_begin_offset;               // uint32 [panels, tiles]: first outlier of a panel in a tile
  int64_t outlier_row_end_offset;             // uint16 [panels, tiles, 64]: end of a row's outliers, counted from outlier_begin
  int64_t outlier_columns_offset;             // int32 [outliers]
  int64_t outlier_deltas_offset;              // fp32 [outliers]: value - what the code under it stands for
  int64_t outlier_values_offset;              // fp16 [outliers]
  int64_t patched;                            // 0: a value over its row's scale is not finite in fp16, so there are no patches
  int64_t patch_begin_offset;                 // uint32 [slots / 16, tiles] and the end of the last
  int64_t patches_offset;                     // Patch [outliers]
  int64_t counters_offset;                    // uint32 [counter sets, token blocks, tiles] (linear_operand_cuda.h)
};

// Whether a blob of `bytes` that starts with this header is a weight of that shape: kernels index by what it says.
PYLLMQ_HOST_DEVICE bool describes(const LayoutHeader& h, int64_t bytes, int64_t rows, int64_t columns) {
  return h.magic == h.kMagic && h.version == h.kVersion && h.bytes == bytes && h.rows == rows && h.columns == columns;
}

struct GroupRange {
  int begin, end;
};

// The groups of one width in panels [panel_begin, panel_end).
PYLLMQ_HOST_DEVICE GroupRange panel_groups(const LayoutHeader& h, int width, int64_t panel_begin, int64_t panel_end) {
  return {static_cast<int>(panel_begin * h.groups[width] / h.panels), static_cast<int>(panel_end * h.groups[width] / h.panels)};
}

PYLLMQ_HOST_DEVICE int64_t tile_bytes(int width) { return int64_t{kTileRows} * kGroupColumns / 8 * width; }
PYLLMQ_HOST_DEVICE int64_t table_bytes(int width) { return int64_t{kGroupColumns} * 2 << width; }
PYLLMQ_HOST_DEVICE int block_tiles(const RowBlock& block) { return (block.rows + kTileRows - 1) / kTileRows; }

// Codes of one group in one block: its tiles one after the other.
PYLLMQ_HOST_DEVICE int64_t codes_offset(const LayoutHeader& h, int width, const RowBlock& block, int64_t group) {
  return h.codes_offset[width] + (block.tile_begin * h.groups[width] + block_tiles(block) * group) * tile_bytes(width);
}

// Codebooks of one group: 16 columns, each fp16 [2^width]; of 3 and 4 bits all low bytes, then all high bytes.
PYLLMQ_HOST_DEVICE int64_t tables_offset(const LayoutHeader& h, int width, int64_t segment, int64_t group) {
  return h.tables_begin + segment * h.segment_table_bytes + h.tables_offset[width] + group * table_bytes(width);
}
PYLLMQ_HOST_DEVICE bool has_split_bytes(int width) { return width == 3 || width == 4; }

// Integer codebooks of one group: of each of 16 columns the low bytes, then the high bytes.
PYLLMQ_HOST_DEVICE constexpr int plane_entries(int width) { return width <= 2 ? 4 : 1 << width; }
PYLLMQ_HOST_DEVICE constexpr int plane_bytes(int width) { return kGroupColumns * 2 * plane_entries(width); }
PYLLMQ_HOST_DEVICE int64_t planes_offset(const LayoutHeader& h, int width, int64_t segment, int64_t group) {
  return h.planes_begin + segment * h.segment_plane_bytes + h.planes_offset[width] + group * plane_bytes(width);
}

// Widths above 4 are two parts: low nibbles, and the bits above them.
PYLLMQ_HOST_DEVICE int low_part(int width) { return width < 4 ? width : 4; }
// Word of a lane within one part of a tile. Three words a lane are no single load, so each is a row of 32 lanes.
PYLLMQ_HOST_DEVICE int word_index(int part, int lane, int word) { return part == 3 ? word * 32 + lane : lane * part + word; }
// Nibble that holds row 16i + 2g + h. Decoding 1 and 2 bits takes every second nibble at a time.
PYLLMQ_HOST_DEVICE int nibble_of(int i, int h) { return 4 * (i & 1) + 2 * h + (i >> 1); }

// A group's decoded tile in shared memory, as wgmma takes it: 16 columns of 128 bytes. A lane's two columns of a half of the
// group are neighbours, so that it stores both without meeting other lanes' banks; its 8 rows of a column are a chunk of 16
// bytes.
PYLLMQ_HOST_DEVICE int tile_column(int column) { return column / 8 * 8 + column % 4 * 2 + column / 4 % 2; }
PYLLMQ_HOST_DEVICE int column_of_tile(int k) { return k / 8 * 8 + k % 2 * 4 + k % 8 / 2; }
PYLLMQ_HOST_DEVICE int tile_row(int m) { return m % 8 / 2 * 16 + m / 8 * 2 + m % 2; }  // that stands in place m of a column
// Where row 16i + 2g + h of a column begins, in units of 2 bytes.
PYLLMQ_HOST_DEVICE int half_in_tile(int row, int column) {
  const int k = tile_column(column), g = row % 16 / 2;
  return k * 64 + (g ^ k % 8) * 8 + row / 16 * 2 + row % 2;
}

// Host functions. They throw std::invalid_argument that says what does not fit.
int64_t codebook_layout_bytes(const CodebookCheckpoint& checkpoint);
void codebook_layout_pack(void* layout, int64_t layout_bytes, const CodebookCheckpoint& checkpoint);
// codes_out uint8 [rows, columns]: exactly the codes that were packed, also under the outliers.
void codebook_layout_codes(const void* layout, int64_t layout_bytes, uint8_t* codes_out);
const LayoutHeader& codebook_header(const void* layout, int64_t layout_bytes);

}  // namespace pyllmq::cuda

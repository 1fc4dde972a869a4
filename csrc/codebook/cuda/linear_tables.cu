// codebook_linear for one token: tables of partial products in shared memory, no weight is decoded.
//
// A lane owns four columns of a group. All sums that two code nibbles can select - one 2-bit code each of four columns, or a
// code of up to 4 bits each of two columns - are a table of at most 256 fp32 numbers, and a lookup replaces two or four
// multiplications. Every lane has its own table in its own bank of shared memory, so lookups never conflict:
//
//   address = index << 7 | lane << 2          lane 4q + t: columns t, t+4, t+8, t+12 of group q of a set of eight groups
//
// Four such tables (128 KiB) are a *unit*: 512 columns of 2 bits, or 256 of 3 or 4 bits. Units x steps of 8, 16 or 32 rows
// are cut into equal stretches, one for each block, which builds its unit's tables and then streams codes. A warp takes a
// step: for every 8 rows eight sums per lane, added over the lanes by a transposing reduction. Sums of a unit lie in a
// workspace until the warp that finishes a step's last unit adds them, in order. Widths 5..8 look up single weights in the
// codebooks.

#include "codebook/cuda/operand.h"
#include "codebook/cuda/outliers.cuh"
#include "codebook/cuda/decode.cuh"
#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 24;  // 80 registers a thread
constexpr int kThreads = 32 * kWarps;
constexpr int kSetGroups = 8;
constexpr int kStrips = 8;  // of a tile; strip s is rows 16i + 2s + h
constexpr int kStripRows = kTileRows / kStrips;
constexpr int kTables = 4;  // of a unit
constexpr int kMostEntries = 256;
constexpr int kWarpsPerTable = kWarps / kTables;

struct Arguments {
  LinearCall call;
  int step_strips;  // 1, 2 or 4
};

// Consecutive steps of one unit and one segment.
struct Run {
  int64_t position, end;  // among all units' steps: after this run, and of this block
  int64_t units, unit, panel_begin, panel_end;
  int width, first_group, group_end, segment;
  int step_begin, step_end;
  int tile_begin, tile_end, row_begin, row_end;  // of the segment
};

struct Shared {
  Run run;
  uint32_t arrived[kWarps];
  alignas(16) uint8_t tables[kTables][kMostEntries * 32 * 4];
};

PYLLMQ_HOST_DEVICE int unit_sets(int width) { return width <= 2 ? 4 : 2; }
PYLLMQ_HOST_DEVICE int unit_groups(int width) { return unit_sets(width) * kSetGroups; }

PYLLMQ_DEVICE int64_t units_of(const LayoutHeader& h, int width) {
  return (h.groups[width] + unit_groups(width) - 1) / unit_groups(width);
}

// The first block of rows for which `past` holds, blocks being in ascending order; h.blocks if there is none.
template <class Past>
PYLLMQ_DEVICE int64_t first_block(const LayoutHeader& h, const Past& past) {
  const RowBlock* blocks = section<RowBlock>(h, h.blocks_offset);
  int64_t low = 0, high = h.blocks;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (past(blocks[middle]))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Fills in the run that starts at r.position.
PYLLMQ_DEVICE void describe(const LayoutHeader& h, int step_strips, Run& r) {
  const int tile_steps = kStrips / step_strips;
  const int64_t steps = h.tiles * tile_steps;
  r.unit = r.position / steps;
  r.panel_begin = r.unit * h.panels / r.units;
  r.panel_end = (r.unit + 1) * h.panels / r.units;
  r.step_begin = static_cast<int>(r.position % steps);
  const int tile = r.step_begin / tile_steps;
  int64_t before = 0;
  for (r.width = 1; r.unit >= before + units_of(h, r.width); ++r.width) before += units_of(h, r.width);
  r.first_group = static_cast<int>(r.unit - before) * unit_groups(r.width);
  r.group_end = static_cast<int>(h.groups[r.width]);

  const RowBlock* blocks = section<RowBlock>(h, h.blocks_offset);
  const int64_t block = first_block(h, [&](const RowBlock& b) { return b.tile_begin > tile; }) - 1;
  const int segment = blocks[block].segment;
  const RowBlock first = blocks[first_block(h, [&](const RowBlock& b) { return b.segment >= segment; })];
  const RowBlock last = blocks[first_block(h, [&](const RowBlock& b) { return b.segment > segment; }) - 1];
  r.segment = segment;
  r.tile_begin = first.tile_begin;
  r.row_begin = first.row_begin;
  r.tile_end = last.tile_begin + block_tiles(last);
  r.row_end = last.row_begin + last.rows;
  const int64_t left = r.end - r.position;
  const int in_segment = r.tile_end * tile_steps - r.step_begin;
  r.step_end = r.step_begin + (left < in_segment ? static_cast<int>(left) : in_segment);
  r.position += r.step_end - r.step_begin;
}

// Where the codes of a tile lie: of group 0, and how far apart two groups are.
struct TileCodes {
  const uint8_t* first;
  int group_bytes;
};

PYLLMQ_DEVICE TileCodes tile_codes(const LayoutHeader& h, const Run& r, int width, int tile) {
  const uint32_t in_segment = tile - r.tile_begin, in_block = in_segment % kBlockTiles;
  const int block_begin = tile - static_cast<int>(in_block), left = r.tile_end - block_begin;
  const int64_t index = block_begin * h.groups[width] + in_block;
  return {reinterpret_cast<const uint8_t*>(&h) + h.codes_offset[width] + index * tile_bytes(width),
          (left < kBlockTiles ? left : kBlockTiles) * static_cast<int>(tile_bytes(width))};
}

// Where word 0 of the layout's lane `lane` lies in a tile.
template <int kWidth>
PYLLMQ_DEVICE int word_offset(int lane) {
  return 4 * word_index(kWidth, lane, 0);
}

// A lane's words of one group in a strip, from its word 0 on.
template <int kWidth>
PYLLMQ_DEVICE void load_codes(const uint8_t* first, uint32_t (&words)[kWidth]) {
  if constexpr (kWidth == 3) {
    unrolled<3>([&](int j) { words[j] = load_words<1>(first + 128 * j)[0]; });
  } else {
    const Words<kWidth> loaded = load_words<kWidth>(first);
    unrolled<kWidth>([&](int j) { words[j] = loaded[j]; });
  }
}

// Words whose nibbles are halves of indices, one for each table and half; their rows are those of the nibbles.
template <int kWidth>
PYLLMQ_DEVICE void index_halves(const uint32_t (&words)[kWidth], uint32_t (&halves)[4]) {
  if constexpr (kWidth == 1) {
    halves[0] = words[0];
    halves[1] = 0;
  } else if constexpr (kWidth == 2) {
    halves[0] = words[0];
    halves[1] = words[1];
  } else if constexpr (kWidth == 3) {
    unrolled<3>([&](int j) { halves[j] = words[j] & 0x77777777u; });
    halves[3] = (words[0] >> 3 & 0x11111111u) | (words[1] >> 2 & 0x22222222u) | (words[2] >> 1 & 0x44444444u);
  } else {
    unrolled<4>([&](int j) { halves[j] = words[j]; });
  }
}

// Adds what a table says about eight rows; `bank` is the lane's in the first table.
template <int kTable>
PYLLMQ_DEVICE void add_lookups(ptx::SharedAddress bank, uint32_t low, uint32_t high, float (&sums)[kStripRows]) {
  constexpr int kOffset = kTable * kMostEntries * 128;
  const uint32_t even = (low & 0x0F0F0F0Fu) | (high << 4 & 0xF0F0F0F0u);
  const uint32_t odd = (low >> 4 & 0x0F0F0F0Fu) | (high & 0xF0F0F0F0u);
  unrolled<4>([&](int i) {
    sums[2 * i] += ptx::load_shared<kOffset>(bank + ptx::permute(even, 0, 0x4440 + i) * 128);
    sums[2 * i + 1] += ptx::load_shared<kOffset>(bank + ptx::permute(odd, 0, 0x4440 + i) * 128);
  });
}

// x of a lane's four columns in a group.
PYLLMQ_DEVICE void load_x(const LayoutHeader& h, const LinearCall& call, int width, int64_t group, int t, float (&x)[4]) {
  const int32_t* columns = section<int32_t>(h, h.columns_offset) + h.first_slot[width] + group * kGroupColumns;
  unrolled<4>([&](int j) {
    const int32_t column = columns[t + 4 * j];
    x[j] = column < 0 ? 0.0f : load_element(call.x, static_cast<DType>(call.dtype), column);
  });
}

// x times all entries of one column's codebook.
template <int kWidth>
PYLLMQ_DEVICE void products_of(const uint8_t* group_table, int column, float x, float (&products)[1 << kWidth]) {
  RegisterTable<kWidth> table;
  table.load(group_table, column);
  unrolled<1 << kWidth>([&](int code) {
    uint32_t entry;
    if constexpr (kWidth <= 2) {
      entry = table.word[code / 2] >> (16 * (code % 2));
    } else {
      constexpr int kPlane = RegisterTable<kWidth>::kWords / 2;
      entry = ptx::permute(table.word[code / 4], table.word[kPlane + code / 4], (code % 4) | (4 + code % 4) << 4);
    }
    products[code] = x * ptx::fp16_to_fp32(static_cast<uint16_t>(entry));
  });
}

// One column's codebook and x; entries are chosen at run time.
template <int kWidth>
struct Column {
  RegisterTable<kWidth> table;
  float x;
  PYLLMQ_MEMBER float product(int code) const {
    uint32_t pairs[4];
    table.decode(code, pairs);
    return x * ptx::fp16_to_fp32(static_cast<uint16_t>(pairs[0]));
  }
};

// The tables of a unit, each by eight warps: entry low | high << 4 = what `low` selects + what `high` selects.
template <int kWidth>
PYLLMQ_DEVICE void build_tables(const LayoutHeader& h, const LinearCall& call, Shared& shared) {
  constexpr int kSets = kWidth <= 2 ? 4 : 2, kCodes = 1 << kWidth;
  constexpr int kLow = kWidth == 3 ? 8 : 16, kHigh = kWidth == 1 ? 1 : kLow;
  const Run& r = shared.run;
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32, t = lane % 4;
  const int table = warp % kTables, pair = table / kSets;
  const int64_t group = r.first_group + table % kSets * kSetGroups + lane / 4;
  float low[kLow] = {};
  Column<kWidth> above[2] = {};
  if (group < r.group_end) {
    const uint8_t* codebooks = reinterpret_cast<const uint8_t*>(&h) + tables_offset(h, kWidth, r.segment, group);
    float x[4];
    load_x(h, call, kWidth, group, t, x);
    if constexpr (kWidth > 2) {
      products_of<kWidth>(codebooks, t + 8 * pair, pair == 0 ? x[0] : x[2], low);
      above[0].table.load(codebooks, t + 8 * pair + 4);
      above[0].x = pair == 0 ? x[1] : x[3];
    } else {
      float products[2][kCodes];
      products_of<kWidth>(codebooks, t, x[0], products[0]);
      products_of<kWidth>(codebooks, t + 4, x[1], products[1]);
      unrolled<kLow>([&](int i) { low[i] = products[0][i % kCodes] + products[1][i / kCodes % kCodes]; });
      if constexpr (kWidth == 1) {
        products_of<kWidth>(codebooks, t + 8, x[2], products[0]);
        products_of<kWidth>(codebooks, t + 12, x[3], products[1]);
        unrolled<kLow>([&](int i) { low[i] += products[0][i / 4 % 2] + products[1][i / 8]; });
      } else {
        unrolled<2>([&](int i) {
          above[i].table.load(codebooks, t + 8 + 4 * i);
          above[i].x = x[2 + i];
        });
      }
    }
  }
  auto* bank = reinterpret_cast<float*>(shared.tables[table]) + lane;
  for (int high = warp / kTables; high < kHigh; high += kWarpsPerTable) {
    float more = 0.0f;
    if constexpr (kWidth == 2) more = above[0].product(high % 4) + above[1].product(high / 4);
    if constexpr (kWidth > 2) more = above[0].product(high);
    unrolled<kLow>([&](int i) { bank[(high * 16 + i) * 32] = low[i] + more; });
  }
}

// Eight sums of every lane, added over the lanes: lane l gets sum l / 4.
PYLLMQ_DEVICE float reduce(float (&sums)[kStripRows], int lane) {
  PYLLMQ_UNROLL
  for (int kept = 4; kept >= 1; kept /= 2) {
    const bool upper = lane & 4 * kept;
    PYLLMQ_UNROLL
    for (int i = 0; i < kept; ++i) {
      const float keep = upper ? sums[i + kept] : sums[i], give = upper ? sums[i] : sums[i + kept];
      sums[i] = keep + ptx::shuffle_xor(give, 4 * kept);
    }
  }
  sums[0] += ptx::shuffle_xor(sums[0], 2);
  return sums[0] + ptx::shuffle_xor(sums[0], 1);
}

// A lane has the sum of one row, nibble lane / 4 of strip lane % 4 of the step. Adds row scale and this unit's share of the
// outliers; if this warp is the last at this step, then all units' sums in order.
PYLLMQ_DEVICE void finish_step(const LayoutHeader& h, const Arguments& a, Shared& shared, int step, float sum) {
  const Run& r = shared.run;
  const LinearCall& call = a.call;
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32, nibble = lane / 4;
  const int tile = step * a.step_strips / kStrips, strip = step * a.step_strips % kStrips + lane % 4;
  const int in_tile = row_of_nibble(r.width, nibble, strip);
  const int tile_row = r.row_begin + (tile - r.tile_begin) * kTileRows, row = tile_row + in_tile;
  const bool here = lane % 4 < a.step_strips && row < r.row_end;
  // In a whole tile the sums of a step lie side by side; in one that is cut off, such an index could leave the tile.
  const int64_t at = tile_row + kTileRows <= r.row_end ? tile_row + strip * kStripRows + in_tile / 16 * 2 + in_tile % 2 : row;

  if (here) {
    if (h.row_scale_offset != 0) sum *= ptx::fp16_to_fp32(section<uint16_t>(h, h.row_scale_offset)[row]);
    if (h.outliers != 0) sum += outlier_sum(h, call, 0, r.panel_begin, r.panel_end, tile, in_tile);
    call.partials[r.unit * call.rows + at] = sum;
  }
  ptx::fence();
  ptx::sync_warp();
  // The first lane's row is the step's first: if it is beyond the segment, so are the others.
  if (lane == 0) shared.arrived[warp] = here ? ptx::count_to(call.counters + row, static_cast<uint32_t>(r.units - 1)) : 0;
  ptx::sync_warp();
  const bool last = shared.arrived[warp] == r.units - 1;
  ptx::sync_warp();
  if (!last || !here) return;
  ptx::fence();
  sum = 0.0f;
  for (int64_t unit = 0; unit < r.units; ++unit) sum += ptx::load_l2(call.partials + unit * call.rows + at);
  store_y(call, 0, row, sum);
}

// Every warp's steps; add_strip(step, i, sums) adds the products of a step's i-th strip to eight sums per lane.
template <class AddStrip>
PYLLMQ_DEVICE void run_steps(const LayoutHeader& h, const Arguments& a, Shared& shared, const AddStrip& add_strip) {
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  for (int step = shared.run.step_begin + warp; step < shared.run.step_end; step += kWarps) {
    float mine = 0.0f;
    for (int i = 0; i < a.step_strips; ++i) {
      float sums[kStripRows] = {};
      add_strip(step, i, sums);
      const float sum = reduce(sums, lane);
      if (lane % 4 == i) mine = sum;
    }
    finish_step(h, a, shared, step, mine);
  }
}

template <int kWidth>
PYLLMQ_DEVICE void run_narrow(const LayoutHeader& h, const Arguments& a, Shared& shared) {
  constexpr int kSets = kWidth <= 2 ? 4 : 2;
  const Run& r = shared.run;
  const int lane = ptx::thread() % 32;
  uint32_t next[kSets][kWidth];
  const uint8_t* strip_words = nullptr;  // of the unit's first group
  int group_words[kSets] = {};           // bytes from there to this lane's group
  // Without branches: after the last step and beyond the last group something else is loaded. The first is not used, and
  // what the second selects is in a table of zeros.
  const auto seek = [&](int step) {
    const int strip = (step < r.step_end ? step : r.step_end - 1) * a.step_strips;
    const TileCodes codes = tile_codes(h, r, kWidth, strip / kStrips);
    strip_words = codes.first + int64_t{r.first_group} * codes.group_bytes + word_offset<kWidth>(strip % kStrips * 4 + lane % 4);
    unrolled<kSets>([&](int set) {
      const int group = set * kSetGroups + lane / 4;
      group_words[set] = group < r.group_end - r.first_group ? group * codes.group_bytes : 0;
    });
  };
  const auto load = [&] { unrolled<kSets>([&](int set) { load_codes<kWidth>(strip_words + group_words[set], next[set]); }); };
  build_tables<kWidth>(h, a.call, shared);
  seek(r.step_begin + ptx::thread() / 32);
  load();
  ptx::sync_block();
  const ptx::SharedAddress bank = ptx::shared_address(shared.tables) + lane * 4;
  run_steps(h, a, shared, [&](int step, int i, float (&sums)[kStripRows]) {
    uint32_t words[kSets][kWidth];
    unrolled<kSets, kWidth>([&](int set, int j) { words[set][j] = next[set][j]; });
    if (i + 1 < a.step_strips)
      strip_words += word_offset<kWidth>(4);
    else
      seek(step + kWarps);
    load();
    uint32_t halves[kSets][4];
    unrolled<kSets>([&](int set) { index_halves<kWidth>(words[set], halves[set]); });
    add_lookups<0>(bank, halves[0][0], halves[0][1], sums);
    add_lookups<1>(bank, halves[1][0], halves[1][1], sums);
    constexpr int kPair = kSets == 4 ? 0 : 2;  // tables 2 and 3: of two more sets, or of the other two columns
    add_lookups<2>(bank, halves[2 % kSets][kPair], halves[2 % kSets][kPair + 1], sums);
    add_lookups<3>(bank, halves[3 % kSets][kPair], halves[3 % kSets][kPair + 1], sums);
  });
}

// Widths 5..8: each weight from its codebook in global memory, times x.
template <int kWidth>
PYLLMQ_DEVICE void run_wide(const LayoutHeader& h, const Arguments& a, Shared& shared) {
  const Run& r = shared.run;
  const int lane = ptx::thread() % 32, t = lane % 4;
  run_steps(h, a, shared, [&](int step, int i, float (&sums)[kStripRows]) {
    const int strip = step * a.step_strips + i, layout_lane = strip % kStrips * 4 + t;
    const TileCodes codes = tile_codes(h, r, kWidth, strip / kStrips);
    for (int set = 0; set < unit_sets(kWidth); ++set) {
      const int64_t group = r.first_group + set * kSetGroups + lane / 4;
      if (group >= r.group_end) continue;
      const uint8_t* words = codes.first + group * codes.group_bytes;
      const auto* codebooks =
          reinterpret_cast<const uint16_t*>(reinterpret_cast<const uint8_t*>(&h) + tables_offset(h, kWidth, r.segment, group));
      float x[4];
      load_x(h, a.call, kWidth, group, t, x);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        uint32_t low[2], high[2], pairs[4];
        column_codes<4>(words, layout_lane, half, low);
        column_codes<kWidth - 4>(words + tile_bytes(4), layout_lane, half, high);
        unrolled<2>([&](int j) {
          MemoryTable<kWidth>{codebooks + ((t + 8 * half + 4 * j) << kWidth)}.decode(low[j], high[j], pairs);
          unrolled<kStripRows>([&](int n) {
            sums[n] += (half == 0 ? x[j] : x[2 + j]) * ptx::fp16_to_fp32(static_cast<uint16_t>(pairs[n / 2] >> (16 * (n % 2))));
          });
        });
      }
    }
  });
}

PYLLMQ_KERNEL void __launch_bounds__(kThreads, 1) codebook_linear_tables_kernel(const Arguments a) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const LinearCall& call = a.call;
  const auto& h = *reinterpret_cast<const LayoutHeader*>(call.layout);
  if (!describes(h, call.layout_bytes, call.rows, call.columns))
    return store_nan(call.y, static_cast<DType>(call.dtype), call.rows, kThreads);
  Run& r = shared.run;
  if (ptx::thread() == 0) {
    r.units = 0;
    for (int width = 1; width <= 8; ++width) r.units += units_of(h, width);
    const int64_t positions = r.units * h.tiles * (kStrips / a.step_strips);
    r.position = ptx::block() * positions / ptx::blocks();
    r.end = (ptx::block() + 1) * positions / ptx::blocks();
  }
  for (;;) {
    ptx::sync_block();  // the run before is done with the tables
    if (r.position >= r.end) return;
    ptx::sync_block();  // all have read the position
    if (ptx::thread() == 0) describe(h, a.step_strips, r);
    ptx::sync_block();
    switch (r.width) {
      case 1: run_narrow<1>(h, a, shared); break;
      case 2: run_narrow<2>(h, a, shared); break;
      case 3: run_narrow<3>(h, a, shared); break;
      case 4: run_narrow<4>(h, a, shared); break;
      case 5: run_wide<5>(h, a, shared); break;
      case 6: run_wide<6>(h, a, shared); break;
      case 7: run_wide<7>(h, a, shared); break;
      default: run_wide<8>(h, a, shared); break;
    }
  }
}

}  // namespace

LinearRoom CodebookTables::find_room(int64_t, int) const {
  // How many units there are stands in the layout; at most each width pads a group and a unit of at least 16 groups.
  const int64_t groups = ceil_div(columns, kGroupColumns) + 8;
  return {(groups / 16 + 8) * rows, rows};
}

bool CodebookTables::fit() { return shared_bytes() >= static_cast<int64_t>(sizeof(Shared)); }

void CodebookTables::run(const LinearCall& call, uintptr_t stream) const {
  // Long steps share the work of finishing, short ones keep all warps busy: at least three steps for two warps.
  const int64_t blocks = multiprocessors(), strips = ceil_div(call.rows, kStripRows) * ceil_div(call.columns, 512);
  int step_strips = 4;
  while (step_strips > 1 && strips / step_strips * 2 < blocks * kWarps * 3) step_strips /= 2;
  const Arguments arguments{call, step_strips};
  allow_shared(reinterpret_cast<const void*>(codebook_linear_tables_kernel), sizeof(Shared));
  PYLLMQ_LAUNCH(codebook_linear_tables_kernel, blocks, kThreads, sizeof(Shared), stream, arguments);
  check_launch("codebook_linear_tables");
}

}  // namespace pyllmq::cuda

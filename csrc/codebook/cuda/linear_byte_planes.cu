// codebook_linear for one or two tokens of a weight of at most 4 bits: bytes of integers go from a table lookup straight into
// integer tensor cores, in one launch.
//
// A column's codebook is integers of 16 bits (layout.h), two planes of bytes. One permutation looks up a plane for 4 rows of a
// column, and what comes out *is* a register of the first operand of mma.m16n8k32: its four k-slots are the four rows, and the
// other operand is a byte of x in slot j for output j of four, and 0 elsewhere. x times the column's half span is an integer
// of 16 bits, too, whose two bytes take the other four outputs:
//
//           slots 4t..4t+3                          n = j      n = 4 + j
//   row g [ W[r0,k] W[r1,k] W[r2,k] W[r3,k] ]    slot 4t+j  [ low(x[k])   high(x[k]) ]    C[g, j] += W[rj,k] low(x[k]), ...
//
// One instruction is 64 rows x 8 columns of a plane. Nothing is transposed, no fp16 is made, and sums are exact in any order.
// 16 entries are two lookups of 8: a selector whose top bit is set gives a sign, for which layout.cpp made room, so codes
// select in the lower half as they are, in the upper one with that bit turned, and two instructions add them.
//
// A block of 8 warps takes 512 rows (256 for two tokens) and a split of K, of which each warp takes every 8th column group, and
// streams it through a ring in shared memory of its own. Codes are under way before x is read. A warp has its own unit of x, so
// that the largest product of at most 272 columns is 2^15 units: errors are 3e-5 of the result's size for normal x (`high`).
// The frame is that of streamed_linear.cuh.
#include <stdexcept>
#include <string>

#include "codebook/cuda/decode.cuh"
#include "codebook/cuda/stream.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kMostTokens = 2;
constexpr int kRingBytes = 9984;     // of one warp: 2 stages of 4 bits, 3 of less
constexpr int kMostSplitPanels = 8;  // what a unit of x spans, and x in shared memory
constexpr int kMostWarpGroups = kMostSplitPanels * kPanelGroups / kWarps + 1;
constexpr int kMostStages = 3;
constexpr int kMostX = 127 * 257;             // of x as an integer: either byte is at most 127
constexpr int kPartStride = kBlockRows + 16;  // floats: the two planes of x lie in different banks

struct Work {
  RowBlock block;
  int first_row, rows;  // within the row block
  Range panels;
  GroupRange groups[9];  // by width
};

// Where a warp's group is copied from, and how many bytes. Behind the last group all is 0.
struct Source {
  const uint8_t* planes;
  const uint8_t* codes;
  int plane_bytes, code_bytes, width;
  uint32_t first_slot;
};
struct alignas(16) Group {
  Source source;
  uint32_t x[kMostTokens][2][4];  // low bytes, high bytes: word t is columns t, t + 4, t + 8, t + 12
};

struct Shared {
  Item item;
  Work work;
  uint32_t arrived;
  float down[kWarps][kMostTokens][2];
  float middle[kWarps][kMostTokens];  // x times the middles of the codebooks
  Group groups[kWarps][kMostWarpGroups + kMostStages];
  alignas(16) uint8_t ring[kWarps][kRingBytes];
};
static_assert(sizeof(Shared) <= 99 << 10, "what a block gets on compute capability 8.6");
static_assert(kRingBytes >= 2 * kPartStride * 4, "a warp's sums take the place of its ring");

// Each lane describes one of its warp's groups; the widths' groups are dealt to the warps as one sequence. Returns how many.
template <int kWidest>
PYLLMQ_DEVICE int list_groups(const LayoutHeader& h, const Work& w, int warp, Group* listed) {
  const int lane = ptx::thread() % 32;
  const auto* base = reinterpret_cast<const uint8_t*>(&h);
  Source mine{};
  int groups = 0, before = 0;
  for (int width = 1; width <= kWidest; ++width) {
    const GroupRange range = w.groups[width];
    const int first = range.begin + ((warp - before) & (kWarps - 1));
    const int here = (range.end - first + kWarps - 1) / kWarps;  // the first is at most 7 beyond the end
    if (groups <= lane && lane < groups + here) {
      const int64_t group = first + int64_t{lane - groups} * kWarps;
      mine.planes = base + planes_offset(h, width, w.block.segment, group);
      mine.codes = base + codes_offset(h, width, w.block, group) + w.first_row / kTileRows * tile_bytes(width);
      mine.plane_bytes = plane_bytes(width);
      mine.code_bytes = (w.rows + kTileRows - 1) / kTileRows * static_cast<int>(tile_bytes(width));
      mine.width = width;
      mine.first_slot = static_cast<uint32_t>(h.first_slot[width] + group * kGroupColumns);
    }
    groups += here;
    before += range.end - range.begin;
  }
  if (lane < kMostWarpGroups + kMostStages) listed[lane].source = mine;
  ptx::sync_warp();
  return groups;
}

// A warp's x as integers, one group after the other; and what its sums need.
template <int kTokens>
PYLLMQ_DEVICE void stage_x(const LayoutHeader& h, const LinearCall& call, int groups, Shared& shared) {
  const int lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  const int32_t* column_of = section<int32_t>(h, h.columns_offset);
  const ColumnSpan* spans = section<ColumnSpan>(h, h.spans_offset) + shared.work.block.segment * h.slots;
  const auto for_each_slot = [&](const auto& body) {  // body(group, slot): two groups at a time
    for (int group = lane / kGroupColumns; group < groups; group += 2)
      body(group, int64_t{shared.groups[warp][group].source.first_slot} + lane % kGroupColumns);
  };
  for (int token = 0; token < kTokens; ++token) {
    const auto x_of = [&](int32_t column) {
      return load_element(call.x, static_cast<DType>(call.dtype), token * call.columns + column);
    };
    float largest = 0.0f, middle = 0.0f;
    for_each_slot([&](int, int64_t slot) {
      if (column_of[slot] < 0) return;
      const float x = x_of(column_of[slot]);
      largest = fmaxf(largest, ptx::magnitude(x * spans[slot].half));
      middle += x * spans[slot].middle;
    });
    for (int mask = 16; mask > 0; mask /= 2) {
      largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
      middle += ptx::shuffle_xor(middle, mask);
    }
    const Unit unit = unit_of(largest, kMostX);
    for_each_slot([&](int group, int64_t slot) {
      int x = 0;
      if (column_of[slot] >= 0) x = ptx::nearest_integer(x_of(column_of[slot]) * spans[slot].half * unit.up[0] * unit.up[1]);
      auto* bytes = reinterpret_cast<uint8_t*>(shared.groups[warp][group].x[token]) + lane % 4 * 4 + lane % kGroupColumns / 4;
      bytes[0] = static_cast<uint8_t>(x);
      bytes[kGroupColumns] = static_cast<uint8_t>((x + 128) >> 8);  // the low byte counts from -128 to 127
    });
    if (lane == 0) {
      shared.middle[warp][token] = middle;
      shared.down[warp][token][0] = unit.down[0] / kMostEntry;
      shared.down[warp][token][1] = unit.down[1];
    }
  }
}

// A column's integer codebook in registers.
template <int kWidth>
struct PlaneTable {
  static constexpr int kWords = plane_entries(kWidth) / 4;  // of a plane
  uint32_t word[2 * kWords];

  PYLLMQ_MEMBER void load(const uint8_t* group_planes, int column) {
    constexpr int kStep = kWords < 2 ? 2 : 4;
    PYLLMQ_UNROLL
    for (int i = 0; i < 2 * kWords; i += kStep) {
      const Words<kStep> loaded = load_words<kStep>(group_planes + (column * 2 * kWords + i) * 4);
      unrolled<kStep>([&](int k) { word[i + k] = loaded[k]; });
    }
  }

  // The bytes of a plane for the codes in the nibbles 0..3 and 4..7; of 4 bits those of the lower or the upper half.
  PYLLMQ_MEMBER void look_up(uint32_t codes, int plane, int half, uint32_t& first, uint32_t& second) const {
    const int from = plane * kWords + 2 * half, other = kWords == 1 ? from : from + 1;
    first = ptx::permute(word[from], word[other], codes);
    second = ptx::permute(word[from], word[other], kWidth < 3 ? codes >> 16 : ptx::shift_by_multiplying<16>(codes));
  }
};

// Of a warp: integer sums of its tiles by token and plane of W.
template <int kTokens>
using PlaneSums = int[kTokens][2][kBlockTiles / kTokens][4];

// Puts a byte of a word into slot lane / 4 % 4, and zeros into the others. Two tokens leave one register for a selector.
template <int kTokens>
struct Slot {
  static constexpr int kSelectors = kTokens == 1 ? 2 : 1;
  uint32_t selector[kSelectors];

  PYLLMQ_MEMBER Slot() {
    const int shift = ptx::thread() / 4 % 4 * 4;
    unrolled<kSelectors>([&](int i) { selector[i] = 0x4444u ^ static_cast<uint32_t>(4 ^ i) << shift; });
  }
  PYLLMQ_MEMBER uint32_t operator()(uint32_t word, int byte) const {
    return ptx::permute(word >> (byte / kSelectors * kSelectors * 8), 0, selector[byte % kSelectors]);
  }
};

// Adds a group: 16 columns in two halves.
template <int kWidth, int kTokens>
PYLLMQ_DEVICE void multiply(const uint8_t* planes, const uint8_t* codes, const uint32_t* lane_x, const Slot<kTokens>& slot,
                            PlaneSums<kTokens>& sums) {
  const int lane = ptx::thread() & 31;
  unrolled<2>([&](int half) {
    // With 16 entries in registers there is no room for the codes of both halves, which the compiler would load at once.
    if (kWidth == 4 && half == 1) ptx::sync_warp();
    PlaneTable<kWidth> table[2];
    unrolled<2>([&](int i) { table[i].load(planes, lane % 4 + 8 * half + 4 * i); });
    uint32_t x[kTokens][2];
    unrolled<kTokens, 2>([&](int token, int i) { x[token][i] = slot(lane_x[8 * token], 2 * half + i); });
    unrolled<kBlockTiles / kTokens>([&](int tile) {
      uint32_t pair[2];
      column_codes<kWidth>(codes + tile * tile_bytes(kWidth), lane, half, pair);
      unrolled<kWidth == 4 ? 2 : 1, 2>([&](int upper, int plane) {
        uint32_t bytes[4];
        unrolled<2>([&](int i) {
          const uint32_t selectors = upper ? pair[i] ^ 0x88888888u : pair[i];
          table[i].look_up(selectors, plane, upper, bytes[2 * i], bytes[2 * i + 1]);
        });
        unrolled<kTokens>([&](int token) { ptx::mma_m16n8k32(sums[token][plane][tile], bytes, x[token]); });
      });
    });
  });
}

// A warp's ring of stages. All widths' groups pass through it as one sequence, so that it never runs dry.
template <int kWidest, int kTokens>
struct Ring {
  static constexpr int kCodeBytes = kBlockTiles / kTokens * kTileRows * kGroupColumns / 8 * kWidest;
  static constexpr int kPlaneBytes = plane_bytes(kWidest);
  static constexpr int kStageBytes = kPlaneBytes + kCodeBytes;
  static constexpr int kFit = kRingBytes / kStageBytes;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static_assert(kStages >= 2, "one stage is read while another is filled");

  // Codes are requested by so many bytes at a time; what is read in vain belongs to other groups.
  static constexpr int kChunk = kCodeBytes % 2048 == 0 ? 2048 : kCodeBytes % 1024 == 0 ? 1024 : 512;
  static_assert(kChunk <= kReadBeyond);

  const uint8_t* const stages;
  const Group* current;
  const int at = (ptx::thread() & 31) * 16;  // of a lane's copies
  const ptx::SharedAddress lane_stages = ptx::shared_address(stages) + at;
  const int lane_x = (ptx::thread() & 16) | (ptx::thread() & 3) * 4;  // bytes
  const Slot<kTokens> slot;
  int used = 0, done = (kStages - 1) * kStageBytes;  // offsets of stages: the one that is read, the one before

  PYLLMQ_MEMBER void begin() {
    for (int ahead = 0; ahead < kStages - 1; ++ahead) fetch(current[ahead].source, ahead * kStageBytes);
  }

  // Without branches: what is not there has no bytes.
  PYLLMQ_MEMBER void fetch(const Source& from, int stage) {
    const ptx::SharedAddress to = lane_stages + stage;
    const int left = from.code_bytes - at;
    const bool planes_wanted = at < from.plane_bytes;
    const uint8_t* const codes = from.codes + static_cast<uint32_t>(at) + kCodeBytes / 2;  // offsets are 12 bits with a sign
    ptx::copy_async_16_if<0, 0>(planes_wanted, to, from.planes + static_cast<uint32_t>(at));
    copy_codes<0>(left, to, codes);
    ptx::commit_async();
  }
  template <int kFirst>
  PYLLMQ_MEMBER void copy_codes(int left, ptx::SharedAddress to, const uint8_t* middle) {
    if constexpr (kFirst < kCodeBytes) {
      const bool wanted = left > kFirst / kChunk * kChunk;
      ptx::copy_async_16_if<kPlaneBytes + kFirst, kFirst - kCodeBytes / 2, true>(wanted, to, middle);
      copy_codes<kFirst + 512>(left, to, middle);
    }
  }

  PYLLMQ_MEMBER void advance() {
    if constexpr (kStages == 2) {
      used = kStageBytes - used;
    } else {
      done = used;
      used = used == (kStages - 1) * kStageBytes ? 0 : used + kStageBytes;
    }
  }

  // Adds the groups of one width, which are the next ones.
  template <int kWidth>
  PYLLMQ_MEMBER void accumulate(PlaneSums<kTokens>& sums) {
    if constexpr (kWidth <= kWidest) {
#pragma unroll 1
      for (; current->source.width == kWidth; ++current) {
        ptx::wait_async<kStages - 2>();
        ptx::sync_warp();  // all lanes' copies are there, and all are done with the stage before, which is filled next
        fetch(current[kStages - 1].source, kStages == 2 ? kStageBytes - used : done);
        const auto* lane_words = reinterpret_cast<const uint8_t*>(current->x) + lane_x;
        multiply<kWidth, kTokens>(stages + used, stages + used + kPlaneBytes, reinterpret_cast<const uint32_t*>(lane_words), slot,
                                  sums);
        advance();
      }
    }
  }
};

// A warp's sums into its ring, without units: [plane of x][token, row].
template <int kTokens>
PYLLMQ_DEVICE void store_sums(const PlaneSums<kTokens>& sums, float* part) {
  const int lane = ptx::thread() % 32, g = lane / 4, t = lane % 4;
  constexpr int kTiles = kBlockTiles / kTokens;
  part += t / 2 * kPartStride;
  unrolled<kTokens, kTiles>([&](int token, int tile) {
    unrolled<4>([&](int e) {
      // Output j of four is nibble j of a word, and those of register 2, 3 are nibbles 4..7.
      const int row = 16 * ((e >> 1) + 2 * (e & 1)) + 2 * g + t % 2;
      const float low = static_cast<float>(sums[token][0][tile][e]), high = static_cast<float>(sums[token][1][tile][e]);
      part[(token * kTiles + tile) * kTileRows + row] = high * 256.0f + low;
    });
  });
}

template <int kWidest, int kTokens>
struct OneOrTwoTokens : CodebookStream<kBlockRows / kTokens, Shared> {
  using Base = CodebookStream<kBlockRows / kTokens, Shared>;
  using Base::a, Base::h, Base::shared;

  PYLLMQ_MEMBER static bool serves(const LayoutHeader& h, const StreamArguments& a) {
    return Base::serves(h, a) && h.widest <= kWidest;
  }

  PYLLMQ_MEMBER void multiply() const {
    const int warp = ptx::thread() / 32;
    const int groups = list_groups<kWidest>(h, shared.work, warp, shared.groups[warp]);
    Ring<kWidest, kTokens> ring{shared.ring[warp], shared.groups[warp]};
    ring.begin();
    ptx::wait_for_previous();
    stage_x<kTokens>(h, a.call, groups, shared);
    PlaneSums<kTokens> sums = {};
    ring.template accumulate<1>(sums);
    ring.template accumulate<2>(sums);
    ring.template accumulate<3>(sums);
    ring.template accumulate<4>(sums);
    ptx::wait_async<0>();  // for groups without copies
    ptx::sync_warp();      // the ring is free
    store_sums<kTokens>(sums, reinterpret_cast<float*>(shared.ring[warp]));
  }

  PYLLMQ_MEMBER float sum(int token, int row) const {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      const float* part = part_of(warp, token, row);
      const float* down = shared.down[warp][token];
      sum += (part[kPartStride] * 256.0f + part[0]) * down[0] * down[1] + shared.middle[warp][token];
    }
    return Base::finished(token, row, sum);
  }
  PYLLMQ_MEMBER float* place(int token, int row) const { return part_of(0, token, row); }

 private:
  PYLLMQ_MEMBER float* part_of(int warp, int token, int row) const {
    return reinterpret_cast<float*>(shared.ring[warp]) + token * (kBlockRows / kTokens) + row;
  }
};

template <int kWidest, int kTokens>
PYLLMQ_KERNEL void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    codebook_linear_byte_planes_kernel(const StreamArguments a) {
  run_items<OneOrTwoTokens<kWidest, kTokens>>(a, kThreads);
}

LinearPlan plan_linear(int64_t rows, int64_t columns, int64_t tokens) {
  LinearPlan plan{};
  plan.set_tokens(tokens, kMostTokens);
  plan.token_tiles = static_cast<int>(tokens);
  plan.threads = kThreads;
  plan.shared_bytes = sizeof(Shared);
  plan.slots = int64_t{multiprocessors()} * kBlocksPerMultiprocessor;
  plan.row_parts = ceil_div(rows, kBlockRows / tokens);
  // In panels of work; beginning and ending an item cost as much as one.
  plan.set_splits(panels_of(columns), ceil_div(most_panels(columns, kMostPlaneBits), kMostSplitPanels), 1,
                  [](int64_t panels) { return panels; });
  return plan;
}

template <int kTokens>
auto kernel_for(int64_t widest) {
  if (widest <= 2) return codebook_linear_byte_planes_kernel<2, kTokens>;
  return widest == 3 ? codebook_linear_byte_planes_kernel<3, kTokens> : codebook_linear_byte_planes_kernel<4, kTokens>;
}

}  // namespace

CodebookBytePlanes::CodebookBytePlanes(const uint8_t* layout, int64_t layout_bytes, int64_t rows, int64_t columns, int64_t widest)
    : CodebookOperand(layout, layout_bytes, rows, columns), widest_(widest) {
  if (widest < 1 || widest > kMostPlaneBits)
    throw std::invalid_argument("byte planes are made for weights of 1 to 4 bits, this one has columns of " +
                                std::to_string(widest) + "; bind it as a CodebookOperand");
}

int64_t CodebookBytePlanes::find_room(int64_t tokens, int) const {
  return plan_linear(rows, columns, tokens).partials(tokens, rows);
}

void CodebookBytePlanes::run(const LinearCall& call, uintptr_t stream) const {
  if (call.tokens > kMostTokens)
    throw std::invalid_argument("byte planes serve one or two tokens, here " + std::to_string(call.tokens));
  const LinearPlan plan = plan_linear(rows, columns, call.tokens);
  launch_items("codebook_linear_byte_planes", call.tokens == 1 ? kernel_for<1>(widest_) : kernel_for<2>(widest_), plan,
               plan.arguments(call), stream);
}

}  // namespace pyllmq::cuda

// The frame of the kernels that stream a packed weight for few tokens, each byte of it once for the tokens of a block: what a
// block works on, x in its order, the sums of its warps, y, the plan and the launch.
//
// An item is some rows, some tokens and a split of K; blocks take items in turn. A format plugs in what one block does with one,
// a class with
//
//   Header, Shared       of its layout; its shared memory, with `Item item` and `uint32_t arrived`
//   kBf16                whether weights are bf16, and x meets them so
//   serves(h, a)         whether the layout is what the launch was made for, else y is NaN
//   row_parts(h)         into how many the rows are cut
//   tiles(h), tile()     of 64 rows: the weight's, and the item's first
//   take(item)           says what `item` is: its rows; called by threads 0..8, of which the first keeps it
//   multiply()           asks for the first weights, then wait_for_previous, then reads x; the sums of all warps in shared memory
//   sum(token, row)      y without bias of this split, after multiply and a barrier; of a row token by token
//   place(token, row)    of shared memory, that only this sum reads: where it is left for the other blocks of a cluster
//
// A launch begins early (code for compute capability 9.0), so a kernel touches behind wait_for_previous alone what others may
// write, x, and what others may still read or write where y, sums and counters are to stand. The wait is for the launch before,
// and through its own wait for all before that one. Who follows and is not launched so begins when all is over, whoever let it
// begin. Weights are read before the wait: what writes a layout must be a copy, or be over.
#pragma once
#include <algorithm>
#include <limits>

#include "codebook/cuda/fp16_planes.cuh"
#include "linear_outputs.cuh"
#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "split_of_k.cuh"

namespace pyllmq::cuda {

constexpr int64_t kMostClusterBlocks = 8;  // that every device with clusters serves
constexpr int64_t kMostXBytes = 24 << 10;  // of shared memory: one block fits on compute capability 8.6 (99 KiB), two on 9.0

// How many columns of the product a token is: fp16 weights meet fp32 x as the sum of two fp16 numbers (22 bits), and bf16 x as
// fp16, by a power of two per token and block that brings its largest value to 2^14..2^15: exact (what falls below 2^-24 is
// 2^-39 of the largest). bf16 weights meet fp16 x as the sum of two, fp32 x as the sum of three bf16 numbers, exactly.
PYLLMQ_HOST_DEVICE int planes_of(bool bf16_weights, DType x) {
  if (x == DType::fp32) return bf16_weights ? 3 : 2;
  return bf16_weights && x == DType::fp16 ? 2 : 1;
}

struct StreamArguments {  // by value to a kernel
  LinearCall call;
  int tokens_per_block, token_blocks, splits;
  bool is_cluster;  // whether blocks are the splits of a cluster, which has a part of y
};

// What one block computes: the same for all threads, so it lies in shared memory, and sums have the registers.
struct Item {
  int number, row_part, token_block, split;
  int tokens, planes, rows;  // no rows: nothing to do
  int64_t token_begin, row_begin;
  PYLLMQ_MEMBER int columns() const { return tokens * planes; }  // of the product
};

// Items that share a split follow each other, since they read the same x and codebooks. 32 bits and one division, as one thread
// does it while the block waits: a division of 64 bits would take ten times longer.
PYLLMQ_DEVICE Item item_of(const StreamArguments& a, int row_parts, int number) {
  Item item{};
  item.number = number;
  const int by = a.is_cluster ? a.splits : row_parts * a.token_blocks, quotient = number / by, rest = number % by;
  item.split = a.is_cluster ? rest : quotient;
  item.row_part = a.is_cluster ? quotient : rest;
  for (; item.row_part >= row_parts; item.row_part -= row_parts) ++item.token_block;  // at most 15 times
  item.token_begin = int64_t{item.token_block} * a.tokens_per_block;
  const int64_t left = a.call.tokens - item.token_begin;
  item.tokens = static_cast<int>(left < a.tokens_per_block ? left : a.tokens_per_block);
  return item;
}

// The items of a block, one after the other.
template <class Stream, class Arguments>
PYLLMQ_DEVICE void run_items(const Arguments& a, int threads) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<typename Stream::Shared*>(memory);
  const auto& h = *reinterpret_cast<const typename Stream::Header*>(a.call.layout);
  ptx::let_next_begin();
  if (!Stream::serves(h, a)) {
    ptx::wait_for_previous();
    return store_nan(a.call.y, static_cast<DType>(a.call.dtype), a.call.tokens * a.call.rows, threads);
  }
  const Item& w = shared.item;
  // What is the same for all threads is looked up again: a register of each is what the loops lack.
  for (auto number = static_cast<int>(ptx::block()); number < Stream::row_parts(h) * a.token_blocks * a.splits;
       number = w.number + static_cast<int>(ptx::blocks())) {
    ptx::sync_block();  // the item before is done with shared memory
    Stream stream{a, h, shared};
    if (ptx::thread() <= 8) {
      Item item = item_of(a, Stream::row_parts(h), number);
      item.planes = planes_of(Stream::kBf16, static_cast<DType>(a.call.dtype));
      stream.take(item);
      if (ptx::thread() == 0) shared.item = item;
    }
    ptx::sync_block();
    if (w.rows <= 0) continue;

    stream.multiply();
    ptx::sync_block();
    const auto for_each_output = [&](const auto& body) {
      for (int row = ptx::thread(); row < w.rows; row += threads)
        for (int token = 0; token < w.tokens; ++token) body(token, row);
    };
    uint32_t* counter = counter_of(a.call, h, w.token_block, Stream::tiles(h), stream.tile());
    store_outputs(
        a.call, a.splits, w.split, counter, w.token_begin, w.row_begin, shared.arrived, for_each_output,
        [&](int token, int row) { return stream.sum(token, row); }, a.is_cluster,
        [&](int token, int row) { return stream.place(token, row); });
  }
}

// ---- x as 16-bit floats ------------------------------------------------------------------------------------------------------

template <int kMostColumns, int kWarps>
struct XScales {
  float largest[kMostColumns][kWarps];
  float unscale[kMostColumns];
};

// x of a block's columns, in the order of its groups, as planes in shared memory. for_each_slot(body) calls body(slot, column)
// for what is this thread's, columns below 0 being padding; place(slot, column of the product) is where a number goes.
template <bool kBf16, int kMostColumns, int kWarps, class ForEachSlot, class Place>
PYLLMQ_DEVICE void stage_x(const LinearCall& call, const Item& item, int warps, XScales<kMostColumns, kWarps>& scales,
                           uint16_t* x_shared, const ForEachSlot& for_each_slot, const Place& place) {
  const auto dtype = static_cast<DType>(call.dtype);
  const auto x_of = [&](int token, int64_t column) {
    return column < 0 ? 0.0f : load_element(call.x, dtype, (item.token_begin + token) * call.columns + column);
  };
  const bool scaled = !kBf16 && dtype != DType::fp16;
  ptx::wait_for_previous();
  for (int token = 0; scaled && token < item.tokens; ++token) {
    float largest = 0.0f;
    for_each_slot([&](int, int64_t column) { largest = fmaxf(largest, fabsf(x_of(token, column))); });
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
    scales.largest[token][ptx::thread() / 32] = largest;
  }
  ptx::sync_block();  // the largest of each warp is there

  for (int token = 0; token < item.tokens; ++token) {
    float largest = 0.0f;
    for (int warp = 0; scaled && warp < warps; ++warp) largest = fmaxf(largest, scales.largest[token][warp]);
    const int exponent = scale_exponent(largest);
    const float scale = power_of_two(exponent);
    if (ptx::thread() == 0) scales.unscale[token] = power_of_two(-exponent);
    for_each_slot([&](int slot, int64_t column) {
      float rest = scale * x_of(token, column);
      for (int plane = 0; plane < item.planes; ++plane) {
        const uint16_t half = kBf16 ? ptx::fp32_to_bf16(rest) : ptx::fp32_to_fp16(rest);
        x_shared[place(slot, token * item.planes + plane)] = half;
        rest = kBf16 ? rest - bf16_to_fp32(half) : (rest - ptx::fp16_to_fp32(half)) * kLowPlane;
      }
    });
  }
  ptx::sync_block();  // x is there
}

// A token's sum: of_warps(column of the product) gives that of all warps, in order.
template <bool kBf16, class Scales, class OfWarps>
PYLLMQ_DEVICE float sum_of_planes(const Item& item, const Scales& scales, int token, const OfWarps& of_warps) {
  float sum = 0.0f, weight = 1.0f;
  for (int plane = 0; plane < item.planes; ++plane) {
    sum += of_warps(token * item.planes + plane) * weight;
    if (!kBf16) weight *= 1.0f / kLowPlane;
  }
  return sum * scales.unscale[token];
}

// ---- the host ----------------------------------------------------------------------------------------------------------------

// How a call is cut, by its shape alone: nothing on the device is read.
struct LinearPlan {
  int token_tiles = 1;  // columns of a block's product, in units of the format's
  int64_t tokens_per_block = 0, token_blocks = 1;
  int64_t row_parts = 0;  // at least: segments may make more of them
  int64_t splits = 1;     // of K
  bool is_cluster = false;
  int64_t all = multiprocessors(), slots = 0;  // of the device; blocks that run at once
  int64_t x_bytes = 0, shared_bytes = 0;
  int threads = 0;

  int64_t parts() const { return row_parts * token_blocks; }  // of y
  int64_t grid() const { return is_cluster ? std::min(clusters(splits), parts()) * splits : std::min(slots, parts() * splits); }
  // Of so many blocks, that run at once: one lies within 16 multiprocessors, as H100 and H200 are taken to have in a group at
  // least. Where it has fewer, some begin a round later.
  int64_t clusters(int64_t blocks) const {
    const int64_t group = std::min<int64_t>(all, 16);
    return all / group * (slots / all * group / blocks);
  }
  // Elements of the workspace.
  int64_t partials(int64_t tokens, int64_t rows) const { return splits > 1 && !is_cluster ? splits * tokens * rows : 0; }
  StreamArguments arguments(const LinearCall& call) const {
    return {call, static_cast<int>(tokens_per_block), static_cast<int>(token_blocks), static_cast<int>(splits), is_cluster};
  }

  void set_tokens(int64_t tokens, int64_t most) {
    tokens_per_block = std::min(tokens, most);
    token_blocks = ceil_div(tokens, tokens_per_block);
  }
  // Cuts K, of so many units, into `least` splits or more, so that the rounds of blocks take the least time: time(units) is that
  // of an item, and begins_and_ends what comes beside, half of it to share outputs by counters (predicted). Up to 8 splits may be
  // a cluster, or all of K one.
  template <class Time>
  void set_splits(int64_t units, int64_t least, int64_t begins_and_ends, const Time& time) {
    const int64_t most_of_cluster = code_version() >= 90 ? kMostClusterBlocks : 1;
    int64_t best = std::numeric_limits<int64_t>::max();
    const auto consider = [&](int64_t n, bool together, int64_t rounds) {
      const int64_t needed = rounds * (2 * time(ceil_div(units, n)) + (n == 1 || together ? 1 : 2) * begins_and_ends);
      if (needed >= best) return;
      best = needed;
      splits = n;
      is_cluster = together;
    };
    for (int64_t n = least; n <= std::max(least, std::min(units, least + slots)); ++n) {
      consider(n, false, ceil_div(parts() * n, slots));
      if (n > 1 && n <= most_of_cluster && clusters(n) > 0) consider(n, true, ceil_div(parts(), clusters(n)));
    }
  }
};

template <class Arguments>
void launch_items(const char* name, void (*kernel)(Arguments), const LinearPlan& plan, const Arguments& arguments,
                  uintptr_t stream) {
  const LinearCall& call = arguments.call;
  // Each item has at least one row.
  if (call.rows * plan.token_tiles * plan.token_blocks * plan.splits > std::numeric_limits<int32_t>::max())
    refuse_work(name, call);
  allow_shared(reinterpret_cast<const void*>(kernel), plan.shared_bytes);
  if (code_version() >= 90)
    PYLLMQ_LAUNCH_CLUSTERS(kernel, plan.is_cluster ? plan.splits : 1, plan.grid(), plan.threads, plan.shared_bytes, stream,
                           arguments);
  else
    PYLLMQ_LAUNCH(kernel, plan.grid(), plan.threads, plan.shared_bytes, stream, arguments);
  check_launch(name);
}

}  // namespace pyllmq::cuda

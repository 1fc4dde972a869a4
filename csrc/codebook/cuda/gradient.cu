// A block holds 32 columns of one width and a run of rows: a lane has a column, a warp every eighth row, and each thread its own
// sums in shared memory, so nothing is atomic. Sums of warps and of runs are added in order: the same call gives the same bits.
#include "codebook/cuda/gradient.h"

#include <algorithm>

#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps;
constexpr int kEntries = 32;       // of a codebook at a time: 32 KiB of sums; wider codes are gone through again
constexpr int64_t kRunRows = 256;  // at least, before a column's rows are split between blocks
constexpr int64_t kBlocksPerMultiprocessor = 4;
constexpr int64_t kMostBlocks = 1 << 16;

// What the bytes of a row's codes can hold; the last tile may turn out empty.
int64_t most_tiles(const GradientCall& call, int bits) {
  return call.codes[bits] ? ceil_div(call.code_bytes[bits] * 8 / bits, kLanes) : 0;
}

int64_t runs(const GradientCall& call) {
  int64_t tiles = 0;
  for (int bits = 1; bits <= 8; ++bits) tiles += most_tiles(call, bits);
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * multiprocessors(), std::max<int64_t>(tiles * call.segments, 1));
  return std::clamp<int64_t>(wanted, 1, ceil_div(call.rows, kRunRows));
}

PYLLMQ_DEVICE uint32_t code_at(const uint8_t* row, int64_t bit, int bits) {
  const int shift = static_cast<int>(bit % 8);
  uint32_t word = row[bit / 8];
  if (shift + bits > 8) word |= static_cast<uint32_t>(row[bit / 8 + 1]) << 8;
  return word >> shift & ((1u << bits) - 1);
}

PYLLMQ_KERNEL void __launch_bounds__(kThreads)
    codebook_gradient_kernel(const GradientCall call, int bits, int64_t tiles, int64_t runs, float* parts) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<float*>(memory);  // [warp][entry][lane]: the lanes of a warp meet 32 different banks
  const int lane = ptx::thread() % kLanes, warp = ptx::thread() / kLanes;
  float* sums = shared + warp * kEntries * kLanes + lane;
  const int64_t members = call.width_starts[bits] - call.width_starts[bits - 1];
  const int size = 1 << bits, pass_size = size < kEntries ? size : kEntries;
  for (int64_t item = ptx::block(); item < tiles * call.segments * runs; item += ptx::blocks()) {
    const int64_t slot = item % tiles * kLanes + lane, segment = item / tiles % call.segments, run = item / tiles / call.segments;
    const bool inside = slot < members;
    const int64_t column = inside ? call.sorted_columns[call.width_starts[bits - 1] + slot] : 0;
    const int64_t begin = call.segment_starts[segment], end = call.segment_starts[segment + 1];
    const int64_t rows_each = (end - begin + runs - 1) / runs;
    const int64_t first = begin + run * rows_each, last = first + rows_each < end ? first + rows_each : end;
    float* out = parts + (run * call.segments + segment) * call.entries + call.first_entry[column];
    for (int base = 0; base < size; base += pass_size) {
      for (int entry = 0; entry < pass_size; ++entry) sums[entry * kLanes] = 0;
      for (int64_t row = first + warp; inside && row < last; row += kWarps) {
        const int entry = static_cast<int>(code_at(call.codes[bits] + row * call.code_bytes[bits], slot * bits, bits)) - base;
        if (entry < 0 || entry >= pass_size) continue;
        float value = call.weight_gradient[row * call.columns + column];
        if (call.row_scale) value *= load_element(call.row_scale, static_cast<DType>(call.row_scale_dtype), row);
        sums[entry * kLanes] += value;
      }
      ptx::sync_block();
      for (int entry = warp; inside && entry < pass_size; entry += kWarps) {
        float sum = 0;
        for (int other = 0; other < kWarps; ++other) sum += shared[(other * kEntries + entry) * kLanes + lane];
        out[base + entry] = sum;
      }
      ptx::sync_block();  // before the sums are cleared
    }
  }
}

PYLLMQ_KERNEL void __launch_bounds__(kThreads) add_runs_kernel(const float* parts, float* gradient, int64_t runs, int64_t count) {
  for (int64_t i = ptx::block() * kThreads + ptx::thread(); i < count; i += ptx::blocks() * kThreads) {
    float sum = 0;
    for (int64_t run = 0; run < runs; ++run) sum += parts[run * count + i];
    gradient[i] = sum;
  }
}

}  // namespace

int64_t codebook_gradient_workspace(const GradientCall& call) {
  const int64_t count = runs(call);
  return count > 1 ? count * call.segments * call.entries : 0;
}

void codebook_gradient(const GradientCall& call, float* gradient, float* workspace, uintptr_t stream) {
  const int64_t run_count = runs(call);
  float* parts = run_count > 1 ? workspace : gradient;
  constexpr int64_t kShared = int64_t{kWarps} * kEntries * kLanes * sizeof(float);
  for (int bits = 1; bits <= 8; ++bits) {
    const int64_t tiles = most_tiles(call, bits);
    if (tiles == 0) continue;
    const int64_t grid = std::min(tiles * call.segments * run_count, kMostBlocks);
    PYLLMQ_LAUNCH(codebook_gradient_kernel, grid, kThreads, kShared, stream, call, bits, tiles, run_count, parts);
    check_launch("codebook_gradient");
  }
  if (run_count == 1) return;
  const int64_t count = call.segments * call.entries;
  PYLLMQ_LAUNCH(add_runs_kernel, std::min(ceil_div(count, kThreads), kMostBlocks), kThreads, 0, stream, parts, gradient,
                run_count, count);
  check_launch("codebook_gradient sums");
}

}  // namespace pyllmq::cuda

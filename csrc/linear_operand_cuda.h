// A packed weight of any format on the device, bound once: where its layout lies and what a launch must know of it without
// waiting for it. The object does not own the layout: whoever makes it keeps that memory alive and in its place. Pointers and
// integers only; all pointers are of the current device.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runtime/cuda/runtime.h"

namespace pyllmq::cuda {

constexpr int64_t kAlignment = 128, kReadAlignment = 16;  // of a layout's arrays, and of what a kernel is given

// Blocks that share outputs count themselves in the layout, which ends with words that are zero between calls: nothing has to be
// cleared before a call, and nothing lives beside the operand. Calls of one weight on different streams may overlap, so each
// stream has a set of counters. Graphs share the first set: those that call the same weight must not overlap.
constexpr int kCounterSets = 4;
constexpr int64_t kMostLinearTokens = 64;  // of a call, for most kernels
constexpr int64_t kTokenBlocks = 16;       // that 64 tokens make at most: 4 of them to a block
inline int64_t counter_bytes(int64_t tiles) { return 4 * kCounterSets * kTokenBlocks * tiles; }  // tiles of at most 64 rows

struct LinearCall {  // by value to a kernel; what has a default is filled in by the operand
  const uint8_t* layout = nullptr;
  int64_t layout_bytes = 0;
  int64_t rows = 0, columns = 0, tokens;
  const void* x;
  int dtype;         // of x and y: 0 fp32, 1 bf16, 2 fp16
  const void* bias;  // or null
  int bias_dtype;
  void* y;
  float* partials;
  int counter_set = 0;
};

[[noreturn]] inline void refuse_work(const char* kernel, const LinearCall& call) {
  throw std::invalid_argument(std::string(kernel) + " of " + std::to_string(call.tokens) + " tokens by [" +
                              std::to_string(call.rows) + ", " + std::to_string(call.columns) +
                              "] has more than 2^31 pieces of work; give fewer tokens at a time");
}

class LinearOperand {
 public:
  virtual ~LinearOperand() = default;
  LinearOperand(const LinearOperand&) = delete;
  LinearOperand& operator=(const LinearOperand&) = delete;

  // Elements of call.partials, all overwritten. Depends on the device: it is asked for its multiprocessors, and once for each
  // number of tokens. Not for two threads at once.
  int64_t room(int64_t tokens, int dtype) {
    if (tokens > most_tokens())
      throw std::invalid_argument("linear of " + std::to_string(tokens) + " tokens; at most " + std::to_string(most_tokens()) +
                                  " at once: dequantize the weight for more");
    const auto found = rooms_.find({tokens, dtype});
    return found != rooms_.end() ? found->second : rooms_[{tokens, dtype}] = find_room(tokens, dtype);
  }
  // y [tokens, rows] = x [tokens, columns] W^T + bias. A layout that is not one of this shape gives NaN: what lies on the device
  // cannot be refused without waiting for it.
  void linear(LinearCall call, uintptr_t stream) {
    call.layout = layout;
    call.layout_bytes = layout_bytes;
    call.rows = rows;
    call.columns = columns;
    call.counter_set = is_captured(stream) ? 0 : counter_set_of(stream);
    if (call.tokens > 0) run(call, stream);
  }
  // weight [rows, columns] of dtype 0 fp32, 1 bf16, 2 fp16, or NaN as above.
  virtual void dequantize(void* weight, int dtype, uintptr_t stream) const = 0;

  const uint8_t* const layout;
  const int64_t layout_bytes, rows, columns;

 protected:
  LinearOperand(const uint8_t* layout, int64_t layout_bytes, int64_t header_bytes, int64_t rows, int64_t columns)
      : layout(layout), layout_bytes(layout_bytes), rows(rows), columns(columns) {
    if (layout_bytes < header_bytes)
      throw std::invalid_argument("the layout has " + std::to_string(layout_bytes) +
                                  " bytes, less than its header; pack the weight again");
    if (reinterpret_cast<uintptr_t>(layout) % kReadAlignment != 0)
      throw std::invalid_argument("the layout lies " + std::to_string(reinterpret_cast<uintptr_t>(layout) % kReadAlignment) +
                                  " bytes behind a multiple of 16, where no kernel can read it; give a copy of it (clone())");
  }

 private:
  virtual int64_t most_tokens() const { return kMostLinearTokens; }
  virtual int64_t find_room(int64_t tokens, int dtype) const = 0;
  virtual void run(const LinearCall& call, uintptr_t stream) const = 0;  // of at least one token

  // Of 1 and more. When a stream comes for which there is none, the device is waited for once, and all sets are free.
  int counter_set_of(uintptr_t stream) {
    auto found = std::find(streams_.begin(), streams_.end(), stream);
    if (found == streams_.end() && streams_.size() + 1 == kCounterSets) {
      wait_for_device();
      streams_.clear();
      found = streams_.end();
    }
    if (found == streams_.end()) found = streams_.insert(found, stream);
    return static_cast<int>(found - streams_.begin()) + 1;
  }

  std::map<std::pair<int64_t, int>, int64_t> rooms_;
  std::vector<uintptr_t> streams_;  // whose sets of counters are the second, the third, ...
};

}  // namespace pyllmq::cuda

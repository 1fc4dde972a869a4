// Counts in whole units, and where the arrays of a layout begin. `static` for the reason that half.h gives.
#pragma once
#include <cstdint>

namespace pyllmq {

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t rounded_up(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

// Arrays one after the other, each at a multiple of `alignment`.
struct Sections {
  int64_t end, alignment;

  int64_t operator()(int64_t bytes) {  // where the next array begins
    const int64_t begin = rounded_up(end, alignment);
    end = begin + bytes;
    return begin;
  }
};

}  // namespace pyllmq

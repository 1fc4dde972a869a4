// The inner step of the dynamic program: where the last cluster of the first `end` points begins, for one end or eight.
#pragma once

#include <cstdint>

#include "runtime/isa.h"

namespace pyllmq::cpu {

// The gain of a last cluster [at, end) is gain[at] + (sum[end] - sum[at])^2 / (mass[end] - mass[at]). With `inverse`,
// mass[i] = i and the quotient is a product by inverse[end - at] = 1 / (end - at); `mass` is not read then.
struct SplitTerms {
  const double* gain;  // best gains with one cluster fewer
  const double* sum;
  const double* mass;
  const double* inverse;  // or null
};

struct Split {
  double gain;
  int64_t at;
};

constexpr int kGroup = 8;

// Candidates are at = first .. last. The lowest one wins a tie, and all operations round alike (no fused multiply-add),
// so every instruction set returns the same bits.
struct SplitKernels {
  // first <= last < end
  Split (*one)(const SplitTerms& terms, int64_t end, int64_t first, int64_t last);
  // For the ends end .. end + 7, last < end. Behind the last end wanted the arrays are readable, whatever they hold.
  void (*group)(const SplitTerms& terms, int64_t end, int64_t first, int64_t last, double* gains, int64_t* ats);
};

template <Isa isa>
const SplitKernels& split_kernels();

}  // namespace pyllmq::cpu

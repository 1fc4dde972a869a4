#include "kmeans/cpu/codes.h"

namespace pyllmq::cpu {
namespace {

// `Bits` halving steps without a branch: codes are random, so that one would be mispredicted half the time.
template <int Bits>
void halve(const float* values, int64_t n, const float* thresholds, const uint8_t* code_of, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    int below = 0;
    for (int half = 1 << Bits >> 1; half > 0; half /= 2) below += values[i] > thresholds[below + half - 1] ? half : 0;
    codes[i] = code_of[below];
  }
}

}  // namespace

void codes_scalar(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of, uint8_t* codes) {
  using Halve = void (*)(const float*, int64_t, const float*, const uint8_t*, uint8_t*);
  constexpr Halve kHalve[9] = {halve<0>, halve<1>, halve<2>, halve<3>, halve<4>, halve<5>, halve<6>, halve<7>, halve<8>};
  kHalve[bits](values, n, thresholds, code_of, codes);
}

}  // namespace pyllmq::cpu

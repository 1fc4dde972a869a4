// Halving steps without a branch: codes are random, so that one would be mispredicted half the time. Up to 4 bits all thresholds
// are in registers.
#include "kmeans/cpu/codes.h"
#include "runtime/simd.h"

namespace pyllmq::cpu {
namespace {

template <class V, int Bits>
void halve(const float* values, int64_t n, const float* thresholds, const uint8_t* code_of, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += V::width) {
    const auto value = V::load_part(values + i, n - i, 0);
    auto below = V::index(0);
#pragma GCC unroll 8
    for (int half = 1 << Bits >> 1; half > 0; half /= 2) {
      const auto threshold = V::look_up(thresholds, V::plus(below, half - 1));
      below = V::add_where(V::above(value, threshold), below, half);
    }
    V::store_bytes(codes + i, n - i, below, code_of);
  }
}

void find_codes(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of, uint8_t* codes) {
  using Halve = void (*)(const float*, int64_t, const float*, const uint8_t*, uint8_t*);
  constexpr Halve kHalve[9] = {halve<V, 0>,      halve<V, 1>,      halve<V, 2>,      halve<V, 3>,     halve<V, 4>,
                               halve<Scalar, 5>, halve<Scalar, 6>, halve<Scalar, 7>, halve<Scalar, 8>};
  kHalve[bits](values, n, thresholds, code_of, codes);
}

}  // namespace

template <Isa isa>
CodeKernel code_kernel() {
  return find_codes;
}
template CodeKernel code_kernel<Isa::PYLLMQ_ISA>();

}  // namespace pyllmq::cpu

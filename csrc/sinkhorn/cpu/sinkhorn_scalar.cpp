#include <cmath>

#include "runtime/half.h"
#include "sinkhorn/cpu/doubly_stochastic_kernels.h"

namespace pyllmq::cpu {
namespace {

// A vector of one number.
struct Scalar {
  using R = float;
  using Half = Scalar;
  using Flag = bool;
  static constexpr int64_t width = 1;

  static R set(float x) { return x; }
  static R load(const float* from) { return *from; }
  static R load_part(const float* from, int64_t left, float missing) { return left > 0 ? *from : missing; }
  static void store(float* to, R x) { *to = x; }
  static void store_part(float* to, int64_t left, R x) {
    if (left > 0) *to = x;
  }
  static R add(R x, R y) { return x + y; }
  static R sub(R x, R y) { return x - y; }
  static R mul(R x, R y) { return x * y; }
  static R div(R x, R y) { return x / y; }
  static R fma(R x, R y, R z) { return x * y + z; }
  static R min(R x, R y) { return x < y ? x : y; }
  static R max(R x, R y) { return x > y ? x : y; }
  static R round(R x) { return std::nearbyint(x); }
  static R reciprocal(R x) { return 1 / x; }
  static R quotient(R x, R y) { return x / y; }
  static void split(R x, R& n, R& m) {
    int exponent = 0;
    m = std::frexp(x, &exponent);
    n = static_cast<float>(exponent);
    if (m < 0.70710678f) m *= 2, n -= 1;
  }
  static R scale2(R x, R n) { return n < -126 ? 0 : x * bits_float(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23); }
  static R exponent(R cost, double u, const double* v, double inverse) { return static_cast<float>((u + *v - cost) * inverse); }
  static Four sums(R s0, R s1, R s2, R s3) { return Four{s0, s1, s2, s3}; }
  static void transpose(R*) {}
  static void transpose_fours(R*) {}
  static float total(R x) { return x; }
  static float least(R x) { return x; }
  static float most(R x) { return x; }

  static Flag no_flag() { return false; }
  static Flag is_nan(R x) { return x != x; }
  static Flag above(R x, R y) { return x > y; }
  static Flag at_least(R x, R y) { return x >= y; }
  static Flag equal(R x, R y) { return x == y; }
  static Flag either(Flag x, Flag y) { return x || y; }
  static Flag both(Flag x, Flag y) { return x && y; }
  static R select(Flag flag, R yes, R no) { return flag ? yes : no; }
  static R zero_unless(Flag flag, R x) { return flag ? x : 0; }
  static bool any(Flag flag) { return flag; }
  static uint32_t bits(Flag flag) { return flag; }
};

}  // namespace

const SinkhornKernels kSinkhornScalar = sinkhorn_kernels_of<Scalar, Scalar>();

}  // namespace pyllmq::cpu

#include <cmath>

#include "decode_step/cpu/step_kernels_of.h"

namespace pyllmq::cpu {
namespace {

// A vector of one number.
struct Scalar {
  using R = float;
  using Flag = bool;
  static constexpr int64_t width = 1;

  static R set(float x) { return x; }
  static R load(const float* from) { return *from; }
  static R load_part(const float* from, int64_t, float) { return *from; }
  static void store(float* to, R x) { *to = x; }
  static void store_part(float* to, int64_t, R x) { *to = x; }
  static R add(R x, R y) { return x + y; }
  static R sub(R x, R y) { return x - y; }
  static R mul(R x, R y) { return x * y; }
  static R div(R x, R y) { return x / y; }
  static R fma(R x, R y, R z) { return x * y + z; }
  static R min(R x, R y) { return x < y ? x : y; }
  static R max(R x, R y) { return x > y ? x : y; }
  static R round(R x) { return std::nearbyint(x); }
  // x * 2^n; n NaN or out of range: any number
  static R scale2(R x, R n) {
    return n > -127 && n < 128 ? x * bits_float(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23) : x;
  }
  static float total(R x) { return x; }
  static Flag at_least(R x, R y) { return x >= y; }
  static Flag not_below(R x, R y) { return !(x < y); }
  static R zero_unless(Flag flag, R x) { return flag ? x : 0; }
  static Flag above(R x, R y) { return x > y; }
  static R select(Flag flag, R yes, R no) { return flag ? yes : no; }
};

}  // namespace

const StepKernels kStepScalar = step_kernels_of<Scalar>();

}  // namespace pyllmq::cpu

#include "sinkhorn/cpu/doubly_stochastic.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "sinkhorn/cpu/lane_groups.h"

namespace pyllmq::cpu {
namespace {

[[noreturn]] void refuse(const DoublyStochastic& call, int64_t first, int64_t lanes) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (int64_t q = first; q < first + lanes; ++q) {
    const float* logits = call.logits + q * call.n * call.m;
    const std::string where = "problem " + std::to_string(q) + " of the batch: ";
    float top = -infinity;
    for (int64_t e = 0; e < call.n * call.m; ++e) {
      if (!(logits[e] < infinity))
        throw std::invalid_argument(where +
                                    "logits have a NaN or +inf entry; allowed: finite, or -inf where the result must be 0");
      top = std::max(top, logits[e]);
    }
    const auto any_closed = [&](int64_t lines, int64_t line_step, int64_t entries, int64_t entry_step) {
      bool any = false;
      for (int64_t line = 0; line < lines; ++line) {
        bool closed = true;
        for (int64_t e = 0; e < entries; ++e) closed &= logits[line * line_step + e * entry_step] == -infinity;
        any |= closed;
      }
      return any;
    };
    if (any_closed(call.n, call.m, call.m, 1) || any_closed(call.m, 1, call.n, call.m))
      throw std::invalid_argument(where +
                                  "a row or column of logits is -inf throughout, so it cannot sum to 1; make an entry finite");
    if (!call.softmax_start && call.shift == Shift::none && top >= kLargestUnshifted)
      throw std::invalid_argument(where + "logits up to " + std::to_string(top) +
                                  " overflow in exp; use shift='line' or shift='matrix'");
  }
  throw std::logic_error("doubly_stochastic refused logits that have a limit");
}

template <class Body>
void for_groups(const DoublyStochastic& call, double passes, const Body& body) {
  const double entries = static_cast<double>(call.problems) * static_cast<double>(call.n * call.m);
  const double cost_ns = kNsPerEntry * entries * passes * static_cast<double>(call.iterations + 5);
  for_lane_groups(call.problems, sinkhorn_kernels().small_width * doubly_stochastic_room(call), cost_ns, body);
}

}  // namespace

void doubly_stochastic(const DoublyStochastic& call, float* out) {
  for_groups(call, 1, [&](int64_t first, int64_t lanes, float* room) {
    if (sinkhorn_kernels().normalise(call, first, lanes, room, out)) refuse(call, first, lanes);
  });
}

void doubly_stochastic_backward(const DoublyStochastic& call, const float* gradient, float* logits_gradient) {
  for_groups(call, 3, [&](int64_t first, int64_t lanes, float* room) {
    sinkhorn_kernels().normalise_backward(call, first, lanes, room, gradient, logits_gradient);
  });
}

}  // namespace pyllmq::cpu

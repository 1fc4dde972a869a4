#include "sinkhorn/cpu/doubly_stochastic.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "runtime/counting.h"
#include "sinkhorn/cpu/sinkhorn.h"
#include "runtime/thread_pool.h"
#include "runtime/workspace.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kGrain = 4;
constexpr double kNsPerEntry = 0.15;

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
    bool line = false;
    for (int64_t i = 0; i < call.n; ++i) {
      bool closed = true;
      for (int64_t j = 0; j < call.m; ++j) closed &= logits[i * call.m + j] == -infinity;
      line |= closed;
    }
    for (int64_t j = 0; j < call.m; ++j) {
      bool closed = true;
      for (int64_t i = 0; i < call.n; ++i) closed &= logits[i * call.m + j] == -infinity;
      line |= closed;
    }
    if (line)
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
  const int64_t width = sinkhorn_kernels().small_width, groups = ceil_div(call.problems, width);
  const double entries = static_cast<double>(call.problems) * static_cast<double>(call.n * call.m);
  parallel_for(groups, kGrain, kNsPerEntry * entries * passes * static_cast<double>(call.iterations + 5),
               [&](int64_t begin, int64_t end) {
                 thread_local Workspace workspace;
                 const int64_t floats = width * doubly_stochastic_room(call);
                 for (int64_t group = begin; group < end; ++group) {
                   workspace.reserve(4 * floats + 64);
                   body(group * width, std::min(width, call.problems - group * width), workspace.take<float>(floats));
                 }
               });
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

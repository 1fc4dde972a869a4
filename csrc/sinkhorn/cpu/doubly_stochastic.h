// Rows and columns of exp(logits) normalised in turn, for matrices of up to kSmallEntries: a problem to a vector lane.
// Arguments mean what those of pyllmq.doubly_stochastic do.
#pragma once
#include <cstdint>

namespace pyllmq::cpu {

enum class Shift : int { none = 0, line = 1, matrix = 2 };

struct DoublyStochastic {
  const float* logits;  // [problems, n, m]
  int64_t problems, n, m, iterations;
  bool columns_first, softmax_start;
  Shift shift;
  float matrix_epsilon, division_epsilon;
};

// Throw std::invalid_argument for logits that have no doubly stochastic limit.
void doubly_stochastic(const DoublyStochastic& call, float* out);
void doubly_stochastic_backward(const DoublyStochastic& call, const float* gradient, float* logits_gradient);

// fp32 numbers that a kernel wants for each lane.
inline int64_t doubly_stochastic_room(const DoublyStochastic& call) {
  return 3 * call.n * call.m + 2 * (call.iterations + 1) * (call.n + call.m);
}

}  // namespace pyllmq::cpu

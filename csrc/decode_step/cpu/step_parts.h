// What both steps do before and behind their middle, on the CPU.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "decode_step/cpu/step_kernels.h"
#include "decode_step/step_parts.h"

namespace pyllmq::cpu {

// Memory of one call. What was taken stays in its place until `clear`; the next call finds one block for all of it.
class Scratch {
 public:
  void clear();
  float* take(int64_t count);

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  std::vector<std::unique_ptr<float, Free>> blocks_;
  int64_t used_ = 0, size_ = 0;  // of the last block
  int64_t taken_ = 0;            // in all
};

// Throws std::invalid_argument with the message unless the condition holds.
void require(bool condition, const std::string& message);
std::string list_of(std::initializer_list<int64_t> numbers);

void check_norm(const std::string& name, const Norm& norm, std::initializer_list<int64_t> allowed_sizes);
void check_input(const InputLinears& input, const Norm& norm);
// Of `count` groups of `width` rows, `stride` apart, all are rows of the operand.
void check_rows(const std::string& name, const InputLinears& input, int64_t operand, int64_t first, int64_t stride, int64_t count,
                int64_t width);
void check_output(const OutputLinear& output, int64_t columns);
void check_call(const StepCall& call);

// y = norm of x [size]; y may be x. part: which of several weights that stand behind each other.
void normalize(const Norm& norm, const float* x, int64_t size, int64_t part, float* y);

// The outputs of the Linears of norm(x), [operand][token, row].
std::vector<float*> project(const InputLinears& input, const Norm& norm, const StepCall& call, Precision precision,
                            Scratch& scratch);

// call.y = residual + multiplier * norm(x W^T + bias), x [tokens, columns].
void finish(const OutputLinear& output, const float* x, const StepCall& call, Precision precision, Scratch& scratch);

}  // namespace pyllmq::cpu

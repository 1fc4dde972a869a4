// What both steps do before and behind their middle, on the CPU.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "decode_step/cpu/step_kernels.h"
#include "decode_step/step_parts.h"
#include "runtime/workspace.h"

namespace pyllmq::cpu {

// Memory of the steps of the calling thread, which follow each other: 16 MB for 256 tokens of a model of 1.1 B parameters, where
// 39 were taken by steps that each had their own.
Workspace& step_workspace();

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

// What a step takes first, and what its outputs take behind it, in bytes of a workspace.
int64_t room_bytes(const InputLinears& input, const OutputLinear& output, int64_t tokens);
int64_t outputs_bytes(const InputLinears& input, int64_t tokens);

// Memory for norm(x) and later for the outputs of the last Linear.
float* take_room(const InputLinears& input, const OutputLinear& output, int64_t tokens, Workspace& workspace);

// The outputs of the Linears of norm(x), [operand][token, row].
std::vector<float*> project(const InputLinears& input, const Norm& norm, const StepCall& call, Precision precision, float* room,
                            Workspace& workspace);

// call.y = residual + multiplier * norm(x W^T + bias), x [tokens, columns].
void finish(const OutputLinear& output, const float* x, const StepCall& call, Precision precision, float* room);

}  // namespace pyllmq::cpu

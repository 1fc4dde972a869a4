#include "decode_step/mlp_step.h"

#include "runtime/thread_pool.h"
#include "runtime/trace.h"
#include "decode_step/cpu/step_parts.h"

namespace pyllmq::cpu {
namespace {

constexpr double kNsPerUnit = 1.0;

// Elements first, first + stride, ... side by side.
const float* side_by_side(const float* from, int64_t stride, int64_t count, float* room) {
  if (room == nullptr) return from;
  for (int64_t i = 0; i < count; ++i) room[i] = from[i * stride];
  return room;
}

}  // namespace

void check_mlp_step(const MlpStep& step) {
  require(step.units > 0, "units = " + std::to_string(step.units) + "; must be > 0");
  check_input(step.input, step.norm);
  const auto check = [&](const char* name, const UnitRows& rows) {
    check_rows(name, step.input, rows.operand, rows.first_row, rows.stride, step.units, 1);
  };
  check("gate_rows", step.gate_rows);
  if (step.gated) check("up_rows", step.up_rows);
  check_output(step.output, step.units);
}

void mlp_step(const MlpStep& step, const StepCall& call) {
  check_call(call);
  const Traced traced(Part::step);
  const HotThreads hot;
  const int64_t units = step.units, of_units = Workspace::need<float>(call.tokens * units);
  const bool scattered_gates = step.gate_rows.stride != 1, scattered_ups = step.gated && step.up_rows.stride != 1;
  // Where a Linear makes the gates alone, the activations take their place.
  const bool in_place = !scattered_gates && step.input.operands[step.gate_rows.operand]->rows() == units;
  Workspace& workspace = step_workspace();
  workspace.reserve(room_bytes(step.input, step.output, call.tokens) + outputs_bytes(step.input, call.tokens) +
                    (!in_place + scattered_gates + scattered_ups) * of_units);
  float* room = take_room(step.input, step.output, call.tokens, workspace);
  const std::vector<float*> outputs = project(step.input, step.norm, call, step.precision, room, workspace);
  const auto take = [&](bool needed) { return needed ? workspace.take<float>(call.tokens * units) : nullptr; };
  float *gates = take(scattered_gates), *ups = take(scattered_ups);
  float* activated = in_place ? outputs[step.gate_rows.operand] : take(true);
  parallel_for(call.tokens, 1, kNsPerUnit * static_cast<double>(call.tokens * units), [&](int64_t begin, int64_t end) {
    const auto rows_of = [&](const UnitRows& rows, int64_t t, float* room) {
      const float* all = outputs[rows.operand] + t * step.input.operands[rows.operand]->rows();
      return side_by_side(all + rows.first_row, rows.stride, units, room == nullptr ? nullptr : room + t * units);
    };
    for (int64_t t = begin; t < end; ++t)
      step_kernels().activate(step.activation, rows_of(step.gate_rows, t, gates),
                              step.gated ? rows_of(step.up_rows, t, ups) : nullptr, units, activated + t * units);
  });
  finish(step.output, activated, call, step.precision, room);
}

}  // namespace pyllmq::cpu

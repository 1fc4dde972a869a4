#include "decode_step/cpu/step_parts.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "codebook/cpu/operand.h"
#include "runtime/counting.h"
#include "runtime/isa.h"
#include "runtime/thread_pool.h"
#include "runtime/trace.h"

namespace pyllmq::cpu {
namespace {

constexpr double kNsPerElement = 0.3;  // of a norm, a residual or a conversion, on one thread

double elements_cost(int64_t tokens, int64_t size) { return kNsPerElement * static_cast<double>(tokens * size); }

// y += elements first, first + 1, ... of x.
void add(const RowKernels& conversions, const void* x, DType dtype, int64_t first, int64_t count, float* y) {
  float piece[512];
  for (int64_t at = 0; at < count; at += 512) {
    const int64_t some = std::min<int64_t>(512, count - at);
    conversions.to_fp32[static_cast<int>(dtype)](static_cast<const uint8_t*>(x) + (first + at) * element_bytes(dtype), piece,
                                                 some);
    for (int64_t i = 0; i < some; ++i) y[at + i] += piece[i];
  }
}

int64_t room_floats(const InputLinears& input, const OutputLinear& output, int64_t tokens) {
  return tokens * std::max(input.operands[0]->columns(), output.operand->rows());
}

}  // namespace

const StepKernels& step_kernels() {
  return by_isa([]<Isa isa>() -> const StepKernels& { return step_kernels_for<isa>(); });
}

Workspace& step_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

std::string list_of(std::initializer_list<int64_t> numbers) {
  std::string list;
  for (const int64_t number : numbers) list += (list.empty() ? "" : ", ") + std::to_string(number);
  return list;
}

void check_norm(const std::string& name, const Norm& norm, std::initializer_list<int64_t> allowed_sizes) {
  const auto check = [&](const char* part, const std::vector<float>& given) {
    const auto size = static_cast<int64_t>(given.size());
    require(given.empty() || std::find(allowed_sizes.begin(), allowed_sizes.end(), size) != allowed_sizes.end(),
            name + " has a " + part + " of " + std::to_string(size) + " elements; allowed: none or " + list_of(allowed_sizes));
  };
  check("weight", norm.weight);
  check("bias", norm.bias);
  require(norm.weight.empty() || norm.bias.empty() || norm.weight.size() == norm.bias.size(),
          name + " has a weight and a bias of different sizes");
}

void check_input(const InputLinears& input, const Norm& norm) {
  require(!input.operands.empty(), "there is no input Linear");
  int64_t rows = 0;
  for (const LinearOperand* operand : input.operands) {
    require(operand->columns() == input.operands[0]->columns(), "the input Linears read " +
                                                                    list_of({input.operands[0]->columns(), operand->columns()}) +
                                                                    " columns; all read the same x");
    rows += operand->rows();
  }
  require(input.bias.empty() || static_cast<int64_t>(input.bias.size()) == rows,
          "input_bias has " + std::to_string(input.bias.size()) + " elements; the input Linears have " + std::to_string(rows) +
              " rows");
  check_norm("norm", norm, {input.operands[0]->columns()});
}

void check_rows(const std::string& name, const InputLinears& input, int64_t operand, int64_t first, int64_t stride, int64_t count,
                int64_t width) {
  require(operand >= 0 && operand < static_cast<int64_t>(input.operands.size()),
          name + " are of operand " + std::to_string(operand) + " of " + std::to_string(input.operands.size()));
  const int64_t rows = input.operands[operand]->rows();
  require(first >= 0 && (count == 1 || stride >= width) && first + (count - 1) * stride + width <= rows,
          name + " begin at " + std::to_string(first) + ", " + std::to_string(count) + " times " + std::to_string(width) +
              " rows that are " + std::to_string(stride) + " apart; the operand has " + std::to_string(rows) + " rows");
}

void check_output(const OutputLinear& output, int64_t columns) {
  const int64_t rows = output.operand->rows();
  require(output.operand->columns() == columns, "the output Linear reads " + std::to_string(output.operand->columns()) +
                                                    " columns, but is given " + std::to_string(columns));
  require(output.bias.empty() || static_cast<int64_t>(output.bias.size()) == rows,
          "output_bias has " + std::to_string(output.bias.size()) + " elements; the output Linear has " + std::to_string(rows) +
              " rows");
  check_norm("output_norm", output.norm, {rows});
}

void check_call(const StepCall& call) {
  require(call.x != nullptr && call.y != nullptr, "x and y must not be null");
  require(call.tokens > 0, "there are " + std::to_string(call.tokens) + " tokens; at least one is needed");
}

void normalize(const Norm& norm, const float* x, int64_t size, int64_t part, float* y) {
  const auto part_of = [&](const std::vector<float>& all) {
    if (all.empty()) return static_cast<const float*>(nullptr);
    return all.data() + (static_cast<int64_t>(all.size()) == size ? 0 : part * size);
  };
  step_kernels().norm(norm.kind, norm.eps, part_of(norm.weight), part_of(norm.bias), x, size, y);
}

void norm_step(const Norm& norm, const StepCall& call, int64_t size) {
  check_call(call);
  check_norm("norm", norm, {size});
  Workspace& workspace = step_workspace();
  workspace.reserve(Workspace::need<float>(call.tokens * size));
  auto* rows = workspace.take<float>(call.tokens * size);
  parallel_for(call.tokens, 1, elements_cost(call.tokens, size), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* y = rows + t * size;
      normalize(norm, rows_in_fp32(row_kernels(), call.x, call.dtype, t, 1, size, y), size, 0, y);
      row_kernels().from_fp32[static_cast<int>(call.dtype)](
          y, static_cast<uint8_t*>(call.y) + t * size * element_bytes(call.dtype), size);
    }
  });
}

int64_t room_bytes(const InputLinears& input, const OutputLinear& output, int64_t tokens) {
  return Workspace::need<float>(room_floats(input, output, tokens));
}

int64_t outputs_bytes(const InputLinears& input, int64_t tokens) {
  int64_t bytes = 0;
  for (const LinearOperand* operand : input.operands) bytes += Workspace::need<float>(tokens * operand->rows());
  return bytes;
}

float* take_room(const InputLinears& input, const OutputLinear& output, int64_t tokens, Workspace& workspace) {
  return workspace.take<float>(room_floats(input, output, tokens));
}

std::vector<float*> project(const InputLinears& input, const Norm& norm, const StepCall& call, Precision precision, float* room,
                            Workspace& workspace) {
  const int64_t columns = input.operands[0]->columns();
  const float* h = static_cast<const float*>(call.x);
  if (call.dtype != DType::fp32 || norm.kind != NormKind::none) {
    parallel_for(call.tokens, 1, elements_cost(call.tokens, columns), [&](int64_t begin, int64_t end) {
      const float* x = rows_in_fp32(row_kernels(), call.x, call.dtype, begin, end - begin, columns, room + begin * columns);
      if (norm.kind == NormKind::none) return;
      for (int64_t t = begin; t < end; ++t) normalize(norm, x + (t - begin) * columns, columns, 0, room + t * columns);
    });
    h = room;
  }
  const Traced traced(Part::linear);
  std::vector<float*> outputs;
  std::vector<const float*> biases;
  std::vector<LinearOfMany> together;
  const float* bias = input.bias.empty() ? nullptr : input.bias.data();
  for (const LinearOperand* operand : input.operands) {
    outputs.push_back(workspace.take<float>(call.tokens * operand->rows()));
    biases.push_back(bias);
    if (const auto* codebook = dynamic_cast<const CodebookOperand*>(operand))
      together.push_back({codebook->view(), h, call.tokens, bias, outputs.back()});
    if (bias != nullptr) bias += operand->rows();
  }
  std::vector<size_t> rest(outputs.size());
  std::iota(rest.begin(), rest.end(), size_t{0});
  if (together.size() > 1 && together.size() == outputs.size()) rest = codebook_linears(together, precision);
  for (const size_t i : rest)
    input.operands[i]->linear(h, DType::fp32, call.tokens, biases[i], DType::fp32, outputs[i], precision);
  return outputs;
}

void finish(const OutputLinear& output, const float* x, const StepCall& call, Precision precision, float* room) {
  const int64_t rows = output.operand->rows();
  output.operand->linear(x, DType::fp32, call.tokens, output.bias.empty() ? nullptr : output.bias.data(), DType::fp32, room,
                         precision);
  const RowKernels& conversions = row_kernels();
  parallel_for(call.tokens, 1, elements_cost(call.tokens, rows), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* y = room + t * rows;
      const bool has_norm = output.norm.kind != NormKind::none;
      if (has_norm && !output.norm_last) normalize(output.norm, y, rows, 0, y);
      if (output.multiplier != 1)
        for (int64_t i = 0; i < rows; ++i) y[i] *= output.multiplier;
      if (call.residual != nullptr) add(conversions, call.residual, call.dtype, t * rows, rows, y);
      if (has_norm && output.norm_last) normalize(output.norm, y, rows, 0, y);
      conversions.from_fp32[static_cast<int>(call.dtype)](y, static_cast<uint8_t*>(call.y) + t * rows * element_bytes(call.dtype),
                                                          rows);
    }
  });
}

}  // namespace pyllmq::cpu

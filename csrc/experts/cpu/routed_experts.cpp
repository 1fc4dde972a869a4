#include "experts/routed_experts.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "codebook/cpu/operand.h"
#include "decode_step/cpu/step_kernels.h"
#include "decode_step/cpu/step_parts.h"
#include "runtime/counting.h"
#include "runtime/thread_pool.h"
#include "runtime/trace.h"
#include "runtime/workspace.h"

namespace pyllmq::cpu {
namespace {

// Memory between the Linears. Experts are taken in waves that fit in it, each whole, so that none is decoded twice.
constexpr int64_t kWaveBytes = 64 << 20;
// Experts that do not run together are shared out whole where each thread gets so many: then the last one, whose end the
// others wait for, is a small part. Fewer run one after the other, each on all threads.
constexpr int64_t kExpertsPerThread = 4;
constexpr double kNsPerElement = 0.3, kNsPerUnit = 1.0;
constexpr double kNsPerWeight = 0.1;  // of an expert that is decoded and multiplied; far above what waking threads costs

// Of one expert, in rows that are sorted by expert.
struct Chosen {
  int64_t expert, first, count;
};

struct Wave {
  size_t begin, end;  // of the chosen
  int64_t first, count;
};

struct Routing {
  std::vector<Chosen> chosen;          // by rising expert
  std::vector<int64_t> token, row_of;  // row -> token; choice -> row, -1: none
  std::vector<int64_t> order;          // [tokens, choices]: choices of a token by rising expert
};

Routing sort_by_expert(const RoutedTokens& tokens, int64_t experts) {
  const int64_t pairs = tokens.tokens * tokens.choices;
  std::vector<int64_t> next(experts + 2, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t expert = tokens.index[i];
    if (expert < 0 || expert > experts)
      throw std::out_of_range("a token was sent to expert " + std::to_string(expert) + "; allowed: 0 to " +
                              std::to_string(experts - 1));
    ++next[expert + 1];
  }
  Routing routing;
  for (int64_t e = 0; e < experts; ++e) {
    if (next[e + 1] > 0) routing.chosen.push_back({e, next[e], next[e + 1]});
    next[e + 1] += next[e];
  }
  routing.token.resize(next[experts]);
  routing.row_of.assign(pairs, -1);
  routing.order.resize(pairs);
  for (int64_t t = 0; t < tokens.tokens; ++t) {
    const auto order = routing.order.begin() + t * tokens.choices;
    std::iota(order, order + tokens.choices, t * tokens.choices);
    std::stable_sort(order, order + tokens.choices, [&](int64_t a, int64_t b) { return tokens.index[a] < tokens.index[b]; });
    for (int64_t j = 0; j < tokens.choices; ++j) {
      const int64_t i = order[j], expert = tokens.index[i];
      if (expert == experts) continue;
      routing.row_of[i] = next[expert]++;
      routing.token[routing.row_of[i]] = t;
    }
  }
  return routing;
}

struct LinearCall {
  const LinearOperand* operand;
  const float* x;
  int64_t tokens;
  const float* bias;
  float* y;

  void operator()(Precision precision) const { operand->linear(x, DType::fp32, tokens, bias, DType::fp32, y, precision); }
  double cost() const { return kNsPerWeight * static_cast<double>(operand->rows() * operand->columns()); }
};

void run_linears(const std::vector<LinearCall>& calls, Precision precision) {
  const Traced traced(Part::linear);
  std::vector<LinearOfMany> together;
  std::vector<LinearCall> codebooks, single;
  for (const LinearCall& call : calls) {
    const auto* codebook = dynamic_cast<const CodebookOperand*>(call.operand);
    (codebook == nullptr ? single : codebooks).push_back(call);
    if (codebook != nullptr) together.push_back({codebook->view(), call.x, call.tokens, call.bias, call.y});
  }
  for (const size_t place : codebook_linears(together, precision)) single.push_back(codebooks[place]);
  const auto count = static_cast<int64_t>(single.size());
  if (count < kExpertsPerThread * num_threads()) {
    for (const LinearCall& call : single) call(precision);
    return;
  }
  std::stable_sort(single.begin(), single.end(), [](const LinearCall& a, const LinearCall& b) { return a.tokens > b.tokens; });
  double cost = 0;
  for (const LinearCall& call : single) cost += call.cost();
  parallel_for(count, 1, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) single[i](precision);
  });
}

// h [rows of an up operand] -> a [units].
void activate(const RoutedExperts& experts, const float* h, float* room, float* a) {
  const int64_t units = experts.units;
  const auto picked = [&](const GateRows& rows, float* to) {
    for (int64_t i = 0; i < units; ++i) to[i] = h[rows.first + i * rows.stride];
    return to;
  };
  if (!experts.gated) return step_kernels().activate(experts.activation, picked(experts.gate_rows, room), nullptr, units, a);
  float* gate = picked(experts.gate_rows, room);
  float* up = picked(experts.up_rows, room + units);
  // A comparison with NaN is false: NaN stays.
  for (int64_t i = 0; i < units; ++i) {
    gate[i] = experts.alpha * (gate[i] > experts.limit ? experts.limit : gate[i]);
    const float bounded = up[i] > experts.limit ? experts.limit : up[i] < -experts.limit ? -experts.limit : up[i];
    up[i] = (bounded + experts.offset) / experts.alpha;
  }
  step_kernels().activate(experts.activation, gate, up, units, a);
}

struct Sizes {
  int64_t hidden, up_rows, units;
  int64_t row() const { return hidden + up_rows + 3 * units + hidden; }  // floats: x, h, gate and up, a, y
};

std::vector<Wave> waves_of(const Routing& routing, const Sizes& sizes) {
  const int64_t most = kWaveBytes / (sizes.row() * int64_t{sizeof(float)});
  std::vector<Wave> waves;
  for (size_t i = 0; i < routing.chosen.size(); ++i) {
    const Chosen& next = routing.chosen[i];
    if (waves.empty() || waves.back().count + next.count > most) waves.push_back({i, i, next.first, 0});
    waves.back().end = i + 1;
    waves.back().count += next.count;
  }
  return waves;
}

// The outputs of a wave's experts, [count, hidden].
const float* run_wave(const RoutedExperts& experts, const RoutedTokens& tokens, const Routing& routing, const Wave& wave,
                      const Sizes& sizes, Workspace& workspace) {
  const auto take = [&](int64_t width) { return workspace.take<float>(wave.count * width); };
  float *x = take(sizes.hidden), *h = take(sizes.up_rows), *room = take(2 * sizes.units), *a = take(sizes.units),
        *y = take(sizes.hidden);
  parallel_for(wave.count, 1, kNsPerElement * static_cast<double>(wave.count * sizes.hidden), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = x + i * sizes.hidden;
      const float* from = rows_in_fp32(row_kernels(), tokens.x, tokens.dtype, routing.token[wave.first + i], 1, sizes.hidden, to);
      if (from != to) std::copy_n(from, sizes.hidden, to);
    }
  });
  const auto linears = [&](const std::vector<const LinearOperand*>& operands, const std::vector<float>& bias, const float* from,
                           float* to) {
    std::vector<LinearCall> calls;
    for (size_t i = wave.begin; i < wave.end; ++i) {
      const Chosen& chosen = routing.chosen[i];
      const LinearOperand& operand = *operands[chosen.expert];
      const int64_t row = chosen.first - wave.first;
      calls.push_back({&operand, from + row * operand.columns(), chosen.count,
                       bias.empty() ? nullptr : bias.data() + chosen.expert * operand.rows(), to + row * operand.rows()});
    }
    run_linears(calls, experts.precision);
  };
  linears(experts.up, experts.up_bias, x, h);
  parallel_for(wave.count, 1, kNsPerUnit * static_cast<double>(wave.count * sizes.units), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      activate(experts, h + i * sizes.up_rows, room + i * 2 * sizes.units, a + i * sizes.units);
  });
  linears(experts.down, experts.down_bias, a, y);
  return y;
}

}  // namespace

void check_routed_experts(const RoutedExperts& experts) {
  const size_t count = experts.up.size();
  require(count > 0 && experts.down.size() == count,
          "there are " + std::to_string(count) + " up Linears and " + std::to_string(experts.down.size()) + " down Linears");
  const int64_t hidden = experts.up[0]->columns(), rows = experts.up[0]->rows(), units = experts.units;
  for (size_t e = 0; e < count; ++e) {
    const LinearOperand &up = *experts.up[e], &down = *experts.down[e];
    require(up.rows() == rows && up.columns() == hidden && down.rows() == hidden && down.columns() == units,
            "the Linears of expert " + std::to_string(e) + " have the sizes " +
                list_of({up.rows(), up.columns(), down.rows(), down.columns()}) + "; needs " +
                list_of({rows, hidden, hidden, units}));
  }
  const auto check_bias = [&](const char* name, const std::vector<float>& bias, int64_t of_each) {
    const auto size = static_cast<int64_t>(bias.size()), needed = static_cast<int64_t>(count) * of_each;
    require(bias.empty() || size == needed,
            std::string(name) + " has " + std::to_string(size) + " elements; allowed: none or " + std::to_string(needed));
  };
  check_bias("up_bias", experts.up_bias, rows);
  check_bias("down_bias", experts.down_bias, hidden);
  const auto check = [&](const char* name, const GateRows& given) {
    require(given.first >= 0 && given.stride >= 1 && given.first + (units - 1) * given.stride < rows,
            std::string(name) + " begin at " + std::to_string(given.first) + ", " + std::to_string(units) + " rows that are " +
                std::to_string(given.stride) + " apart; the up Linears have " + std::to_string(rows) + " rows");
  };
  check("gate_rows", experts.gate_rows);
  if (experts.gated) check("up_rows", experts.up_rows);
  require(experts.limit > 0 && experts.alpha > 0, "limit and alpha must be positive");
}

void routed_experts(const RoutedExperts& experts, const RoutedTokens& tokens) {
  if (tokens.tokens == 0) return;
  require(tokens.x != nullptr && tokens.y != nullptr, "x and y must not be null");
  require(tokens.choices == 0 || (tokens.index != nullptr && tokens.weights != nullptr), "index and weights must not be null");
  const Traced traced(Part::step);
  const Routing routing = sort_by_expert(tokens, static_cast<int64_t>(experts.up.size()));
  const Sizes sizes{experts.up[0]->columns(), experts.up[0]->rows(), experts.units};
  const std::vector<Wave> waves = waves_of(routing, sizes);
  int64_t largest = 0;
  for (const Wave& wave : waves) largest = std::max(largest, wave.count);

  const HotThreads hot;
  const int64_t outputs = tokens.tokens * sizes.hidden;
  const auto need = [](int64_t count) { return Workspace::need<float>(count); };
  const int64_t for_wave = 2 * need(largest * sizes.hidden) + need(largest * sizes.up_rows) + need(largest * 2 * sizes.units) +
                           need(largest * sizes.units);
  thread_local Workspace for_sums, workspace;
  for_sums.reserve(need(outputs));
  auto* sums = for_sums.take<float>(outputs);
  std::fill_n(sums, outputs, 0.0f);
  for (const Wave& wave : waves) {
    workspace.reserve(for_wave);
    const float* y = run_wave(experts, tokens, routing, wave, sizes, workspace);
    const double cost = kNsPerElement * static_cast<double>(wave.count * sizes.hidden);
    parallel_for(tokens.tokens, 1, cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * tokens.choices; i < end * tokens.choices; ++i) {
        const int64_t choice = routing.order[i], row = routing.row_of[choice] - wave.first;
        if (routing.row_of[choice] < 0 || row < 0 || row >= wave.count) continue;
        float* sum = sums + i / tokens.choices * sizes.hidden;
        const float* of_expert = y + row * sizes.hidden;
        const float weight = tokens.weights[choice];
        for (int64_t c = 0; c < sizes.hidden; ++c) sum[c] += weight * of_expert[c];
      }
    });
  }
  row_kernels().from_fp32[static_cast<int>(tokens.dtype)](sums, tokens.y, outputs);
}

}  // namespace pyllmq::cpu

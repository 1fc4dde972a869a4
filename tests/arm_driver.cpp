// The kernels without Python: reads cases, runs each on each instruction set of this processor, writes what came out.
// tests/test_arm.py makes the cases, runs this under an emulator, and compares with its fp64 results.
//
//   case     "<operation> <name>=<number> ...\n", then arrays, then "run\n"
//   array    "in <name> <bytes>\n" and the bytes; "out <name> <bytes>\n", memory full of NaN, which is written back
//   results  "<instruction set> ...\n"; then for each case, instruction set and `out` array its bytes, or "error <message>\n"
//   first,
//            "fine\n" otherwise
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "codebook/cpu/checkpoint.h"
#include "codebook/cpu/operand.h"
#include "codebook/cpu/pack_codes.h"
#include "decode_step/attention_step.h"
#include "decode_step/cpu/dense_operand.h"
#include "decode_step/mlp_step.h"
#include "experts/routed_experts.h"
#include "fit_columns/cpu/fit_columns.h"
#include "kmeans/cpu/kmeans_1d.h"
#include "runtime/isa.h"
#include "runtime/thread_pool.h"
#include "sinkhorn/cpu/sinkhorn.h"
#include "softmax_cdist/cpu/softmax_cdist_l1.h"
#include "sparse/cpu/operand.h"

using namespace pyllmq;
using namespace pyllmq::cpu;

namespace {

constexpr int64_t kGuard = 64;
constexpr uint8_t kPoison = 0xFF;

// Memory with guard bytes around it, at an address that is a multiple of 64.
class Array {
 public:
  explicit Array(int64_t bytes) : bytes_(bytes), memory_(bytes + 3 * kGuard) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    begin_ = (kGuard - static_cast<int64_t>(address % kGuard)) % kGuard + kGuard;
    poison();
  }
  void poison() { std::fill(memory_.begin(), memory_.end(), kPoison); }
  uint8_t* data() { return memory_.data() + begin_; }
  int64_t bytes() const { return bytes_; }
  bool guards_hold() const {
    for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()); ++i)
      if ((i < begin_ || i >= begin_ + bytes_) && memory_[i] != kPoison) return false;
    return true;
  }

 private:
  int64_t bytes_, begin_;
  std::vector<uint8_t> memory_;
};

struct Case {
  std::string operation;
  std::map<std::string, double> numbers;
  std::map<std::string, std::unique_ptr<Array>> in;
  std::vector<std::pair<std::string, std::unique_ptr<Array>>> out;

  template <class T = int64_t>
  T number(const std::string& name, double otherwise = 0) const {
    const auto found = numbers.find(name);
    return static_cast<T>(found == numbers.end() ? otherwise : found->second);
  }
  template <class T>
  T* array(const std::string& name) const {  // null where there is none
    for (const auto& [own, memory] : out)
      if (own == name) return reinterpret_cast<T*>(memory->data());
    const auto found = in.find(name);
    return found == in.end() ? nullptr : reinterpret_cast<T*>(found->second->data());
  }
  template <class T>
  std::vector<T> list(const std::string& name) const {
    const auto found = in.find(name);
    if (found == in.end()) return {};
    const T* first = array<T>(name);
    return {first, first + found->second->bytes() / static_cast<int64_t>(sizeof(T))};
  }
};

bool read_case(std::istream& from, Case& one) {
  std::string line, word;
  if (!std::getline(from, line)) return false;
  std::istringstream words(line);
  words >> one.operation;
  while (words >> word) one.numbers[word.substr(0, word.find('='))] = std::stod(word.substr(word.find('=') + 1));
  while (std::getline(from, line) && line != "run") {
    std::istringstream fields(line);
    std::string kind, name;
    int64_t bytes;
    fields >> kind >> name >> bytes;
    auto memory = std::make_unique<Array>(bytes);
    if (kind == "out") {
      one.out.emplace_back(name, std::move(memory));
    } else {
      from.read(reinterpret_cast<char*>(memory->data()), bytes);
      one.in[name] = std::move(memory);
    }
  }
  return true;
}

// --- packed weights --------------------------------------------------------------------------------------------------

CodebookCheckpoint codebook_of(const Case& c, const std::string& prefix = "") {
  CodebookCheckpoint found{.rows = c.number(prefix + "rows"),
                           .columns = c.number(prefix + "columns"),
                           .segments = c.number(prefix + "segments", 1),
                           .column_bits = c.array<uint8_t>(prefix + "column_bits"),
                           .segment_rows = c.array<int32_t>(prefix + "segment_rows"),
                           .codes = {},
                           .codebook = c.array<uint16_t>(prefix + "codebook"),
                           .row_scale = c.array<uint16_t>(prefix + "row_scale"),
                           .outlier_row_offsets = c.array<int32_t>(prefix + "outlier_row_offsets"),
                           .outlier_columns = c.array<void>(prefix + "outlier_columns"),
                           .outlier_columns_bytes = c.number<int>(prefix + "column_bytes"),
                           .outlier_values = c.array<uint16_t>(prefix + "outlier_values")};
  for (int width = 1; width <= 8; ++width) found.codes[width] = c.array<uint8_t>(prefix + "codes" + std::to_string(width));
  return found;
}

SparseCheckpoint sparse_of(const Case& c) {
  return {.kind = static_cast<SparseKind>(c.number("kind")),
          .value_type = static_cast<ValueType>(c.number("value_type")),
          .rows = c.number("rows"),
          .columns = c.number("columns"),
          .kept = c.number("kept"),
          .bits = c.number("bits"),
          .outliers = c.number("outliers"),
          .values = c.array<uint8_t>("values"),
          .row_offsets = c.array<int32_t>("row_offsets"),
          .mask = c.array<uint8_t>("mask"),
          .column_numbers = c.array<uint8_t>("columns"),
          .column_bytes = c.number<int>("column_bytes"),
          .positions = c.array<uint8_t>("positions"),
          .scale = c.array<float>("scale"),
          .codes = c.array<uint8_t>("codes"),
          .codebook = c.array<uint16_t>("codebook"),
          .outlier_row_offsets = c.array<int32_t>("outlier_row_offsets"),
          .outlier_columns = c.array<uint8_t>("outlier_columns"),
          .outlier_values = c.array<uint16_t>("outlier_values")};
}

DType dtype_of(const Case& c, const std::string& name = "dtype") { return static_cast<DType>(c.number(name)); }
Precision precision_of(const Case& c) { return static_cast<Precision>(c.number("precision")); }

void codebook(const Case& c) {
  const CodebookCheckpoint checkpoint = codebook_of(c);
  Array layout(codebook_layout_bytes(checkpoint));
  codebook_layout_pack(layout.data(), layout.bytes(), checkpoint);
  const CodebookOperand operand(layout.data(), layout.bytes());
  if (void* y = c.array<void>("y"))
    operand.linear_by(static_cast<LinearPath>(c.number("path", 2)), c.array<void>("x"), dtype_of(c), c.number("tokens"),
                      c.array<void>("bias"), DType::fp32, y, precision_of(c));
  if (void* dense = c.array<void>("dense")) operand.dequantize(0, checkpoint.rows, dense, dtype_of(c));
  if (void* rows = c.array<void>("row_values")) operand.row_values(c.array<int64_t>("ids"), c.number("count"), rows, dtype_of(c));
  if (uint8_t* codes = c.array<uint8_t>("all_codes")) operand.codes(codes);
}

void of_checkpoint(const Case& c) {
  const CodebookCheckpoint checkpoint = codebook_of(c);
  const float *scale = c.array<float>("scale"), *centroids = c.array<float>("centroids");
  codebook_decode(checkpoint, scale, centroids, c.array<float>("dense"));
  codebook_gradient(checkpoint, scale, c.array<float>("weight_gradient"), c.array<float>("gradient"));
}

void codes(const Case& c) {
  const int64_t rows = c.number("rows"), columns = c.number("columns");
  const int bits = c.number<int>("bits");
  pack_codes(c.array<uint8_t>("codes"), c.array<uint8_t>("packed"), rows, columns, bits);
  unpack_codes(c.array<uint8_t>("packed"), c.array<uint8_t>("again"), rows, columns, bits);
}

void sparse(const Case& c) {
  const SparseCheckpoint checkpoint = sparse_of(c);
  const double few_kept = c.number<double>("sparse_columns", 0.12);
  Array layout(sparse_layout_bytes(checkpoint, few_kept));
  sparse_layout_pack(layout.data(), layout.bytes(), checkpoint, few_kept);
  const SparseOperand operand(layout.data(), layout.bytes());
  if (void* y = c.array<void>("y"))
    operand.linear(c.array<void>("x"), dtype_of(c), c.number("tokens"), c.array<void>("bias"), DType::fp32, y, precision_of(c));
  if (void* dense = c.array<void>("dense")) operand.dequantize(dense, dtype_of(c));
}

// --- transport, distances, k-means -----------------------------------------------------------------------------------

void run_sinkhorn(const Case& c) {
  const int64_t n = c.number("n"), m = c.number("m"), iterations = c.number("iterations");
  const SinkhornProblem problem{c.array<float>("cost"),
                                n * m,
                                c.array<float>("a"),
                                n,
                                c.array<float>("b"),
                                m,
                                c.array<float>("epsilon"),
                                1,
                                c.number("problems"),
                                n,
                                m,
                                c.number<double>("rho_a", INFINITY),
                                c.number<double>("rho_b", INFINITY)};
  sinkhorn(problem, {iterations, c.number<float>("tolerance"), c.array<float>("plan"), c.array<float>("u"), c.array<float>("v"),
                     c.array<float>("tape"), c.array<int32_t>("count")});
  if (c.array<float>("grad_cost") != nullptr)
    sinkhorn_backward(problem, {iterations, c.array<float>("tape"), c.array<int32_t>("count"), c.array<float>("grad_plan"),
                                c.array<float>("grad_u"), c.array<float>("grad_v"), c.array<float>("grad_cost"),
                                c.array<float>("grad_a"), c.array<float>("grad_b")});
}

void run_doubly_stochastic(const Case& c) {
  const DoublyStochastic call{.logits = c.array<float>("logits"),
                              .problems = c.number("problems"),
                              .n = c.number("n"),
                              .m = c.number("m"),
                              .iterations = c.number("iterations"),
                              .columns_first = c.number("columns_first") != 0,
                              .softmax_start = c.number("softmax_start") != 0,
                              .shift = static_cast<Shift>(c.number("shift")),
                              .matrix_epsilon = c.number<float>("matrix_epsilon"),
                              .division_epsilon = c.number<float>("division_epsilon")};
  doubly_stochastic(call, c.array<float>("plan"));
  doubly_stochastic_backward(call, c.array<float>("gradient"), c.array<float>("logits_gradient"));
}

void run_softmax_cdist_l1(const Case& c) {
  const auto side = [&](const std::string& name) {
    return Logits{c.array<void>(name), dtype_of(c), c.number(name + "_rows"), c.array<RowStatistics>(name + "_statistics")};
  };
  const SoftmaxCdistProblem problem{side("x"), side("y"), c.number("batch"), c.number("columns"), c.number<float>("scale", 1)};
  softmax_cdist_l1(problem, c.array<float>("distances"));
  softmax_cdist_l1_backward(problem, c.array<float>("gradient"), c.array<void>("x_gradient"));
}

void run_kmeans_1d(const Case& c) {
  const int k = c.number<int>("k");
  float* const centroids[] = {c.array<float>("centroids")};
  uint8_t* const codes[] = {c.array<uint8_t>("codes")};
  kmeans_1d({.values = c.array<float>("values"),
             .weights = c.array<float>("weights"),
             .weights_stride = c.number("n"),
             .problems = c.number("problems"),
             .n = c.number("n"),
             .counts = 1,
             .ks = &k,
             .method = static_cast<KMeans1dMethod>(c.number("method")),
             .seed = 7,
             .half_centroids = false,
             .packed = false,
             .centroids = centroids,
             .codes = codes,
             .errors = c.array<double>("errors")});
}

void run_fit_columns(const Case& c) {
  const int64_t columns = c.number("columns"), rows = c.number("rows");
  const auto copied = [&]<class T>(const char* from, const char* to, T) {
    return std::copy_n(c.array<T>(from), columns * rows, c.array<T>(to)) - columns * rows;
  };
  float* const centroids = c.array<float>("centroids");
  std::copy_n(c.array<float>("start_centroids"), columns * 256, centroids);
  *c.array<double>("decrease") = fit_columns({.columns = columns,
                                              .rows = rows,
                                              .descend = c.number("descend") != 0,
                                              .method = KMeans1dMethod::exact,
                                              .block = copied("start_block", "block", 0.0f),
                                              .coupling = c.array<float>("coupling"),
                                              .coupling_stride = columns,
                                              .pivot = c.array<float>("pivot"),
                                              .row_weights = c.array<float>("row_weights"),
                                              .row_scale = c.array<float>("row_scale"),
                                              .bits = c.array<uint8_t>("bits"),
                                              .kept_counts = c.array<int32_t>("kept_counts"),
                                              .stored = copied("start_stored", "stored", 0.0f),
                                              .codes = copied("start_codes", "codes", uint8_t{}),
                                              .kept = copied("start_kept", "kept", uint8_t{}),
                                              .centroids = centroids,
                                              .moves = c.array<float>("moves")});
}

// --- decode steps ----------------------------------------------------------------------------------------------------

StepCall step_call(const Case& c) {
  return {c.array<void>("x"), c.array<void>("x"), c.array<void>("y"), DType::fp32, c.number("tokens")};
}

template <class Step>
Step step_of(const Case& c, const DenseOperand& input, const DenseOperand& output) {
  Step step{};
  step.norm.kind = static_cast<NormKind>(c.number("norm"));
  step.norm.eps = 1e-5f;
  step.norm.weight = c.list<float>("norm_weight");
  if (c.number("norm_last") != 0) {  // as in BERT
    std::swap(step.norm, step.output.norm);
    step.output.norm_last = true;
  }
  step.input.operands = {&input};
  step.output.operand = &output;
  return step;
}

void run_mlp_step(const Case& c) {
  const int64_t units = c.number("units"), hidden = c.number("hidden");
  const DenseOperand up(c.array<void>("up"), DType::fp32, 2 * units, hidden);
  const DenseOperand down(c.array<void>("down"), DType::fp32, hidden, units);
  auto step = step_of<MlpStep>(c, up, down);
  step.units = units;
  step.gate_rows = {0, 0, 1};
  step.up_rows = {0, units, 1};
  step.activation = static_cast<Activation>(c.number("activation"));
  mlp_step(step, step_call(c));
}

void run_attention_step(const Case& c) {
  const int64_t hidden = c.number("hidden"), heads = c.number("heads"), size = c.number("head_size");
  const int64_t kv_heads = c.number("kv_heads"), past = c.number("past"), capacity = past + c.number("tokens");
  const DenseOperand input(c.array<void>("qkv"), DType::fp32, (heads + 2 * kv_heads) * size, hidden);
  const DenseOperand output(c.array<void>("back"), DType::fp32, hidden, heads * size);
  auto step = step_of<AttentionStep>(c, input, output);
  step.q_rows = {0, 0, size};
  step.k_rows = {0, heads * size, size};
  step.v_rows = {0, (heads + kv_heads) * size, size};
  step.heads = heads;
  step.kv_heads = kv_heads;
  step.head_size = step.value_size = size;
  step.scale = c.number<float>("scale");
  step.soft_cap = c.number<float>("soft_cap");
  step.causal = c.number("norm_last") == 0;
  StepTokens tokens{};
  tokens.batch = 1;
  tokens.queries = c.number("tokens");
  const std::array<int64_t, 3> strides{kv_heads * capacity * size, capacity * size, size};
  attention_step(
      step, step_call(c), tokens,
      {c.array<void>("keys"), c.array<void>("values"), dtype_of(c), 1, kv_heads, capacity, size, size, strides, strides}, past);
}

void run_routed_experts(const Case& c) {
  std::vector<std::unique_ptr<Array>> layouts;
  std::vector<std::unique_ptr<CodebookOperand>> operands;
  RoutedExperts experts{};
  for (int64_t e = 0; e < c.number("experts"); ++e)
    for (auto [name, part] : {std::pair{"up", &experts.up}, {"down", &experts.down}}) {
      const CodebookCheckpoint checkpoint = codebook_of(c, name + std::to_string(e) + "_");
      const int64_t bytes = codebook_layout_bytes(checkpoint);
      layouts.push_back(std::make_unique<Array>(bytes));
      codebook_layout_pack(layouts.back()->data(), bytes, checkpoint);
      operands.push_back(std::make_unique<CodebookOperand>(layouts.back()->data(), bytes));
      part->push_back(operands.back().get());
    }
  experts.up_bias = c.list<float>("up_bias");
  experts.units = c.number("units");
  experts.gate_rows = {0, 1};
  experts.up_rows = {experts.units, 1};
  experts.precision = precision_of(c);
  check_routed_experts(experts);
  routed_experts(experts, {c.array<void>("x"), c.array<void>("y"), dtype_of(c), c.number("tokens"), c.number("choices"),
                           c.array<int64_t>("index"), c.array<float>("weights")});
}

// --- thread pool -----------------------------------------------------------------------------------------------------

// Each round with another number of threads; tasks have tasks within, one fails now and then, threads sleep between rounds.
void run_thread_pool(const Case& c) {
  const int64_t tasks = c.number("tasks"), nested = c.number("nested");
  const auto visits = std::make_unique<std::atomic<int64_t>[]>(tasks);
  const int threads = num_threads();
  for (int64_t round = 0; round < c.number("rounds"); ++round) {
    if (round % 8 == 0) set_num_threads(1 + static_cast<int>(round / 8 % 5));
    if (round % 4 == 3) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::unique_ptr<HotThreads> hot;
    if (round % 3 == 0) hot = std::make_unique<HotThreads>();
    parallel_for(tasks, 1, 1e9, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::atomic<int64_t> inside{0};
        parallel_for(nested, 2, 1e9, [&](int64_t from, int64_t to) { inside += to - from; });
        visits[i] += 1 + inside;
      }
    });
    try {
      parallel_for(tasks, 1, 1e9, [&](int64_t begin, int64_t) {
        if (begin == round % tasks) throw std::runtime_error("as it shall");
      });
      throw std::logic_error("the exception of a task was lost");
    } catch (const std::runtime_error&) {
    }
  }
  set_num_threads(threads);
  std::copy_n(visits.get(), tasks, c.array<int64_t>("visits"));
}

const std::map<std::string, void (*)(const Case&)> kOperations = {
    {"codebook", codebook},
    {"checkpoint", of_checkpoint},
    {"codes", codes},
    {"sparse", sparse},
    {"sinkhorn", run_sinkhorn},
    {"doubly_stochastic", run_doubly_stochastic},
    {"softmax_cdist_l1", run_softmax_cdist_l1},
    {"kmeans_1d", run_kmeans_1d},
    {"fit_columns", run_fit_columns},
    {"mlp_step", run_mlp_step},
    {"attention_step", run_attention_step},
    {"routed_experts", run_routed_experts},
    {"thread_pool", run_thread_pool},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "driver CASES RESULTS\n"), 2;
  std::ifstream cases(arguments[1], std::ios::binary);
  std::ofstream results(arguments[2], std::ios::binary);
  set_num_threads(3);
  for (Isa isa : supported_isas()) results << isa_name(isa) << ' ';
  results << '\n';
  for (Case one; read_case(cases, one); one = Case{})
    for (Isa isa : supported_isas()) {
      set_isa(isa_name(isa));
      for (const auto& [name, memory] : one.out) memory->poison();
      std::string outcome = "fine";
      try {
        kOperations.at(one.operation)(one);
        for (const auto& [name, memory] : one.out)
          if (!memory->guards_hold()) outcome = "error bytes around '" + name + "' were overwritten";
      } catch (const std::exception& error) {
        outcome = std::string("error ") + error.what();
      }
      results << outcome << '\n';
      for (const auto& [name, memory] : one.out) results.write(reinterpret_cast<const char*>(memory->data()), memory->bytes());
    }
  return results.good() ? 0 : 1;
}

// Python's door to the CPU back end: arguments are read, the GIL is released, kernels are called, errors are raised as
// exceptions. No torch header: shapes and dtypes are checked by the Python side.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <thread>

#include "bindings.h"
#include "state_guard.h"
#include "torch_tensors.h"
#include "codebook/cpu/checkpoint.h"
#include "codebook/cpu/layout.h"
#include "codebook/cpu/operand.h"
#include "fit_columns/cpu/fit_columns.h"
#include "runtime/isa.h"
#include "kmeans/cpu/kmeans_1d.h"
#include "codebook/cpu/pack_codes.h"
#include "runtime/read_probe.h"
#include "sinkhorn/cpu/sinkhorn.h"
#include "softmax_cdist/cpu/softmax_cdist_l1.h"
#include "sparse/cpu/layout.h"
#include "sparse/cpu/operand.h"
#include "runtime/thread_pool.h"
#include "runtime/trace.h"
#include "decode_step/attention_step.h"
#include "decode_step/cpu/dense_operand.h"
#include "decode_step/mlp_step.h"
#include "experts/routed_experts.h"

namespace pyllmq::cpu {
namespace {

using py::arg;

// Enumerators are numbered as their names stand here.
constexpr std::array kDTypes = {"fp32", "bf16", "fp16"};
constexpr std::array kPrecisions = {"exact", "high", "fast"};
constexpr std::array kPaths = {"tables", "decode", "automatic"};
constexpr std::array kKMeans1dMethods = {"exact", "windowed", "lloyd"};

template <class Enum, size_t kCount>
Enum enumerator(const char* what, int code, const std::array<const char*, kCount>& names) {
  if (code >= 0 && code < static_cast<int>(kCount)) return static_cast<Enum>(code);
  std::string allowed;
  for (size_t i = 0; i < kCount; ++i) allowed += (i == 0 ? "" : ", ") + std::to_string(i) + " (" + names[i] + ")";
  throw std::invalid_argument(std::string(what) + " " + std::to_string(code) + "; allowed: " + allowed);
}

DType dtype_of(int code) { return enumerator<DType>("dtype code", code, kDTypes); }
Precision precision_of(int code) { return enumerator<Precision>("precision", code, kPrecisions); }
LinearPath path_of(int code) { return enumerator<LinearPath>("path", code, kPaths); }
KMeans1dMethod kmeans_method_of(int code) { return enumerator<KMeans1dMethod>("method", code, kKMeans1dMethods); }

void* elements(Pointer pointer, DType dtype) {
  return dtype == DType::fp32 ? static_cast<void*>(as<float>(pointer)) : static_cast<void*>(as<uint16_t>(pointer));
}

// --- isa and threads -----------------------------------------------------------------------------------------------

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
  return names;
}

// How often each task ran, and on how many threads: what the thread pool's test looks at.
py::tuple parallel_probe(int64_t tasks, double task_us, int64_t failing_task, int64_t nested_tasks) {
  if (tasks < 0) throw std::invalid_argument("tasks = " + std::to_string(tasks) + "; must be >= 0");
  std::vector<std::atomic<int64_t>> visits(tasks);
  std::mutex mutex;
  std::set<std::thread::id> threads;
  {
    py::gil_scoped_release release;
    parallel_for(tasks, 1, 1e9, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i == failing_task) throw std::runtime_error("task " + std::to_string(i) + " failed");
        const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double, std::micro>(task_us);
        while (std::chrono::steady_clock::now() < until) {
        }
        std::atomic<int64_t> nested{0};
        parallel_for(nested_tasks, 1, 1e9, [&](int64_t b, int64_t e) { nested += e - b; });
        visits[i] += 1 + nested;
      }
      std::lock_guard<std::mutex> lock(mutex);
      threads.insert(std::this_thread::get_id());
    });
  }
  return py::make_tuple(std::vector<int64_t>(visits.begin(), visits.end()), threads.size());
}

void bind_runtime(py::module_& m) {
  m.def("supported_isas", &isa_names);
  m.def("isa", [] { return isa_name(active_isa()); });
  m.def("set_isa", &set_isa, arg("name"));
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, arg("threads"), NoGil());
  m.def("trace_clock", &trace_clock);
  m.def("start_trace", &start_trace);
  m.def("take_trace", [] {
    static const char* const kNames[] = {"step", "linear", "attention", "work"};
    py::list found;
    for (const Span& span : take_trace())
      found.append(py::make_tuple(kNames[static_cast<int>(span.part)], span.thread, span.begin, span.end));
    return found;
  });
  m.def("worker_sleep", [] {
    const WorkerSleep state = worker_sleep();
    return py::make_tuple(state.wakeups, state.asleep);
  });
  m.def("parallel_probe", &parallel_probe, arg("tasks"), arg("task_us") = 0.0, arg("failing_task") = -1, arg("nested_tasks") = 0);
  m.def("read_bandwidth_probe", with_addresses(&sum_words), arg("pointer"), arg("bytes"), NoGil());
}

// --- codes ---------------------------------------------------------------------------------------------------------

void bind_codes(py::module_& m) {
  m.def("pack_codes", with_addresses(&pack_codes), arg("codes"), arg("packed"), arg("rows"), arg("columns"), arg("bits"),
        NoGil());
  m.def("unpack_codes", with_addresses(&unpack_codes), arg("packed"), arg("codes"), arg("rows"), arg("columns"), arg("bits"),
        NoGil());
}

// --- packed weights --------------------------------------------------------------------------------------------------

template <class Operand>
std::unique_ptr<Operand> bind_layout(Pointer layout, int64_t layout_bytes) {
  return std::make_unique<Operand>(as<void>(layout), layout_bytes);
}

TorchTensors& torch_tensors() {
  static auto* const tensors = new TorchTensors;  // never destroyed: it names objects of an interpreter that ends before
  return *tensors;
}

std::optional<Precision> precision_named(py::handle name) {
  if (PyUnicode_Check(name.ptr()) == 0) return std::nullopt;
  for (size_t code = 0; code < kPrecisions.size(); ++code)
    if (PyUnicode_CompareWithASCIIString(name.ptr(), kPrecisions[code]) == 0) return static_cast<Precision>(code);
  return std::nullopt;
}

// None for what needs more than reading memory: the caller goes its general way, which also has the errors.
py::object linear_of_tensors(const LinearOperand& self, py::handle x, py::handle bias, py::handle precision_name) {
  const TorchTensors& torch = torch_tensors();
  const std::optional<Precision> precision = precision_named(precision_name);
  const std::optional<TensorRows> from = torch.rows_of(x);
  if (!precision || !from || from->columns != self.columns() || !self.is_intact()) return py::none();
  std::optional<TensorRows> added;
  if (!bias.is_none()) {
    added = torch.rows_of(bias);
    if (!added || added->tensor.ndim != 1 || added->columns != self.rows()) return py::none();
  }
  if (const int threads = torch.num_threads(); threads != num_threads()) set_num_threads(threads);
  TorchTensors::Made y = torch.empty_like_rows(*from, self.rows());
  {
    const py::gil_scoped_release released;
    self.linear(from->data, from->dtype, from->rows, added ? added->data : nullptr, added ? added->dtype : DType::fp32, y.data,
                *precision);
  }
  return std::move(y.tensor);
}

void bind_linear_operand(py::module_& m) {
  m.def(
      "use_tensors",
      [](py::object tensor_type, py::object parameter_type, py::object is_grad_enabled, py::object num_threads) {
        return torch_tensors().bind(std::move(tensor_type), std::move(parameter_type), std::move(is_grad_enabled),
                                    std::move(num_threads));
      },
      arg("tensor_type"), arg("parameter_type"), arg("is_grad_enabled"), arg("num_threads"));
  py::class_<LinearOperand>(m, "LinearOperand")
      .def_property_readonly("rows", &LinearOperand::rows)
      .def_property_readonly("columns", &LinearOperand::columns)
      .def_property_readonly("is_intact", &LinearOperand::is_intact)
      .def_property_readonly("is_native", &LinearOperand::is_native)
      .def(
          "linear",
          [](const LinearOperand& self, Pointer x, int x_dtype, int64_t tokens, Pointer bias, int bias_dtype, Pointer y,
             int precision) {
            const DType x_type = dtype_of(x_dtype), bias_type = dtype_of(bias_dtype);
            self.linear(elements(x, x_type), x_type, tokens, elements(bias, bias_type), bias_type, elements(y, x_type),
                        precision_of(precision));
          },
          arg("x"), arg("x_dtype"), arg("tokens"), arg("bias"), arg("bias_dtype"), arg("y"), arg("precision"), NoGil())
      .def("linear_of_tensors", &linear_of_tensors, arg("x"), arg("bias"), arg("precision"));
}

// --- the codebook format -------------------------------------------------------------------------------------------

void bind_codebook(py::module_& m) {
  bind_keywords<CodebookCheckpoint>(m, "CodebookCheckpoint", &codebook_checkpoint);
  m.def("codebook_layout_bytes", &codebook_layout_bytes, arg("checkpoint"), NoGil());
  m.def("codebook_layout_pack", with_addresses(&codebook_layout_pack), arg("layout"), arg("layout_bytes"), arg("checkpoint"),
        NoGil());
  py::class_<CodebookOperand, LinearOperand>(m, "CodebookOperand")
      .def(py::init(&bind_layout<CodebookOperand>), arg("layout"), arg("layout_bytes"))
      .def(
          "linear_by",
          [](const CodebookOperand& self, int path, Pointer x, int x_dtype, int64_t tokens, Pointer bias, int bias_dtype,
             Pointer y, int precision) {
            const DType x_type = dtype_of(x_dtype), bias_type = dtype_of(bias_dtype);
            self.linear_by(path_of(path), elements(x, x_type), x_type, tokens, elements(bias, bias_type), bias_type,
                           elements(y, x_type), precision_of(precision));
          },
          arg("path"), arg("x"), arg("x_dtype"), arg("tokens"), arg("bias"), arg("bias_dtype"), arg("y"), arg("precision"),
          NoGil())
      .def(
          "path",
          [](const CodebookOperand& self, int x_dtype, int64_t tokens, int precision) {
            const LinearPath path = self.path(dtype_of(x_dtype), tokens, precision_of(precision));
            return path == LinearPath::tables ? "tables" : "decode";
          },
          arg("x_dtype"), arg("tokens"), arg("precision"))
      .def(
          "dequantize",
          [](const CodebookOperand& self, int64_t row_begin, int64_t row_end, Pointer out, int out_dtype) {
            const DType type = dtype_of(out_dtype);
            self.dequantize(row_begin, row_end, elements(out, type), type);
          },
          arg("row_begin"), arg("row_end"), arg("out"), arg("out_dtype"), NoGil())
      .def(
          "row_values",
          [](const CodebookOperand& self, Pointer ids, int64_t count, Pointer out, int out_dtype) {
            const DType type = dtype_of(out_dtype);
            self.row_values(as<int64_t>(ids), count, elements(out, type), type);
          },
          arg("ids"), arg("count"), arg("out"), arg("out_dtype"), NoGil())
      .def(
          "codes", [](const CodebookOperand& self, Pointer codes_out) { self.codes(as<uint8_t>(codes_out)); }, arg("codes_out"),
          NoGil());
}

void bind_codebook_checkpoint(py::module_& m) {
  m.def("codebook_decode", with_addresses(&codebook_decode), arg("checkpoint"), arg("row_scale"), arg("codebook"), arg("weight"),
        NoGil());
  m.def("codebook_gradient", with_addresses(&codebook_gradient), arg("checkpoint"), arg("row_scale"), arg("weight_gradient"),
        arg("gradient"), NoGil());
}

// --- the sparse formats ----------------------------------------------------------------------------------------------

void bind_sparse(py::module_& m) {
  bind_keywords<SparseCheckpoint>(m, "SparseCheckpoint", &sparse_checkpoint);
  m.def("sparse_layout_bytes", &sparse_layout_bytes, arg("checkpoint"), arg("sparse_columns"), NoGil());
  m.def("sparse_layout_pack", with_addresses(&sparse_layout_pack), arg("layout"), arg("layout_bytes"), arg("checkpoint"),
        arg("sparse_columns"), NoGil());
  py::class_<SparseOperand, LinearOperand>(m, "SparseOperand")
      .def(py::init(&bind_layout<SparseOperand>), arg("layout"), arg("layout_bytes"))
      .def(
          "dequantize",
          [](const SparseOperand& self, Pointer out, int out_dtype) {
            const DType type = dtype_of(out_dtype);
            self.dequantize(elements(out, type), type);
          },
          arg("out"), arg("out_dtype"), NoGil())
      .def("unpack", &SparseOperand::unpack, arg("checkpoint"), NoGil());
}

// --- k-means -------------------------------------------------------------------------------------------------------

// centroids and codes: one array per k, or none at all; errors: null if they are not wanted.
void bind_kmeans_1d(py::module_& m) {
  m.def("kmeans_1d", [](const py::kwargs& given) {
    Keywords from(given);
    KMeans1dArguments k{};
    from.fill("values", k.values, "weights", k.weights, "weights_stride", k.weights_stride, "problems", k.problems, "n", k.n,
              "seed", k.seed, "half_centroids", k.half_centroids, "packed", k.packed, "errors", k.errors);
    k.method = kmeans_method_of(from.take<int>("method"));
    const auto ks = from.take<std::vector<int>>("ks");
    std::vector<float*> centroids;
    std::vector<uint8_t*> codes;
    for (const py::handle one : from.take<py::list>("centroids")) centroids.push_back(array<float>(one));
    for (const py::handle one : from.take<py::list>("codes")) codes.push_back(array<uint8_t>(one));
    from.finish();
    if (ks.empty() || centroids.size() != codes.size() || (!codes.empty() && codes.size() != ks.size()))
      throw std::invalid_argument("kmeans_1d takes at least one k, and no or one array for centroids and codes of each");
    k.counts = static_cast<int>(ks.size());
    k.ks = ks.data();
    if (!codes.empty()) k.centroids = centroids.data(), k.codes = codes.data();
    const py::gil_scoped_release release;
    kmeans_1d(k);
  });
}

// --- compression ---------------------------------------------------------------------------------------------------

void bind_fit_columns(py::module_& m) {
  m.def("fit_columns", [](const py::kwargs& given) {
    Keywords from(given);
    FitColumnsArguments f{};
    from.fill("columns", f.columns, "rows", f.rows, "descend", f.descend, "block", f.block, "coupling", f.coupling,
              "coupling_stride", f.coupling_stride, "pivot", f.pivot, "row_weights", f.row_weights, "row_scale", f.row_scale,
              "bits", f.bits, "kept_counts", f.kept_counts, "stored", f.stored, "codes", f.codes, "kept", f.kept, "centroids",
              f.centroids, "moves", f.moves);
    f.method = kmeans_method_of(from.take<int>("method"));
    from.finish();
    const py::gil_scoped_release release;
    return fit_columns(f);
  });
}

// --- sinkhorn ------------------------------------------------------------------------------------------------------

template <class Out>
void bind_sinkhorn_pass(py::module_& m, const char* name, Out (*read)(Keywords&),
                        void (*run)(const SinkhornProblem&, const Out&)) {
  m.def(name, [read, run](const py::kwargs& given) {
    Keywords from(given);
    const Out out = read(from);
    const SinkhornProblem p = sinkhorn_problem(from);
    from.finish();
    if (p.problems < 0 || p.n < 1 || p.m < 1 || out.iterations < 1 || !(p.rho_a > 0 && p.rho_b > 0))
      throw std::invalid_argument("problems must be >= 0, n, m and iterations >= 1, prices > 0");
    const auto fits = [](int64_t stride, int64_t size) { return stride == 0 || stride == size; };
    if (!fits(p.cost_stride, p.n * p.m) || !fits(p.a_stride, p.n) || !fits(p.b_stride, p.m) ||
        (p.epsilon_stride != 1 && p.problems > 1))
      throw std::invalid_argument("strides of cost, a and b between problems are each its size, or 0 if shared; epsilon's is 1");
    const py::gil_scoped_release release;
    run(p, out);
  });
}

void bind_sinkhorn(py::module_& m) {
  bind_sinkhorn_pass(m, "sinkhorn", &sinkhorn_results, &sinkhorn);
  bind_sinkhorn_pass(m, "sinkhorn_backward", &sinkhorn_gradients, &sinkhorn_backward);
}

// --- doubly_stochastic ---------------------------------------------------------------------------------------------

DoublyStochastic doubly_stochastic_call(Keywords& given) {
  DoublyStochastic d{};
  given.fill("logits", d.logits, "problems", d.problems, "n", d.n, "m", d.m, "iterations", d.iterations, "columns_first",
             d.columns_first, "softmax_start", d.softmax_start, "matrix_epsilon", d.matrix_epsilon, "division_epsilon",
             d.division_epsilon);
  const int shift = given.take<int>("shift");
  if (d.problems < 0 || d.n < 1 || d.m < 1 || d.n * d.m > kSmallEntries || d.iterations < 1 || shift < 0 || shift > 2)
    throw std::invalid_argument("problems must be >= 0, n, m and iterations >= 1, n * m at most " +
                                std::to_string(kSmallEntries) + ", shift 0 (none), 1 (line) or 2 (matrix)");
  d.shift = static_cast<Shift>(shift);
  return d;
}

void bind_doubly_stochastic(py::module_& m) {
  bind_keywords<DoublyStochastic>(m, "DoublyStochastic", &doubly_stochastic_call);
  m.def("doubly_stochastic", with_addresses(&doubly_stochastic), arg("call"), arg("out"), NoGil());
  m.def("doubly_stochastic_backward", with_addresses(&doubly_stochastic_backward), arg("call"), arg("gradient"),
        arg("logits_gradient"), NoGil());
}

// --- distances of distributions --------------------------------------------------------------------------------------

SoftmaxCdistProblem cdist_problem(Keywords& given) {
  SoftmaxCdistProblem p{};
  given.fill("batch", p.batch, "columns", p.columns, "scale", p.inverse_temperature, "x_rows", p.x.rows, "y_rows", p.y.rows, "x",
             p.x.values, "y", p.y.values);
  p.x.dtype = dtype_of(given.take<int>("x_dtype"));
  p.y.dtype = dtype_of(given.take<int>("y_dtype"));
  p.x.statistics = reinterpret_cast<RowStatistics*>(given.take<float*>("x_statistics"));
  p.y.statistics = reinterpret_cast<RowStatistics*>(given.take<float*>("y_statistics"));
  if (p.batch < 0 || p.x.rows < 0 || p.y.rows < 0 || p.columns < 1)
    throw std::invalid_argument("batch, rows and columns are " + std::to_string(p.batch) + ", " + std::to_string(p.x.rows) +
                                " and " + std::to_string(p.y.rows) + ", " + std::to_string(p.columns) +
                                "; none may be negative, and columns not 0");
  return p;
}

void bind_softmax_cdist_l1(py::module_& m) {
  bind_keywords<SoftmaxCdistProblem>(m, "Cdist", &cdist_problem);
  m.def("softmax_cdist_l1", with_addresses(&softmax_cdist_l1), arg("call"), arg("distances"), NoGil());
  m.def("softmax_cdist_l1_backward", with_addresses(&softmax_cdist_l1_backward), arg("call"), arg("gradient"), arg("x_gradient"),
        NoGil());
}

// --- decode steps --------------------------------------------------------------------------------------------------

Norm norm_of(Keywords& given, const char* name) {
  const auto* norm = given.take<const Norm*>(name, nullptr);
  return norm == nullptr ? Norm{} : *norm;
}

// One of the allowed names -> the enumerator at its place.
template <class Enum>
Enum choice(const char* name, const std::string& given, const std::vector<std::string>& allowed) {
  const auto found = std::find(allowed.begin(), allowed.end(), given);
  if (found != allowed.end()) return static_cast<Enum>(found - allowed.begin());
  std::string list;
  for (const std::string& one : allowed) list += (list.empty() ? "" : ", ") + one;
  throw std::invalid_argument(std::string(name) + " '" + given + "' is not known; allowed: " + list);
}

template <class Step>
struct Bound {
  Step step;
  py::tuple operands;  // keeps them alive
};

struct TypedTokens {
  StepTokens tokens;
  DType dtype;

  StepCall call(Pointer x, Pointer residual, Pointer y) const {
    return {elements(x, dtype), elements(residual, dtype), elements(y, dtype), dtype, tokens.batch * tokens.queries};
  }
};

template <class Rows>
Rows rows_of(const std::array<int64_t, 3>& rows) {
  return {rows[0], rows[1], rows[2]};
}

using Three = std::array<int64_t, 3>;
using Floats = std::vector<float>;

InputLinears input_of(Keywords& arguments, const py::tuple& inputs) {
  return {inputs.cast<std::vector<const LinearOperand*>>(), arguments.take<Floats>("input_bias", {})};
}

OutputLinear output_of(Keywords& arguments, const py::object& output) {
  return {output.cast<const LinearOperand*>(), arguments.take<Floats>("output_bias", {}), norm_of(arguments, "output_norm"),
          arguments.take<float>("multiplier", 1), arguments.take<bool>("norm_last", false)};
}

Bound<AttentionStep> bound_attention_step(const py::kwargs& given) {
  Keywords arguments(given);
  const auto inputs = arguments.take<py::tuple>("inputs");
  const auto output = arguments.take<py::object>("output");
  AttentionStep step{
      .norm = norm_of(arguments, "norm"),
      .input = input_of(arguments, inputs),
      .q_rows = rows_of<HeadRows>(arguments.take<Three>("q_rows")),
      .k_rows = rows_of<HeadRows>(arguments.take<Three>("k_rows")),
      .v_rows = rows_of<HeadRows>(arguments.take<Three>("v_rows")),
      .heads = arguments.take<int64_t>("heads"),
      .kv_heads = arguments.take<int64_t>("kv_heads"),
      .head_size = arguments.take<int64_t>("head_size"),
      .value_size = arguments.take<int64_t>("value_size"),
      .q_norm = norm_of(arguments, "q_norm"),
      .k_norm = norm_of(arguments, "k_norm"),
      .v_norm = norm_of(arguments, "v_norm"),
      .norms_span_heads = arguments.take<bool>("norms_span_heads", false),
      .norms_after_rotary = arguments.take<bool>("norms_after_rotary", false),
      .rotary = choice<Rotary>("rotary", arguments.take<std::string>("rotary", "none"), {"none", "halves", "interleaved"}),
      .rotary_size = arguments.take<int64_t>("rotary_size", 0),
      .scale = arguments.take<float>("scale"),
      .soft_cap = arguments.take<float>("soft_cap", 0),
      .window = arguments.take<int64_t>("window", 0),
      .causal = arguments.take<bool>("causal", true),
      .sinks = arguments.take<Floats>("sinks", {}),
      .output = output_of(arguments, output),
      .precision = precision_of(arguments.take<int>("precision", 1))};
  arguments.finish();
  check_attention_step(step);
  return {std::move(step), py::make_tuple(inputs, output)};
}

Bound<MlpStep> bound_mlp_step(const py::kwargs& given) {
  Keywords arguments(given);
  const auto inputs = arguments.take<py::tuple>("inputs");
  const auto output = arguments.take<py::object>("output");
  const auto gate = arguments.take<Three>("gate_rows");
  const auto up = arguments.take<std::optional<Three>>("up_rows", std::nullopt);
  MlpStep step{.norm = norm_of(arguments, "norm"),
               .input = input_of(arguments, inputs),
               .units = arguments.take<int64_t>("units"),
               .gate_rows = rows_of<UnitRows>(gate),
               .up_rows = rows_of<UnitRows>(up.value_or(gate)),
               .gated = up.has_value(),
               .activation = choice<Activation>("activation", arguments.take<std::string>("activation"), activation_names()),
               .output = output_of(arguments, output),
               .precision = precision_of(arguments.take<int>("precision", 1))};
  arguments.finish();
  check_mlp_step(step);
  return {std::move(step), py::make_tuple(inputs, output)};
}

Norm make_norm(const std::string& kind, float eps, Floats weight, Floats bias) {
  if (kind != "rms" && kind != "layer") throw std::invalid_argument("norm '" + kind + "' is not known; allowed: rms, layer");
  return {kind == "rms" ? NormKind::rms : NormKind::layer, eps, std::move(weight), std::move(bias)};
}

KeyValueCache cache_of(Pointer keys, Pointer values, int dtype, int64_t batch, int64_t kv_heads, int64_t capacity,
                       int64_t head_size, int64_t value_size, const Three& key_strides, const Three& value_strides) {
  const DType type = dtype_of(dtype);
  return {elements(keys, type), elements(values, type), type, batch, kv_heads, capacity, head_size, value_size,
          key_strides,          value_strides};
}

TypedTokens tokens_of(int64_t batch, int64_t queries, int dtype, Pointer cos, Pointer sin, std::vector<int64_t> starts,
                      Pointer mask, const std::array<int64_t, 2>& mask_strides) {
  return {{batch, queries, as<float>(cos), as<float>(sin), std::move(starts), as<float>(mask), mask_strides[0], mask_strides[1]},
          dtype_of(dtype)};
}

template <class Step>
py::class_<Bound<Step>> bind_step(py::module_& m, const char* name, Bound<Step> (*make)(const py::kwargs&)) {
  return py::class_<Bound<Step>>(m, name)
      .def(py::init(make))
      .def_property(
          "precision", [](const Bound<Step>& bound) { return static_cast<int>(bound.step.precision); },
          [](Bound<Step>& bound, int code) { bound.step.precision = precision_of(code); });
}

// Blocks of one model, each an attention step and an MLP step with their residuals.
class BlockRun {
 public:
  BlockRun(const py::list& blocks) : keep_(blocks) {
    for (const py::handle block : blocks) {
      const auto parts = py::cast<py::tuple>(block);
      blocks_.push_back(
          {parts[0].cast<const Bound<AttentionStep>*>(), parts[1].cast<const Bound<MlpStep>*>(), parts[2].cast<bool>()});
    }
  }

  void run(Pointer x, Pointer y, Pointer copies, const TypedTokens& tokens, const std::vector<const KeyValueCache*>& caches,
           const std::vector<int64_t>& pasts, const Norm* norm) const {
    if (caches.size() != blocks_.size() || pasts.size() != blocks_.size())
      throw std::invalid_argument("there are " + std::to_string(blocks_.size()) + " blocks, " + std::to_string(caches.size()) +
                                  " caches and " + std::to_string(pasts.size()) + " pasts");
    const HotThreads hot;
    const int64_t hidden = blocks_.empty() ? 0 : blocks_[0].attention->step.output.operand->rows();
    const int64_t bytes = tokens.tokens.batch * tokens.tokens.queries * hidden * element_bytes(tokens.dtype);
    for (size_t i = 0; i < blocks_.size(); ++i, x = y, y += bytes) {
      const Block& block = blocks_[i];
      attention_step(block.attention->step, tokens.call(x, x, y), tokens.tokens, *caches[i], pasts[i]);
      mlp_step(block.mlp->step, tokens.call(block.in_sequence ? y : x, y, y));
      if (copies != 0) std::memcpy(as<uint8_t>(copies + i * bytes), as<uint8_t>(y), bytes);
    }
    if (norm != nullptr) norm_step(*norm, tokens.call(x, 0, y), hidden);
  }

 private:
  struct Block {
    const Bound<AttentionStep>* attention;
    const Bound<MlpStep>* mlp;
    bool in_sequence;
  };
  py::list keep_;
  std::vector<Block> blocks_;
};

void bind_decode_step(py::module_& m) {
  py::class_<DenseOperand, LinearOperand>(m, "DenseOperand")
      .def(py::init([](Pointer weight, int dtype, int64_t rows, int64_t columns) {
             const DType type = dtype_of(dtype);
             return std::make_unique<DenseOperand>(elements(weight, type), type, rows, columns);
           }),
           arg("weight"), arg("dtype"), arg("rows"), arg("columns"));
  py::class_<Norm>(m, "Norm").def(py::init(&make_norm), arg("kind"), arg("eps"), arg("weight") = Floats{},
                                  arg("bias") = Floats{});
  py::class_<KeyValueCache>(m, "KeyValueCache")
      .def(py::init(&cache_of), py::kw_only(), arg("keys"), arg("values"), arg("dtype"), arg("batch"), arg("kv_heads"),
           arg("capacity"), arg("head_size"), arg("value_size"), arg("key_strides"), arg("value_strides"));
  py::class_<TypedTokens>(m, "StepTokens")
      .def(py::init(&tokens_of), py::kw_only(), arg("batch"), arg("queries"), arg("dtype"), arg("cos") = 0, arg("sin") = 0,
           arg("starts") = std::vector<int64_t>{}, arg("mask") = 0, arg("mask_strides") = std::array<int64_t, 2>{});
  bind_step(m, "AttentionStep", &bound_attention_step)
      .def(
          "__call__",
          [](const Bound<AttentionStep>& bound, Pointer x, Pointer y, const TypedTokens& tokens, const KeyValueCache& cache,
             int64_t past,
             Pointer residual) { attention_step(bound.step, tokens.call(x, residual, y), tokens.tokens, cache, past); },
          arg("x"), arg("y"), arg("tokens"), arg("cache"), arg("past"), arg("residual") = 0, NoGil());
  bind_step(m, "MlpStep", &bound_mlp_step)
      .def(
          "__call__",
          [](const Bound<MlpStep>& bound, Pointer x, Pointer y, const TypedTokens& tokens, Pointer residual) {
            mlp_step(bound.step, tokens.call(x, residual, y));
          },
          arg("x"), arg("y"), arg("tokens"), arg("residual") = 0, NoGil());
  py::class_<BlockRun>(m, "BlockRun")
      .def(py::init<const py::list&>(), arg("blocks"))
      .def("__call__", &BlockRun::run, arg("x"), arg("y"), arg("copies"), arg("tokens"), arg("caches"), arg("pasts"),
           arg("norm") = nullptr, NoGil());
  py::class_<StateGuard>(m, "StateGuard")
      .def(py::init<py::list, py::list, py::list>(), arg("slots"), arg("empty"), arg("tensors"))
      .def("holds", &StateGuard::holds);
  m.def(
      "same_bytes", [](Pointer a, Pointer b, int64_t bytes) { return std::memcmp(as<uint8_t>(a), as<uint8_t>(b), bytes) == 0; },
      arg("a"), arg("b"), arg("bytes"));
}

// --- experts -------------------------------------------------------------------------------------------------------

Bound<RoutedExperts> bound_routed_experts(const py::kwargs& given) {
  Keywords arguments(given);
  using Two = std::array<int64_t, 2>;
  const auto up = arguments.take<py::tuple>("up"), down = arguments.take<py::tuple>("down");
  const auto gate_rows = arguments.take<Two>("gate_rows");
  const auto up_rows = arguments.take<std::optional<Two>>("up_rows");
  RoutedExperts experts{
      .up = up.cast<std::vector<const LinearOperand*>>(),
      .down = down.cast<std::vector<const LinearOperand*>>(),
      .up_bias = arguments.take<Floats>("up_bias"),
      .down_bias = arguments.take<Floats>("down_bias"),
      .units = arguments.take<int64_t>("units"),
      .gate_rows = {gate_rows[0], gate_rows[1]},
      .up_rows = up_rows ? GateRows{(*up_rows)[0], (*up_rows)[1]} : GateRows{},
      .gated = up_rows.has_value(),
      .activation = choice<Activation>("activation", arguments.take<std::string>("activation"), activation_names()),
      .limit = arguments.take<float>("limit"),
      .alpha = arguments.take<float>("alpha"),
      .offset = arguments.take<float>("offset"),
      .precision = precision_of(arguments.take<int>("precision"))};
  arguments.finish();
  check_routed_experts(experts);
  return {std::move(experts), py::make_tuple(up, down)};
}

void bind_experts(py::module_& m) {
  bind_step(m, "RoutedExperts", &bound_routed_experts)
      .def(
          "__call__",
          [](const Bound<RoutedExperts>& bound, Pointer x, Pointer y, int dtype, int64_t tokens, int64_t choices, Pointer index,
             Pointer weights) {
            const DType type = dtype_of(dtype);
            routed_experts(bound.step,
                           {elements(x, type), elements(y, type), type, tokens, choices, as<int64_t>(index), as<float>(weights)});
          },
          arg("x"), arg("y"), arg("dtype"), arg("tokens"), arg("choices"), arg("index"), arg("weights"), NoGil());
}

}  // namespace
}  // namespace pyllmq::cpu

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "pyllmq CPU back end (built without libtorch)";
  pyllmq::cpu::bind_runtime(m);
  pyllmq::cpu::bind_codes(m);
  pyllmq::cpu::bind_linear_operand(m);
  pyllmq::cpu::bind_codebook(m);
  pyllmq::cpu::bind_codebook_checkpoint(m);
  pyllmq::cpu::bind_sparse(m);
  pyllmq::cpu::bind_kmeans_1d(m);
  pyllmq::cpu::bind_fit_columns(m);
  pyllmq::cpu::bind_sinkhorn(m);
  pyllmq::cpu::bind_doubly_stochastic(m);
  pyllmq::cpu::bind_softmax_cdist_l1(m);
  pyllmq::cpu::bind_decode_step(m);
  pyllmq::cpu::bind_experts(m);
}

// Python's door to the CPU back end. Pointers, sizes and flags come in as integers, the GIL is released, kernels are
// called, errors are raised as exceptions. No torch header: shapes and dtypes are checked by the Python side.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <thread>

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

namespace py = pybind11;

namespace pyllmq::cpu {
namespace {

using Pointer = uint64_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* as(Pointer pointer) {
  if (pointer % alignof(T) != 0) throw std::invalid_argument("a pointer is not aligned to its element size");
  return reinterpret_cast<T*>(static_cast<uintptr_t>(pointer));
}

template <>
void* as<void>(Pointer pointer) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(pointer));
}

DType dtype_of(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("dtype code " + std::to_string(code) + "; allowed: 0 (fp32), 1 (bf16), 2 (fp16)");
  return static_cast<DType>(code);
}

Precision precision_of(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("precision " + std::to_string(code) + "; allowed: 0 (exact), 1 (high), 2 (fast)");
  return static_cast<Precision>(code);
}

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
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("threads"), NoGil());
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
  m.def("parallel_probe", &parallel_probe, py::arg("tasks"), py::arg("task_us") = 0.0, py::arg("failing_task") = -1,
        py::arg("nested_tasks") = 0);
  m.def(
      "read_bandwidth_probe", [](Pointer memory, int64_t bytes) { return sum_words(as<uint64_t>(memory), bytes); },
      py::arg("pointer"), py::arg("bytes"), NoGil());
}

// --- codes ---------------------------------------------------------------------------------------------------------

void bind_codes(py::module_& m) {
  m.def(
      "pack_codes",
      [](Pointer codes, Pointer packed, int64_t rows, int64_t columns, int bits) {
        pack_codes(as<uint8_t>(codes), as<uint8_t>(packed), rows, columns, bits);
      },
      py::arg("codes"), py::arg("packed"), py::arg("rows"), py::arg("columns"), py::arg("bits"), NoGil());
  m.def(
      "unpack_codes",
      [](Pointer packed, Pointer codes, int64_t rows, int64_t columns, int bits) {
        unpack_codes(as<uint8_t>(packed), as<uint8_t>(codes), rows, columns, bits);
      },
      py::arg("packed"), py::arg("codes"), py::arg("rows"), py::arg("columns"), py::arg("bits"), NoGil());
}

// --- packed weights --------------------------------------------------------------------------------------------------

template <class Operand>
std::unique_ptr<Operand> bind_layout(Pointer layout, int64_t layout_bytes) {
  return std::make_unique<Operand>(as<void>(layout), layout_bytes);
}

void bind_linear_operand(py::module_& m) {
  py::class_<LinearOperand>(m, "LinearOperand")
      .def_property_readonly("rows", &LinearOperand::rows)
      .def_property_readonly("columns", &LinearOperand::columns)
      .def_property_readonly("is_intact", &LinearOperand::is_intact)
      .def(
          "linear",
          [](const LinearOperand& self, Pointer x, int x_dtype, int64_t tokens, Pointer bias, int bias_dtype, Pointer y,
             int precision) {
            const DType x_type = dtype_of(x_dtype), bias_type = dtype_of(bias_dtype);
            self.linear(elements(x, x_type), x_type, tokens, elements(bias, bias_type), bias_type, elements(y, x_type),
                        precision_of(precision));
          },
          py::arg("x"), py::arg("x_dtype"), py::arg("tokens"), py::arg("bias"), py::arg("bias_dtype"), py::arg("y"),
          py::arg("precision"), NoGil());
}

// --- the codebook format -------------------------------------------------------------------------------------------

int64_t layout_bytes(int64_t rows, int64_t columns, Pointer column_bits, Pointer segment_rows, int64_t segments,
                     int64_t outliers) {
  return codebook_layout_bytes(rows, columns, as<uint8_t>(column_bits), as<int32_t>(segment_rows), segments, outliers);
}

void layout_pack(Pointer layout, int64_t bytes, int64_t rows, int64_t columns, Pointer column_bits, Pointer segment_rows,
                 int64_t segments, const std::vector<Pointer>& codes, Pointer codebook, Pointer row_scale,
                 Pointer outlier_row_offsets, Pointer outlier_columns, int outlier_columns_bytes, Pointer outlier_values) {
  if (codes.size() != 8)
    throw std::invalid_argument("codes has " + std::to_string(codes.size()) + " pointers; needs 8, one per width 1..8");
  CodebookCheckpoint checkpoint{};
  checkpoint.rows = rows;
  checkpoint.columns = columns;
  checkpoint.segments = segments;
  checkpoint.column_bits = as<uint8_t>(column_bits);
  checkpoint.segment_rows = as<int32_t>(segment_rows);
  for (int width = 1; width <= 8; ++width) checkpoint.codes[width] = as<uint8_t>(codes[width - 1]);
  checkpoint.codebook = as<uint16_t>(codebook);
  checkpoint.row_scale = as<uint16_t>(row_scale);
  checkpoint.outlier_row_offsets = as<int32_t>(outlier_row_offsets);
  checkpoint.outlier_columns = outlier_columns_bytes == 2 ? static_cast<void*>(as<uint16_t>(outlier_columns))
                                                          : static_cast<void*>(as<int32_t>(outlier_columns));
  checkpoint.outlier_columns_bytes = outlier_columns_bytes;
  checkpoint.outlier_values = as<uint16_t>(outlier_values);
  codebook_layout_pack(as<void>(layout), bytes, checkpoint);
}

LinearPath path_of(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("path " + std::to_string(code) + "; allowed: 0 (tables), 1 (decode), 2 (automatic)");
  return static_cast<LinearPath>(code);
}

void bind_codebook(py::module_& m) {
  m.def("codebook_layout_bytes", &layout_bytes, py::arg("rows"), py::arg("columns"), py::arg("column_bits"),
        py::arg("segment_rows"), py::arg("segments"), py::arg("outliers"), NoGil());
  m.def("codebook_layout_pack", &layout_pack, py::arg("layout"), py::arg("layout_bytes"), py::arg("rows"), py::arg("columns"),
        py::arg("column_bits"), py::arg("segment_rows"), py::arg("segments"), py::arg("codes"), py::arg("codebook"),
        py::arg("row_scale"), py::arg("outlier_row_offsets"), py::arg("outlier_columns"), py::arg("outlier_columns_bytes"),
        py::arg("outlier_values"), NoGil());
  py::class_<CodebookOperand, LinearOperand>(m, "CodebookOperand")
      .def(py::init(&bind_layout<CodebookOperand>), py::arg("layout"), py::arg("layout_bytes"))
      .def(
          "linear_by",
          [](const CodebookOperand& self, int path, Pointer x, int x_dtype, int64_t tokens, Pointer bias, int bias_dtype,
             Pointer y, int precision) {
            const DType x_type = dtype_of(x_dtype), bias_type = dtype_of(bias_dtype);
            self.linear_by(path_of(path), elements(x, x_type), x_type, tokens, elements(bias, bias_type), bias_type,
                           elements(y, x_type), precision_of(precision));
          },
          py::arg("path"), py::arg("x"), py::arg("x_dtype"), py::arg("tokens"), py::arg("bias"), py::arg("bias_dtype"),
          py::arg("y"), py::arg("precision"), NoGil())
      .def(
          "path",
          [](const CodebookOperand& self, int x_dtype, int64_t tokens, int precision) {
            const LinearPath path = self.path(dtype_of(x_dtype), tokens, precision_of(precision));
            return path == LinearPath::tables ? "tables" : "decode";
          },
          py::arg("x_dtype"), py::arg("tokens"), py::arg("precision"))
      .def(
          "dequantize",
          [](const CodebookOperand& self, int64_t row_begin, int64_t row_end, Pointer out, int out_dtype) {
            const DType type = dtype_of(out_dtype);
            self.dequantize(row_begin, row_end, elements(out, type), type);
          },
          py::arg("row_begin"), py::arg("row_end"), py::arg("out"), py::arg("out_dtype"), NoGil())
      .def(
          "codes", [](const CodebookOperand& self, Pointer codes_out) { self.codes(as<uint8_t>(codes_out)); },
          py::arg("codes_out"), NoGil());
}

CodebookTensors codebook_tensors(int64_t rows, int64_t columns, Pointer column_bits, Pointer segment_rows, int64_t segments,
                                 const std::vector<Pointer>& codes, Pointer row_scale) {
  if (codes.size() != 8)
    throw std::invalid_argument("codes has " + std::to_string(codes.size()) + " pointers; needs 8, one per width 1..8");
  CodebookTensors tensors{rows, columns, segments, as<uint8_t>(column_bits), as<int32_t>(segment_rows), {}, as<float>(row_scale)};
  for (int width = 1; width <= 8; ++width) tensors.codes[width] = as<uint8_t>(codes[width - 1]);
  return tensors;
}

void bind_codebook_checkpoint(py::module_& m) {
  m.def(
      "codebook_decode",
      [](int64_t rows, int64_t columns, Pointer column_bits, Pointer segment_rows, int64_t segments,
         const std::vector<Pointer>& codes, Pointer row_scale, Pointer codebook, Pointer weight) {
        codebook_decode(codebook_tensors(rows, columns, column_bits, segment_rows, segments, codes, row_scale),
                        as<float>(codebook), as<float>(weight));
      },
      py::arg("rows"), py::arg("columns"), py::arg("column_bits"), py::arg("segment_rows"), py::arg("segments"), py::arg("codes"),
      py::arg("row_scale"), py::arg("codebook"), py::arg("weight"), NoGil());
  m.def(
      "codebook_gradient",
      [](int64_t rows, int64_t columns, Pointer column_bits, Pointer segment_rows, int64_t segments,
         const std::vector<Pointer>& codes, Pointer row_scale, Pointer weight_gradient, Pointer gradient) {
        codebook_gradient(codebook_tensors(rows, columns, column_bits, segment_rows, segments, codes, row_scale),
                          as<float>(weight_gradient), as<float>(gradient));
      },
      py::arg("rows"), py::arg("columns"), py::arg("column_bits"), py::arg("segment_rows"), py::arg("segments"), py::arg("codes"),
      py::arg("row_scale"), py::arg("weight_gradient"), py::arg("gradient"), NoGil());
}

// --- the sparse formats ----------------------------------------------------------------------------------------------

void bind_sparse(py::module_& m) {
  py::class_<SparseCheckpoint>(m, "SparseCheckpoint")
      .def(py::init(&sparse_checkpoint), py::arg("kind"), py::arg("value_type"), py::arg("rows"), py::arg("columns"),
           py::arg("kept"), py::arg("bits"), py::arg("outliers"), py::arg("column_bytes"), py::arg("tensors"));
  m.def("sparse_layout_bytes", &sparse_layout_bytes, py::arg("checkpoint"), py::arg("sparse_columns"), NoGil());
  m.def(
      "sparse_layout_pack",
      [](Pointer layout, int64_t bytes, const SparseCheckpoint& checkpoint, double sparse_columns) {
        sparse_layout_pack(as<void>(layout), bytes, checkpoint, sparse_columns);
      },
      py::arg("layout"), py::arg("layout_bytes"), py::arg("checkpoint"), py::arg("sparse_columns"), NoGil());
  py::class_<SparseOperand, LinearOperand>(m, "SparseOperand")
      .def(py::init(&bind_layout<SparseOperand>), py::arg("layout"), py::arg("layout_bytes"))
      .def(
          "dequantize",
          [](const SparseOperand& self, Pointer out, int out_dtype) {
            const DType type = dtype_of(out_dtype);
            self.dequantize(elements(out, type), type);
          },
          py::arg("out"), py::arg("out_dtype"), NoGil())
      .def("unpack", &SparseOperand::unpack, py::arg("checkpoint"), NoGil());
}

// --- k-means -------------------------------------------------------------------------------------------------------

KMeans1dMethod kmeans_method_of(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("method " + std::to_string(code) + "; allowed: 0 (exact), 1 (windowed), 2 (lloyd)");
  return static_cast<KMeans1dMethod>(code);
}

// centroids and codes: one pointer per k, or none at all; errors: 0 if they are not wanted.
void kmeans(Pointer values, Pointer weights, int64_t weights_stride, int64_t problems, int64_t n, const std::vector<int>& ks,
            int method, uint64_t seed, bool half_centroids, bool packed, const std::vector<Pointer>& centroids,
            const std::vector<Pointer>& codes, Pointer errors) {
  if (ks.empty() || centroids.size() != codes.size() || (!codes.empty() && codes.size() != ks.size()))
    throw std::invalid_argument("kmeans_1d takes at least one k, and no or one pointer to centroids and codes for each");
  std::vector<float*> centroids_out;
  std::vector<uint8_t*> codes_out;
  for (const Pointer pointer : centroids) centroids_out.push_back(as<float>(pointer));
  for (const Pointer pointer : codes) codes_out.push_back(as<uint8_t>(pointer));
  kmeans_1d({
      .values = as<float>(values),
      .weights = as<float>(weights),
      .weights_stride = weights_stride,
      .problems = problems,
      .n = n,
      .counts = static_cast<int>(ks.size()),
      .ks = ks.data(),
      .method = kmeans_method_of(method),
      .seed = seed,
      .half_centroids = half_centroids,
      .packed = packed,
      .centroids = centroids.empty() ? nullptr : centroids_out.data(),
      .codes = codes.empty() ? nullptr : codes_out.data(),
      .errors = as<double>(errors),
  });
}

void bind_kmeans_1d(py::module_& m) {
  m.def("kmeans_1d", &kmeans, py::arg("values"), py::arg("weights"), py::arg("weights_stride"), py::arg("problems"), py::arg("n"),
        py::arg("ks"), py::arg("method"), py::arg("seed"), py::arg("half_centroids"), py::arg("packed"), py::arg("centroids"),
        py::arg("codes"), py::arg("errors"), NoGil());
}

// --- compression ---------------------------------------------------------------------------------------------------

void bind_fit_columns(py::module_& m) {
  m.def(
      "fit_columns",
      [](int64_t columns, int64_t rows, bool descend, int method, Pointer block, Pointer coupling, int64_t coupling_stride,
         Pointer pivot, Pointer row_weights, Pointer row_scale, Pointer bits, Pointer kept, Pointer stored, Pointer codes,
         Pointer kept_mask, Pointer centroids, Pointer moves) {
        return fit_columns({
            .columns = columns,
            .rows = rows,
            .descend = descend,
            .method = kmeans_method_of(method),
            .block = as<float>(block),
            .coupling = as<float>(coupling),
            .coupling_stride = coupling_stride,
            .pivot = as<float>(pivot),
            .row_weights = as<float>(row_weights),
            .row_scale = as<float>(row_scale),
            .bits = as<uint8_t>(bits),
            .kept = as<int32_t>(kept),
            .stored = as<float>(stored),
            .codes = as<uint8_t>(codes),
            .kept_mask = as<uint8_t>(kept_mask),
            .centroids = as<float>(centroids),
            .moves = as<float>(moves),
        });
      },
      py::arg("columns"), py::arg("rows"), py::arg("descend"), py::arg("method"), py::arg("block"), py::arg("coupling"),
      py::arg("coupling_stride"), py::arg("pivot"), py::arg("row_weights"), py::arg("row_scale"), py::arg("bits"),
      py::arg("kept"), py::arg("stored"), py::arg("codes"), py::arg("kept_mask"), py::arg("centroids"), py::arg("moves"),
      NoGil());
}

// --- sinkhorn ------------------------------------------------------------------------------------------------------

SinkhornProblem sinkhorn_problem(const std::vector<Pointer>& inputs, const std::vector<int64_t>& strides, int64_t problems,
                                 int64_t n, int64_t m, int64_t iterations, double rho_a, double rho_b) {
  if (inputs.size() != 4)
    throw std::invalid_argument("inputs has " + std::to_string(inputs.size()) + " pointers; needs 4: cost, a, b, epsilon");
  if (problems < 0 || n < 1 || m < 1 || iterations < 1 || !(rho_a > 0 && rho_b > 0))
    throw std::invalid_argument("problems must be >= 0, n, m and iterations >= 1, prices > 0");
  const int64_t sizes[3] = {n * m, n, m};
  for (size_t i = 0; i < 3; ++i)
    if (strides.size() != 3 || (strides[i] != 0 && strides[i] != sizes[i]))
      throw std::invalid_argument("strides are those of cost, a and b between problems: each its size, or 0 if shared");
  return {
      .cost = as<float>(inputs[0]),
      .cost_stride = strides[0],
      .a = as<float>(inputs[1]),
      .a_stride = strides[1],
      .b = as<float>(inputs[2]),
      .b_stride = strides[2],
      .epsilon = as<float>(inputs[3]),
      .problems = problems,
      .n = n,
      .m = m,
      .rho_a = rho_a,
      .rho_b = rho_b,
  };
}

void bind_sinkhorn(py::module_& m) {
  m.def(
      "sinkhorn",
      [](const std::vector<Pointer>& inputs, const std::vector<int64_t>& strides, int64_t problems, int64_t n, int64_t m,
         int64_t iterations, double tolerance, double rho_a, double rho_b, Pointer plan, Pointer u, Pointer v, Pointer tape,
         Pointer count) {
        sinkhorn(sinkhorn_problem(inputs, strides, problems, n, m, iterations, rho_a, rho_b),
                 {iterations, tolerance, as<float>(plan), as<float>(u), as<float>(v), as<float>(tape), as<int32_t>(count)});
      },
      py::arg("inputs"), py::arg("strides"), py::arg("problems"), py::arg("n"), py::arg("m"), py::arg("iterations"),
      py::arg("tolerance"), py::arg("rho_a"), py::arg("rho_b"), py::arg("plan"), py::arg("u"), py::arg("v"), py::arg("tape"),
      py::arg("count"), NoGil());
  m.def(
      "sinkhorn_backward",
      [](const std::vector<Pointer>& inputs, const std::vector<int64_t>& strides, int64_t problems, int64_t n, int64_t m,
         int64_t iterations, double rho_a, double rho_b, Pointer tape, Pointer count, Pointer grad_plan, Pointer grad_u,
         Pointer grad_v, Pointer grad_cost, Pointer grad_a, Pointer grad_b) {
        sinkhorn_backward(sinkhorn_problem(inputs, strides, problems, n, m, iterations, rho_a, rho_b),
                          {iterations, as<float>(tape), as<int32_t>(count), as<float>(grad_plan), as<float>(grad_u),
                           as<float>(grad_v), as<float>(grad_cost), as<float>(grad_a), as<float>(grad_b)});
      },
      py::arg("inputs"), py::arg("strides"), py::arg("problems"), py::arg("n"), py::arg("m"), py::arg("iterations"),
      py::arg("rho_a"), py::arg("rho_b"), py::arg("tape"), py::arg("count"), py::arg("grad_plan"), py::arg("grad_u"),
      py::arg("grad_v"), py::arg("grad_cost"), py::arg("grad_a"), py::arg("grad_b"), NoGil());
}

// --- doubly_stochastic ---------------------------------------------------------------------------------------------

DoublyStochastic doubly_stochastic_call(Pointer logits, int64_t problems, int64_t n, int64_t m, int64_t iterations,
                                        bool columns_first, bool softmax_start, int shift, float matrix_epsilon,
                                        float division_epsilon) {
  if (problems < 0 || n < 1 || m < 1 || n * m > kSmallEntries || iterations < 1 || shift < 0 || shift > 2)
    throw std::invalid_argument("problems must be >= 0, n, m and iterations >= 1, n * m at most " +
                                std::to_string(kSmallEntries) + ", shift 0 (none), 1 (line) or 2 (matrix)");
  return {as<float>(logits), problems,        n, m, iterations, columns_first, softmax_start, static_cast<Shift>(shift),
          matrix_epsilon,    division_epsilon};
}

void bind_doubly_stochastic(py::module_& m) {
  using py::arg;
  py::class_<DoublyStochastic>(m, "DoublyStochastic", py::module_local())
      .def(py::init(&doubly_stochastic_call), arg("logits"), arg("problems"), arg("n"), arg("m"), arg("iterations"),
           arg("columns_first"), arg("softmax_start"), arg("shift"), arg("matrix_epsilon"), arg("division_epsilon"));
  m.def(
      "doubly_stochastic", [](const DoublyStochastic& call, Pointer out) { doubly_stochastic(call, as<float>(out)); },
      arg("call"), arg("out"), NoGil());
  m.def(
      "doubly_stochastic_backward",
      [](const DoublyStochastic& call, Pointer gradient, Pointer logits_gradient) {
        doubly_stochastic_backward(call, as<float>(gradient), as<float>(logits_gradient));
      },
      arg("call"), arg("gradient"), arg("logits_gradient"), NoGil());
}

// --- distances of distributions --------------------------------------------------------------------------------------

SoftmaxCdistProblem cdist_problem(Pointer x, int x_dtype, Pointer y, int y_dtype, int64_t batch, int64_t x_rows, int64_t y_rows,
                                  int64_t columns, float inverse_temperature, Pointer x_statistics, Pointer y_statistics) {
  if (batch < 0 || x_rows < 0 || y_rows < 0 || columns < 1)
    throw std::invalid_argument("batch, rows and columns are " + std::to_string(batch) + ", " + std::to_string(x_rows) + " and " +
                                std::to_string(y_rows) + ", " + std::to_string(columns) +
                                "; none may be negative, and columns not 0");
  const DType x_type = dtype_of(x_dtype), y_type = dtype_of(y_dtype);
  return {{elements(x, x_type), x_type, x_rows, as<RowStatistics>(x_statistics)},
          {elements(y, y_type), y_type, y_rows, as<RowStatistics>(y_statistics)},
          batch,
          columns,
          inverse_temperature};
}

void bind_softmax_cdist_l1(py::module_& m) {
  m.def(
      "softmax_cdist_l1",
      [](Pointer x, int x_dtype, Pointer y, int y_dtype, int64_t batch, int64_t x_rows, int64_t y_rows, int64_t columns,
         float inverse_temperature, Pointer x_statistics, Pointer y_statistics, Pointer distances) {
        softmax_cdist_l1(cdist_problem(x, x_dtype, y, y_dtype, batch, x_rows, y_rows, columns, inverse_temperature, x_statistics,
                                       y_statistics),
                         as<float>(distances));
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("y"), py::arg("y_dtype"), py::arg("batch"), py::arg("x_rows"), py::arg("y_rows"),
      py::arg("columns"), py::arg("inverse_temperature"), py::arg("x_statistics"), py::arg("y_statistics"), py::arg("distances"),
      NoGil());
  m.def(
      "softmax_cdist_l1_backward",
      [](Pointer x, int x_dtype, Pointer y, int y_dtype, int64_t batch, int64_t x_rows, int64_t y_rows, int64_t columns,
         float inverse_temperature, Pointer x_statistics, Pointer y_statistics, Pointer gradient, Pointer x_gradient) {
        softmax_cdist_l1_backward(cdist_problem(x, x_dtype, y, y_dtype, batch, x_rows, y_rows, columns, inverse_temperature,
                                                x_statistics, y_statistics),
                                  as<float>(gradient), elements(x_gradient, dtype_of(x_dtype)));
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("y"), py::arg("y_dtype"), py::arg("batch"), py::arg("x_rows"), py::arg("y_rows"),
      py::arg("columns"), py::arg("inverse_temperature"), py::arg("x_statistics"), py::arg("y_statistics"), py::arg("gradient"),
      py::arg("x_gradient"), NoGil());
}

// --- decode steps --------------------------------------------------------------------------------------------------

// The keyword arguments of a constructor: each is taken once, by name.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& given) : left_(given.attr("copy")()) {}

  template <class T>
  T take(const char* name) {
    if (!left_.contains(name)) throw py::type_error(std::string("missing keyword argument '") + name + "'");
    try {
      return left_.attr("pop")(name).template cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string("keyword argument '") + name + "' is of another type than the stub file says");
    }
  }
  template <class T>
  T take(const char* name, T otherwise) {
    return left_.contains(name) ? take<T>(name) : otherwise;
  }
  Norm norm(const char* name) {
    const auto* given = take<const Norm*>(name, nullptr);
    return given == nullptr ? Norm{} : *given;
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
  void finish() const {
    for (const auto& [name, value] : left_) throw py::type_error("unknown keyword argument '" + name.cast<std::string>() + "'");
  }

 private:
  py::dict left_;
};

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

InputLinears input_of(Arguments& arguments, const py::tuple& inputs) {
  return {inputs.cast<std::vector<const LinearOperand*>>(), arguments.take<Floats>("input_bias", {})};
}

OutputLinear output_of(Arguments& arguments, const py::object& output) {
  return {output.cast<const LinearOperand*>(), arguments.take<Floats>("output_bias", {}), arguments.norm("output_norm"),
          arguments.take<float>("multiplier", 1)};
}

Bound<AttentionStep> bound_attention_step(const py::kwargs& given) {
  Arguments arguments(given);
  const auto inputs = arguments.take<py::tuple>("inputs");
  const auto output = arguments.take<py::object>("output");
  AttentionStep step{.norm = arguments.norm("norm"),
                     .input = input_of(arguments, inputs),
                     .q_rows = rows_of<HeadRows>(arguments.take<Three>("q_rows")),
                     .k_rows = rows_of<HeadRows>(arguments.take<Three>("k_rows")),
                     .v_rows = rows_of<HeadRows>(arguments.take<Three>("v_rows")),
                     .heads = arguments.take<int64_t>("heads"),
                     .kv_heads = arguments.take<int64_t>("kv_heads"),
                     .head_size = arguments.take<int64_t>("head_size"),
                     .value_size = arguments.take<int64_t>("value_size"),
                     .q_norm = arguments.norm("q_norm"),
                     .k_norm = arguments.norm("k_norm"),
                     .v_norm = arguments.norm("v_norm"),
                     .norms_span_heads = arguments.take<bool>("norms_span_heads", false),
                     .norms_after_rotary = arguments.take<bool>("norms_after_rotary", false),
                     .rotary = arguments.choice<Rotary>("rotary", arguments.take<std::string>("rotary", "none"),
                                                        {"none", "halves", "interleaved"}),
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
  Arguments arguments(given);
  const auto inputs = arguments.take<py::tuple>("inputs");
  const auto output = arguments.take<py::object>("output");
  const auto gate = arguments.take<Three>("gate_rows");
  const auto up = arguments.take<std::optional<Three>>("up_rows", std::nullopt);
  MlpStep step{.norm = arguments.norm("norm"),
               .input = input_of(arguments, inputs),
               .units = arguments.take<int64_t>("units"),
               .gate_rows = rows_of<UnitRows>(gate),
               .up_rows = rows_of<UnitRows>(up.value_or(gate)),
               .gated = up.has_value(),
               .activation = arguments.choice<Activation>("activation", arguments.take<std::string>("activation"),
                                                          {"silu", "gelu", "gelu_tanh", "relu", "relu_squared"}),
               .output = output_of(arguments, output),
               .precision = precision_of(arguments.take<int>("precision", 1))};
  arguments.finish();
  check_mlp_step(step);
  return {std::move(step), py::make_tuple(inputs, output)};
}

Norm norm_of(const std::string& kind, float eps, Floats weight, Floats bias) {
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

void bind_decode_step(py::module_& m) {
  using py::arg;
  py::class_<DenseOperand, LinearOperand>(m, "DenseOperand")
      .def(py::init([](Pointer weight, int dtype, int64_t rows, int64_t columns) {
             const DType type = dtype_of(dtype);
             return std::make_unique<DenseOperand>(elements(weight, type), type, rows, columns);
           }),
           arg("weight"), arg("dtype"), arg("rows"), arg("columns"));
  py::class_<Norm>(m, "Norm").def(py::init(&norm_of), arg("kind"), arg("eps"), arg("weight") = Floats{}, arg("bias") = Floats{});
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
}

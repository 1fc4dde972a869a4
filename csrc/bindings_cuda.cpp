// Python's door to the CUDA back end. Takes addresses and sizes as integers, knows nothing of torch; the GIL is released
// while layouts are packed on the host. Every function that launches works on the current device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "codebook/cuda/dequantize.h"
#include "codebook/cuda/gradient.h"
#include "codebook/cuda/layout.h"
#include "codebook/cuda/linear.h"
#include "kmeans/cuda/kmeans_1d.h"
#include "codebook/cuda/pack_codes.h"
#include "runtime/cuda/runtime.h"
#include "sinkhorn/cuda/sinkhorn.h"
#include "softmax_cdist/cuda/softmax_cdist_l1.h"
#include "sparse/cuda/layout.h"
#include "sparse/cuda/linear.h"

namespace py = pybind11;
namespace cuda = pyllmq::cuda;

#ifdef PYLLMQ_CUDA_EMULATED
namespace pyllmq::cuda::emulator {
void add_bindings(py::module_& parent);
}
#endif

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t layout_bytes(int64_t rows, int64_t columns, uintptr_t column_bits, uintptr_t segment_rows, int64_t segments,
                     int64_t outliers, bool row_scale) {
  return cuda::codebook_layout_bytes(rows, columns, pointer<uint8_t>(column_bits), pointer<int32_t>(segment_rows), segments,
                                     outliers, row_scale);
}

void layout_pack(uintptr_t layout, int64_t layout_bytes, int64_t rows, int64_t columns, uintptr_t column_bits,
                 uintptr_t segment_rows, int64_t segments, const std::array<uintptr_t, 8>& codes, uintptr_t codebook,
                 uintptr_t row_scale, uintptr_t outlier_row_offsets, uintptr_t outlier_columns, int outlier_columns_bytes,
                 uintptr_t outlier_values) {
  pyllmq::CodebookCheckpoint c{};
  c.rows = rows;
  c.columns = columns;
  c.segments = segments;
  c.column_bits = pointer<uint8_t>(column_bits);
  c.segment_rows = pointer<int32_t>(segment_rows);
  for (int width = 1; width <= 8; ++width) c.codes[width] = pointer<uint8_t>(codes[width - 1]);
  c.codebook = pointer<uint16_t>(codebook);
  c.row_scale = pointer<uint16_t>(row_scale);
  c.outlier_row_offsets = pointer<int32_t>(outlier_row_offsets);
  c.outlier_columns = pointer<void>(outlier_columns);
  c.outlier_columns_bytes = outlier_columns_bytes;
  c.outlier_values = pointer<uint16_t>(outlier_values);
  const py::gil_scoped_release release;
  cuda::codebook_layout_pack(pointer<void>(layout), layout_bytes, c);
}

py::tuple layout_shape(uintptr_t layout, int64_t layout_bytes) {
  const cuda::LayoutHeader& h = cuda::checked_header(pointer<void>(layout), layout_bytes);
  return py::make_tuple(h.rows, h.columns);
}

void layout_codes(uintptr_t layout, int64_t layout_bytes, uintptr_t codes_out) {
  const py::gil_scoped_release release;
  cuda::codebook_layout_codes(pointer<void>(layout), layout_bytes, pointer<uint8_t>(codes_out));
}

py::tuple linear_workspace(int64_t rows, int64_t columns, int64_t tokens, int dtype) {
  const cuda::LinearPlan plan = cuda::plan_linear(rows, columns, tokens, dtype, cuda::multiprocessors());
  return py::make_tuple(plan.partials, plan.counters);
}

py::tuple linear_tables_workspace(int64_t rows, int64_t columns) {
  const cuda::TablesPlan plan = cuda::plan_linear_tables(rows, columns);
  return py::make_tuple(plan.partials, plan.counters);
}

cuda::LinearCall linear_call(uintptr_t layout, int64_t layout_bytes, int64_t rows, int64_t columns, uintptr_t x, int dtype,
                             int64_t tokens, uintptr_t bias, int bias_dtype, uintptr_t y, uintptr_t partials,
                             uintptr_t counters) {
  cuda::LinearCall call{};
  call.layout = pointer<uint8_t>(layout);
  call.layout_bytes = layout_bytes;
  call.rows = rows;
  call.columns = columns;
  call.tokens = tokens;
  call.x = pointer<void>(x);
  call.dtype = dtype;
  call.bias = pointer<void>(bias);
  call.bias_dtype = bias_dtype;
  call.y = pointer<void>(y);
  call.partials = pointer<float>(partials);
  call.counters = pointer<uint32_t>(counters);
  return call;
}

void codebook_linear(uintptr_t layout, int64_t layout_bytes, int64_t rows, int64_t columns, uintptr_t x, int dtype,
                     int64_t tokens, uintptr_t bias, int bias_dtype, uintptr_t y, uintptr_t partials, uintptr_t counters,
                     uintptr_t stream) {
  cuda::codebook_linear(
      linear_call(layout, layout_bytes, rows, columns, x, dtype, tokens, bias, bias_dtype, y, partials, counters), stream);
}

void codebook_linear_tables(uintptr_t layout, int64_t layout_bytes, int64_t rows, int64_t columns, uintptr_t x, int dtype,
                            uintptr_t bias, int bias_dtype, uintptr_t y, uintptr_t partials, uintptr_t counters,
                            uintptr_t stream) {
  cuda::codebook_linear_tables(
      linear_call(layout, layout_bytes, rows, columns, x, dtype, 1, bias, bias_dtype, y, partials, counters), stream);
}

void codebook_dequantize(uintptr_t layout, int64_t layout_bytes, int64_t rows, int64_t columns, uintptr_t weight, int dtype,
                         uintptr_t stream) {
  cuda::codebook_dequantize(pointer<uint8_t>(layout), layout_bytes, rows, columns, pointer<void>(weight), dtype, stream);
}

void pack_codes(uintptr_t codes, uintptr_t packed, int64_t rows, int64_t columns, int bits, uintptr_t stream) {
  cuda::pack_codes(pointer<uint8_t>(codes), pointer<uint8_t>(packed), rows, columns, bits, stream);
}

void unpack_codes(uintptr_t packed, uintptr_t codes, int64_t rows, int64_t columns, int bits, uintptr_t stream) {
  cuda::unpack_codes(pointer<uint8_t>(packed), pointer<uint8_t>(codes), rows, columns, bits, stream);
}

cuda::GradientCall gradient_call(int64_t rows, int64_t columns, int64_t segments, int64_t entries, uintptr_t segment_starts,
                                 uintptr_t sorted_columns, uintptr_t width_starts, uintptr_t first_entry,
                                 const std::array<uintptr_t, 8>& codes, const std::array<int64_t, 8>& code_bytes,
                                 uintptr_t row_scale, int row_scale_dtype, uintptr_t weight_gradient) {
  cuda::GradientCall call{rows,
                          columns,
                          segments,
                          entries,
                          pointer<int64_t>(segment_starts),
                          pointer<int64_t>(sorted_columns),
                          pointer<int64_t>(width_starts),
                          pointer<int64_t>(first_entry),
                          {},
                          {},
                          pointer<void>(row_scale),
                          row_scale_dtype,
                          pointer<float>(weight_gradient)};
  for (int bits = 1; bits <= 8; ++bits) {
    call.codes[bits] = pointer<uint8_t>(codes[bits - 1]);
    call.code_bytes[bits] = code_bytes[bits - 1];
  }
  return call;
}

void bind_codebook_gradient(py::module_& m) {
  using py::arg;
  py::class_<cuda::GradientCall>(m, "GradientCall", py::module_local())
      .def(py::init(&gradient_call), arg("rows"), arg("columns"), arg("segments"), arg("entries"), arg("segment_starts"),
           arg("sorted_columns"), arg("width_starts"), arg("first_entry"), arg("codes"), arg("code_bytes"), arg("row_scale"),
           arg("row_scale_dtype"), arg("weight_gradient"));
  m.def("codebook_gradient_workspace", &cuda::codebook_gradient_workspace, arg("call"), "-> fp32 elements");
  m.def(
      "codebook_gradient",
      [](const cuda::GradientCall& call, uintptr_t gradient, uintptr_t workspace, uintptr_t stream) {
        cuda::codebook_gradient(call, pointer<float>(gradient), pointer<float>(workspace), stream);
      },
      arg("call"), arg("gradient"), arg("workspace"), arg("stream"));
}

cuda::CdistCall cdist_call(uintptr_t x, int x_dtype, uintptr_t y, int y_dtype, int64_t batch, int64_t x_rows, int64_t y_rows,
                           int64_t columns, float scale, uintptr_t x_statistics, uintptr_t y_statistics) {
  return {pointer<void>(x),
          pointer<void>(y),
          x_dtype,
          y_dtype,
          batch,
          x_rows,
          y_rows,
          columns,
          scale,
          pointer<float>(x_statistics),
          pointer<float>(y_statistics)};
}

void bind_softmax_cdist_l1(py::module_& m) {
  using py::arg;
  py::class_<cuda::CdistCall>(m, "CdistCall", py::module_local())  // the emulated module has it as well
      .def(py::init(&cdist_call), arg("x"), arg("x_dtype"), arg("y"), arg("y_dtype"), arg("batch"), arg("x_rows"), arg("y_rows"),
           arg("columns"), arg("scale"), arg("x_statistics"), arg("y_statistics"));
  m.def("softmax_cdist_l1_workspace", &cuda::softmax_cdist_l1_workspace, arg("call"), "-> fp32 elements");
  m.def("softmax_cdist_l1_backward_workspace", &cuda::softmax_cdist_l1_backward_workspace, arg("call"));
  m.def(
      "softmax_cdist_l1",
      [](const cuda::CdistCall& call, uintptr_t distances, uintptr_t workspace, uintptr_t stream) {
        cuda::softmax_cdist_l1(call, pointer<float>(distances), pointer<float>(workspace), stream);
      },
      arg("call"), arg("distances"), arg("workspace"), arg("stream"));
  m.def(
      "softmax_cdist_l1_backward",
      [](const cuda::CdistCall& call, uintptr_t gradient, uintptr_t x_gradient, uintptr_t workspace, uintptr_t stream) {
        cuda::softmax_cdist_l1_backward(call, pointer<float>(gradient), pointer<void>(x_gradient), pointer<float>(workspace),
                                        stream);
      },
      arg("call"), arg("gradient"), arg("x_gradient"), arg("workspace"), arg("stream"));
}

cuda::SinkhornCall sinkhorn_call(const std::array<uintptr_t, 4>& inputs, const std::array<int64_t, 4>& strides, int64_t problems,
                                 int64_t n, int64_t m, double rho_a, double rho_b) {
  return {pointer<float>(inputs[0]),
          strides[0],
          pointer<float>(inputs[1]),
          strides[1],
          pointer<float>(inputs[2]),
          strides[2],
          pointer<float>(inputs[3]),
          strides[3],
          problems,
          n,
          m,
          rho_a,
          rho_b};
}

void sinkhorn(const cuda::SinkhornCall& call, int64_t iterations, float tolerance, uintptr_t plan, uintptr_t u, uintptr_t v,
              uintptr_t tape, uintptr_t count, uintptr_t workspace, uintptr_t counters, uintptr_t stream) {
  const cuda::SinkhornForward out{iterations,
                                  tolerance,
                                  pointer<float>(plan),
                                  pointer<float>(u),
                                  pointer<float>(v),
                                  pointer<float>(tape),
                                  pointer<int32_t>(count)};
  if (cuda::sinkhorn_is_small(call))
    cuda::sinkhorn_small(call, out, stream);
  else
    cuda::sinkhorn(call, out, pointer<float>(workspace), pointer<uint32_t>(counters), stream);
}

void sinkhorn_backward(const cuda::SinkhornCall& call, int64_t iterations, uintptr_t tape, uintptr_t count, uintptr_t grad_plan,
                       uintptr_t grad_u, uintptr_t grad_v, uintptr_t grad_cost, uintptr_t grad_a, uintptr_t grad_b,
                       uintptr_t workspace, uintptr_t counters, uintptr_t stream) {
  const cuda::SinkhornBackward out{iterations,
                                   pointer<float>(tape),
                                   pointer<int32_t>(count),
                                   pointer<float>(grad_plan),
                                   pointer<float>(grad_u),
                                   pointer<float>(grad_v),
                                   pointer<float>(grad_cost),
                                   pointer<float>(grad_a),
                                   pointer<float>(grad_b)};
  if (cuda::sinkhorn_is_small(call))
    cuda::sinkhorn_small_backward(call, out, stream);
  else
    cuda::sinkhorn_backward(call, out, pointer<float>(workspace), pointer<uint32_t>(counters), stream);
}

void bind_sinkhorn(py::module_& m) {
  using py::arg;
  py::class_<cuda::SinkhornCall>(m, "SinkhornCall", py::module_local())
      .def(py::init(&sinkhorn_call), arg("inputs"), arg("strides"), arg("problems"), arg("n"), arg("m"), arg("rho_a"),
           arg("rho_b"));
  m.def("sinkhorn_fits", &cuda::sinkhorn_fits, arg("n"), arg("m"));
  m.def(
      "sinkhorn_room",
      [](const cuda::SinkhornCall& call, int64_t backward_iterations) {
        const cuda::SinkhornRoom room = cuda::sinkhorn_room(call, backward_iterations);
        return py::make_tuple(room.floats, room.counters);
      },
      arg("call"), arg("backward_iterations"), "-> (fp32 elements, uint32 counters that are zero before the first call)");
  m.def("sinkhorn", &sinkhorn, arg("call"), arg("iterations"), arg("tolerance"), arg("plan"), arg("u"), arg("v"), arg("tape"),
        arg("count"), arg("workspace"), arg("counters"), arg("stream"));
  m.def("sinkhorn_backward", &sinkhorn_backward, arg("call"), arg("iterations"), arg("tape"), arg("count"), arg("grad_plan"),
        arg("grad_u"), arg("grad_v"), arg("grad_cost"), arg("grad_a"), arg("grad_b"), arg("workspace"), arg("counters"),
        arg("stream"));
}

// --- the sparse formats ----------------------------------------------------------------------------------------------

// As _cuda names layouts: a kind that is not the format's own is `columns`.
const std::map<std::string, pyllmq::SparseKind> kSparseKinds = {{"bitmap", pyllmq::SparseKind::bitmap},
                                                                {"columns", pyllmq::SparseKind::columns},
                                                                {"sparse24", pyllmq::SparseKind::sparse24},
                                                                {"sparse24_codebook", pyllmq::SparseKind::codes}};

cuda::SparseOperand sparse_operand(const std::string& kind, int values, int64_t bits, int64_t stage_bytes) {
  if (kSparseKinds.count(kind) == 0)
    throw std::invalid_argument("kind '" + kind + "'; allowed: bitmap, columns, sparse24, sparse24_codebook");
  return {kSparseKinds.at(kind), static_cast<pyllmq::ValueType>(values), bits, stage_bytes};
}

// What the header says that kernels are told by the host; and where the data begin.
py::tuple sparse_layout_describe(uintptr_t layout, int64_t layout_bytes, int64_t rows, int64_t columns) {
  const cuda::SparseHeader& h = cuda::checked_sparse_header(pointer<void>(layout), layout_bytes);
  if (h.rows != rows || h.columns != columns)
    throw std::invalid_argument("the layout holds a weight of shape [" + std::to_string(h.rows) + ", " +
                                std::to_string(h.columns) + "], but was given as [" + std::to_string(rows) + ", " +
                                std::to_string(columns) + "]");
  std::string kind;
  for (const auto& [name, value] : kSparseKinds)
    if (value == h.kind) kind = name;
  return py::make_tuple(kind, static_cast<int>(h.values), h.bits, h.stage_bytes, h.data_offset);
}

py::tuple sparse_linear_workspace(const cuda::SparseOperand& operand, int64_t rows, int64_t columns, int64_t tokens, int dtype) {
  const cuda::SparsePlan plan =
      operand.kind == pyllmq::SparseKind::columns
          ? cuda::plan_sparse_columns_linear(rows, columns, tokens, cuda::multiprocessors())
          : cuda::plan_sparse_linear(operand, rows, columns, tokens, dtype, cuda::multiprocessors(), cuda::shared_bytes());
  return py::make_tuple(plan.partials, plan.counters);
}

void sparse_linear(const cuda::SparseOperand& operand, uintptr_t layout, int64_t layout_bytes, int64_t rows, int64_t columns,
                   uintptr_t x, int dtype, int64_t tokens, uintptr_t bias, int bias_dtype, uintptr_t y, uintptr_t partials,
                   uintptr_t counters, uintptr_t stream) {
  const cuda::LinearCall call =
      linear_call(layout, layout_bytes, rows, columns, x, dtype, tokens, bias, bias_dtype, y, partials, counters);
  if (operand.kind == pyllmq::SparseKind::columns)
    cuda::sparse_columns_linear(operand.values, call, stream);
  else
    cuda::sparse_linear(operand, call, stream);
}

void bind_sparse(py::module_& m) {
  using py::arg;
  using pyllmq::SparseCheckpoint;
  py::class_<SparseCheckpoint>(m, "SparseCheckpoint", py::module_local())  // the emulated module has it as well
      .def(py::init(&pyllmq::sparse_checkpoint), arg("kind"), arg("value_type"), arg("rows"), arg("columns"), arg("kept"),
           arg("bits"), arg("outliers"), arg("column_bytes"), arg("tensors"));
  py::class_<cuda::SparseOperand>(m, "SparseOperand", py::module_local())
      .def(py::init(&sparse_operand), arg("kind"), arg("values"), arg("bits"), arg("stage_bytes"));
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("sparse_layout_bytes", &cuda::sparse_layout_bytes, arg("checkpoint"), arg("sparse_columns"), NoGil());
  m.def(
      "sparse_layout_pack",
      [](uintptr_t layout, int64_t layout_bytes, const SparseCheckpoint& checkpoint, double sparse_columns) {
        cuda::sparse_layout_pack(pointer<void>(layout), layout_bytes, checkpoint, sparse_columns);
      },
      arg("layout"), arg("layout_bytes"), arg("checkpoint"), arg("sparse_columns"), NoGil());
  m.def(
      "sparse_layout_unpack",
      [](uintptr_t layout, int64_t layout_bytes, const SparseCheckpoint& checkpoint) {
        cuda::sparse_layout_unpack(pointer<void>(layout), layout_bytes, checkpoint);
      },
      arg("layout"), arg("layout_bytes"), arg("checkpoint"), NoGil());
  m.attr("sparse_header_bytes") = sizeof(cuda::SparseHeader);
  m.def("sparse_layout_describe", &sparse_layout_describe, arg("header"), arg("layout_bytes"), arg("rows"), arg("columns"),
        "-> (kind, values, bits, stage_bytes, data_offset)");
  m.def("sparse_linear_workspace", &sparse_linear_workspace, arg("operand"), arg("rows"), arg("columns"), arg("tokens"),
        arg("dtype"), "as codebook_linear_workspace");
  m.def("sparse_linear", &sparse_linear, arg("operand"), arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"),
        arg("x"), arg("dtype"), arg("tokens"), arg("bias"), arg("bias_dtype"), arg("y"), arg("partials"), arg("counters"),
        arg("stream"));
  m.def(
      "sparse_dequantize",
      [](const cuda::SparseOperand& operand, uintptr_t layout, int64_t layout_bytes, int64_t rows, int64_t columns,
         uintptr_t weight, int dtype, uintptr_t stream) {
        cuda::sparse_dequantize(operand, pointer<uint8_t>(layout), layout_bytes, rows, columns, pointer<void>(weight), dtype,
                                stream);
      },
      arg("operand"), arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"), arg("weight"), arg("dtype"),
      arg("stream"));
}

void kmeans_1d_layers(uintptr_t sums, uintptr_t masses, uintptr_t gains, uintptr_t best, int64_t problems, int64_t n, int k_max,
                      uintptr_t stream) {
  cuda::kmeans_1d_layers(pointer<double>(sums), pointer<double>(masses), pointer<double>(gains), pointer<int32_t>(best), problems,
                         n, k_max, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using py::arg;
  m.doc() = "pyllmq CUDA back end (built without libtorch, static cudart)";
  m.def("runtime_version", &cuda::runtime_version);
  m.def("device_problem", &cuda::device_problem, "why the kernels cannot run on the current device, or ''");

  m.def("codebook_layout_bytes", &layout_bytes, arg("rows"), arg("columns"), arg("column_bits"), arg("segment_rows"),
        arg("segments"), arg("outliers"), arg("row_scale"));
  m.def("codebook_layout_pack", &layout_pack, arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"), arg("column_bits"),
        arg("segment_rows"), arg("segments"), arg("codes"), arg("codebook"), arg("row_scale"), arg("outlier_row_offsets"),
        arg("outlier_columns"), arg("outlier_columns_bytes"), arg("outlier_values"),
        "on the host; codes: 8 addresses of codes_b1..codes_b8, 0 where absent");
  m.def("codebook_layout_shape", &layout_shape, arg("layout"), arg("layout_bytes"));
  m.def("codebook_layout_codes", &layout_codes, arg("layout"), arg("layout_bytes"), arg("codes_out"));

  m.def("codebook_linear_workspace", &linear_workspace, arg("rows"), arg("columns"), arg("tokens"), arg("dtype"),
        "-> (fp32 elements, uint32 counters that are zero before the first call)");
  m.def("codebook_linear", &codebook_linear, arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"), arg("x"),
        arg("dtype"), arg("tokens"), arg("bias"), arg("bias_dtype"), arg("y"), arg("partials"), arg("counters"), arg("stream"),
        "dtype: 0 fp32, 1 bf16, 2 fp16");
  m.def("linear_tables_fit", &cuda::linear_tables_fit, "whether the current device's blocks get the shared memory for tables");
  m.def("codebook_linear_tables_workspace", &linear_tables_workspace, arg("rows"), arg("columns"), "as above");
  m.def("codebook_linear_tables", &codebook_linear_tables, arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"),
        arg("x"), arg("dtype"), arg("bias"), arg("bias_dtype"), arg("y"), arg("partials"), arg("counters"), arg("stream"),
        "of one token");
  m.def("codebook_dequantize", &codebook_dequantize, arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"),
        arg("weight"), arg("dtype"), arg("stream"));
  m.def("pack_codes", &pack_codes, arg("codes"), arg("packed"), arg("rows"), arg("columns"), arg("bits"), arg("stream"));
  m.def("unpack_codes", &unpack_codes, arg("packed"), arg("codes"), arg("rows"), arg("columns"), arg("bits"), arg("stream"));
  bind_codebook_gradient(m);
  bind_softmax_cdist_l1(m);
  bind_sinkhorn(m);
  bind_sparse(m);
  m.def("kmeans_1d_layers", &kmeans_1d_layers, arg("sums"), arg("masses"), arg("gains"), arg("best"), arg("problems"), arg("n"),
        arg("k_max"), arg("stream"));
#ifdef PYLLMQ_CUDA_EMULATED
  cuda::emulator::add_bindings(m);
#endif
}

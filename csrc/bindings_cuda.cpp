// Python's door to the CUDA back end. Knows nothing of torch; the GIL is released while layouts are packed on the host. Every
// function that launches works on the current device.
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "bindings.h"
#include "codebook/cuda/gradient.h"
#include "codebook/cuda/layout.h"
#include "codebook/cuda/operand.h"
#include "codebook/cuda/pack_codes.h"
#include "experts/cuda/routed_experts.h"
#include "kmeans/cuda/kmeans_1d.h"
#include "runtime/cuda/runtime.h"
#include "sinkhorn/cuda/sinkhorn.h"
#include "softmax_cdist/cuda/softmax_cdist_l1.h"
#include "sparse/cuda/layout.h"
#include "sparse/cuda/operand.h"

#ifdef PYLLMQ_CUDA_EMULATED
namespace pyllmq::cuda::emulator {
void add_bindings(pybind11::module_& parent);
}
#endif

namespace pyllmq::cuda {
namespace {

using py::arg;
using py::module_local;  // the emulated module has the same classes

void require_shape(int64_t rows, int64_t columns, int64_t given_rows, int64_t given_columns) {
  const auto shape = [](int64_t r, int64_t c) { return "[" + std::to_string(r) + ", " + std::to_string(c) + "]"; };
  if (rows != given_rows || columns != given_columns)
    throw std::invalid_argument("the layout holds a weight of shape " + shape(rows, columns) + ", but was given as " +
                                shape(given_rows, given_columns));
}

// --- packed weights --------------------------------------------------------------------------------------------------

void bind_linear_operand(py::module_& m) {
  py::class_<LinearOperand>(m, "LinearOperand", module_local())
      .def_property_readonly("layout", [](const LinearOperand& self) { return reinterpret_cast<Pointer>(self.layout); })
      .def("room", &LinearOperand::room, arg("tokens"), arg("dtype"))
      .def(
          "linear",
          [](LinearOperand& self, Pointer x, int dtype, int64_t tokens, Pointer bias, int bias_dtype, Pointer y, Pointer partials,
             Pointer stream) {
            self.linear({.tokens = tokens,
                         .x = as<void>(x),
                         .dtype = dtype,
                         .bias = as<void>(bias),
                         .bias_dtype = bias_dtype,
                         .y = as<void>(y),
                         .partials = as<float>(partials)},
                        stream);
          },
          arg("x"), arg("dtype"), arg("tokens"), arg("bias"), arg("bias_dtype"), arg("y"), arg("partials"), arg("stream"))
      .def(
          "dequantize",
          [](const LinearOperand& self, Pointer weight, int dtype, Pointer stream) {
            self.dequantize(as<void>(weight), dtype, stream);
          },
          arg("weight"), arg("dtype"), arg("stream"));
}

// --- the codebook format -------------------------------------------------------------------------------------------

std::unique_ptr<CodebookOperand> bind_layout(Pointer layout, int64_t layout_bytes, int64_t rows, int64_t columns) {
  return std::make_unique<CodebookOperand>(as<uint8_t>(layout), layout_bytes, rows, columns);
}

GradientCall gradient_call(Keywords& given) {
  GradientCall g{};
  given.fill("rows", g.rows, "columns", g.columns, "segments", g.segments, "entries", g.entries, "segment_starts",
             g.segment_starts, "sorted_columns", g.sorted_columns, "width_starts", g.width_starts, "first_entry", g.first_entry,
             "row_scale", g.row_scale, "row_scale_dtype", g.row_scale_dtype, "weight_gradient", g.weight_gradient);
  given.fill_widths("codes", g.codes);
  given.fill_widths("code_bytes", g.code_bytes);
  return g;
}

void bind_codebook(py::module_& m) {
  bind_keywords<CodebookCheckpoint>(m, "CodebookCheckpoint", &codebook_checkpoint);
  m.def("codebook_layout_bytes", &codebook_layout_bytes, arg("checkpoint"), NoGil());
  m.def("codebook_layout_pack", with_addresses(&codebook_layout_pack), arg("layout"), arg("layout_bytes"), arg("checkpoint"),
        NoGil());
  m.def(
      "codebook_layout_codes",
      [](Pointer layout, int64_t bytes, int64_t rows, int64_t columns, Pointer codes_out) {
        const LayoutHeader& h = codebook_header(as<void>(layout), bytes);
        require_shape(h.rows, h.columns, rows, columns);
        codebook_layout_codes(as<void>(layout), bytes, as<uint8_t>(codes_out));
      },
      arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"), arg("codes_out"), NoGil());
  m.attr("codebook_header_bytes") = sizeof(LayoutHeader);
  m.def(
      "codebook_layout_meta",
      [](Pointer header, int64_t layout_bytes, int64_t rows, int64_t columns) {
        const LayoutHeader& h = codebook_header(as<void>(header), layout_bytes);
        require_shape(h.rows, h.columns, rows, columns);
        return std::make_tuple(h.widest, h.patched);
      },
      arg("header"), arg("layout_bytes"), arg("rows"), arg("columns"));
  py::class_<CodebookOperand, LinearOperand>(m, "CodebookOperand", module_local())
      .def(py::init(&bind_layout), arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"))
      .def(
          "row_values",
          [](const CodebookOperand& self, Pointer ids, int64_t count, Pointer out, int dtype, Pointer stream) {
            self.row_values(as<int64_t>(ids), count, as<void>(out), dtype, stream);
          },
          arg("ids"), arg("count"), arg("out"), arg("dtype"), arg("stream"));
  py::class_<CodebookBytePlanes, LinearOperand>(m, "CodebookBytePlanes", module_local())
      .def(py::init([](Pointer layout, int64_t layout_bytes, int64_t rows, int64_t columns, int64_t widest) {
             return std::make_unique<CodebookBytePlanes>(as<uint8_t>(layout), layout_bytes, rows, columns, widest);
           }),
           arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"), arg("widest"));
  py::class_<CodebookWgmma, LinearOperand>(m, "CodebookWgmma", module_local())
      .def(py::init([](Pointer layout, int64_t layout_bytes, int64_t rows, int64_t columns) {
             return std::make_unique<CodebookWgmma>(as<uint8_t>(layout), layout_bytes, rows, columns);
           }),
           arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"))
      .def_static("runs", &CodebookWgmma::runs);
  py::class_<CodebookWgmmaRegisters, LinearOperand>(m, "CodebookWgmmaRegisters", module_local())
      .def(py::init([](Pointer layout, int64_t layout_bytes, int64_t rows, int64_t columns) {
             return std::make_unique<CodebookWgmmaRegisters>(as<uint8_t>(layout), layout_bytes, rows, columns);
           }),
           arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"));
  m.def("pack_codes", with_addresses(&pack_codes), arg("codes"), arg("packed"), arg("rows"), arg("columns"), arg("bits"),
        arg("stream"));
  m.def("unpack_codes", with_addresses(&unpack_codes), arg("packed"), arg("codes"), arg("rows"), arg("columns"), arg("bits"),
        arg("stream"));
  bind_keywords<GradientCall>(m, "GradientCall", &gradient_call);
  m.def("codebook_gradient_workspace", &codebook_gradient_workspace, arg("call"));
  m.def("codebook_gradient", with_addresses(&codebook_gradient), arg("call"), arg("gradient"), arg("workspace"), arg("stream"));
}

// --- the sparse formats ----------------------------------------------------------------------------------------------

// As layouts are named: a kind that is not the format's own is `columns`.
const std::map<std::string, SparseKind> kSparseKinds = {{"bitmap", SparseKind::bitmap},
                                                        {"columns", SparseKind::columns},
                                                        {"sparse24", SparseKind::sparse24},
                                                        {"sparse24_codebook", SparseKind::codes}};

SparseKind sparse_kind(const std::string& name) {
  const auto found = kSparseKinds.find(name);
  if (found == kSparseKinds.end())
    throw std::invalid_argument("kind '" + name + "'; allowed: bitmap, columns, sparse24, sparse24_codebook");
  return found->second;
}

std::unique_ptr<SparseOperand> bind_sparse_layout(Pointer layout, int64_t layout_bytes, int64_t rows, int64_t columns,
                                                  const std::string& kind, int values, int64_t bits, int64_t stage_bytes) {
  return std::make_unique<SparseOperand>(as<uint8_t>(layout), layout_bytes, rows, columns, sparse_kind(kind),
                                         static_cast<ValueType>(values), bits, stage_bytes);
}

// What the header says that kernels are told by the host; and where the data begin.
auto sparse_layout_describe(Pointer layout, int64_t layout_bytes, int64_t rows, int64_t columns) {
  const SparseHeader& h = sparse_header(as<void>(layout), layout_bytes);
  require_shape(h.rows, h.columns, rows, columns);
  std::string kind;
  for (const auto& [name, value] : kSparseKinds)
    if (value == h.kind) kind = name;
  return std::make_tuple(kind, static_cast<int>(h.values), h.bits, h.stage_bytes, h.data_offset);
}

void bind_sparse(py::module_& m) {
  bind_keywords<SparseCheckpoint>(m, "SparseCheckpoint", &sparse_checkpoint);
  m.def("sparse_layout_bytes", &sparse_layout_bytes, arg("checkpoint"), arg("sparse_columns"), NoGil());
  m.def("sparse_layout_pack", with_addresses(&sparse_layout_pack), arg("layout"), arg("layout_bytes"), arg("checkpoint"),
        arg("sparse_columns"), NoGil());
  m.def("sparse_layout_unpack", with_addresses(&sparse_layout_unpack), arg("layout"), arg("layout_bytes"), arg("checkpoint"),
        NoGil());
  m.attr("sparse_header_bytes") = sizeof(SparseHeader);
  m.def("sparse_layout_describe", &sparse_layout_describe, arg("header"), arg("layout_bytes"), arg("rows"), arg("columns"));
  py::class_<SparseOperand, LinearOperand>(m, "SparseOperand", module_local())
      .def(py::init(&bind_sparse_layout), arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"), arg("kind"),
           arg("values"), arg("bits"), arg("stage_bytes"));
  py::class_<SparseProducts, LinearOperand>(m, "SparseProducts", module_local())
      .def(py::init([](Pointer layout, int64_t layout_bytes, int64_t rows, int64_t columns, int64_t stage_bytes) {
             return std::make_unique<SparseProducts>(as<uint8_t>(layout), layout_bytes, rows, columns, stage_bytes);
           }),
           arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"), arg("stage_bytes"));
  py::class_<SparseTables, LinearOperand>(m, "SparseTables", module_local())
      .def(py::init([](Pointer layout, int64_t layout_bytes, int64_t rows, int64_t columns, int64_t stage_bytes) {
             return std::make_unique<SparseTables>(as<uint8_t>(layout), layout_bytes, rows, columns, stage_bytes);
           }),
           arg("layout"), arg("layout_bytes"), arg("rows"), arg("columns"), arg("stage_bytes"));
}

// --- experts ---------------------------------------------------------------------------------------------------------

// (kind, values, bits, size) of each: "codebook", or as a SparseOperand's.
std::vector<WeightKind> weight_kinds(const std::vector<std::tuple<std::string, int, int64_t, int64_t>>& given) {
  std::vector<WeightKind> kinds;
  for (const auto& [kind, values, bits, size] : given) {
    const bool is_codebook = kind == "codebook";
    kinds.push_back(
        {is_codebook, is_codebook ? SparseKind::bitmap : sparse_kind(kind), static_cast<ValueType>(values), bits, size});
  }
  return kinds;
}

RoutedExperts routed_experts_of(Keywords& given) {
  RoutedExperts e{};
  given.fill("experts", e.experts, "units", e.units, "gate_first", e.gate_first, "up_first", e.up_first, "stride", e.stride,
             "limit", e.limit, "alpha", e.alpha, "offset", e.offset, "sum_bytes", e.sum_bytes);
  const auto activation = given.take<std::string>("activation");
  const std::vector<std::string> names = activation_names();
  const auto found = std::find(names.begin(), names.end(), activation);
  if (found == names.end()) throw std::invalid_argument("activation '" + activation + "' is not known");
  e.activation = static_cast<Activation>(found - names.begin());
  using Kinds = std::vector<std::tuple<std::string, int, int64_t, int64_t>>;
  static_assert(sizeof(ExpertLayout) == 3 * sizeof(int64_t), "a row of the tables");
  e.up.layouts = reinterpret_cast<const ExpertLayout*>(given.take<const int64_t*>("up_layouts"));
  e.down.layouts = reinterpret_cast<const ExpertLayout*>(given.take<const int64_t*>("down_layouts"));
  e.up_kinds = weight_kinds(given.take<Kinds>("up_kinds"));
  e.down_kinds = weight_kinds(given.take<Kinds>("down_kinds"));
  given.fill("up_bias", e.up.bias, "up_rows", e.up.rows, "up_columns", e.up.columns);
  given.fill("down_bias", e.down.bias, "down_rows", e.down.rows, "down_columns", e.down.columns);
  check_routed_experts(e);
  return e;
}

void bind_experts(py::module_& m) {
  bind_keywords<RoutedExperts>(m, "RoutedExperts", &routed_experts_of);
  m.def(
      "codebook_layout_blocks",
      [](Pointer header, int64_t layout_bytes) { return codebook_header(as<void>(header), layout_bytes).blocks; }, arg("header"),
      arg("layout_bytes"));
  m.def("routed_experts_workspace", &routed_experts_workspace, arg("experts"), arg("tokens"), arg("choices"), arg("dtype"));
  m.def(
      "routed_experts",
      [](const RoutedExperts& experts, Pointer x, Pointer y, int dtype, int64_t tokens, int64_t choices, Pointer index,
         Pointer weights, Pointer workspace, Pointer stream) {
        routed_experts(experts, {as<void>(x), as<void>(y), dtype, tokens, choices, as<int64_t>(index), as<float>(weights)},
                       as<void>(workspace), stream);
      },
      arg("experts"), arg("x"), arg("y"), arg("dtype"), arg("tokens"), arg("choices"), arg("index"), arg("weights"),
      arg("workspace"), arg("stream"));
}

// --- the others ------------------------------------------------------------------------------------------------------

CdistCall cdist_call(Keywords& given) {
  CdistCall c{};
  given.fill("x", c.x, "x_dtype", c.x_dtype, "y", c.y, "y_dtype", c.y_dtype, "batch", c.batch, "x_rows", c.x_rows, "y_rows",
             c.y_rows, "columns", c.columns, "scale", c.scale, "x_statistics", c.x_statistics, "y_statistics", c.y_statistics);
  return c;
}

void bind_softmax_cdist_l1(py::module_& m) {
  bind_keywords<CdistCall>(m, "Cdist", &cdist_call);
  m.def("softmax_cdist_l1_workspace", &softmax_cdist_l1_workspace, arg("call"));
  m.def("softmax_cdist_l1_backward_workspace", &softmax_cdist_l1_backward_workspace, arg("call"));
  m.def("softmax_cdist_l1", with_addresses(&softmax_cdist_l1), arg("call"), arg("distances"), arg("workspace"), arg("stream"));
  m.def("softmax_cdist_l1_backward", with_addresses(&softmax_cdist_l1_backward), arg("call"), arg("gradient"), arg("x_gradient"),
        arg("workspace"), arg("stream"));
}

template <class Out>
void bind_sinkhorn_pass(py::module_& m, const char* name, Out (*read)(Keywords&),
                        void (*run)(const SinkhornProblem&, const Out&, float*, uint32_t*, uintptr_t)) {
  m.def(name, [read, run](const SinkhornProblem& problem, const py::kwargs& given) {
    Keywords from(given);
    const Out out = read(from);
    auto* workspace = from.take<float*>("workspace");
    auto* counters = from.take<uint32_t*>("counters");
    const auto stream = from.take<Pointer>("stream");
    from.finish();
    run(problem, out, workspace, counters, stream);
  });
}

void bind_sinkhorn(py::module_& m) {
  bind_keywords<SinkhornProblem>(m, "SinkhornProblem", &sinkhorn_problem);
  m.def("sinkhorn_fits", &sinkhorn_fits, arg("n"), arg("m"));
  m.def(
      "sinkhorn_room",
      [](const SinkhornProblem& problem, int64_t backward_iterations) {
        const SinkhornRoom room = sinkhorn_room(problem, backward_iterations);
        return std::make_tuple(room.floats, room.counters);
      },
      arg("problem"), arg("backward_iterations"));
  bind_sinkhorn_pass(m, "sinkhorn", &sinkhorn_results, &sinkhorn);
  bind_sinkhorn_pass(m, "sinkhorn_backward", &sinkhorn_gradients, &sinkhorn_backward);
}

void bind_kmeans_1d(py::module_& m) {
  m.def("kmeans_1d_layers", with_addresses(&kmeans_1d_layers), arg("sums"), arg("masses"), arg("gains"), arg("best"),
        arg("problems"), arg("n"), arg("k_max"), arg("stream"));
}

}  // namespace
}  // namespace pyllmq::cuda

PYBIND11_MODULE(_cuda, m) {
  using namespace pyllmq::cuda;
  m.doc() = "pyllmq CUDA back end (built without libtorch, static cudart)";
  m.def("runtime_version", &runtime_version);
  m.def("device_problem", &device_problem, "why the kernels cannot run on the current device, or ''");
  bind_linear_operand(m);
  bind_codebook(m);
  bind_softmax_cdist_l1(m);
  bind_sinkhorn(m);
  bind_sparse(m);
  bind_kmeans_1d(m);
  bind_experts(m);
#ifdef PYLLMQ_CUDA_EMULATED
  emulator::add_bindings(m);
#endif
}

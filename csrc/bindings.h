// What the bindings of both extensions have in common: arguments taken by keyword, and the structs that both fill so.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <type_traits>
#include <vector>

#include "codebook/shape.h"
#include "sinkhorn/problem.h"
#include "sparse/shape.h"

namespace pyllmq {
namespace py = pybind11;

using Pointer = uint64_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* as(Pointer pointer) {
  if constexpr (!std::is_void_v<T>)
    if (pointer % alignof(T) != 0) throw std::invalid_argument("a pointer is not aligned to its element size");
  return reinterpret_cast<T*>(static_cast<uintptr_t>(pointer));
}

// object.name(), as an integer.
inline Pointer asked(py::handle object, PyObject* name) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), name));
  if (!found) throw py::error_already_set();
  return found.cast<Pointer>();
}

// The elements of a contiguous tensor, given itself or by its address; None or 0: null.
template <class T>
T* array(py::handle given) {
  if (given.is_none()) return nullptr;
  if (py::isinstance<py::int_>(given)) return as<T>(given.cast<Pointer>());
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const element_size = PyUnicode_InternFromString("element_size");
  if constexpr (!std::is_void_v<T>)
    if (asked(given, element_size) != sizeof(T))
      throw std::invalid_argument("a tensor's elements have another size than the " + std::to_string(sizeof(T)) +
                                  " bytes that are read there");
  return as<T>(asked(given, data_ptr));
}

// What a function of a binding takes for a pointer to T: all that `array` takes.
template <class T>
struct Address {
  T* at;
};
template <class Argument>
struct Taken {
  using Type = Argument;
  static Argument given(Argument argument) { return argument; }
};
template <class T>
struct Taken<T*> {
  using Type = Address<T>;
  static T* given(Address<T> address) { return address.at; }
};
template <class Result, class... Arguments>
auto with_addresses(Result (*function)(Arguments...)) {
  return [function](typename Taken<Arguments>::Type... given) -> Result { return function(Taken<Arguments>::given(given)...); };
}

}  // namespace pyllmq

template <class T>
struct pybind11::detail::type_caster<pyllmq::Address<T>> {
  PYBIND11_TYPE_CASTER(pyllmq::Address<T>, const_name("int"));

  bool load(handle given, bool) {
    if (!given.is_none() && !isinstance<int_>(given) && !hasattr(given, "data_ptr")) return false;
    value = {pyllmq::array<T>(given)};
    return true;
  }
};

namespace pyllmq {

// Keyword arguments, each taken once. `fill` takes those of a struct's fields.
class Keywords {
 public:
  explicit Keywords(py::kwargs given) : given_(std::move(given)) {}

  template <class T>
  T take(const char* name) {
    const py::handle given = find(name);
    if (!given) throw py::type_error(std::string("missing keyword argument '") + name + "'");
    return read<T>(name, given);
  }
  template <class T>
  T take(const char* name, T otherwise) {
    const py::handle given = find(name);
    return given ? read<T>(name, given) : otherwise;
  }
  template <class T, class... Rest>
  void fill(const char* name, T& field, Rest&&... rest) {
    field = take<T>(name);
    if constexpr (sizeof...(Rest) > 0) fill(std::forward<Rest>(rest)...);
  }
  // Arrays by the width of their codes, 1 to 8.
  template <class T>
  void fill_widths(const char* name, T (&fields)[9]) {
    const auto given = take<py::list>(name);
    if (given.size() != 8)
      throw std::invalid_argument(std::string(name) + " has " + std::to_string(given.size()) +
                                  " entries; needs 8, one per width 1..8");
    for (int width = 1; width <= 8; ++width) {
      if constexpr (std::is_pointer_v<T>)
        fields[width] = array<std::remove_pointer_t<T>>(given[width - 1]);
      else
        fields[width] = given[width - 1].template cast<T>();
    }
  }
  void finish() const {
    if (taken_.size() == given_.size()) return;
    for (const auto& [name, value] : given_)
      if (std::find(taken_.begin(), taken_.end(), name.cast<std::string>()) == taken_.end())
        throw py::type_error("unknown keyword argument '" + name.cast<std::string>() + "'");
  }

 private:
  template <class T>
  static T read(const char* name, py::handle given) {
    try {
      using Element = std::remove_pointer_t<T>;
      if constexpr (std::is_pointer_v<T> && (std::is_void_v<Element> || std::is_arithmetic_v<Element>))
        return array<Element>(given);
      else
        return given.cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string("keyword argument '") + name + "' is of another type than the stub file says");
    }
  }
  // What is found counts as taken. Rejected: names popped from a copy, 19 us for ten of them in place of 5.
  py::handle find(const char* name) {
    const py::handle found = PyDict_GetItemWithError(given_.ptr(), key(name));
    if (found) taken_.push_back(name);
    return found;
  }
  // The string object of a literal, made once: 22 keywords of a small sinkhorn take 1 us less. Under the interpreter's lock.
  static PyObject* key(const char* name) {
    static std::unordered_map<const char*, PyObject*> keys;
    PyObject*& made = keys[name];
    if (made == nullptr) made = PyUnicode_InternFromString(name);
    return made;
  }

  const py::kwargs given_;
  std::vector<std::string_view> taken_;
};

// A class of the extension whose objects are made from keywords, whose tensors they keep alive. Both modules may have it.
template <class T>
void bind_keywords(py::module_& m, const char* name, T (*make)(Keywords&)) {
  py::class_<T>(m, name, py::module_local())
      .def(py::init([make](const py::kwargs& given) {
             Keywords keywords(given);
             T made = make(keywords);
             keywords.finish();
             return made;
           }),
           py::keep_alive<1, 2>());
}

inline CodebookCheckpoint codebook_checkpoint(Keywords& given) {
  CodebookCheckpoint c{};
  given.fill("rows", c.rows, "columns", c.columns, "segments", c.segments, "column_bits", c.column_bits, "segment_rows",
             c.segment_rows, "codebook", c.codebook, "row_scale", c.row_scale, "outlier_row_offsets", c.outlier_row_offsets,
             "outlier_columns", c.outlier_columns, "outlier_columns_bytes", c.outlier_columns_bytes, "outlier_values",
             c.outlier_values);
  given.fill_widths("codes", c.codes);
  return c;
}

// `tensors` by their names in the checkpoint; absent ones stay null.
inline SparseCheckpoint sparse_checkpoint(Keywords& given) {
  SparseCheckpoint c{};
  const auto kind = given.take<std::string>("kind");
  const auto value_type = given.take<int>("value_type");
  if (kind == "bitmap")
    c.kind = SparseKind::bitmap;
  else if (kind == "sparse24")
    c.kind = SparseKind::sparse24;
  else if (kind == "sparse24_codebook")
    c.kind = SparseKind::codes;
  else
    throw std::invalid_argument("kind '" + kind + "'; allowed: bitmap, sparse24, sparse24_codebook");
  if (value_type < 0 || value_type > 3)
    throw std::invalid_argument("value type " + std::to_string(value_type) + "; allowed: 0 to 3 (fp32, bf16, fp16, int8)");
  c.value_type = static_cast<ValueType>(value_type);
  given.fill("rows", c.rows, "columns", c.columns, "kept", c.kept, "bits", c.bits, "outliers", c.outliers, "column_bytes",
             c.column_bytes);
  Keywords tensors(given.take<py::kwargs>("tensors"));
  const auto bytes = [&](const char* name) { return static_cast<uint8_t*>(tensors.take<void*>(name, nullptr)); };
  c.values = bytes("values");
  c.row_offsets = tensors.take<int32_t*>("row_offsets", nullptr);
  c.mask = bytes("mask");
  c.column_numbers = bytes("columns");
  c.positions = bytes("positions");
  c.scale = tensors.take<float*>("scale", nullptr);
  c.codes = bytes("codes");
  c.codebook = tensors.take<uint16_t*>("codebook", nullptr);
  c.outlier_row_offsets = tensors.take<int32_t*>("outlier_row_offsets", nullptr);
  c.outlier_columns = bytes("outlier_columns");
  c.outlier_values = tensors.take<uint16_t*>("outlier_values", nullptr);
  tensors.finish();
  return c;
}

inline SinkhornProblem sinkhorn_problem(Keywords& given) {
  SinkhornProblem p{};
  given.fill("cost", p.cost, "cost_stride", p.cost_stride, "a", p.a, "a_stride", p.a_stride, "b", p.b, "b_stride", p.b_stride,
             "epsilon", p.epsilon, "epsilon_stride", p.epsilon_stride, "problems", p.problems, "n", p.n, "m", p.m, "rho_a",
             p.rho_a, "rho_b", p.rho_b);
  return p;
}

inline SinkhornForward sinkhorn_results(Keywords& given) {
  SinkhornForward f{};
  given.fill("iterations", f.iterations, "tolerance", f.tolerance, "plan", f.plan, "u", f.u, "v", f.v, "tape", f.tape, "count",
             f.count);
  return f;
}

inline SinkhornBackward sinkhorn_gradients(Keywords& given) {
  SinkhornBackward b{};
  given.fill("iterations", b.iterations, "tape", b.tape, "count", b.count, "grad_plan", b.grad_plan, "grad_u", b.grad_u, "grad_v",
             b.grad_v, "grad_cost", b.grad_cost, "grad_a", b.grad_a, "grad_b", b.grad_b);
  return b;
}

}  // namespace pyllmq

// torch's tensors without its headers: by the table of C functions that DLPack's exchange protocol asks of a framework
// (`torch.Tensor.__dlpack_c_exchange_api__`, torch 2.10 and later). A tensor is read in one call where Python asks for its dtype,
// device, shape, strides and address one by one. The weights of a layer displace Python's and torch's code from the caches: what
// surrounds the kernel took 54 us of a call in place of 4, this way 38 and 2 (Intel server, 2 MB of L2).
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "runtime/half.h"

namespace pyllmq::cpu {
namespace py = pybind11;

// DLPack 1, as its ABI lays them out.
namespace dlpack {

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};
struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  int (*allocate)(Tensor* like, ManagedTensor** out, void* context, void (*fail)(void*, const char* kind, const char* message));
  int (*export_owning)(void* object, ManagedTensor** out);
  int (*import_owning)(ManagedTensor* tensor, void** object);  // takes the tensor over
  int (*look)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace dlpack

// The rows [rows, columns] of a contiguous CPU tensor [..., columns] whose elements stand in memory as their values are.
struct TensorRows {
  void* data;
  DType dtype;
  int64_t rows, columns;
  dlpack::Tensor tensor;
};

class TorchTensors {
 public:
  static constexpr int kMostDims = 8;

  // False where this torch has no such table, or one of another version: `rows_of` then gives nothing.
  bool bind(py::object tensor_type, py::object parameter_type, py::object is_grad_enabled, py::object num_threads) {
    exchange_ = nullptr;
    const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
    auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found->major != 1 || found->look == nullptr) return false;
    tensor_ = tensor_type.release().ptr();  // these live as long as torch
    parameter_ = parameter_type.release().ptr();
    is_grad_enabled_ = is_grad_enabled.release().ptr();
    num_threads_ = num_threads.release().ptr();
    is_neg_ = py::getattr(tensor_, "is_neg").release().ptr();
    exchange_ = found;
    return true;
  }

  int num_threads() const {
    const auto found = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(num_threads_));
    if (!found) throw py::error_already_set();
    return static_cast<int>(PyLong_AsLong(found.ptr()));
  }

  // Nothing for all that needs more than its memory: gradients, subclasses, other devices and dtypes, strides, negative views.
  std::optional<TensorRows> rows_of(py::handle object) const {
    dlpack::Tensor tensor;
    if (exchange_ == nullptr || (Py_TYPE(object.ptr()) != type(tensor_) && Py_TYPE(object.ptr()) != type(parameter_)) ||
        wants_gradient(object) || is_true(PyObject_CallOneArg(is_neg_, object.ptr())))
      return std::nullopt;
    if (exchange_->look(object.ptr(), &tensor) == 0) return rows_of(tensor);
    PyErr_Clear();  // a wrapper without memory
    return std::nullopt;
  }

  struct Made {
    py::object tensor;
    void* data;
  };
  // As torch.empty(*shape of x but its last, columns), of the dtype of x.
  Made empty_like_rows(const TensorRows& x, int64_t columns) const {
    dlpack::Tensor like = x.tensor;
    std::array<int64_t, kMostDims> shape;
    std::copy_n(like.shape, like.ndim, shape.begin());
    shape[like.ndim - 1] = columns;
    like.shape = shape.data();
    like.strides = nullptr;
    like.byte_offset = 0;
    const auto fail = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
    dlpack::ManagedTensor* owning = nullptr;
    if (exchange_->allocate(&like, &owning, nullptr, fail) != 0) throw py::error_already_set();
    void* const data = static_cast<uint8_t*>(owning->tensor.data) + owning->tensor.byte_offset;
    void* made = nullptr;
    if (exchange_->import_owning(owning, &made) != 0) throw py::error_already_set();
    return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(made)), data};
  }

 private:
  static PyTypeObject* type(PyObject* object) { return reinterpret_cast<PyTypeObject*>(object); }
  static bool is_true(PyObject* stolen) {
    const auto answer = py::reinterpret_steal<py::object>(stolen);
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }
  bool wants_gradient(py::handle object) const {
    if (!is_true(PyObject_CallNoArgs(is_grad_enabled_))) return false;
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    return is_true(PyObject_GetAttr(object.ptr(), requires_grad));
  }
  static std::optional<DType> known_dtype(const dlpack::DataType& type) {
    if (type.lanes != 1) return std::nullopt;
    if (type.code == dlpack::kFloat && type.bits == 32) return DType::fp32;
    if (type.code == dlpack::kFloat && type.bits == 16) return DType::fp16;
    if (type.code == dlpack::kBfloat && type.bits == 16) return DType::bf16;
    return std::nullopt;
  }
  static std::optional<TensorRows> rows_of(const dlpack::Tensor& tensor) {
    const std::optional<DType> dtype = known_dtype(tensor.dtype);
    if (!dtype || tensor.device_type != dlpack::kCpu || tensor.ndim < 1 || tensor.ndim > kMostDims) return std::nullopt;
    int64_t elements = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
      if (tensor.strides != nullptr && tensor.shape[i] != 1 && tensor.strides[i] != elements) return std::nullopt;
      elements *= tensor.shape[i];
    }
    auto* data = static_cast<uint8_t*>(tensor.data) + tensor.byte_offset;
    if (elements == 0 || reinterpret_cast<uintptr_t>(data) % (tensor.dtype.bits / 8) != 0) return std::nullopt;
    const int64_t columns = tensor.shape[tensor.ndim - 1];
    return TensorRows{data, *dtype, elements / columns, columns, tensor};
  }

  const dlpack::Exchange* exchange_ = nullptr;
  PyObject *tensor_ = nullptr, *parameter_ = nullptr, *is_grad_enabled_ = nullptr, *num_threads_ = nullptr, *is_neg_ = nullptr;
};

}  // namespace pyllmq::cpu

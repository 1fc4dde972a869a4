// Is the state of Python objects what it was? Asked for each block at each token: as a loop in Python it takes 15 us a block,
// here 1.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace pyllmq {

namespace py = pybind11;

class StateGuard {
 public:
  // slots: (dict, key, value), the value Ellipsis where the key must be absent; empty: containers that must have no element;
  // tensors: (tensor, data_ptr, version or None for tensors that keep none).
  StateGuard(py::list slots, py::list empty, py::list tensors)
      : keep_(py::make_tuple(slots, empty, tensors)), empty_(empty), version_("_version"), data_ptr_("data_ptr") {
    for (const py::handle slot : slots) {
      const auto parts = py::cast<py::tuple>(slot);
      slots_.push_back({py::handle(parts[0]), py::handle(parts[1]), py::handle(parts[2])});
    }
    for (const py::handle tensor : tensors) {
      const auto parts = py::cast<py::tuple>(tensor);
      const bool counted = !parts[2].is_none();
      tensors_.push_back({parts[0], parts[1].cast<uint64_t>(), counted, counted ? parts[2].cast<int64_t>() : 0});
    }
  }

  bool holds() const {
    for (const Slot& slot : slots_) {
      const PyObject* now = PyDict_GetItemWithError(slot.state.ptr(), slot.key.ptr());
      if (now == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (now != (slot.value.ptr() == Py_Ellipsis ? nullptr : slot.value.ptr())) return false;
    }
    for (const py::handle container : empty_)
      if (py::len(container) != 0) return false;
    for (const Watched& watched : tensors_)
      if (watched.tensor.attr(data_ptr_)().cast<uint64_t>() != watched.data_ptr ||
          (watched.counted && watched.tensor.attr(version_).cast<int64_t>() != watched.version))
        return false;
    return true;
  }

 private:
  struct Slot {
    py::handle state, key, value;
  };
  struct Watched {
    py::object tensor;
    uint64_t data_ptr;
    bool counted;
    int64_t version;
  };

  py::tuple keep_;
  py::list empty_;
  py::str version_, data_ptr_;
  std::vector<Slot> slots_;
  std::vector<Watched> tensors_;
};

}  // namespace pyllmq

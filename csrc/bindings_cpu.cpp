// Python's door to the CPU back end. Pointers, sizes and flags come in as integers, the GIL is released, kernels are
// called, errors are raised as exceptions. No torch header: shapes and dtypes are checked by the Python side.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "pyllmq CPU back end (built without libtorch)";
}

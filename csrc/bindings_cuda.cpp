// Python's door to the CUDA back end. No kernel stands behind it yet: the room exists so that builds, wheels and
// `pyllmq doctor` treat a machine with nvcc as they will when the kernels come.
#include <pybind11/pybind11.h>

#include "cuda/runtime.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "pyllmq CUDA back end (built without libtorch, static cudart)";
  m.attr("kernels") = pybind11::tuple();
  m.def("runtime_version", &pyllmq::cuda::runtime_version);
}

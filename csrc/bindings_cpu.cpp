// Python's door to the CPU back end. Pointers, sizes and flags come in as integers, the GIL is released, kernels are
// called, errors are raised as exceptions. No torch header: shapes and dtypes are checked by the Python side.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kmeans_1d.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "pyllmq CPU back end (built without libtorch)";

  m.def(
      "kmeans_1d",
      [](uintptr_t values, uintptr_t weights, int64_t weights_stride, int64_t problems, int64_t n, int k, bool exact,
         uint64_t seed, int threads, bool simd, uintptr_t centroids, uintptr_t codes) {
        using namespace pyllmq::cpu;
        const auto method = exact ? KMeans1dMethod::exact : KMeans1dMethod::lloyd;
        kmeans_1d({reinterpret_cast<const float*>(values), reinterpret_cast<const float*>(weights), weights_stride,
                   problems, n, k, method, seed, threads, simd, reinterpret_cast<float*>(centroids),
                   reinterpret_cast<uint8_t*>(codes)});
      },
      py::call_guard<py::gil_scoped_release>());
}

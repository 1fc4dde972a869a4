// Tests only: what a test sets and asks of the emulator, as pyllmq._cuda.emulator.
#include <pybind11/pybind11.h>

#include "cuda_emulator/emulator.h"

namespace pyllmq::cuda::emulator {

void add_bindings(pybind11::module_& parent) {
  pybind11::module_ m = parent.def_submodule("emulator");
  m.def(
      "set_schedule",
      [](bool last_thread_first, bool last_block_first, bool eager_copies) {
        schedule = {last_thread_first, last_block_first, eager_copies};
      },
      pybind11::kw_only(), pybind11::arg("last_thread_first") = false, pybind11::arg("last_block_first") = false,
      pybind11::arg("eager_copies") = false);
  m.def("set_hopper", [](bool set) { is_hopper = set; }, pybind11::arg("set"));
  m.def("launches", &launches);
}

}  // namespace pyllmq::cuda::emulator

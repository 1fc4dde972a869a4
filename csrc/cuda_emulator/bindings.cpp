// Tests only: what a test sets and asks of the emulator, as pyllmq._cuda.emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_emulator/emulator.h"

namespace pyllmq::cuda::emulator {

void add_bindings(pybind11::module_& parent) {
  pybind11::module_ m = parent.def_submodule("emulator");
  pybind11::enum_<Fault>(m, "Fault")
      .value("none", Fault::none)
      .value("first_cluster_barrier", Fault::first_cluster_barrier)
      .value("second_cluster_barrier", Fault::second_cluster_barrier)
      .value("wait_for_previous", Fault::wait_for_previous);
  m.def(
      "set_schedule",
      [](bool last_thread_first, bool last_block_first, bool eager_copies, bool warps_apart, bool blocks_apart,
         bool early_launches, Fault fault) {
        schedule = {last_thread_first, last_block_first, eager_copies, warps_apart, blocks_apart, early_launches, fault};
      },
      pybind11::kw_only(), pybind11::arg("last_thread_first") = false, pybind11::arg("last_block_first") = false,
      pybind11::arg("eager_copies") = false, pybind11::arg("warps_apart") = false, pybind11::arg("blocks_apart") = false,
      pybind11::arg("early_launches") = false, pybind11::arg("fault") = Fault::none);
  m.def("finish", &finish);
  m.def("list_waits", [](bool set) { waits.listed = set, waits.places.clear(); }, pybind11::arg("set"));
  m.def("waits", [] { return waits.places; });
  m.def(
      "leave_out",
      [](const std::string& file, int line, bool only_weaker) {
        waits.file = file, waits.line = line, waits.only_weaker = only_weaker;
      },
      pybind11::arg("file") = "", pybind11::arg("line") = 0, pybind11::arg("only_weaker") = false);
  m.def("set_hopper", [](bool set) { is_hopper = set; }, pybind11::arg("set"));
  m.def("launches", &launches);
}

}  // namespace pyllmq::cuda::emulator

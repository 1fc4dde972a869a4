#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace pyllmq::cpu {
namespace {

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{supported_isas().front()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::scalar: break;
  }
  return "scalar";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(Isa::avx512);
  if (avx2) found.push_back(Isa::avx2);
#endif
  found.push_back(Isa::scalar);
  return found;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) {
  std::string allowed;
  for (Isa isa : supported_isas()) {
    if (name == isa_name(isa)) {
      active().store(isa);
      return;
    }
    allowed += std::string(allowed.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("isa '" + name + "' is not available; allowed on this machine: " + allowed);
}

}  // namespace pyllmq::cpu

#include "runtime/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <atomic>
#include <stdexcept>

namespace pyllmq::cpu {
namespace {

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{supported_isas().front()};
  return isa;
}

#if defined(__x86_64__)
// CPUID 7.1 EAX; not all compilers know the name for __builtin_cpu_supports.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// Linux grants the tile registers to a process that asks for them; asking where they are missing is an error only.
bool amx_granted() {
#if defined(__linux__)
  constexpr unsigned tiles = 1u << 22 | 1u << 24 | 1u << 25;   // with bf16 and int8, of CPUID 7.0 EDX
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tiles) == tiles &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
// The kernel says what a processor has: bits of getauxval on Linux, names on macOS. Elsewhere nothing is taken for granted.
#if defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }    // HWCAP2_I8MM
#elif defined(__APPLE__)
bool has(const char* feature) {
  int found = 0;
  size_t bytes = sizeof found;
  return sysctlbyname(feature, &found, &bytes, nullptr, 0) == 0 && found != 0;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::neon_i8mm: return "neon_i8mm";
    case Isa::neon_dotprod: return "neon_dotprod";
    case Isa::neon: return "neon";
    case Isa::amx: return "amx";
    case Isa::avx512: return "avx512";
    case Isa::avx_vnni: return "avx_vnni";
    case Isa::avx2: return "avx2";
    case Isa::scalar: break;
  }
  return "scalar";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && amx_granted()) found.push_back(Isa::amx);
  if (avx512) found.push_back(Isa::avx512);
  if (avx2 && has_avx_vnni()) found.push_back(Isa::avx_vnni);
  if (avx2) found.push_back(Isa::avx2);
#elif defined(__aarch64__)
  if (has_dotprod() && has_i8mm()) found.push_back(Isa::neon_i8mm);
  if (has_dotprod()) found.push_back(Isa::neon_dotprod);
  found.push_back(Isa::neon);
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

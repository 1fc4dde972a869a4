#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

// Asked here, not in a file compiled for an instruction set: what runs at import must run on every processor.
bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace

const Ahead kLookupsAvx512 = is_amd() ? Ahead{8192, 0, true} : Ahead{1024, 4096};

}  // namespace pyllmq::cpu

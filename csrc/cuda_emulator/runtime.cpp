// Tests only: runtime.h without a device.
#include "runtime/cuda/runtime.h"

#include "cuda_emulator/emulator.h"

namespace pyllmq::cuda {

int runtime_version() { return 0; }
std::string device_problem() { return ""; }
int multiprocessors() { return 3; }  // few, so that blocks take several items
int code_version() { return emulator::is_hopper ? 90 : 80; }
int64_t shared_bytes() { return 163 << 10; }
void allow_shared(const void*, size_t) {}
bool has_code(const void*) { return emulator::is_hopper; }
bool is_captured(uintptr_t stream) { return stream % 2 == 1; }  // no stream of a device is odd
void wait_for_device() {}
void check_launch(const char*) {}

}  // namespace pyllmq::cuda

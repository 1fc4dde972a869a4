// What the bindings and the launching code may ask of the CUDA runtime, without seeing a CUDA header.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace pyllmq::cuda {

// Version of the linked static runtime, major * 1000 + minor * 10. Needs no driver.
int runtime_version();

// Why the kernels cannot run on the current device; empty if they can.
std::string device_problem();

// Of the current device; asked once per device.
int multiprocessors();

// For which compute capability, times ten, the code was compiled that the current device runs: 80 on a newer device, too, that
// translates the PTX for 8.0. From 90 on kernels form clusters and begin early. Asked once per device.
int code_version();

// Most shared memory that a block can get on the current device.
int64_t shared_bytes();

// Lets a kernel take that much dynamic shared memory on the current device; done once per kernel and device.
void allow_shared(const void* kernel, size_t bytes);

// Of a kernel for compute capability 9.0 alone: whether the current device is one, and the build is for it. What stands in its
// place elsewhere has so much static shared memory (PYLLMQ_NO_CODE); drivers may count a kibibyte of their own.
constexpr size_t kNoCodeBytes = 16 << 10;
bool has_code(const void* kernel);

// Whether work for the stream is recorded in a graph, not run.
bool is_captured(uintptr_t stream);

// Until all work of the current device is done. Throws while a graph is recorded.
void wait_for_device();

// Throws std::runtime_error with the runtime's own text if a launch was refused. The error is taken: later calls are clean.
void check_launch(const char* kernel);

}  // namespace pyllmq::cuda

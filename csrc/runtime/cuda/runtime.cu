#include "runtime/cuda/runtime.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace pyllmq::cuda {
namespace {

constexpr int kMostDevices = 64;

__global__ void probe() {}  // compiled for the same devices as every kernel

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // otherwise the next call would find this error again
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// What is asked of a device once.
using Known = std::array<std::atomic<int>, kMostDevices>;
template <class Ask>
int of_device(Known& known, const Ask& ask) {
  const int device = current_device();
  if (device >= kMostDevices) throw std::runtime_error("device " + std::to_string(device) + " is beyond the 64 served");
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    answer = ask(device);
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer;
}

}  // namespace

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

std::string device_problem() {
  int devices = 0;
  cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) {
    cudaFuncAttributes attributes;  // fails where the binary holds no code for the device
    status = cudaFuncGetAttributes(&attributes, probe);
  }
  if (status == cudaSuccess) return devices > 0 ? "" : "the driver sees no device";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

int multiprocessors() {
  static Known known{};
  return of_device(known, [](int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
  });
}

int code_version() {
  static Known known{};
  return of_device(known, [](int) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, probe), "cudaFuncGetAttributes");
    return attributes.ptxVersion;
  });
}

int64_t shared_bytes() {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()), "cudaDeviceGetAttribute");
  return bytes;
}

void allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const auto key = std::make_pair(kernel, current_device());
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed[key] >= bytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "this device does not give a block " + std::to_string(bytes) + " bytes of shared memory");
  allowed[key] = bytes;
}

bool has_code(const void* kernel) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.sharedSizeBytes < kNoCodeBytes;
}

bool is_captured(uintptr_t stream) {
  if (stream == 0) return false;  // the default stream cannot be
  cudaStreamCaptureStatus status{};
  check(cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusActive;
}

void wait_for_device() { check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace pyllmq::cuda

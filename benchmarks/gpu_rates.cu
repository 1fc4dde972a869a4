// What the kernels' predictions hang on, measured: instructions per clock and SM, the clock under load, memory bandwidth.
//   nvcc -O3 -std=c++17 -arch=native -o rates benchmarks/gpu_rates.cu && ./rates > rates.json
// One block of 1024 threads per SM (8 warps for each scheduler), 8 independent chains a thread: enough to hide every latency here.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                                    \
  do {                                                                                                 \
    cudaError_t error = (call);                                                                        \
    if (error != cudaSuccess) {                                                                        \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error));  \
      std::exit(1);                                                                                    \
    }                                                                                                  \
  } while (0)

enum Op { kPrmt, kLop3, kShf, kIadd3, kMulHi, kLds, kShfl, kFfma, kHfma2, kMma, kMmaInt8, kOps };
constexpr const char* kNames[kOps] = {"prmt", "lop3", "shf", "iadd3", "mul_hi", "lds32", "shfl", "ffma", "hfma2", "mma_m16n8k16_f16",
                                      "mma_m16n8k32_u8s8"};

constexpr int kThreads = 1024, kChains = 8, kUnrolled = 8, kRounds = 512;

// Neighbouring chains feed each other, so that no two steps can be folded into one.
template <Op op>
__device__ __forceinline__ void step(uint32_t (&a)[kChains], float (&f)[kChains], uint32_t b, uint32_t c) {
#pragma unroll
  for (int i = 0; i < kChains; ++i) {
    const uint32_t next = a[(i + 1) % kChains];
    if constexpr (op == kPrmt) asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(next), "r"(c));
    if constexpr (op == kLop3) asm volatile("lop3.b32 %0, %0, %1, %2, 0xE8;" : "+r"(a[i]) : "r"(next), "r"(c));
    if constexpr (op == kShf) asm volatile("shf.l.wrap.b32 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(next), "r"(c));
    if constexpr (op == kIadd3) asm volatile("{.reg .u32 t; add.u32 t, %0, %1; add.u32 %0, t, %2;}" : "+r"(a[i]) : "r"(next), "r"(c));
    if constexpr (op == kMulHi) asm volatile("mul.hi.u32 %0, %0, %1;" : "+r"(a[i]) : "r"(next));
    if constexpr (op == kLds) asm volatile("ld.shared.u32 %0, [%0];" : "+r"(a[i])::"memory");
    if constexpr (op == kShfl) asm volatile("shfl.sync.bfly.b32 %0, %0, 1, 0x1f, 0xffffffff;" : "+r"(a[i]));
    if constexpr (op == kFfma) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(f[i]) : "f"(f[(i + 1) % kChains]), "f"(__uint_as_float(b)));
    if constexpr (op == kHfma2) asm volatile("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(next), "r"(b));
  }
  if constexpr (op == kMma) {
#pragma unroll
    for (int i = 0; i < kChains; i += 4)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%4,%5}, {%6,%7}, {%0,%1,%2,%3};"
                   : "+f"(f[i]), "+f"(f[i + 1]), "+f"(f[i + 2]), "+f"(f[i + 3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
  }
  if constexpr (op == kMmaInt8) {
#pragma unroll
    for (int i = 0; i < kChains; i += 4)
      asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%4,%5}, {%4,%5}, {%0,%1,%2,%3};"
                   : "+r"(a[i]), "+r"(a[i + 1]), "+r"(a[i + 2]), "+r"(a[i + 3])
                   : "r"(b), "r"(c));
  }
}

template <Op op>
__global__ void __launch_bounds__(kThreads) rate(uint32_t seed, uint32_t* sink, long long* cycles) {
  __shared__ uint32_t chase[kThreads];
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(&chase[threadIdx.x]));
  chase[threadIdx.x] = own;  // each lane chases its own word: no bank conflicts
  uint32_t a[kChains];
  float f[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) a[i] = op == kLds ? own : seed * (threadIdx.x + i), f[i] = static_cast<float>(seed + i);
  __syncthreads();
  const long long begin = clock64();
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) step<op>(a, f, seed, seed + 3);
  }
  __syncthreads();
  const long long end = clock64();
  uint32_t used = 0;
#pragma unroll
  for (int i = 0; i < kChains; ++i) used += a[i] + __float_as_uint(f[i]);
  if (used == 0x12345678u) *sink = used;
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
}

struct Rate {
  double per_clock;  // lanes (mma: instructions of a warp) per clock and SM
  double mhz;
};

template <Op op>
Rate measure(int sms, uint32_t* sink, long long* cycles) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  constexpr int kLaunches = 20;
  for (int i = 0; i < 3; ++i) rate<op><<<sms, kThreads>>>(1, sink, cycles);
  CHECK(cudaEventRecord(begin));
  for (int i = 0; i < kLaunches; ++i) rate<op><<<sms, kThreads>>>(1, sink, cycles);
  CHECK(cudaEventRecord(end));
  CHECK(cudaGetLastError());
  CHECK(cudaEventSynchronize(end));
  float ms = 0;
  CHECK(cudaEventElapsedTime(&ms, begin, end));
  std::vector<long long> found(sms);
  CHECK(cudaMemcpy(found.data(), cycles, sms * sizeof(long long), cudaMemcpyDeviceToHost));
  std::nth_element(found.begin(), found.begin() + sms / 2, found.end());
  const double steps = double(kRounds) * kUnrolled;
  const double done = op >= kMma ? steps * (kChains / 4) * (kThreads / 32) : steps * kChains * kThreads;
  return {done / double(found[sms / 2]), double(found[sms / 2]) * kLaunches / (ms * 1e3)};
}

__global__ void read_all(const uint4* from, size_t count, uint32_t* sink) {
  uint32_t used = 0;
  const size_t stride = size_t(gridDim.x) * blockDim.x;
#pragma unroll 4
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const uint4 v = __ldcs(from + i);
    used ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (used == 0x12345678u) *sink = used;
}

__global__ void copy_all(const uint4* from, uint4* to, size_t count) {
  const size_t stride = size_t(gridDim.x) * blockDim.x;
#pragma unroll 4
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) __stcs(to + i, __ldcs(from + i));
}

// Median of 15 passes over 2 GiB, many times the L2, in GB/s.
template <typename Launch>
double gb_per_s(double bytes, Launch launch) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 17; ++i) {
    CHECK(cudaEventRecord(begin));
    launch();
    CHECK(cudaEventRecord(end));
    CHECK(cudaGetLastError());
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  std::nth_element(times.begin(), times.begin() + 7, times.end());
  return bytes / times[7] / 1e6;
}

int main() {
  cudaDeviceProp device{};
  CHECK(cudaGetDeviceProperties(&device, 0));
  const int sms = device.multiProcessorCount;
  const size_t bytes = size_t(2) << 30;
  uint32_t* sink;
  long long* cycles;
  uint4 *from, *to;
  CHECK(cudaMalloc(&sink, 4));
  CHECK(cudaMalloc(&cycles, sms * sizeof(long long)));
  CHECK(cudaMalloc(&from, bytes));
  CHECK(cudaMalloc(&to, bytes));
  CHECK(cudaMemset(from, 1, bytes));

  const Rate rates[kOps] = {
      measure<kPrmt>(sms, sink, cycles), measure<kLop3>(sms, sink, cycles),  measure<kShf>(sms, sink, cycles),
      measure<kIadd3>(sms, sink, cycles), measure<kMulHi>(sms, sink, cycles), measure<kLds>(sms, sink, cycles),
      measure<kShfl>(sms, sink, cycles),
      measure<kFfma>(sms, sink, cycles), measure<kHfma2>(sms, sink, cycles), measure<kMma>(sms, sink, cycles),
      measure<kMmaInt8>(sms, sink, cycles)};

  std::printf("{\n \"device\": \"%s\", \"sms\": %d, \"l2_bytes\": %d,\n \"per_clock_and_sm\": {", device.name, sms, device.l2CacheSize);
  for (int op = 0; op < kOps; ++op) std::printf("%s\"%s\": %.2f", op ? ", " : "", kNames[op], rates[op].per_clock);
  std::printf("},\n \"clock_mhz\": {");
  for (int op = 0; op < kOps; ++op) std::printf("%s\"%s\": %.0f", op ? ", " : "", kNames[op], rates[op].mhz);
  const size_t count = bytes / sizeof(uint4);
  const double read = gb_per_s(double(bytes), [&] { read_all<<<sms * 8, 512>>>(from, count, sink); });
  const double copy = gb_per_s(2.0 * double(bytes), [&] { copy_all<<<sms * 8, 512>>>(from, to, count); });
  std::printf("},\n \"read_gb_per_s\": %.0f, \"copy_gb_per_s\": %.0f\n}\n", read, copy);
  return 0;
}

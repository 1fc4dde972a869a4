#include "runtime/read_probe.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "runtime/isa.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kChunkWords = (1 << 20) / 8;
constexpr double kNsPerWord = 0.4;  // 20 GB/s a core

}  // namespace

uint64_t sum_range_scalar(const uint64_t* at, int64_t words) {
  uint64_t sums[kReadStreams] = {};
  const int64_t part = words / kReadStreams;
  for (int64_t i = 0; i < part; ++i)
    for (int s = 0; s < kReadStreams; ++s) sums[s] += at[s * part + i];
  for (int64_t i = kReadStreams * part; i < words; ++i) sums[0] += at[i];
  uint64_t sum = 0;
  for (uint64_t stream : sums) sum += stream;
  return sum;
}

uint64_t sum_words(const uint64_t* memory, int64_t bytes) {
  if (memory == nullptr || bytes < 0 || bytes % 8 != 0)
    throw std::invalid_argument("read probe: " + std::to_string(bytes) +
                                " bytes; allowed: a multiple of 8, at an address that is not null");
#if defined(__x86_64__)
  const auto sum_range = active_isa() == Isa::scalar ? sum_range_scalar : sum_range_avx2;
#else
  const auto sum_range = sum_range_scalar;
#endif
  std::atomic<uint64_t> sum{0};
  parallel_for(bytes / 8, kChunkWords, kNsPerWord * static_cast<double>(bytes / 8),
               [&](int64_t begin, int64_t end) { sum += sum_range(memory + begin, end - begin); });
  return sum;
}

}  // namespace pyllmq::cpu

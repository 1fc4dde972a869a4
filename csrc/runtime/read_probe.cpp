#include "runtime/read_probe.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kChunkWords = (1 << 20) / 8;
constexpr double kNsPerWord = 0.4;  // 20 GB/s a core
// A range is read as so many streams side by side: on 2 cores with DDR5 one stream each reached 22 GB/s, four 30, which is
// what torch's fp32 F.linear reads there; prefetching added nothing.
constexpr int kReadStreams = 4;

// In registers of 16 bytes, as every x86-64 has them, sums keep up with memory.
using Pair = uint64_t __attribute__((vector_size(16), aligned(8)));

uint64_t sum_range(const uint64_t* at, int64_t words) {
  Pair sums[kReadStreams] = {};
  const int64_t part = words / kReadStreams / 8 * 8;  // whole cache lines
  for (int64_t i = 0; i < part; i += 8)
#pragma GCC unroll 4
    for (int s = 0; s < kReadStreams; ++s) {
      const auto* line = reinterpret_cast<const Pair*>(at + s * part + i);
      sums[s] += (line[0] + line[1]) + (line[2] + line[3]);
    }
  const Pair all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  uint64_t sum = all[0] + all[1];
  for (int64_t i = kReadStreams * part; i < words; ++i) sum += at[i];
  return sum;
}

}  // namespace

uint64_t sum_words(const uint64_t* memory, int64_t bytes) {
  if (memory == nullptr || bytes < 0 || bytes % 8 != 0)
    throw std::invalid_argument("read probe: " + std::to_string(bytes) +
                                " bytes; allowed: a multiple of 8, at an address that is not null");
  std::atomic<uint64_t> sum{0};
  parallel_for(bytes / 8, kChunkWords, kNsPerWord * static_cast<double>(bytes / 8),
               [&](int64_t begin, int64_t end) { sum += sum_range(memory + begin, end - begin); });
  return sum;
}

}  // namespace pyllmq::cpu

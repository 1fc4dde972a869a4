#include "runtime/read_probe.h"

#include <immintrin.h>

namespace pyllmq::cpu {

uint64_t sum_range_avx2(const uint64_t* at, int64_t words) {
  __m256i sums[kReadStreams] = {};
  const int64_t part = words / kReadStreams / 8 * 8;  // whole cache lines
  for (int64_t i = 0; i < part; i += 8)
    for (int s = 0; s < kReadStreams; ++s) {
      const auto* line = reinterpret_cast<const __m256i*>(at + s * part + i);
      sums[s] = _mm256_add_epi64(sums[s], _mm256_add_epi64(_mm256_loadu_si256(line), _mm256_loadu_si256(line + 1)));
    }
  for (int s = 1; s < kReadStreams; ++s) sums[0] = _mm256_add_epi64(sums[0], sums[s]);
  uint64_t parts[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), sums[0]);
  const int64_t done = kReadStreams * part;
  return parts[0] + parts[1] + parts[2] + parts[3] + sum_range_scalar(at + done, words - done);
}

}  // namespace pyllmq::cpu

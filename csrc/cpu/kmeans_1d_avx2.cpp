#include "cpu/kmeans_1d.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace pyllmq::cpu {

// Subtract, multiply, divide and add round as in the scalar code (no fused multiply-add), so both return the same bits.
Split best_split_avx2(const double* gain, const double* sum, const double* mass, int64_t end, int64_t first,
                      int64_t last) {
  if (last - first < 7) return best_split_scalar(gain, sum, mass, end, first, last);  // shorter than the reduction
  const __m256d end_sum = _mm256_set1_pd(sum[end]);
  const __m256d end_mass = _mm256_set1_pd(mass[end]);
  const __m256i four = _mm256_set1_epi64x(4);
  __m256i index = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 1, 2, 3));
  __m256i best_index = index;
  __m256d best = _mm256_set1_pd(-1.0);  // every gain is >= 0

  int64_t at = first;
  for (; at + 3 <= last; at += 4) {
    const __m256d s = _mm256_sub_pd(end_sum, _mm256_loadu_pd(sum + at));
    const __m256d w = _mm256_sub_pd(end_mass, _mm256_loadu_pd(mass + at));
    const __m256d value = _mm256_add_pd(_mm256_loadu_pd(gain + at), _mm256_div_pd(_mm256_mul_pd(s, s), w));
    const __m256d better = _mm256_cmp_pd(value, best, _CMP_GT_OQ);
    best = _mm256_blendv_pd(best, value, better);
    best_index = _mm256_castpd_si256(
        _mm256_blendv_pd(_mm256_castsi256_pd(best_index), _mm256_castsi256_pd(index), better));
    index = _mm256_add_epi64(index, four);
  }

  alignas(32) double lane_gain[4];
  alignas(32) int64_t lane_at[4];
  _mm256_store_pd(lane_gain, best);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane_at), best_index);
  Split split{lane_gain[0], lane_at[0]};
  for (int lane = 1; lane < 4; ++lane) {
    if (lane_gain[lane] > split.gain || (lane_gain[lane] == split.gain && lane_at[lane] < split.at)) {
      split = {lane_gain[lane], lane_at[lane]};
    }
  }
  if (at <= last) {
    const Split tail = best_split_scalar(gain, sum, mass, end, at, last);
    if (tail.gain > split.gain) split = tail;
  }
  return split;
}

}  // namespace pyllmq::cpu
#endif

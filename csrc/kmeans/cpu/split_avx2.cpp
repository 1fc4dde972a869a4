#include "kmeans/cpu/split.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace pyllmq::cpu {
namespace {

struct Best {
  __m256d gain = _mm256_set1_pd(-1.0);
  __m256i at = _mm256_set1_epi64x(INT64_MAX);

  void offer(__m256d value, __m256i candidate) {
    const __m256d better = _mm256_cmp_pd(value, gain, _CMP_GT_OQ);
    gain = _mm256_blendv_pd(gain, value, better);
    at = _mm256_castpd_si256(_mm256_blendv_pd(_mm256_castsi256_pd(at), _mm256_castsi256_pd(candidate), better));
  }
};

// Four candidates, at .. at + 3, of one end.
template <bool Uniform>
__m256d candidates(const SplitTerms& t, __m256d end_sum, __m256d end_mass, int64_t end, int64_t at) {
  const __m256d s = _mm256_sub_pd(end_sum, _mm256_loadu_pd(t.sum + at));
  const __m256d square = _mm256_mul_pd(s, s);
  const __m256d share =
      Uniform ? _mm256_mul_pd(square, _mm256_permute4x64_pd(_mm256_loadu_pd(t.inverse + end - at - 3), 0x1B))
              : _mm256_div_pd(square, _mm256_sub_pd(end_mass, _mm256_loadu_pd(t.mass + at)));
  return _mm256_add_pd(_mm256_loadu_pd(t.gain + at), share);
}

template <bool Uniform>
Split one_as(const SplitTerms& t, int64_t end, int64_t first, int64_t last) {
  if (last - first < 7) return kSplitScalar.one(t, end, first, last);  // shorter than the reduction
  const __m256d end_sum = _mm256_set1_pd(t.sum[end]);
  const __m256d end_mass = Uniform ? end_sum : _mm256_set1_pd(t.mass[end]);
  const __m256i four = _mm256_set1_epi64x(4);
  __m256i index = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 1, 2, 3));
  Best best;
  int64_t at = first;
  for (; at + 3 <= last; at += 4) {
    best.offer(candidates<Uniform>(t, end_sum, end_mass, end, at), index);
    index = _mm256_add_epi64(index, four);
  }

  alignas(32) double lane_gain[4];
  alignas(32) int64_t lane_at[4];
  _mm256_store_pd(lane_gain, best.gain);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane_at), best.at);
  Split split{lane_gain[0], lane_at[0]};
  for (int lane = 1; lane < 4; ++lane) {
    if (lane_gain[lane] > split.gain || (lane_gain[lane] == split.gain && lane_at[lane] < split.at)) {
      split = {lane_gain[lane], lane_at[lane]};
    }
  }
  if (at <= last) {
    const Split tail = kSplitScalar.one(t, end, at, last);
    if (tail.gain > split.gain) split = tail;
  }
  return split;
}

// One candidate of four ends.
template <bool Uniform>
__m256d ends(const SplitTerms& t, __m256d end_sum, __m256d end_mass, int64_t end, int64_t at) {
  const __m256d s = _mm256_sub_pd(end_sum, _mm256_set1_pd(t.sum[at]));
  const __m256d square = _mm256_mul_pd(s, s);
  const __m256d share = Uniform ? _mm256_mul_pd(square, _mm256_loadu_pd(t.inverse + end - at))
                                : _mm256_div_pd(square, _mm256_sub_pd(end_mass, _mm256_set1_pd(t.mass[at])));
  return _mm256_add_pd(_mm256_set1_pd(t.gain[at]), share);
}

template <bool Uniform>
void group_as(const SplitTerms& t, int64_t end, int64_t first, int64_t last, double* gains, int64_t* ats) {
  const __m256d low_sum = _mm256_loadu_pd(t.sum + end), high_sum = _mm256_loadu_pd(t.sum + end + 4);
  const __m256d low_mass = Uniform ? low_sum : _mm256_loadu_pd(t.mass + end);
  const __m256d high_mass = Uniform ? high_sum : _mm256_loadu_pd(t.mass + end + 4);
  Best low, high;
  for (int64_t at = first; at <= last; ++at) {
    const __m256i candidate = _mm256_set1_epi64x(at);
    low.offer(ends<Uniform>(t, low_sum, low_mass, end, at), candidate);
    high.offer(ends<Uniform>(t, high_sum, high_mass, end + 4, at), candidate);
  }
  _mm256_storeu_pd(gains, low.gain);
  _mm256_storeu_pd(gains + 4, high.gain);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ats), low.at);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ats + 4), high.at);
}

Split one(const SplitTerms& t, int64_t end, int64_t first, int64_t last) {
  return t.inverse ? one_as<true>(t, end, first, last) : one_as<false>(t, end, first, last);
}

void group(const SplitTerms& t, int64_t end, int64_t first, int64_t last, double* gains, int64_t* ats) {
  t.inverse ? group_as<true>(t, end, first, last, gains, ats) : group_as<false>(t, end, first, last, gains, ats);
}

}  // namespace

const SplitKernels kSplitAvx2{one, group};

}  // namespace pyllmq::cpu
#endif

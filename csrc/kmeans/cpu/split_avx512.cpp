#include "kmeans/cpu/split.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace pyllmq::cpu {
namespace {

struct Best {
  __m512d gain = _mm512_set1_pd(-1.0);
  __m512i at = _mm512_set1_epi64(INT64_MAX);

  void offer(__m512d value, __m512i candidate) {
    const __mmask8 better = _mm512_cmp_pd_mask(value, gain, _CMP_GT_OQ);
    gain = _mm512_mask_mov_pd(gain, better, value);
    at = _mm512_mask_mov_epi64(at, better, candidate);
  }
  void merge(const Best& other) {
    const __mmask8 better =
        _mm512_cmp_pd_mask(other.gain, gain, _CMP_GT_OQ) |
        (_mm512_cmp_pd_mask(other.gain, gain, _CMP_EQ_OQ) & _mm512_cmplt_epi64_mask(other.at, at));
    gain = _mm512_mask_mov_pd(gain, better, other.gain);
    at = _mm512_mask_mov_epi64(at, better, other.at);
  }
};

// Eight candidates, at .. at + 7, of one end.
template <bool Uniform>
__m512d candidates(const SplitTerms& t, __m512d end_sum, __m512d end_mass, int64_t end, int64_t at) {
  const __m512d s = _mm512_sub_pd(end_sum, _mm512_loadu_pd(t.sum + at));
  const __m512d square = _mm512_mul_pd(s, s);
  __m512d share;
  if (Uniform) {
    const __m512i backwards = _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    share = _mm512_mul_pd(square, _mm512_permutexvar_pd(backwards, _mm512_loadu_pd(t.inverse + end - at - 7)));
  } else {
    share = _mm512_div_pd(square, _mm512_sub_pd(end_mass, _mm512_loadu_pd(t.mass + at)));
  }
  return _mm512_add_pd(_mm512_loadu_pd(t.gain + at), share);
}

template <bool Uniform>
Split one_as(const SplitTerms& t, int64_t end, int64_t first, int64_t last) {
  const __m512d end_sum = _mm512_set1_pd(t.sum[end]);
  const __m512d end_mass = Uniform ? end_sum : _mm512_set1_pd(t.mass[end]);
  const __m512i eight = _mm512_set1_epi64(8);
  __m512i index = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  Best even, odd;  // two chains of compare and blend
  int64_t at = first;
  for (; at + 15 <= last; at += 16) {
    even.offer(candidates<Uniform>(t, end_sum, end_mass, end, at), index);
    index = _mm512_add_epi64(index, eight);
    odd.offer(candidates<Uniform>(t, end_sum, end_mass, end, at + 8), index);
    index = _mm512_add_epi64(index, eight);
  }
  for (; at + 7 <= last; at += 8) {
    even.offer(candidates<Uniform>(t, end_sum, end_mass, end, at), index);
    index = _mm512_add_epi64(index, eight);
  }
  if (at <= last) {
    const __mmask8 valid = static_cast<__mmask8>((1u << (last - at + 1)) - 1);
    const __m512d s = _mm512_sub_pd(end_sum, _mm512_maskz_loadu_pd(valid, t.sum + at));
    const __m512d square = _mm512_mul_pd(s, s);
    __m512d share;
    if (Uniform) {
      const __mmask8 upper = static_cast<__mmask8>(0xFF << (7 - (last - at)));
      const __m512i backwards = _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0);
      share = _mm512_mul_pd(
          square, _mm512_permutexvar_pd(backwards, _mm512_maskz_loadu_pd(upper, t.inverse + end - at - 7)));
    } else {
      share = _mm512_div_pd(square, _mm512_sub_pd(end_mass, _mm512_maskz_loadu_pd(valid, t.mass + at)));
    }
    const __m512d value = _mm512_add_pd(_mm512_maskz_loadu_pd(valid, t.gain + at), share);
    odd.offer(_mm512_mask_mov_pd(_mm512_set1_pd(-1.0), valid, value), index);
  }
  even.merge(odd);
  const double gain = _mm512_reduce_max_pd(even.gain);
  const __mmask8 equal = _mm512_cmp_pd_mask(even.gain, _mm512_set1_pd(gain), _CMP_EQ_OQ);
  return {gain, _mm512_mask_reduce_min_epi64(equal, even.at)};
}

// One candidate of eight ends.
template <bool Uniform>
__m512d ends(const SplitTerms& t, __m512d end_sum, __m512d end_mass, int64_t end, int64_t at) {
  const __m512d s = _mm512_sub_pd(end_sum, _mm512_set1_pd(t.sum[at]));
  const __m512d square = _mm512_mul_pd(s, s);
  const __m512d share = Uniform ? _mm512_mul_pd(square, _mm512_loadu_pd(t.inverse + end - at))
                                : _mm512_div_pd(square, _mm512_sub_pd(end_mass, _mm512_set1_pd(t.mass[at])));
  return _mm512_add_pd(_mm512_set1_pd(t.gain[at]), share);
}

template <bool Uniform>
void group_as(const SplitTerms& t, int64_t end, int64_t first, int64_t last, double* gains, int64_t* ats) {
  const __m512d end_sum = _mm512_loadu_pd(t.sum + end);
  const __m512d end_mass = Uniform ? end_sum : _mm512_loadu_pd(t.mass + end);
  Best even, odd;
  int64_t at = first;
  for (; at < last; at += 2) {
    even.offer(ends<Uniform>(t, end_sum, end_mass, end, at), _mm512_set1_epi64(at));
    odd.offer(ends<Uniform>(t, end_sum, end_mass, end, at + 1), _mm512_set1_epi64(at + 1));
  }
  if (at == last) even.offer(ends<Uniform>(t, end_sum, end_mass, end, at), _mm512_set1_epi64(at));
  even.merge(odd);
  _mm512_storeu_pd(gains, even.gain);
  _mm512_storeu_si512(ats, even.at);
}

Split one(const SplitTerms& t, int64_t end, int64_t first, int64_t last) {
  return t.inverse ? one_as<true>(t, end, first, last) : one_as<false>(t, end, first, last);
}

void group(const SplitTerms& t, int64_t end, int64_t first, int64_t last, double* gains, int64_t* ats) {
  t.inverse ? group_as<true>(t, end, first, last, gains, ats) : group_as<false>(t, end, first, last, gains, ats);
}

}  // namespace

const SplitKernels kSplitAvx512{one, group};

}  // namespace pyllmq::cpu
#endif

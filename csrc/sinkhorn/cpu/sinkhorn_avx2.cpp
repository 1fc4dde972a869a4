#if defined(__AVX2__)
#include <immintrin.h>

#include "sinkhorn/cpu/doubly_stochastic_kernels.h"

namespace pyllmq::cpu {
namespace {

struct Avx2 {
  using R = __m256;
  using Flag = __m256;
  static constexpr int64_t width = 8;

  static R set(float x) { return _mm256_set1_ps(x); }
  static R load(const float* from) { return _mm256_loadu_ps(from); }
  static __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count < 8 ? count : 8)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static R load_part(const float* from, int64_t left, float missing) {
    if (left >= 8) return load(from);
    const __m256i there = first(left);
    return _mm256_blendv_ps(set(missing), _mm256_maskload_ps(from, there), _mm256_castsi256_ps(there));
  }
  static void store(float* to, R x) { _mm256_storeu_ps(to, x); }
  static void store_part(float* to, int64_t left, R x) {
    if (left >= 8) return store(to, x);
    _mm256_maskstore_ps(to, first(left), x);
  }
  static R add(R x, R y) { return _mm256_add_ps(x, y); }
  static R sub(R x, R y) { return _mm256_sub_ps(x, y); }
  static R mul(R x, R y) { return _mm256_mul_ps(x, y); }
  static R div(R x, R y) { return _mm256_div_ps(x, y); }
  static R fma(R x, R y, R z) { return _mm256_fmadd_ps(x, y, z); }
  static R min(R x, R y) { return _mm256_min_ps(x, y); }
  static R max(R x, R y) { return _mm256_max_ps(x, y); }
  static R round(R x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 1 / y to 12 bits, and to twice as many after one Newton step: x / y to 1e-7 in a third of a division's time
  static R reciprocal(R x) {
    const R r = _mm256_rcp_ps(x);
    return _mm256_mul_ps(r, _mm256_fnmadd_ps(x, r, set(2)));
  }
  static R quotient(R x, R y) {
    const R r = _mm256_rcp_ps(y);
    return _mm256_mul_ps(_mm256_mul_ps(x, r), _mm256_fnmadd_ps(y, r, set(2)));
  }
  static void split(R x, R& n, R& m) {
    const __m256i bits = _mm256_castps_si256(x), shifted = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3F3504F3));
    n = _mm256_cvtepi32_ps(_mm256_srai_epi32(shifted, 23));  // m in [sqrt 1/2, sqrt 2)
    m = _mm256_castsi256_ps(
        _mm256_sub_epi32(bits, _mm256_and_si256(shifted, _mm256_set1_epi32(static_cast<int>(0xFF800000)))));
  }
  static R scale2(R x, R n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
  }
  static R exponent(R cost, double u, const double* v, double inverse) {
    const __m256d row = _mm256_set1_pd(u), scale = _mm256_set1_pd(inverse);
    const __m256d low = _mm256_sub_pd(_mm256_add_pd(row, _mm256_loadu_pd(v)), _mm256_cvtps_pd(_mm256_castps256_ps128(cost)));
    const __m256d high =
        _mm256_sub_pd(_mm256_add_pd(row, _mm256_loadu_pd(v + 4)), _mm256_cvtps_pd(_mm256_extractf128_ps(cost, 1)));
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_mul_pd(high, scale)), _mm256_cvtpd_ps(_mm256_mul_pd(low, scale)));
  }
  static Four sums(R s0, R s1, R s2, R s3) {
    const R pairs = _mm256_hadd_ps(_mm256_hadd_ps(s0, s1), _mm256_hadd_ps(s2, s3));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  }
  static void transpose(R* r) {
    R pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int half = 0; half < 2; ++half) {
        const __m256d low = _mm256_castps_pd(pairs[i + half]), high = _mm256_castps_pd(pairs[i + 2 + half]);
        fours[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
        fours[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
      }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }
  template <class Fold>
  static float fold(R x, Fold pair) {
    __m128 half = pair(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = pair(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(pair(half, _mm_shuffle_ps(half, half, 1)));
  }
  // Four lines of 8 lanes to 8 times four numbers, lane by lane.
  static void transpose_fours(R* r) {
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    // lane 4 p + q is in the 128-bit part p of the q-th
    const R q0 = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)), q1 = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    const R q2 = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)), q3 = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
    r[0] = _mm256_permute2f128_ps(q0, q1, 0x20);
    r[1] = _mm256_permute2f128_ps(q2, q3, 0x20);
    r[2] = _mm256_permute2f128_ps(q0, q1, 0x31);
    r[3] = _mm256_permute2f128_ps(q2, q3, 0x31);
  }
  static float total(R x) { return fold(x, [](__m128 p, __m128 q) { return _mm_add_ps(p, q); }); }
  static float least(R x) { return fold(x, [](__m128 p, __m128 q) { return _mm_min_ps(p, q); }); }
  static float most(R x) { return fold(x, [](__m128 p, __m128 q) { return _mm_max_ps(p, q); }); }

  static Flag no_flag() { return _mm256_setzero_ps(); }
  static Flag is_nan(R x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
  static Flag above(R x, R y) { return _mm256_cmp_ps(x, y, _CMP_GT_OQ); }
  static Flag at_least(R x, R y) { return _mm256_cmp_ps(x, y, _CMP_GE_OQ); }
  static Flag equal(R x, R y) { return _mm256_cmp_ps(x, y, _CMP_EQ_OQ); }
  static Flag either(Flag x, Flag y) { return _mm256_or_ps(x, y); }
  static Flag both(Flag x, Flag y) { return _mm256_and_ps(x, y); }
  static R select(Flag flag, R yes, R no) { return _mm256_blendv_ps(no, yes, flag); }
  static R zero_unless(Flag flag, R x) { return _mm256_and_ps(flag, x); }
  static bool any(Flag flag) { return _mm256_movemask_ps(flag) != 0; }
  static uint32_t bits(Flag flag) { return static_cast<uint32_t>(_mm256_movemask_ps(flag)); }
};

}  // namespace

const SinkhornKernels kSinkhornAvx2 = sinkhorn_kernels_of<Avx2, Twice<Avx2>>();

}  // namespace pyllmq::cpu
#endif

#if defined(__AVX512F__)
#include <immintrin.h>

#include "sinkhorn/cpu/doubly_stochastic_kernels.h"

namespace pyllmq::cpu {
namespace {

struct Avx512 {
  using R = __m512;
  using Flag = __mmask16;
  static constexpr int64_t width = 16;

  static R set(float x) { return _mm512_set1_ps(x); }
  static R load(const float* from) { return _mm512_loadu_ps(from); }
  static __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0); }
  static R load_part(const float* from, int64_t left, float missing) {
    return _mm512_mask_loadu_ps(set(missing), first(left), from);
  }
  static void store(float* to, R x) { _mm512_storeu_ps(to, x); }
  static void store_part(float* to, int64_t left, R x) { _mm512_mask_storeu_ps(to, first(left), x); }
  static R add(R x, R y) { return _mm512_add_ps(x, y); }
  static R sub(R x, R y) { return _mm512_sub_ps(x, y); }
  static R mul(R x, R y) { return _mm512_mul_ps(x, y); }
  static R div(R x, R y) { return _mm512_div_ps(x, y); }
  static R fma(R x, R y, R z) { return _mm512_fmadd_ps(x, y, z); }
  static R min(R x, R y) { return _mm512_min_ps(x, y); }
  static R max(R x, R y) { return _mm512_max_ps(x, y); }
  static R round(R x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static R reciprocal(R x) {
    const R r = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, set(2)));
  }
  static R quotient(R x, R y) {
    const R r = _mm512_rcp14_ps(y);
    return _mm512_mul_ps(_mm512_mul_ps(x, r), _mm512_fnmadd_ps(y, r, set(2)));
  }
  static void split(R x, R& n, R& m) {
    const __m512i bits = _mm512_castps_si512(x), shifted = _mm512_sub_epi32(bits, _mm512_set1_epi32(0x3F3504F3));
    n = _mm512_cvtepi32_ps(_mm512_srai_epi32(shifted, 23));  // m in [sqrt 1/2, sqrt 2)
    m = _mm512_castsi512_ps(
        _mm512_sub_epi32(bits, _mm512_and_si512(shifted, _mm512_set1_epi32(static_cast<int>(0xFF800000)))));
  }
  static R scale2(R x, R n) { return _mm512_scalef_ps(x, n); }
  static R exponent(R cost, double u, const double* v, double inverse) {
    const __m512d row = _mm512_set1_pd(u), scale = _mm512_set1_pd(inverse);
    const __m512d low =
        _mm512_sub_pd(_mm512_add_pd(row, _mm512_loadu_pd(v)), _mm512_cvtps_pd(_mm512_castps512_ps256(cost)));
    const __m512d high =
        _mm512_sub_pd(_mm512_add_pd(row, _mm512_loadu_pd(v + 8)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(cost, 1)));
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_mul_pd(low, scale))),
                              _mm512_cvtpd_ps(_mm512_mul_pd(high, scale)), 1);
  }
  static Four sums(R s0, R s1, R s2, R s3) {
    const __m512d low = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(s0, s1), _mm512_unpackhi_ps(s0, s1)));
    const __m512d high = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(s2, s3), _mm512_unpackhi_ps(s2, s3)));
    const R four_times = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    const __m256 twice = _mm256_add_ps(_mm512_castps512_ps256(four_times), _mm512_extractf32x8_ps(four_times, 1));
    return _mm_add_ps(_mm256_castps256_ps128(twice), _mm256_extractf128_ps(twice, 1));
  }
  static void transpose(R* r) {
    R pairs[16], fours[16], eights[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int half = 0; half < 2; ++half) {
        const __m512d low = _mm512_castps_pd(pairs[i + half]), high = _mm512_castps_pd(pairs[i + 2 + half]);
        fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    // fours[i + e]: in each 128-bit part p, entries of column 4 p + e of rows i .. i + 3
    for (int i = 0; i < 16; i += 8)
      for (int e = 0; e < 4; ++e) {
        eights[i + e] = _mm512_shuffle_f32x4(fours[i + e], fours[i + 4 + e], 0x88);
        eights[i + 4 + e] = _mm512_shuffle_f32x4(fours[i + e], fours[i + 4 + e], 0xDD);
      }
    for (int e = 0; e < 4; ++e) {
      r[e] = _mm512_shuffle_f32x4(eights[e], eights[8 + e], 0x88);
      r[8 + e] = _mm512_shuffle_f32x4(eights[e], eights[8 + e], 0xDD);
      r[4 + e] = _mm512_shuffle_f32x4(eights[4 + e], eights[12 + e], 0x88);
      r[12 + e] = _mm512_shuffle_f32x4(eights[4 + e], eights[12 + e], 0xDD);
    }
  }
  // Four lines of 16 lanes to 16 times four numbers, lane by lane.
  static void transpose_fours(R* r) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    // lane 4 p + q is in the 128-bit part p of the q-th
    const R q0 = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)), q1 = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    const R q2 = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)), q3 = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
    const R even0 = _mm512_shuffle_f32x4(q0, q1, 0x88), odd0 = _mm512_shuffle_f32x4(q0, q1, 0xDD);
    const R even1 = _mm512_shuffle_f32x4(q2, q3, 0x88), odd1 = _mm512_shuffle_f32x4(q2, q3, 0xDD);
    r[0] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    r[1] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    r[2] = _mm512_shuffle_f32x4(even0, even1, 0xDD);
    r[3] = _mm512_shuffle_f32x4(odd0, odd1, 0xDD);
  }
  static float total(R x) { return _mm512_reduce_add_ps(x); }
  static float least(R x) { return _mm512_reduce_min_ps(x); }
  static float most(R x) { return _mm512_reduce_max_ps(x); }

  static Flag no_flag() { return 0; }
  static Flag is_nan(R x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  static Flag above(R x, R y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
  static Flag at_least(R x, R y) { return _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ); }
  static Flag equal(R x, R y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
  static Flag either(Flag x, Flag y) { return static_cast<Flag>(x | y); }
  static Flag both(Flag x, Flag y) { return static_cast<Flag>(x & y); }
  static R select(Flag flag, R yes, R no) { return _mm512_mask_blend_ps(flag, no, yes); }
  static R zero_unless(Flag flag, R x) { return _mm512_maskz_mov_ps(flag, x); }
  static bool any(Flag flag) { return flag != 0; }
  static uint32_t bits(Flag flag) { return flag; }
};

}  // namespace

const SinkhornKernels kSinkhornAvx512 = sinkhorn_kernels_of<Avx512, Twice<Avx512>>();

}  // namespace pyllmq::cpu
#endif

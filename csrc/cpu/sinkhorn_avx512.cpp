#if defined(__AVX512F__)
#include <immintrin.h>

#include "cpu/sinkhorn_kernels.h"

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
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(x, r, set(1)), r, r);
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
  static __m256 halves(R x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
  static void sums(R s0, R s1, R s2, R s3, float* out) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves(s0), halves(s1)), _mm256_hadd_ps(halves(s2), halves(s3)));
    _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
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

const SinkhornKernels kSinkhornAvx512 = sinkhorn_kernels_of<Avx512>();

}  // namespace pyllmq::cpu
#endif

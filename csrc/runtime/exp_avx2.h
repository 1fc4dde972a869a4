// exp of x <= 0, to 1e-7: below -87, where the result leaves the normal numbers, exactly 0; NaN stays NaN. Taylor to the
// 7th power on |r| <= ln 2 / 2, whose rest is 5e-9. `static` because only files compiled for AVX2 may hold this code.
#pragma once
#include <immintrin.h>

namespace pyllmq::cpu {

static inline __m256 exp_avx2(__m256 x) {
  const __m256 too_small = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, the first with zeros enough for n times it to be exact
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
  __m256 power = _mm256_set1_ps(1.0f / 5040);
  power = _mm256_fmadd_ps(power, r, _mm256_set1_ps(1.0f / 720));
  power = _mm256_fmadd_ps(power, r, _mm256_set1_ps(1.0f / 120));
  power = _mm256_fmadd_ps(power, r, _mm256_set1_ps(1.0f / 24));
  power = _mm256_fmadd_ps(power, r, _mm256_set1_ps(1.0f / 6));
  power = _mm256_fmadd_ps(power, r, _mm256_set1_ps(0.5f));
  power = _mm256_fmadd_ps(power, r, _mm256_set1_ps(1.0f));
  power = _mm256_fmadd_ps(power, r, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(too_small, _mm256_mul_ps(power, _mm256_castsi256_ps(exponent)));
}

}  // namespace pyllmq::cpu

// exp of x <= 0 as in exp_avx2.h, 16 at a time. `static` because only files compiled for AVX-512 may hold this code.
#pragma once
#include <immintrin.h>

namespace pyllmq::cpu {

static inline __m512 exp_avx512(__m512 x) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 power = _mm512_set1_ps(1.0f / 5040);
  power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f / 720));
  power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f / 120));
  power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f / 24));
  power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f / 6));
  power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(0.5f));
  power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f));
  power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(keep, power, n);
}

}  // namespace pyllmq::cpu

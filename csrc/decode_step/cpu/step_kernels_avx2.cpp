#if defined(__AVX2__)
#include <immintrin.h>

#include "decode_step/cpu/step_kernels_of.h"

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
  static R square_error(R x, R square) { return _mm256_fmsub_ps(x, x, square); }
  static R min(R x, R y) { return _mm256_min_ps(x, y); }
  static R max(R x, R y) { return _mm256_max_ps(x, y); }
  static R round(R x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n; n NaN or out of range: any number
  static R scale2(R x, R n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
  }
  static float total(R x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static Flag above(R x, R y) { return _mm256_cmp_ps(x, y, _CMP_GT_OQ); }
  static R select(Flag flag, R yes, R no) { return _mm256_blendv_ps(no, yes, flag); }
};

}  // namespace

const StepKernels kStepAvx2 = step_kernels_of<Avx2>();

}  // namespace pyllmq::cpu
#endif

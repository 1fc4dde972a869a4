#include <immintrin.h>

#include <cmath>
#include <limits>

#include "runtime/exp_avx2.h"
#include "softmax_cdist/cpu/softmax_cdist_l1.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kStride = kCdistTileColumns;
constexpr int kLanes = 8;

inline __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count < kLanes ? count : kLanes)), lane);
}

inline __m256 load(const float* x, int64_t left, float absent) {
  if (left >= kLanes) return _mm256_loadu_ps(x);
  const __m256i inside = first_lanes(left);
  return _mm256_blendv_ps(_mm256_set1_ps(absent), _mm256_maskload_ps(x, inside), _mm256_castsi256_ps(inside));
}

inline void store(float* to, int64_t left, __m256 value) {
  if (left >= kLanes)
    _mm256_storeu_ps(to, value);
  else
    _mm256_maskstore_ps(to, first_lanes(left), value);
}

// Every sum of lanes goes through here, so that sums of equal lanes are equal.
inline float sum_of_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

float largest(const float* x, int64_t count) {
  const float none = -std::numeric_limits<float>::infinity();
  __m256 found = _mm256_set1_ps(none);
  for (int64_t i = 0; i < count; i += kLanes) found = _mm256_max_ps(load(x + i, count - i, none), found);
  alignas(32) float lanes[kLanes];
  _mm256_store_ps(lanes, found);
  float result = none;
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

inline __m256 exponentials(__m256 x, float largest, float scale) {
  return exp_avx2(_mm256_mul_ps(_mm256_sub_ps(x, _mm256_set1_ps(largest)), _mm256_set1_ps(scale)));
}

double sum_of_exponentials(const float* x, int64_t count, float largest, float scale) {
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += kLanes)
    sum = _mm256_add_ps(
        sum, exponentials(load(x + i, count - i, -std::numeric_limits<float>::infinity()), largest, scale));
  return sum_of_lanes(sum);
}

void probabilities(const float* x, int64_t count, RowStatistics row, float scale, float* p) {
  const __m256 inverse_sum = _mm256_set1_ps(row.inverse_sum);
  for (int64_t i = 0; i < count; i += kLanes)
    store(p + i, count - i,
          _mm256_mul_ps(exponentials(load(x + i, count - i, row.largest), row.largest, scale), inverse_sum));
}

void row_sums(const float* p, int rows, float* sums) {
  for (int i = 0; i < rows; ++i) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t v = 0; v < kStride; v += kLanes) sum = _mm256_add_ps(sum, _mm256_load_ps(p + i * kStride + v));
    sums[i] = sum_of_lanes(sum);
  }
}

// 4 rows x 2: 8 sums hide the latency of an addition, and 16 registers hold no 4 x 4.
void overlaps(const float* p, int p_rows, const float* q, int q_rows, float* overlaps) {
  for (int i = 0; i < p_rows; i += 4)
    for (int j = 0; j < q_rows; j += 2) {
      const float *mine = p + i * kStride, *other = q + j * kStride;
      __m256 sums[4][2] = {};
      for (int64_t v = 0; v < kStride; v += kLanes) {
        const __m256 q0 = _mm256_load_ps(other + v), q1 = _mm256_load_ps(other + kStride + v);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const __m256 p_r = _mm256_load_ps(mine + r * kStride + v);
          sums[r][0] = _mm256_add_ps(sums[r][0], _mm256_min_ps(p_r, q0));
          sums[r][1] = _mm256_add_ps(sums[r][1], _mm256_min_ps(p_r, q1));
        }
      }
      for (int r = 0; r < 4; ++r)
        for (int c = 0; c < 2; ++c) overlaps[(i + r) * kCdistTileRows + j + c] = sum_of_lanes(sums[r][c]);
    }
}

// vpsignd gives the sign of p - q, 0 included, to an integer weight: three instructions. Weights become fixed point,
// 2^30 for the sum of a row's magnitudes, so no sum overflows; the error, 2^-31 of that sum for each weight, is that of
// an fp32 sum. Bits of floats >= 0 are ordered as they are. Rejected: masks of two comparisons, five instructions.
void add_signs(const float* p, int p_rows, const float* q, int q_rows, const float* weights, float* h) {
  constexpr double one = 1 << 30;
  alignas(32) int32_t fixed[4][kCdistTileRows];
  for (int i = 0; i < p_rows; i += 4) {
    float unit[4];
    for (int r = 0; r < 4; ++r) {
      const float* row = weights + (i + r) * kCdistTileRows;
      double size = 0;
      for (int j = 0; j < q_rows; ++j) size += std::fabs(row[j]);
      const bool usable = size > 0 && size <= std::numeric_limits<double>::max();
      unit[r] = static_cast<float>(size / one);  // not finite where a weight is not, and then h is not
      for (int j = 0; j < q_rows; ++j)
        fixed[r][j] = usable ? static_cast<int32_t>(std::lrint(row[j] * (one / size))) : 1;
    }
    for (int64_t v = 0; v < kStride; v += kLanes) {
      __m256i mine[4], sums[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        mine[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(p + (i + r) * kStride + v));
        sums[r] = _mm256_setzero_si256();
      }
      for (int j = 0; j < q_rows; ++j) {
        const __m256i other = _mm256_load_si256(reinterpret_cast<const __m256i*>(q + j * kStride + v));
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
          sums[r] = _mm256_add_epi32(
              sums[r], _mm256_sign_epi32(_mm256_set1_epi32(fixed[r][j]), _mm256_sub_epi32(mine[r], other)));
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        float* to = h + (i + r) * kStride + v;
        const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r]), _mm256_set1_ps(unit[r]));
        _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), sum));
      }
    }
  }
}

float dot(const float* p, const float* h) {
  __m256 sum = _mm256_setzero_ps();
  for (int64_t v = 0; v < kStride; v += kLanes)
    sum = _mm256_fmadd_ps(_mm256_load_ps(p + v), _mm256_load_ps(h + v), sum);
  return sum_of_lanes(sum);
}

void softmax_gradient(const float* p, const float* h, int64_t count, float dot, float scale, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m256 centred = _mm256_sub_ps(load(h + i, count - i, 0), _mm256_set1_ps(dot));
    store(out + i, count - i,
          _mm256_mul_ps(_mm256_mul_ps(load(p + i, count - i, 0), centred), _mm256_set1_ps(scale)));
  }
}

}  // namespace

const SoftmaxCdistKernels kSoftmaxCdistAvx2 = {largest,  sum_of_exponentials, probabilities, row_sums,
                                               overlaps, add_signs,           dot,           softmax_gradient};

}  // namespace pyllmq::cpu

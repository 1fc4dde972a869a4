#include <cmath>
#include <limits>

#include "softmax_cdist/cpu/softmax_cdist_l1_kernels.h"

namespace pyllmq::cpu {
namespace {

void row_sums(const float* p, int rows, float* sums) {
  for (int i = 0; i < rows; ++i) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t v = 0; v < kStride; v += Avx2::width) sum = _mm256_add_ps(sum, _mm256_load_ps(p + i * kStride + v));
    sums[i] = Avx2::total(sum);
  }
}

// 4 rows x 2: 8 sums hide the latency of an addition, and 16 registers hold no 4 x 4.
void overlaps(const float* p, int p_rows, const float* q, int q_rows, float* overlaps) {
  for (int i = 0; i < p_rows; i += 4)
    for (int j = 0; j < q_rows; j += 2) {
      const float *mine = p + i * kStride, *other = q + j * kStride;
      __m256 sums[4][2] = {};
      for (int64_t v = 0; v < kStride; v += Avx2::width) {
        const __m256 q0 = _mm256_load_ps(other + v), q1 = _mm256_load_ps(other + kStride + v);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const __m256 p_r = _mm256_load_ps(mine + r * kStride + v);
          sums[r][0] = _mm256_add_ps(sums[r][0], _mm256_min_ps(p_r, q0));
          sums[r][1] = _mm256_add_ps(sums[r][1], _mm256_min_ps(p_r, q1));
        }
      }
      for (int r = 0; r < 4; ++r)
        for (int c = 0; c < 2; ++c) overlaps[(i + r) * kCdistTileRows + j + c] = Avx2::total(sums[r][c]);
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
      for (int j = 0; j < q_rows; ++j) fixed[r][j] = usable ? static_cast<int32_t>(std::lrint(row[j] * (one / size))) : 1;
    }
    for (int64_t v = 0; v < kStride; v += Avx2::width) {
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
          sums[r] =
              _mm256_add_epi32(sums[r], _mm256_sign_epi32(_mm256_set1_epi32(fixed[r][j]), _mm256_sub_epi32(mine[r], other)));
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

}  // namespace

const SoftmaxCdistKernels kSoftmaxCdistAvx2 = softmax_cdist_kernels<Avx2>(row_sums, overlaps, add_signs);

}  // namespace pyllmq::cpu

#include "softmax_cdist/cpu/softmax_cdist_l1_kernels.h"

namespace pyllmq::cpu {
namespace {

// Lane m of the result: the sum of the lanes of sums[m]. Every sum of lanes goes through here, so that sums of equal
// lanes are equal. Rejected: _mm512_reduce_add_ps for each, 3 times the instructions, 15 % of a distance's time.
inline __m512 sums_of_lanes(const __m512 sums[16]) {
  __m512 pairs[8], fours[4], halves[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]), _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  constexpr int even = 0x88, odd = 0xDD;  // of the 128-bit parts of two registers
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], even),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], odd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], even), _mm512_shuffle_f32x4(halves[0], halves[1], odd));
}

void row_sums(const float* p, int rows, float* sums) {
  for (int i = 0; i < rows; i += Avx512::width) {
    __m512 of_row[Avx512::width] = {};
    for (int r = 0; r < Avx512::width && i + r < rows; ++r)
      for (int64_t v = 0; v < kStride; v += Avx512::width)
        of_row[r] = _mm512_add_ps(of_row[r], _mm512_load_ps(p + (i + r) * kStride + v));
    _mm512_store_ps(sums + i, sums_of_lanes(of_row));
  }
}

void overlaps(const float* p, int p_rows, const float* q, int q_rows, float* overlaps) {
  for (int i = 0; i < p_rows; i += 4)
    for (int j = 0; j < q_rows; j += 4) {
      const float *mine = p + i * kStride, *other = q + j * kStride;
      __m512 sums[16] = {};
      for (int64_t v = 0; v < kStride; v += Avx512::width) {
        __m512 q_v[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) q_v[c] = _mm512_load_ps(other + c * kStride + v);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const __m512 p_r = _mm512_load_ps(mine + r * kStride + v);
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) sums[4 * r + c] = _mm512_add_ps(sums[4 * r + c], _mm512_min_ps(p_r, q_v[c]));
        }
      }
      const __m512 found = sums_of_lanes(sums);
      float* to = overlaps + i * kCdistTileRows + j;
      _mm_store_ps(to, _mm512_castps512_ps128(found));
      _mm_store_ps(to + kCdistTileRows, _mm512_extractf32x4_ps(found, 1));
      _mm_store_ps(to + 2 * kCdistTileRows, _mm512_extractf32x4_ps(found, 2));
      _mm_store_ps(to + 3 * kCdistTileRows, _mm512_extractf32x4_ps(found, 3));
    }
}

// vfixupimmps turns p - q into its sign, 0 included. Nibbles of the table, from the lowest: NaN, NaN -> NaN; 0 -> 0;
// 1 -> 1; -inf -> -1; inf -> 1; negative -> -1; positive -> 1.
inline __m512 sign(__m512 x) { return _mm512_fixupimm_ps(x, x, _mm512_set1_epi32(static_cast<int>(0xA9A9A822)), 0); }

void add_signs(const float* p, int p_rows, const float* q, int q_rows, const float* weights, float* h) {
  for (int i = 0; i < p_rows; i += 4)
    for (int64_t v = 0; v < kStride; v += 2 * Avx512::width) {
      __m512 mine[4][2], sums[4][2];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          mine[r][half] = _mm512_load_ps(p + (i + r) * kStride + v + half * Avx512::width);
          sums[r][half] = _mm512_load_ps(h + (i + r) * kStride + v + half * Avx512::width);
        }
      for (int j = 0; j < q_rows; ++j) {
        const __m512 q_0 = _mm512_load_ps(q + j * kStride + v), q_1 = _mm512_load_ps(q + j * kStride + v + Avx512::width);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const __m512 weight = _mm512_set1_ps(weights[(i + r) * kCdistTileRows + j]);
          sums[r][0] = _mm512_fmadd_ps(weight, sign(_mm512_sub_ps(mine[r][0], q_0)), sums[r][0]);
          sums[r][1] = _mm512_fmadd_ps(weight, sign(_mm512_sub_ps(mine[r][1], q_1)), sums[r][1]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) _mm512_store_ps(h + (i + r) * kStride + v + half * Avx512::width, sums[r][half]);
    }
}

}  // namespace

const SoftmaxCdistKernels kSoftmaxCdistAvx512 = softmax_cdist_kernels<Avx512>(row_sums, overlaps, add_signs);

}  // namespace pyllmq::cpu

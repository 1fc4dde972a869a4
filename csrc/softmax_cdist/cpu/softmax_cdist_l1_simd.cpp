// The kernels of softmax_cdist_l1.h for a vector type V of runtime/simd.h.
#include <limits>
#include <type_traits>

#include "runtime/simd.h"
#include "softmax_cdist/cpu/softmax_cdist_l1.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kStride = kCdistTileColumns;

template <class V>
float largest(const float* x, int64_t count) {
  auto found = V::set(-kInfinity);
  for (int64_t i = 0; i < count; i += V::width) found = V::max(V::load_part(x + i, count - i, -kInfinity), found);
  return V::most(found);
}

template <class V>
typename V::R exponentials(typename V::R x, float largest, float scale) {
  return exponential<V, true>(V::mul(V::sub(x, V::set(largest)), V::set(scale)));
}

template <class V>
double sum_of_exponentials(const float* x, int64_t count, float largest, float scale) {
  auto sum = V::set(0);
  for (int64_t i = 0; i < count; i += V::width)
    sum = V::add(sum, exponentials<V>(V::load_part(x + i, count - i, -kInfinity), largest, scale));
  return V::total(sum);
}

template <class V>
void probabilities(const float* x, int64_t count, RowStatistics row, float scale, float* p) {
  for (int64_t i = 0; i < count; i += V::width) {
    const auto value = exponentials<V>(V::load_part(x + i, count - i, row.largest), row.largest, scale);
    V::store_part(p + i, count - i, V::mul(value, V::set(row.inverse_sum)));
  }
}

template <class V>
float dot(const float* p, const float* h) {
  auto sum = V::set(0);
  for (int64_t v = 0; v < kStride; v += V::width) sum = V::fma(V::load(p + v), V::load(h + v), sum);
  return V::total(sum);
}

template <class V>
void softmax_gradient(const float* p, const float* h, int64_t count, float dot, float scale, float* out) {
  for (int64_t i = 0; i < count; i += V::width) {
    const auto centred = V::sub(V::load_part(h + i, count - i, 0), V::set(dot));
    const auto product = V::mul(V::load_part(p + i, count - i, 0), centred);
    V::store_part(out + i, count - i, V::mul(product, V::set(scale)));
  }
}

// Every sum of lanes goes through V::sums, so that sums of equal lanes are equal. Of AVX-512 it takes as many instructions as a
// transposition of 16 sums at once, and a third of _mm512_reduce_add_ps for each, 15 % of a distance's time.
template <class V>
void row_sums(const float* p, int rows, float* sums) {
  for (int i = 0; i < rows; i += kCdistRowGroup) {  // tiles are padded to whole groups
    typename V::R of_row[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    for (int64_t v = 0; v < kStride; v += V::width)
      for (int r = 0; r < 4; ++r) of_row[r] = V::add(of_row[r], V::load(p + (i + r) * kStride + v));
    store_four(sums + i, V::sums(of_row[0], of_row[1], of_row[2], of_row[3]));
  }
}

// 4 rows x 4, or x 2 where 16 registers hold no more: 8 sums hide the latency of an addition.
template <class V>
void overlaps(const float* p, int p_rows, const float* q, int q_rows, float* overlaps) {
  constexpr int kColumns = V::width == 16 ? 4 : 2;
  for (int i = 0; i < p_rows; i += 4)
    for (int j = 0; j < q_rows; j += kColumns) {
      const float *mine = p + i * kStride, *other = q + j * kStride;
      typename V::R sums[4][kColumns];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sums[r][c] = V::set(0);
      for (int64_t v = 0; v < kStride; v += V::width) {
        typename V::R q_v[kColumns];
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) q_v[c] = V::load(other + c * kStride + v);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const auto p_r = V::load(mine + r * kStride + v);
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) sums[r][c] = V::add(sums[r][c], V::min(p_r, q_v[c]));
        }
      }
      for (int c = 0; c < kColumns; ++c) {
        const Four of_rows = V::sums(sums[0][c], sums[1][c], sums[2][c], sums[3][c]);
        for (int r = 0; r < 4; ++r) overlaps[(i + r) * kCdistTileRows + j + c] = of_rows[r];
      }
    }
}

#if defined(__AVX512F__)
// vfixupimmps turns p - q into its sign, 0 included. Nibbles of the table, from the lowest: NaN, NaN -> NaN; 0 -> 0;
// 1 -> 1; -inf -> -1; inf -> 1; negative -> -1; positive -> 1.
inline __m512 sign(__m512 x) { return _mm512_fixupimm_ps(x, x, _mm512_set1_epi32(static_cast<int>(0xA9A9A822)), 0); }
#elif !defined(__AVX2__)
inline float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }
#if defined(__aarch64__)
inline Neon::R sign(Neon::R x) {
  const Neon::R zero = Neon::set(0);
  return Neon::select(Neon::above(x, zero), Neon::set(1), Neon::select(Neon::above(zero, x), Neon::set(-1), x));
}
#endif
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// vpsignd gives the sign of p - q, 0 included, to an integer weight: three instructions. Weights become fixed point,
// 2^30 for the sum of a row's magnitudes, so no sum overflows; the error, 2^-31 of that sum for each weight, is that of
// an fp32 sum. Bits of floats >= 0 are ordered as they are. Rejected: masks of two comparisons, five instructions.
template <class>
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

#else
template <class V>
void add_signs(const float* p, int p_rows, const float* q, int q_rows, const float* weights, float* h) {
  for (int i = 0; i < p_rows; i += 4)
    for (int64_t v = 0; v < kStride; v += 2 * V::width) {
      typename V::R mine[4][2], sums[4][2];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          mine[r][half] = V::load(p + (i + r) * kStride + v + half * V::width);
          sums[r][half] = V::load(h + (i + r) * kStride + v + half * V::width);
        }
      for (int j = 0; j < q_rows; ++j) {
        const auto q_0 = V::load(q + j * kStride + v), q_1 = V::load(q + j * kStride + v + V::width);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const auto weight = V::set(weights[(i + r) * kCdistTileRows + j]);
          sums[r][0] = V::fma(weight, sign(V::sub(mine[r][0], q_0)), sums[r][0]);
          sums[r][1] = V::fma(weight, sign(V::sub(mine[r][1], q_1)), sums[r][1]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) V::store(h + (i + r) * kStride + v + half * V::width, sums[r][half]);
    }
}
#endif

// Sums run in at least 8 lanes: one chain over 512 columns would lose a digit.
using Lanes = std::conditional_t<V::width == 1, Twice<Twice<Twice<V>>>, V>;
// constexpr: code that made the table at load time would be of that instruction set.
constexpr SoftmaxCdistKernels kKernels = {
    largest<V>, sum_of_exponentials<Lanes>, probabilities<V>, row_sums<Lanes>, overlaps<Lanes>, add_signs<V>,
    dot<Lanes>, softmax_gradient<V>};

}  // namespace

template <Isa isa>
const SoftmaxCdistKernels& softmax_cdist_kernels() {
  return kKernels;
}
template const SoftmaxCdistKernels& softmax_cdist_kernels<Isa::PYLLMQ_ISA>();

}  // namespace pyllmq::cpu

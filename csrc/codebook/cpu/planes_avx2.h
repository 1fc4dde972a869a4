// Fixed-point tables cut into byte planes, and the 16-bit sums of what is looked up in them (linear.h explains
// both). `static` because only files compiled for AVX2 may hold this code.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/linear.h"

namespace pyllmq::cpu {

// gcc 12 otherwise copies the accumulators between registers every iteration, which costs a third of the loop.
#define PYLLMQ_PIN(x) __asm__("" : "+x"(x))

static inline uint32_t largest_lane(__m256i x) {
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
  uint32_t largest = lanes[0];
  for (int i = 1; i < 8; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// Eight fixed-point numbers, each cut into its planes: plane p is byte p of its 32-bit lane.
template <TableKind Kind>
static inline __m256i cut_into_planes(__m256 products) {
  const __m256i t = _mm256_add_epi32(_mm256_cvtps_epi32(products), _mm256_set1_epi32(1 << (table_bits(Kind) - 1)));
  if constexpr (plane_bits(Kind) == 8) return t;
  __m256i planes = _mm256_and_si256(t, _mm256_set1_epi32(0x7F));
  planes = _mm256_or_si256(planes, _mm256_and_si256(_mm256_slli_epi32(t, 1), _mm256_set1_epi32(0x7F00)));
  if constexpr (table_planes(Kind) >= 3)
    planes = _mm256_or_si256(planes, _mm256_and_si256(_mm256_slli_epi32(t, 2), _mm256_set1_epi32(0x7F0000)));
  if constexpr (table_planes(Kind) >= 4)
    planes = _mm256_or_si256(planes, _mm256_and_si256(_mm256_slli_epi32(t, 3), _mm256_set1_epi32(0x7F000000)));
  return planes;
}

// 16 entries in planes: planes 0 and 1, planes 2 and 3, 16 bytes each.
struct PlanePairs {
  __m256i low, high;
};

template <TableKind Kind>
static inline PlanePairs gather_planes(__m256 entries_0_7, __m256 entries_8_15) {
  const __m256i by_plane = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                            0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i a = _mm256_shuffle_epi8(cut_into_planes<Kind>(entries_0_7), by_plane);
  const __m256i b = _mm256_shuffle_epi8(cut_into_planes<Kind>(entries_8_15), by_plane);
  return {_mm256_permutevar8x32_epi32(_mm256_unpacklo_epi32(a, b), in_order),
          _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi32(a, b), in_order)};
}

// Per plane the sums of 32 looked-up bytes: `even` holds even + 256 * odd modulo 2^16 until the flush.
template <TableKind Kind>
struct PlaneSums {
  static constexpr int kPlanes = table_planes(Kind), kBits = plane_bits(Kind);
  __m256i even[kPlanes], odd[kPlanes];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) even[p] = odd[p] = _mm256_setzero_si256();
  }

  inline __attribute__((always_inline)) void add_bytes(int p, __m256i v) {
    even[p] = _mm256_add_epi16(even[p], v);
    PYLLMQ_PIN(even[p]);
    // The high byte of each lane: `srli` would go through the two pipes that the shuffles of the lookups need (Zen, Intel).
    odd[p] = _mm256_add_epi16(odd[p], _mm256_maddubs_epi16(v, _mm256_set1_epi16(0x0100)));
    PYLLMQ_PIN(odd[p]);
  }

  // Two lookups into tables of the same planes; two bytes of 7 bits are added before they are widened.
  inline __attribute__((always_inline)) void add_two(int p, __m256i a, __m256i b) {
    if constexpr (kBits == 7) {
      add_bytes(p, _mm256_add_epi8(a, b));
    } else {
      add_bytes(p, a);
      add_bytes(p, b);
    }
  }

  inline __attribute__((always_inline)) __m256i even_sums(int p) const {
    return _mm256_sub_epi16(even[p], _mm256_slli_epi16(odd[p], 8));
  }
};

// The sums of 8 rows over a panel, wide(p) in 32 bits for each plane -> fp32 in units of `unit`, the bias taken off.
// Sums of 8-bit planes reach 65280 and are unsigned, those of 7-bit planes stay below 2^15.
template <TableKind Kind, class Wide>
static inline __attribute__((always_inline)) __m256 join_planes(Wide&& wide, int64_t lookups, float unit) {
  constexpr int planes = table_planes(Kind), bits = plane_bits(Kind);
  const auto join = [](__m256i low, __m256i high) { return _mm256_add_epi32(low, _mm256_slli_epi32(high, bits)); };
  const __m256i bias = _mm256_set1_epi32(static_cast<int>(lookups << (2 * bits - 1)));
  const __m256i upper = _mm256_sub_epi32(join(wide(planes - 2), wide(planes - 1)), bias);
  const __m256 upper_unit = _mm256_set1_ps(static_cast<float>(1 << (bits * (planes - 2))) * unit);
  const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(upper), upper_unit);
  if constexpr (planes == 2) return sum;
  const __m256i lower = planes == 4 ? join(wide(0), wide(1)) : wide(0);
  return _mm256_add_ps(sum, _mm256_mul_ps(_mm256_cvtepi32_ps(lower), _mm256_set1_ps(unit)));
}

}  // namespace pyllmq::cpu

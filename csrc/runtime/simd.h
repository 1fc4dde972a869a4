// One vocabulary of vectors: what differs between instruction sets in width alone is written once, for a vector type V, in files
// named *_simd.cpp, which setup.py compiles for each instruction set (PYLLMQ_ISA). R is a vector of fp32, Index one of as many
// integers, Flag what a comparison gives. All in an anonymous namespace, so that no code compiled for one instruction set can
// be linked into another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "runtime/half.h"
#include "runtime/isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pyllmq::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();

// Four numbers, one for each of four rows. Spelled out as a vector: gcc 12 makes four divisions of a loop over them.
using Four = float __attribute__((vector_size(16)));

inline Four load_four(const float* from) {
  Four four;
  __builtin_memcpy(&four, from, 16);
  return four;
}
inline void store_four(float* to, Four four) { __builtin_memcpy(to, &four, 16); }
inline Four larger(Four x, Four y) { return x > y ? x : y; }

template <Isa isa>
struct Vector;

template <class Number>
struct Arithmetic {
  using R = Number;

  static R add(R x, R y) { return x + y; }
  static R sub(R x, R y) { return x - y; }
  static R mul(R x, R y) { return x * y; }
  static R div(R x, R y) { return x / y; }
};

// A vector of one number.
template <>
struct Vector<Isa::scalar> : Arithmetic<float> {
  using Index = int;
  using Flag = bool;
  static constexpr int64_t width = 1;

  static R set(float x) { return x; }
  static R load(const float* from) { return *from; }
  static R load(const uint16_t* bf16) { return bf16_to_fp32(*bf16); }
  static void set_two(uint32_t bf16, R& first, R& second) {
    first = bits_float(bf16 << 16);
    second = bits_float(bf16 & 0xFFFF0000u);
  }
  static R load_part(const float* from, int64_t left, float missing) { return left > 0 ? *from : missing; }
  static void store(float* to, R x) { *to = x; }
  static void store_part(float* to, int64_t left, R x) {
    if (left > 0) *to = x;
  }
  static R fma(R x, R y, R z) { return x * y + z; }
  static R min(R x, R y) { return x < y ? x : y; }
  static R max(R x, R y) { return x > y ? x : y; }
  static R round(R x) { return std::nearbyint(x); }
  static R reciprocal(R x) { return 1 / x; }
  static R quotient(R x, R y) { return x / y; }
  static void split(R x, R& n, R& m) {
    int exponent = 0;
    m = std::frexp(x, &exponent);
    n = static_cast<float>(exponent);
    if (m < 0.70710678f) m *= 2, n -= 1;
  }
  // x * 2^n; n NaN or out of range: any number
  static R scale2(R x, R n) {
    return n > -127 && n < 128 ? x * bits_float(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23) : x;
  }
  static R exponent(R cost, double u, const double* v, double inverse) { return static_cast<float>((u + *v - cost) * inverse); }
  static Four sums(R s0, R s1, R s2, R s3) { return Four{s0, s1, s2, s3}; }
  static void transpose(R*) {}
  static void transpose_fours(R*) {}
  static float total(R x) { return x; }
  static float least(R x) { return x; }
  static float most(R x) { return x; }

  static Flag no_flag() { return false; }
  static Flag is_nan(R x) { return x != x; }
  static Flag above(R x, R y) { return x > y; }
  static Flag at_least(R x, R y) { return x >= y; }
  static Flag not_below(R x, R y) { return !(x < y); }
  static Flag equal(R x, R y) { return x == y; }
  static Flag either(Flag x, Flag y) { return x || y; }
  static Flag both(Flag x, Flag y) { return x && y; }
  static R select(Flag flag, R yes, R no) { return flag ? yes : no; }
  static R zero_unless(Flag flag, R x) { return flag ? x : 0; }
  static bool any(Flag flag) { return flag; }
  static uint32_t bits(Flag flag) { return flag; }

  static Index index(int x) { return x; }
  static Index add_where(Flag flag, Index x, int n) { return flag ? x + n : x; }
  static Index plus(Index x, int n) { return x + n; }
  static R look_up(const float* table, Index at) { return table[at]; }
  static void store_bytes(uint8_t* to, int64_t left, Index at, const uint8_t* table) {
    if (left > 0) *to = table[at];
  }
};
using Scalar = Vector<Isa::scalar>;

#if defined(__AVX2__)
template <>
struct Vector<Isa::avx2> : Arithmetic<__m256> {
  using Index = __m256i;
  using Flag = __m256;
  static constexpr int64_t width = 8;

  static R set(float x) { return _mm256_set1_ps(x); }
  static R load(const float* from) { return _mm256_loadu_ps(from); }
  static R load(const uint16_t* bf16) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  // Two numbers in bf16 that lie side by side.
  static void set_two(uint32_t bf16, R& first, R& second) {
    const __m256i both = _mm256_set1_epi32(static_cast<int>(bf16));
    first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    second = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
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
  static R fma(R x, R y, R z) { return _mm256_fmadd_ps(x, y, z); }
  static R min(R x, R y) { return _mm256_min_ps(x, y); }
  static R max(R x, R y) { return _mm256_max_ps(x, y); }
  static R round(R x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 1 / y to 12 bits, and to twice as many after one Newton step: x / y to 1e-7 in a third of a division's time
  static R reciprocal(R x) {
    const R r = _mm256_rcp_ps(x);
    return _mm256_mul_ps(r, _mm256_fnmadd_ps(x, r, set(2)));
  }
  static R quotient(R x, R y) {
    const R r = _mm256_rcp_ps(y);
    return _mm256_mul_ps(_mm256_mul_ps(x, r), _mm256_fnmadd_ps(y, r, set(2)));
  }
  static void split(R x, R& n, R& m) {
    const __m256i bits = _mm256_castps_si256(x), shifted = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3F3504F3));
    n = _mm256_cvtepi32_ps(_mm256_srai_epi32(shifted, 23));  // m in [sqrt 1/2, sqrt 2)
    m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_and_si256(shifted, _mm256_set1_epi32(static_cast<int>(0xFF800000)))));
  }
  static R scale2(R x, R n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
  }
  static R exponent(R cost, double u, const double* v, double inverse) {
    const __m256d row = _mm256_set1_pd(u), scale = _mm256_set1_pd(inverse);
    const __m256d low = _mm256_sub_pd(_mm256_add_pd(row, _mm256_loadu_pd(v)), _mm256_cvtps_pd(_mm256_castps256_ps128(cost)));
    const __m256d high =
        _mm256_sub_pd(_mm256_add_pd(row, _mm256_loadu_pd(v + 4)), _mm256_cvtps_pd(_mm256_extractf128_ps(cost, 1)));
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_mul_pd(high, scale)), _mm256_cvtpd_ps(_mm256_mul_pd(low, scale)));
  }
  static Four sums(R s0, R s1, R s2, R s3) {
    const R pairs = _mm256_hadd_ps(_mm256_hadd_ps(s0, s1), _mm256_hadd_ps(s2, s3));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  }
  static void transpose(R* r) {
    R pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int half = 0; half < 2; ++half) {
        const __m256d low = _mm256_castps_pd(pairs[i + half]), high = _mm256_castps_pd(pairs[i + 2 + half]);
        fours[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
        fours[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
      }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }
  template <class Fold>
  static float fold(R x, Fold pair) {
    __m128 half = pair(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = pair(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(pair(half, _mm_shuffle_ps(half, half, 1)));
  }
  // Four lines of 8 lanes to 8 times four numbers, lane by lane.
  static void transpose_fours(R* r) {
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    // lane 4 p + q is in the 128-bit part p of the q-th
    const R q0 = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)), q1 = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    const R q2 = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)), q3 = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
    r[0] = _mm256_permute2f128_ps(q0, q1, 0x20);
    r[1] = _mm256_permute2f128_ps(q2, q3, 0x20);
    r[2] = _mm256_permute2f128_ps(q0, q1, 0x31);
    r[3] = _mm256_permute2f128_ps(q2, q3, 0x31);
  }
  static float total(R x) {
    return fold(x, [](__m128 p, __m128 q) { return _mm_add_ps(p, q); });
  }
  static float least(R x) {
    return fold(x, [](__m128 p, __m128 q) { return _mm_min_ps(p, q); });
  }
  static float most(R x) {
    return fold(x, [](__m128 p, __m128 q) { return _mm_max_ps(p, q); });
  }

  static Flag no_flag() { return _mm256_setzero_ps(); }
  static Flag is_nan(R x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
  static Flag above(R x, R y) { return _mm256_cmp_ps(x, y, _CMP_GT_OQ); }
  static Flag at_least(R x, R y) { return _mm256_cmp_ps(x, y, _CMP_GE_OQ); }
  static Flag not_below(R x, R y) { return _mm256_cmp_ps(x, y, _CMP_NLT_UQ); }
  static Flag equal(R x, R y) { return _mm256_cmp_ps(x, y, _CMP_EQ_OQ); }
  static Flag either(Flag x, Flag y) { return _mm256_or_ps(x, y); }
  static Flag both(Flag x, Flag y) { return _mm256_and_ps(x, y); }
  static R select(Flag flag, R yes, R no) { return _mm256_blendv_ps(no, yes, flag); }
  static R zero_unless(Flag flag, R x) { return _mm256_and_ps(flag, x); }
  static bool any(Flag flag) { return _mm256_movemask_ps(flag) != 0; }
  static uint32_t bits(Flag flag) { return static_cast<uint32_t>(_mm256_movemask_ps(flag)); }

  // Of as many numbers of 16 or 8 bits; of pairs of bf16, the first in the low half.
  static R load_fp16(const void* from) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))); }
  static R load_int8(const void* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
  }
  static R first_bf16(Index pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static R second_bf16(Index pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }

  static Index load_index(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static Index shifted_right(Index x, int bits) { return _mm256_srli_epi32(x, bits); }
  static Index low_bits(Index x, int mask) { return _mm256_and_si256(x, index(mask)); }
  static Flag same(Index x, int n) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(x, index(n))); }
  // four[x], by the low 2 bits.
  static R look_up_four(const float* four, Index x) {
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)), x);
  }
  static Index index(int x) { return _mm256_set1_epi32(x); }
  static Index plus(Index x, int n) { return _mm256_add_epi32(x, index(n)); }
  static Index add_where(Flag flag, Index x, int n) {
    return _mm256_add_epi32(x, _mm256_and_si256(_mm256_castps_si256(flag), index(n)));
  }
  // Of 16 entries.
  static R look_up(const float* table, Index at) {
    const R low = _mm256_permutevar8x32_ps(load(table), at), high = _mm256_permutevar8x32_ps(load(table + 8), at);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
  }
  // to[i] = table[at[i]], of 16 entries.
  static void store_bytes(uint8_t* to, int64_t left, Index at, const uint8_t* table) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(at), _mm256_extracti128_si256(at, 1));
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_shuffle_epi8(entries, _mm_packus_epi16(words, words)));
    std::memcpy(to, &bytes, left < 8 ? left : 8);
  }

  // Numbers of 64 bits: fp64, and the places of candidates.
  struct Wide : Arithmetic<__m256d> {
    using Place = __m256i;
    using Flag = __m256d;
    static constexpr int width = 4;

    static R set(double x) { return _mm256_set1_pd(x); }
    static R load(const double* from) { return _mm256_loadu_pd(from); }
    static R load_backwards(const double* last) { return _mm256_permute4x64_pd(load(last - 3), 0x1B); }
    static void store(double* to, R x) { _mm256_storeu_pd(to, x); }
    static Place place(int64_t x) { return _mm256_set1_epi64x(x); }
    static Place place_from(int64_t first) { return later(place(first), _mm256_setr_epi64x(0, 1, 2, 3)); }
    static Place later(Place x, Place y) { return _mm256_add_epi64(x, y); }
    static void store(int64_t* to, Place x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
    static Flag above(R x, R y) { return _mm256_cmp_pd(x, y, _CMP_GT_OQ); }
    static R select(Flag flag, R yes, R no) { return _mm256_blendv_pd(no, yes, flag); }
    static Place select(Flag flag, Place yes, Place no) {
      return _mm256_castpd_si256(_mm256_blendv_pd(_mm256_castsi256_pd(no), _mm256_castsi256_pd(yes), flag));
    }
  };
};
using Avx2 = Vector<Isa::avx2>;
#endif

#if defined(__AVX512F__)
template <>
struct Vector<Isa::avx512> : Arithmetic<__m512> {
  using Index = __m512i;
  using Flag = __mmask16;
  static constexpr int64_t width = 16;

  static R set(float x) { return _mm512_set1_ps(x); }
  static R load(const float* from) { return _mm512_loadu_ps(from); }
  static R load(const uint16_t* bf16) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void set_two(uint32_t bf16, R& first, R& second) {
    const __m512i both = _mm512_set1_epi32(static_cast<int>(bf16));
    first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static __mmask16 first(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0);
  }
  static R load_part(const float* from, int64_t left, float missing) {
    return _mm512_mask_loadu_ps(set(missing), first(left), from);
  }
  static void store(float* to, R x) { _mm512_storeu_ps(to, x); }
  static void store_part(float* to, int64_t left, R x) { _mm512_mask_storeu_ps(to, first(left), x); }
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
    m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_and_si512(shifted, _mm512_set1_epi32(static_cast<int>(0xFF800000)))));
  }
  static R scale2(R x, R n) { return _mm512_scalef_ps(x, n); }
  static R exponent(R cost, double u, const double* v, double inverse) {
    const __m512d row = _mm512_set1_pd(u), scale = _mm512_set1_pd(inverse);
    const __m512d low = _mm512_sub_pd(_mm512_add_pd(row, _mm512_loadu_pd(v)), _mm512_cvtps_pd(_mm512_castps512_ps256(cost)));
    const __m512d high =
        _mm512_sub_pd(_mm512_add_pd(row, _mm512_loadu_pd(v + 8)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(cost, 1)));
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_mul_pd(low, scale))),
                              _mm512_cvtpd_ps(_mm512_mul_pd(high, scale)), 1);
  }
  static Four sums(R s0, R s1, R s2, R s3) {
    const __m512d low = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(s0, s1), _mm512_unpackhi_ps(s0, s1)));
    const __m512d high = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(s2, s3), _mm512_unpackhi_ps(s2, s3)));
    const R four_times =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
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
  static Flag not_below(R x, R y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ); }
  static Flag equal(R x, R y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
  static Flag either(Flag x, Flag y) { return static_cast<Flag>(x | y); }
  static Flag both(Flag x, Flag y) { return static_cast<Flag>(x & y); }
  static R select(Flag flag, R yes, R no) { return _mm512_mask_blend_ps(flag, no, yes); }
  static R zero_unless(Flag flag, R x) { return _mm512_maskz_mov_ps(flag, x); }
  static bool any(Flag flag) { return flag != 0; }
  static uint32_t bits(Flag flag) { return flag; }

  static R load_fp16(const void* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from))); }
  static R load_int8(const void* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
  }
  static R first_bf16(Index pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static R second_bf16(Index pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }

  static Index load_index(const void* from) { return _mm512_loadu_si512(from); }
  static Index shifted_right(Index x, int bits) { return _mm512_srli_epi32(x, static_cast<unsigned>(bits)); }
  static Index low_bits(Index x, int mask) { return _mm512_and_si512(x, index(mask)); }
  static Flag same(Index x, int n) { return _mm512_cmpeq_epi32_mask(x, index(n)); }
  static R look_up_four(const float* four, Index x) {
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), x);
  }
  static Index index(int x) { return _mm512_set1_epi32(x); }
  static Index plus(Index x, int n) { return _mm512_add_epi32(x, index(n)); }
  static Index add_where(Flag flag, Index x, int n) { return _mm512_mask_add_epi32(x, flag, x, index(n)); }
  static R look_up(const float* table, Index at) { return _mm512_permutexvar_ps(at, load(table)); }
  static void store_bytes(uint8_t* to, int64_t left, Index at, const uint8_t* table) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    _mm_mask_storeu_epi8(to, first(left), _mm_shuffle_epi8(entries, _mm512_cvtepi32_epi8(at)));
  }

  // Numbers of 64 bits: fp64, and the places of candidates.
  struct Wide : Arithmetic<__m512d> {
    using Place = __m512i;
    using Flag = __mmask8;
    static constexpr int width = 8;

    static R set(double x) { return _mm512_set1_pd(x); }
    static R load(const double* from) { return _mm512_loadu_pd(from); }
    static R load_backwards(const double* last) {
      return _mm512_permutexvar_pd(_mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0), load(last - 7));
    }
    static void store(double* to, R x) { _mm512_storeu_pd(to, x); }
    static Place place(int64_t x) { return _mm512_set1_epi64(x); }
    static Place place_from(int64_t first) { return later(place(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)); }
    static Place later(Place x, Place y) { return _mm512_add_epi64(x, y); }
    static void store(int64_t* to, Place x) { _mm512_storeu_si512(to, x); }
    static Flag above(R x, R y) { return _mm512_cmp_pd_mask(x, y, _CMP_GT_OQ); }
    static Flag above_or_earlier(R x, R y, Place x_at, Place y_at) {
      return above(x, y) | (_mm512_cmp_pd_mask(x, y, _CMP_EQ_OQ) & _mm512_cmplt_epi64_mask(x_at, y_at));
    }
    static R select(Flag flag, R yes, R no) { return _mm512_mask_blend_pd(flag, no, yes); }
    static Place select(Flag flag, Place yes, Place no) { return _mm512_mask_blend_epi64(flag, no, yes); }
  };
};
using Avx512 = Vector<Isa::avx512>;
#endif

// Two vectors that go through every operation together.
template <class V>
struct Twice {
  using Half = V;
  struct R {
    typename V::R x, y;
  };
  struct Flag {
    typename V::Flag x, y;
  };
  struct Index {
    typename V::Index x, y;
  };
  static constexpr int64_t width = 2 * V::width;

  static R set(float x) { return {V::set(x), V::set(x)}; }
  template <class Number>
  static R load(const Number* from) {
    return {V::load(from), V::load(from + V::width)};
  }
  static void set_two(uint32_t bf16, R& first, R& second) {
    V::set_two(bf16, first.x, second.x);
    first.y = first.x;
    second.y = second.x;
  }
  static R load_part(const float* from, int64_t left, float missing) {
    return {V::load_part(from, left, missing), V::load_part(from + V::width, left - V::width, missing)};
  }
  static void store_part(float* to, int64_t left, R v) {
    V::store_part(to, left, v.x);
    V::store_part(to + V::width, left - V::width, v.y);
  }
  static void store(float* to, R v) {
    V::store(to, v.x);
    V::store(to + V::width, v.y);
  }
  static R add(R v, R w) { return {V::add(v.x, w.x), V::add(v.y, w.y)}; }
  static R sub(R v, R w) { return {V::sub(v.x, w.x), V::sub(v.y, w.y)}; }
  static R mul(R v, R w) { return {V::mul(v.x, w.x), V::mul(v.y, w.y)}; }
  static R div(R v, R w) { return {V::div(v.x, w.x), V::div(v.y, w.y)}; }
  static R fma(R v, R w, R z) { return {V::fma(v.x, w.x, z.x), V::fma(v.y, w.y, z.y)}; }
  static R min(R v, R w) { return {V::min(v.x, w.x), V::min(v.y, w.y)}; }
  static R max(R v, R w) { return {V::max(v.x, w.x), V::max(v.y, w.y)}; }
  static R round(R v) { return {V::round(v.x), V::round(v.y)}; }
  static R quotient(R v, R w) { return {V::quotient(v.x, w.x), V::quotient(v.y, w.y)}; }
  static R reciprocal(R v) { return {V::reciprocal(v.x), V::reciprocal(v.y)}; }
  static R scale2(R v, R n) { return {V::scale2(v.x, n.x), V::scale2(v.y, n.y)}; }
  static void split(R v, R& n, R& m) {
    V::split(v.x, n.x, m.x);
    V::split(v.y, n.y, m.y);
  }
  static Four sums(R s0, R s1, R s2, R s3) {
    return V::sums(V::add(s0.x, s0.y), V::add(s1.x, s1.y), V::add(s2.x, s2.y), V::add(s3.x, s3.y));
  }
  static float total(R v) { return V::total(V::add(v.x, v.y)); }
  static float most(R v) { return V::most(V::max(v.x, v.y)); }

  static Flag above(R v, R w) { return {V::above(v.x, w.x), V::above(v.y, w.y)}; }
  static Flag at_least(R v, R w) { return {V::at_least(v.x, w.x), V::at_least(v.y, w.y)}; }
  static Flag not_below(R v, R w) { return {V::not_below(v.x, w.x), V::not_below(v.y, w.y)}; }
  static Flag equal(R v, R w) { return {V::equal(v.x, w.x), V::equal(v.y, w.y)}; }
  static Flag both(Flag v, Flag w) { return {V::both(v.x, w.x), V::both(v.y, w.y)}; }
  static R select(Flag flag, R yes, R no) { return {V::select(flag.x, yes.x, no.x), V::select(flag.y, yes.y, no.y)}; }
  static R zero_unless(Flag flag, R v) { return {V::zero_unless(flag.x, v.x), V::zero_unless(flag.y, v.y)}; }
  static bool any(Flag flag) { return V::any(flag.x) || V::any(flag.y); }
  static uint32_t bits(Flag flag) { return V::bits(flag.x) | V::bits(flag.y) << V::width; }

  static R load_fp16(const uint8_t* from) { return {V::load_fp16(from), V::load_fp16(from + 2 * V::width)}; }
  static R load_int8(const uint8_t* from) { return {V::load_int8(from), V::load_int8(from + V::width)}; }
  static R first_bf16(Index pairs) { return {V::first_bf16(pairs.x), V::first_bf16(pairs.y)}; }
  static R second_bf16(Index pairs) { return {V::second_bf16(pairs.x), V::second_bf16(pairs.y)}; }
  static Index load_index(const uint8_t* from) { return {V::load_index(from), V::load_index(from + 4 * V::width)}; }
  static Index shifted_right(Index v, int bits) { return {V::shifted_right(v.x, bits), V::shifted_right(v.y, bits)}; }
  static Index low_bits(Index v, int mask) { return {V::low_bits(v.x, mask), V::low_bits(v.y, mask)}; }
  static Flag same(Index v, int n) { return {V::same(v.x, n), V::same(v.y, n)}; }
  static R look_up_four(const float* four, Index v) { return {V::look_up_four(four, v.x), V::look_up_four(four, v.y)}; }
};

#if defined(__aarch64__)
// The 4 numbers of one register. Two of them are the vector of NEON: its 32 registers of 16 bytes are AVX2's 16 of 32, so
// that what is written for 8 lanes and 16 registers fits, and sums run in the same order.
struct Quad {
  using R = float32x4_t;
  using Index = int32x4_t;
  using Flag = uint32x4_t;
  static constexpr int64_t width = 4;

  static R set(float x) { return vdupq_n_f32(x); }
  static R load(const float* from) { return vld1q_f32(from); }
  static R load(const uint16_t* bf16) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(bf16), 16)); }
  static void set_two(uint32_t bf16, R& first, R& second) {
    first = vdupq_n_f32(bits_float(bf16 << 16));
    second = vdupq_n_f32(bits_float(bf16 & 0xFFFF0000u));
  }
  static R load_part(const float* from, int64_t left, float missing) {
    if (left >= 4) return load(from);
    float part[4] = {missing, missing, missing, missing};
    for (int64_t i = 0; i < left; ++i) part[i] = from[i];
    return load(part);
  }
  static void store(float* to, R x) { vst1q_f32(to, x); }
  static void store_part(float* to, int64_t left, R x) {
    if (left >= 4) return store(to, x);
    float part[4];
    store(part, x);
    for (int64_t i = 0; i < left; ++i) to[i] = part[i];
  }
  static R add(R x, R y) { return vaddq_f32(x, y); }
  static R sub(R x, R y) { return vsubq_f32(x, y); }
  static R mul(R x, R y) { return vmulq_f32(x, y); }
  static R div(R x, R y) { return vdivq_f32(x, y); }
  static R fma(R x, R y, R z) { return vfmaq_f32(z, x, y); }
  static R min(R x, R y) { return vbslq_f32(vcltq_f32(x, y), x, y); }  // vminq gives NaN where one of the two is
  static R max(R x, R y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
  static R round(R x) { return vrndnq_f32(x); }
  static R reciprocal(R x) { return vdivq_f32(set(1), x); }
  static R quotient(R x, R y) { return vdivq_f32(x, y); }
  static void split(R x, R& n, R& m) {
    const Index bits = vreinterpretq_s32_f32(x), shifted = vsubq_s32(bits, vdupq_n_s32(0x3F3504F3));
    n = vcvtq_f32_s32(vshrq_n_s32(shifted, 23));  // m in [sqrt 1/2, sqrt 2)
    m = vreinterpretq_f32_s32(vsubq_s32(bits, vandq_s32(shifted, vdupq_n_s32(static_cast<int>(0xFF800000)))));
  }
  static R scale2(R x, R n) {
    const Index exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(x, vreinterpretq_f32_s32(exponent));
  }
  static R exponent(R cost, double u, const double* v, double inverse) {
    const float64x2_t row = vdupq_n_f64(u), scale = vdupq_n_f64(inverse);
    const float64x2_t low = vsubq_f64(vaddq_f64(row, vld1q_f64(v)), vcvt_f64_f32(vget_low_f32(cost)));
    const float64x2_t high = vsubq_f64(vaddq_f64(row, vld1q_f64(v + 2)), vcvt_high_f64_f32(cost));
    return vcvt_high_f32_f64(vcvt_f32_f64(vmulq_f64(low, scale)), vmulq_f64(high, scale));
  }
  static Four sums(R s0, R s1, R s2, R s3) { return Four(vpaddq_f32(vpaddq_f32(s0, s1), vpaddq_f32(s2, s3))); }
  template <class Fold>
  static float fold(R x, Fold pair) {
    const float32x2_t half = pair(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(pair(half, vdup_lane_f32(half, 1)), 0);
  }
  static float total(R x) {
    return fold(x, [](float32x2_t p, float32x2_t q) { return vadd_f32(p, q); });
  }
  static float least(R x) {
    return fold(x, [](float32x2_t p, float32x2_t q) { return vbsl_f32(vclt_f32(p, q), p, q); });
  }
  static float most(R x) {
    return fold(x, [](float32x2_t p, float32x2_t q) { return vbsl_f32(vcgt_f32(p, q), p, q); });
  }
  static void transpose(R* r) {
    const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
  }

  static Flag above(R x, R y) { return vcgtq_f32(x, y); }
  static Flag at_least(R x, R y) { return vcgeq_f32(x, y); }
  static Flag not_below(R x, R y) { return vmvnq_u32(vcltq_f32(x, y)); }
  static Flag equal(R x, R y) { return vceqq_f32(x, y); }
  static Flag either(Flag x, Flag y) { return vorrq_u32(x, y); }
  static Flag both(Flag x, Flag y) { return vandq_u32(x, y); }
  static R select(Flag flag, R yes, R no) { return vbslq_f32(flag, yes, no); }
  static R zero_unless(Flag flag, R x) { return vreinterpretq_f32_u32(vandq_u32(flag, vreinterpretq_u32_f32(x))); }
  static bool any(Flag flag) { return vmaxvq_u32(flag) != 0; }
  static uint32_t bits(Flag flag) { return vaddvq_u32(vandq_u32(flag, uint32x4_t{1, 2, 4, 8})); }

  static R load_fp16(const void* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(from))));
  }
  static R load_int8(const void* from) {
    int8_t eight[8] = {};
    std::memcpy(eight, from, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(eight)))));
  }
  static R first_bf16(Index pairs) { return vreinterpretq_f32_s32(vshlq_n_s32(pairs, 16)); }
  static R second_bf16(Index pairs) {
    return vreinterpretq_f32_s32(vandq_s32(pairs, vdupq_n_s32(static_cast<int>(0xFFFF0000u))));
  }

  static Index load_index(const void* from) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(from))); }
  static Index shifted_right(Index x, int bits) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(-bits)));
  }
  static Index low_bits(Index x, int mask) { return vandq_s32(x, index(mask)); }
  static Flag same(Index x, int n) { return vceqq_s32(x, index(n)); }
  static Index index(int x) { return vdupq_n_s32(x); }
  static Index plus(Index x, int n) { return vaddq_s32(x, index(n)); }
  static Index add_where(Flag flag, Index x, int n) { return vaddq_s32(x, vandq_s32(vreinterpretq_s32_u32(flag), index(n))); }
  // The four bytes of a number at once.
  static uint8x16_t number_bytes(Index at) { return vreinterpretq_u8_s32(vmlaq_s32(index(0x03020100), at, index(0x04040404))); }
  static R look_up_four(const float* four, Index x) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(load(four)), number_bytes(low_bits(x, 3))));
  }
  static R look_up(const float* table, Index at) {
    const uint8x16x4_t bytes = {{vreinterpretq_u8_f32(load(table)), vreinterpretq_u8_f32(load(table + 4)),
                                 vreinterpretq_u8_f32(load(table + 8)), vreinterpretq_u8_f32(load(table + 12))}};
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, number_bytes(at)));
  }
};

template <>
struct Vector<Isa::neon> : Twice<Quad> {
  static R exponent(R cost, double u, const double* v, double inverse) {
    return {Quad::exponent(cost.x, u, v, inverse), Quad::exponent(cost.y, u, v + 4, inverse)};
  }
  static void transpose(R* r) {
    for (int rows = 0; rows < 8; rows += 4) {
      float32x4_t left[4], right[4];
      for (int i = 0; i < 4; ++i) left[i] = r[rows + i].x, right[i] = r[rows + i].y;
      Quad::transpose(left);
      Quad::transpose(right);
      for (int i = 0; i < 4; ++i) r[rows + i] = {left[i], right[i]};
    }
    for (int i = 0; i < 4; ++i) std::swap(r[i].y, r[4 + i].x);
  }
  // Four lines of 8 lanes to 8 times four numbers, lane by lane.
  static void transpose_fours(R* r) {
    float32x4_t low[4], high[4];
    for (int i = 0; i < 4; ++i) low[i] = r[i].x, high[i] = r[i].y;
    Quad::transpose(low);
    Quad::transpose(high);
    for (int i = 0; i < 2; ++i) r[i] = {low[2 * i], low[2 * i + 1]}, r[2 + i] = {high[2 * i], high[2 * i + 1]};
  }
  static float least(R v) { return Quad::least(Quad::min(v.x, v.y)); }

  static Flag no_flag() { return {vdupq_n_u32(0), vdupq_n_u32(0)}; }
  static Flag is_nan(R v) { return {vmvnq_u32(vceqq_f32(v.x, v.x)), vmvnq_u32(vceqq_f32(v.y, v.y))}; }
  static Flag either(Flag v, Flag w) { return {Quad::either(v.x, w.x), Quad::either(v.y, w.y)}; }

  static Index index(int n) { return {Quad::index(n), Quad::index(n)}; }
  static Index plus(Index v, int n) { return {Quad::plus(v.x, n), Quad::plus(v.y, n)}; }
  static Index add_where(Flag flag, Index v, int n) { return {Quad::add_where(flag.x, v.x, n), Quad::add_where(flag.y, v.y, n)}; }
  static R look_up(const float* table, Index at) { return {Quad::look_up(table, at.x), Quad::look_up(table, at.y)}; }
  static void store_bytes(uint8_t* to, int64_t left, Index at, const uint8_t* table) {
    const int16x8_t words = vcombine_s16(vmovn_s32(at.x), vmovn_s32(at.y));
    const uint8x8_t bytes = vqtbl1_u8(vld1q_u8(table), vreinterpret_u8_s8(vmovn_s16(words)));
    if (left >= 8) return vst1_u8(to, bytes);
    uint8_t part[8];
    vst1_u8(part, bytes);
    for (int64_t i = 0; i < left; ++i) to[i] = part[i];
  }

  // Numbers of 64 bits: fp64, and the places of candidates.
  struct Wide {
    struct R {
      float64x2_t x, y;
    };
    struct Place {
      int64x2_t x, y;
    };
    struct Flag {
      uint64x2_t x, y;
    };
    static constexpr int width = 4;

    static R set(double v) { return {vdupq_n_f64(v), vdupq_n_f64(v)}; }
    static R load(const double* from) { return {vld1q_f64(from), vld1q_f64(from + 2)}; }
    static R load_backwards(const double* last) {
      const float64x2_t low = vld1q_f64(last - 1), high = vld1q_f64(last - 3);
      return {vextq_f64(low, low, 1), vextq_f64(high, high, 1)};
    }
    static void store(double* to, R v) {
      vst1q_f64(to, v.x);
      vst1q_f64(to + 2, v.y);
    }
    static R add(R v, R w) { return {vaddq_f64(v.x, w.x), vaddq_f64(v.y, w.y)}; }
    static R sub(R v, R w) { return {vsubq_f64(v.x, w.x), vsubq_f64(v.y, w.y)}; }
    static R mul(R v, R w) { return {vmulq_f64(v.x, w.x), vmulq_f64(v.y, w.y)}; }
    static R div(R v, R w) { return {vdivq_f64(v.x, w.x), vdivq_f64(v.y, w.y)}; }
    static Place place(int64_t v) { return {vdupq_n_s64(v), vdupq_n_s64(v)}; }
    static Place place_from(int64_t first) { return later(place(first), {int64x2_t{0, 1}, int64x2_t{2, 3}}); }
    static Place later(Place v, Place w) { return {vaddq_s64(v.x, w.x), vaddq_s64(v.y, w.y)}; }
    static void store(int64_t* to, Place v) {
      vst1q_s64(to, v.x);
      vst1q_s64(to + 2, v.y);
    }
    static Flag above(R v, R w) { return {vcgtq_f64(v.x, w.x), vcgtq_f64(v.y, w.y)}; }
    static R select(Flag flag, R yes, R no) { return {vbslq_f64(flag.x, yes.x, no.x), vbslq_f64(flag.y, yes.y, no.y)}; }
    static Place select(Flag flag, Place yes, Place no) {
      return {vbslq_s64(flag.x, yes.x, no.x), vbslq_s64(flag.y, yes.y, no.y)};
    }
  };
};
using Neon = Vector<Isa::neon>;
#endif

#if defined(PYLLMQ_ISA)
using V = Vector<Isa::PYLLMQ_ISA>;
#endif

// exp to 1e-7 relative for x <= 88; below -87, where the result leaves the normal numbers, exactly 0. NaN becomes 0, or stays.
// Taylor to the 7th power on |r| <= ln 2 / 2, whose rest is 5e-9.
template <class V, bool kNanStays = false>
inline typename V::R exponential(typename V::R x) {
  using R = typename V::R;
  const R n = V::round(V::mul(x, V::set(1.44269504f)));
  // ln 2 in two parts, the first short enough for n times it to be exact
  R r = V::fma(n, V::set(-0x1.62e4p-1f), x);
  r = V::fma(n, V::set(-0x1.7f7d1cp-20f), r);
  R p = V::set(1.0f / 5040);
  p = V::fma(p, r, V::set(1.0f / 720));
  p = V::fma(p, r, V::set(1.0f / 120));
  p = V::fma(p, r, V::set(1.0f / 24));
  p = V::fma(p, r, V::set(1.0f / 6));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1));
  p = V::fma(p, r, V::set(1));
  const R smallest = V::set(-87.0f);
  if constexpr (kNanStays) return V::zero_unless(V::not_below(x, smallest), V::scale2(p, n));
  return V::zero_unless(V::at_least(x, smallest), V::scale2(p, n));
}

// log to 1e-7 relative, -inf of 0. With x = 2^n m, m near 1: log m = 2 artanh s, s = (m - 1) / (m + 1) below 0.18.
template <class V>
inline typename V::R logarithm(typename V::R x) {
  using R = typename V::R;
  R n, m;
  V::split(x, n, m);
  const R s = V::quotient(V::sub(m, V::set(1)), V::add(m, V::set(1)));
  const R square = V::mul(s, s);
  R p = V::set(2.0f / 9);
  p = V::fma(p, square, V::set(2.0f / 7));
  p = V::fma(p, square, V::set(2.0f / 5));
  p = V::fma(p, square, V::set(2.0f / 3));
  p = V::fma(p, square, V::set(2));
  return V::select(V::above(x, V::set(0)), V::fma(p, s, V::mul(n, V::set(0.693147181f))), V::set(-kInfinity));
}

}  // namespace
}  // namespace pyllmq::cpu

// Decoded weights of one byte (codebook_linear_decode.h) for `fast` without AMX: vpdpbusd does 64 multiply-adds, twice those of
// vpdpwssd.
//
//   weight   128 + round(C / max |C of the column| * 127), unsigned as the instruction wants one side; x carries the maximum
//   x        int8 with one fp32 unit per token and 64 columns, max |x| / 127
//   sums     from -128 sum x on, exact int32 over 64 columns, then fma(sum, unit, fp32)
//
// Relative error 7e-3 to 1.1e-2 for normal x, about that of engines that round activations to int8.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/codebook_linear_decode.h"
#include "cpu/codebook_quads_avx512.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kFlushColumns = 64;
constexpr int kBias = 128;

struct BiasedByte {
  static constexpr int kPlanes = 1;
  static constexpr float kLargest = 127;

  static void store(__m512 value, uint8_t* to, int64_t) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(value), _mm512_set1_epi32(kBias));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(biased));
  }
};

// --- x -------------------------------------------------------------------------------------------------------------

// Of a group of tokens: int8 [quad of slots, token, 4], then fp32 units and int32 starts of sums, [64 columns, token] each.
constexpr int64_t flushes(int64_t slots) { return (slots + kFlushColumns - 1) / kFlushColumns; }
constexpr int64_t token_bytes(int64_t slots) { return slots + flushes(slots) * 8; }
int64_t packed_bytes(int64_t tokens) { return token_bytes(kDecodedColumns) * tokens; }

struct PackedGroup {
  int32_t* quads;
  float* units;
  int32_t* starts;
};
PackedGroup packed_group(uint8_t* packed, int64_t slots, int64_t begin, int64_t count) {
  uint8_t* group = packed + begin * token_bytes(slots);
  uint8_t* units = group + count * slots;
  return {reinterpret_cast<int32_t*>(group), reinterpret_cast<float*>(units),
          reinterpret_cast<int32_t*>(units + count * flushes(slots) * 4)};
}

bool pack(const float* x, int64_t slots, const uint8_t* order, const TokenGroups& groups, int64_t group,
          uint8_t* packed) {
  const int64_t count = groups.size(group);
  const PackedGroup to = packed_group(packed, slots, groups.begin(group), count);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t first = 0; first < slots; first += kFlushColumns) {
      const float* from = x + t * kDecodedColumns + first;  // zeros after the last slot
      const float largest = bits_float(largest_bits(from, kFlushColumns));
      if (!(largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f))) return false;
      const __m512 per_unit = _mm512_set1_ps(largest > 0 ? BiasedByte::kLargest / largest : 0.0f);
      alignas(64) int8_t bytes[kFlushColumns];
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 0; i < kFlushColumns; i += 16) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), per_unit));
        sum = _mm512_add_epi32(sum, whole);
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(whole));
      }
      const int64_t flush = first / kFlushColumns * count + t;
      to.units[flush] = largest / BiasedByte::kLargest / BiasedByte::kLargest;
      to.starts[flush] = -kBias * _mm512_reduce_add_epi32(sum);
      alignas(64) int32_t quads[kFlushColumns / 4];
      _mm512_store_si512(quads, _mm512_permutexvar_epi8(load_64(order + first), load_64(bytes)));
      for (int64_t q = 0; q < std::min(slots - first, kFlushColumns) / 4; ++q)
        to.quads[(first / 4 + q) * count + t] = quads[q];
    }
  return true;
}

// --- multiply ------------------------------------------------------------------------------------------------------

template <int Tokens>
void multiply_group(const uint8_t* weights, const PackedGroup& group, int64_t slots, float* sums) {
  const int32_t* x = group.quads;
  const float* units = group.units;
  const int32_t* starts = group.starts;
  for (; slots > 0; slots -= kFlushColumns, units += Tokens, starts += Tokens) {
    asm volatile("" ::: "memory");  // else gcc 12 carries the fp32 sums from chain to chain on the stack
    __m512i sum[Tokens][2];
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) sum[t][0] = sum[t][1] = _mm512_set1_epi32(starts[t]);
    for (int64_t chain = slots < kFlushColumns ? slots : kFlushColumns; chain > 0; chain -= 4, weights += 4 * kHalfRows, x += Tokens) {
      const __m512i w0 = load_64(weights), w1 = load_64(weights + kHalfQuads);
#pragma GCC unroll 12
      for (int t = 0; t < Tokens; ++t) {
        const __m512i x_t = _mm512_set1_epi32(x[t]);
        sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], w0, x_t);
        sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], w1, x_t);
        asm("" : "+v"(sum[t][0]), "+v"(sum[t][1]));  // stay in their registers (gcc 12 spills and copies them)
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = sums + t * kTileRows + half * kHalfRows;
        const __m512 total = _mm512_cvtepi32_ps(sum[t][half]);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(total, _mm512_set1_ps(units[t]), _mm512_loadu_ps(to)));
      }
  }
}

constexpr int64_t kTokenGroup = 12;
using GroupKernel = void (*)(const uint8_t* weights, const PackedGroup& group, int64_t slots, float* sums);
constexpr GroupKernel kGroup[kTokenGroup + 1] = {
    nullptr,           multiply_group<1>, multiply_group<2>, multiply_group<3>,  multiply_group<4>,
    multiply_group<5>, multiply_group<6>, multiply_group<7>, multiply_group<8>,  multiply_group<9>,
    multiply_group<10>, multiply_group<11>, multiply_group<12>};

void multiply(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const TokenGroups groups{tokens, kTokenGroup};
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t begin = groups.begin(g), count = groups.size(g);
    kGroup[count](weights, packed_group(const_cast<uint8_t*>(packed), slots, begin, count), slots,
                  sums + begin * kTileRows);
  }
}

void add_outliers(const RowOutliers& outliers, const float* x, int64_t count, float* sums) {
  add_outliers_loop(outliers, x, count, sums);
}

}  // namespace

const DecodeKernels kDecodeInt8Avx512 = {
    kTokenGroup, 1, BiasedByte::kPlanes, 8, true, true, packed_bytes, pack, split_any_quads<BiasedByte>,
    decode_any_quads<BiasedByte>, nullptr, multiply, add_outliers, nullptr, nullptr};

}  // namespace pyllmq::cpu

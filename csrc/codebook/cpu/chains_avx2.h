// Tokens times decoded rows in integers, in chains over kFlushColumns columns. `static` because only files compiled for AVX2 may
// hold this code.
//
// A Dot says which instruction, as in chains_avx512.h; its `add` multiplies into the sum in place, kSteps times Dot::kColumns
// columns.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/decode.h"
#include "codebook/cpu/decode_int16.h"
#include "codebook/cpu/wide_avx2.h"
#include "runtime/instances.h"

namespace pyllmq::cpu {

// 6 tokens x 16 rows: 12 of 16 registers hold sums. Up to kFewTokens take both halves of the rows at once.
struct ChainShape {
  static constexpr int64_t kSteps = 1, kMostTokens = 6, kFewTokens = 3;
};

// Tokens x (16 * Halves) rows in registers.
template <class Dot, int Tokens, int Halves>
static void multiply_group(const uint8_t* weights, const typename Dot::Group& group, int64_t slots, float* sums) {
  constexpr int vectors = 2 * Halves;
  constexpr int64_t half_bytes = kDecodedColumns / Dot::kColumns * 64;
  const int32_t* x = group.x;
  for (int64_t chains = 0; slots > 0; slots -= kFlushColumns, chains += Tokens) {
    asm volatile("" ::: "memory");  // else gcc 12 carries the fp32 sums from chain to chain on the stack
    __m256i sum[Tokens][vectors];
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[t][v] = Dot::start(group, chains + t);
    for (int64_t chain = slots < kFlushColumns ? slots : kFlushColumns; chain > 0;
         chain -= Dot::kSteps * Dot::kColumns, weights += Dot::kSteps * 64, x += Dot::kSteps * Tokens) {
      const auto rows_of = [&](int v) { return weights + v / 2 * half_bytes + v % 2 * 32; };
      __m256i w[vectors], next[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        w[v] = load_32(rows_of(v));
        if constexpr (Dot::kSteps == 2) next[v] = load_32(rows_of(v) + 64);
      }
#pragma GCC unroll 6
      for (int t = 0; t < Tokens; ++t) {
        const __m256i x_t = _mm256_set1_epi32(x[t]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          if constexpr (Dot::kSteps == 2)
            Dot::add(sum[t][v], w[v], x_t, next[v], _mm256_set1_epi32(x[Tokens + t]));
          else
            Dot::add(sum[t][v], w[v], x_t);
        }
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        float* to = sums + t * kTileRows + v * 8;
        const __m256 total = _mm256_cvtepi32_ps(sum[t][v]);
        _mm256_storeu_ps(to, _mm256_fmadd_ps(total, _mm256_broadcast_ss(group.units + chains + t), _mm256_loadu_ps(to)));
      }
  }
}

template <class Dot>
constexpr auto kBoth = instances<1, Dot::kFewTokens>([]<int Tokens>() { return multiply_group<Dot, Tokens, 2>; });
template <class Dot>
constexpr auto kHalf =
    instances<Dot::kFewTokens + 1, Dot::kMostTokens>([]<int Tokens>() { return multiply_group<Dot, Tokens, 1>; });

template <class Dot>
static void multiply_chains(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const TokenGroups groups{tokens, Dot::kMostTokens};
  for (int half = 0; half < 2; ++half)
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t begin = groups.begin(g), count = groups.size(g);
      const auto group = Dot::group(packed, slots, begin, count);
      float* group_sums = sums + begin * kTileRows;
      if (count > Dot::kFewTokens)
        kHalf<Dot>[count](weights + half* kDecodedColumns / Dot::kColumns* 64, group, slots, group_sums + half* kHalfRows);
      else if (half == 0)
        kBoth<Dot>[count](weights, group, slots, group_sums);
    }
}

}  // namespace pyllmq::cpu

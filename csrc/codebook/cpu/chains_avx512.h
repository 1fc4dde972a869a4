// Tokens times 32 decoded rows in integers, in chains over kFlushColumns columns: 12 tokens in 24 registers. `static` because
// only files compiled for AVX-512 may hold this code.
//
// A Dot says which instruction: kColumns of a row in a dword lane; `group` finds the packed x of some tokens, of which x [dword,
// token] and units [chain, token] are read here; a chain's sum begins at `start` of its place in [chain, token], and `add`
// multiplies.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/fours_avx512.h"
#include "codebook/cpu/decode.h"
#include "codebook/cpu/decode_int16.h"
#include "runtime/instances.h"

namespace pyllmq::cpu {

static constexpr int64_t kChainTokens = 12;

template <class Dot, int Tokens>
static void multiply_group(const uint8_t* weights, const typename Dot::Group& group, int64_t slots, float* sums) {
  constexpr int64_t half_bytes = kDecodedColumns / Dot::kColumns * 64;
  const int32_t* x = group.x;
  for (int64_t chains = 0; slots > 0; slots -= kFlushColumns, chains += Tokens) {
    asm volatile("" ::: "memory");  // else gcc 12 carries the fp32 sums from chain to chain on the stack
    __m512i sum[Tokens][2];
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) sum[t][0] = sum[t][1] = Dot::start(group, chains + t);
    // (std::min would take the address of `slots`, and gcc 12 then keeps all sums on the stack.)
    for (int64_t chain = slots < kFlushColumns ? slots : kFlushColumns; chain > 0;
         chain -= Dot::kColumns, weights += 64, x += Tokens) {
      const __m512i w0 = load_64(weights), w1 = load_64(weights + half_bytes);
#pragma GCC unroll 12
      for (int t = 0; t < Tokens; ++t) {
        const __m512i x_t = _mm512_set1_epi32(x[t]);
        sum[t][0] = Dot::add(sum[t][0], w0, x_t);
        sum[t][1] = Dot::add(sum[t][1], w1, x_t);
        asm("" : "+v"(sum[t][0]), "+v"(sum[t][1]));  // stay in their registers (gcc 12 spills and copies them)
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = sums + t * kTileRows + half * kHalfRows;
        const __m512 total = _mm512_cvtepi32_ps(sum[t][half]);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(total, _mm512_set1_ps(group.units[chains + t]), _mm512_loadu_ps(to)));
      }
  }
}

template <class Dot>
constexpr auto kGroup = instances<1, kChainTokens>([]<int Tokens>() { return multiply_group<Dot, Tokens>; });

template <class Dot>
static void multiply_chains(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const TokenGroups groups{tokens, kChainTokens};
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t begin = groups.begin(g), count = groups.size(g);
    kGroup<Dot>[count](weights, Dot::group(packed, slots, begin, count), slots, sums + begin* kTileRows);
  }
}

}  // namespace pyllmq::cpu

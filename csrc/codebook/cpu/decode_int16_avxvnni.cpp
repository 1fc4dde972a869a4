// vpdpwssd: a multiply-add of int16 pairs as one instruction, where AVX2 takes two.
#include <immintrin.h>

#include "codebook/cpu/chains_avx2.h"
#include "codebook/cpu/decode_int16.h"

namespace pyllmq::cpu {
namespace {

struct Int16Dot : Int16Pairs, ChainShape {
  static __m256i start(const Group&, int64_t) { return _mm256_setzero_si256(); }
  static void add(__m256i& sum, __m256i weights, __m256i x) {
    sum = _mm256_dpwssd_avx_epi32(sum, x, weights);
    asm("" : "+x"(sum));  // stays in its register (gcc 12 spills and copies)
  }
};

}  // namespace

void multiply_int16_avxvnni(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  multiply_chains<Int16Dot>(weights, packed, slots, tokens, sums);
}

}  // namespace pyllmq::cpu

#include "codebook/cpu/bytes_avx2.h"

namespace pyllmq::cpu {
namespace {

struct ByteDot : ByteQuads, ChainShape {
  static __m256i start(const Group& group, int64_t chain) { return _mm256_set1_epi32(group.starts[chain]); }
  static void add(__m256i& sum, __m256i weights, __m256i x) {
    sum = _mm256_dpbusd_avx_epi32(sum, weights, x);
    asm("" : "+x"(sum));  // stays in its register (gcc 12 spills and copies)
  }
};

}  // namespace

constinit const DecodeKernels kDecodeInt8AvxVnni = int8_kernels<ByteDot, kWholeBytes>();

}  // namespace pyllmq::cpu

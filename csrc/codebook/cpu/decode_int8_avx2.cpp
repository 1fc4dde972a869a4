#include "codebook/cpu/bytes_avx2.h"

namespace pyllmq::cpu {
namespace {

// 8 columns at once: the pairs of two quads are summed in 16 bits, at most 4 * 136 * 60, before one multiplication widens them.
// 4 tokens x 16 rows: 8 registers of sums, 4 of weights.
struct PairedByteDot : ByteQuads {
  static constexpr int64_t kSteps = 2, kMostTokens = 4, kFewTokens = 1;
  static __m256i start(const Group& group, int64_t chain) { return _mm256_set1_epi32(group.starts[chain]); }
  static void add(__m256i& sum, __m256i weights, __m256i x, __m256i next_weights, __m256i next_x) {
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(weights, x), _mm256_maddubs_epi16(next_weights, next_x));
    // In place, in a register, as in decode_int16_avx2.cpp.
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
};

}  // namespace

constinit const DecodeKernels kDecodeInt8Avx2 = int8_kernels<PairedByteDot, kPairedBytes>();

}  // namespace pyllmq::cpu

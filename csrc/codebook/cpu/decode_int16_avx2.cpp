#include <immintrin.h>

#include "codebook/cpu/chains_avx2.h"
#include "codebook/cpu/decode_int16.h"
#include "codebook/cpu/integers_avx2.h"
#include "runtime/instances.h"

namespace pyllmq::cpu {
namespace {

// --- decode --------------------------------------------------------------------------------------------------------

inline void store_pair(BytePlanes a, BytePlanes b, int16_t* weights) {
  const __m256i a0 = _mm256_unpacklo_epi8(a.low, a.high), a1 = _mm256_unpackhi_epi8(a.low, a.high);
  const __m256i b0 = _mm256_unpacklo_epi8(b.low, b.high), b1 = _mm256_unpackhi_epi8(b.low, b.high);
  auto* first = reinterpret_cast<__m256i*>(weights);
  auto* second = reinterpret_cast<__m256i*>(weights + kDecodedColumns * kHalfRows);
  _mm256_store_si256(first, _mm256_unpacklo_epi16(a0, b0));
  _mm256_store_si256(first + 1, _mm256_unpackhi_epi16(a0, b0));
  _mm256_store_si256(second, _mm256_unpacklo_epi16(a1, b1));
  _mm256_store_si256(second + 1, _mm256_unpackhi_epi16(a1, b1));
}

template <int Width>
void decode_columns(const uint8_t* codes, const uint8_t* split, int64_t slots, int16_t* weights) {
  decode_blocks<Width>(codes, split, slots, [&](const auto& column) {
#pragma GCC unroll 4
    for (int c = 0; c < kBlockColumns; c += 2, weights += 2 * kHalfRows) store_pair(column(c), column(c + 1), weights);
  });
}

constexpr auto kSplit = instances<1, 8>([]<int Width>() { return split_columns<Width, IntegerEntries{kLargestWeight, 0}>; });
constexpr auto kDecode = instances<1, 8>([]<int Width>() { return decode_columns<Width>; });

void split_any(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  kSplit[width](codebook, max_magnitude, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots, const float*,
                uint8_t* weights) {
  kDecode[width](tile_codes + slot / kBlockColumns * block_bytes(width), split, slots, reinterpret_cast<int16_t*>(weights));
}

// --- multiply ------------------------------------------------------------------------------------------------------

struct Int16Dot : Int16Pairs, ChainShape {
  static __m256i start(const Group&, int64_t) { return _mm256_setzero_si256(); }
  static void add(__m256i& sum, __m256i weights, __m256i x) {
    // In place, in a register: left to itself gcc 12 keeps half of the sums on the stack and copies the others.
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(x, weights)));
  }
};

constexpr DecodeKernels kernels(decltype(DecodeKernels::multiply) multiply) {
  return {.token_group = ChainShape::kMostTokens,
          .weight_bytes = 2,
          .relative = true,
          .packed_bytes = packed_int16_bytes,
          .pack = pack_int16,
          .split_codebook = split_any,
          .decode = decode_any,
          .multiply = multiply,
          .add_outliers = add_outliers_loop};
}

}  // namespace

constinit const DecodeKernels kDecodeInt16Avx2 = kernels(multiply_chains<Int16Dot>);
constinit const DecodeKernels kDecodeInt16AvxVnni = kernels(multiply_int16_avxvnni);

}  // namespace pyllmq::cpu

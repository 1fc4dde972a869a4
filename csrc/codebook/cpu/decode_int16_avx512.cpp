// vpdpwssd: 32 multiply-adds of int16 in one instruction, twice the fp32 rate.
#include <immintrin.h>

#include "codebook/cpu/chains_avx512.h"
#include "codebook/cpu/decode_int16.h"
#include "codebook/cpu/pairs_avx512.h"
#include "runtime/instances.h"

namespace pyllmq::cpu {
namespace {

// --- decode --------------------------------------------------------------------------------------------------------

template <int Width>
void quantize_block(const uint16_t* codebook, const float* max_magnitude, BlockEntries<Width>& block) {
  alignas(64) float factors[16] = {};
  for (int column = 0; column < kBlockColumns; ++column) factors[column] = to_int16(max_magnitude[column]);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int first = 0; first < kBlockColumns << Width; first += 16) {
    const __m512i column = _mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(first)), Width);
    const __m512 factor = _mm512_permutexvar_ps(column, _mm512_load_ps(factors));
    const __m512 values = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + first)));
    const __m512i entries = _mm512_cvtps_epi32(_mm512_mul_ps(values, factor));
    _mm256_store_si256(reinterpret_cast<__m256i*>(block.entries + first), _mm512_cvtepi32_epi16(entries));
  }
}

template <int Width>
void split_columns(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  BlockEntries<Width> block;
  for (; slots > 0; slots -= kBlockColumns, codebook += kBlockColumns << Width, max_magnitude += kBlockColumns,
                    split += kBlockColumns * split_bytes(Width)) {
    quantize_block<Width>(codebook, max_magnitude, block);
    split_pairs<Width>(block, split_bytes(Width), split);
  }
}

constexpr auto kSplit = instances<1, 8>([]<int Width>() { return split_columns<Width>; });
constexpr auto kDecode = instances<1, 8>([]<int Width>() { return decode_pairs<Width>; });

void split_any(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  kSplit[width](codebook, max_magnitude, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots, const float*,
                uint8_t* weights) {
  kDecode[width](tile_codes + slot / group_columns(width) * group_bytes(width), split, slots,
                 reinterpret_cast<uint16_t*>(weights));
}

// --- multiply ------------------------------------------------------------------------------------------------------

struct Int16Dot : Int16Pairs {
  static __m512i start(const Group&, int64_t) { return _mm512_setzero_si512(); }
  static __m512i add(__m512i sum, __m512i weights, __m512i x) { return _mm512_dpwssd_epi32(sum, x, weights); }
};

}  // namespace

const DecodeKernels kDecodeInt16Avx512 = {.token_group = kChainTokens,
                                          .weight_bytes = 2,
                                          .relative = true,
                                          .packed_bytes = packed_int16_bytes,
                                          .pack = pack_int16,
                                          .split_codebook = split_any,
                                          .decode = decode_any,
                                          .multiply = multiply_chains<Int16Dot>,
                                          .add_outliers = add_outliers_loop};

}  // namespace pyllmq::cpu

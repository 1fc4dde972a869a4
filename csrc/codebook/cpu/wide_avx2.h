// Codes of 5..8 bits, one byte each, to fp16 weights by byte shuffles: the codebook is cut into sub-tables of 16
// entries and two byte planes; a shuffle index whose high bit is set gives zero, so every sub-table answers only its
// own codes and the answers are joined by OR. 2^(bits-4) sub-tables cost 6 vector operations each for 32 codes.
// Rejected: vpgatherdps from an fp32 codebook: 0.42 ns per weight and core at 5 bits, 0.54 at 8, against 0.10 and 0.42.
// `static` because only files compiled for AVX2 may hold this code.
#pragma once
#include <immintrin.h>

#include "codebook/cpu/layout.h"

namespace pyllmq::cpu {

struct BytePlanes {  // of 32 numbers of 16 bits
  __m256i low, high;
};

static inline __m256i load_32(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
static inline __m256i broadcast16(const uint8_t* from) {  // to both lanes
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Low bytes of the 2^width entries at planes[0], high bytes at planes[2^width].
static inline void split_codebook(const uint16_t* codebook, int width, uint8_t* planes) {
  const int entries = 1 << width;
  const __m256i low_byte = _mm256_set1_epi16(255);
  for (int e = 0; e < entries; e += 32) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + e));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + e + 16));
    const __m256i low = _mm256_packus_epi16(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte));
    const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(planes + e), _mm256_permute4x64_epi64(low, 0xD8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(planes + entries + e), _mm256_permute4x64_epi64(high, 0xD8));
  }
}

template <int Width>
static inline BytePlanes decode_wide(__m256i codes, const uint8_t* planes) {
  constexpr int entries = 1 << Width;
  __m256i own = codes;  // code - first entry of the sub-table
  BytePlanes weights{_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 16
  for (int first = 0; first < entries; first += 16) {
    // Codes of this sub-table become 0x70..0x7F, all others (smaller ones have wrapped) 0x80 and above.
    const __m256i index = _mm256_adds_epu8(own, _mm256_set1_epi8(0x70));
    own = _mm256_sub_epi8(own, _mm256_set1_epi8(16));
    weights.low = _mm256_or_si256(weights.low, _mm256_shuffle_epi8(broadcast16(planes + first), index));
    weights.high = _mm256_or_si256(weights.high, _mm256_shuffle_epi8(broadcast16(planes + entries + first), index));
  }
  return weights;
}
template <int Width>
static inline BytePlanes decode_wide(const uint8_t* codes, const uint8_t* planes) {
  return decode_wide<Width>(load_32(codes), planes);
}

}  // namespace pyllmq::cpu

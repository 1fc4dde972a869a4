// fp16 codebook entries are looked up as two byte planes (two shuffles give 32 exact fp16 weights of a column), then
// 8 x 8 blocks are transposed in 16-bit lanes and widened: about one vector operation per weight.
#include <immintrin.h>

#include "cpu/codebook_dequantize.h"
#include "cpu/codebook_layout.h"
#include "cpu/codebook_wide_avx2.h"

namespace pyllmq::cpu {
namespace {

// values[column][row]: the fp16 weights of 8 columns of a tile.
using Block = uint16_t[kBlockColumns][kTileRows];

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

struct BytePlanes {  // entry i of a 16-entry table of fp16: low byte, high byte; the same in both lanes
  __m256i low, high;
};

// pick[i] = the place of the low byte of entry i among 8 fp16 numbers.
inline BytePlanes planes_of_8(const uint16_t* codebook, __m128i pick) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook));
  return {_mm256_broadcastsi128_si256(_mm_shuffle_epi8(entries, pick)),
          _mm256_broadcastsi128_si256(_mm_shuffle_epi8(entries, _mm_add_epi8(pick, _mm_set1_epi8(1))))};
}

inline BytePlanes planes_of_16(const uint16_t* codebook) {
  const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i both = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load(codebook), apart), 0xD8);
  return {_mm256_permute2x128_si256(both, both, 0x00), _mm256_permute2x128_si256(both, both, 0x11)};
}

inline void store_column(__m256i low, __m256i high, uint16_t* column) {
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);  // rows 0-7|16-23, 8-15|24-31
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(column), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(column + 16), _mm256_permute2x128_si256(a, b, 0x31));
}

inline void look_up(const BytePlanes& planes, __m256i index, uint16_t* column) {
  store_column(_mm256_shuffle_epi8(planes.low, index), _mm256_shuffle_epi8(planes.high, index), column);
}

inline __m256i nibble(__m256i bytes, int which) {
  return _mm256_and_si256(which ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

void decode_4bit(const uint8_t* codes, const uint16_t* codebook, Block values) {
  for (int c = 0; c < kBlockColumns; ++c)
    look_up(planes_of_16(codebook + 16 * c), nibble(load(codes + c / 2 * kTileRows), c % 2), values[c]);
}

void decode_3bit(const uint8_t* codes, const uint16_t* codebook, Block values) {
  const __m128i pick = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i a = load(codes), b = load(codes + kTileRows), c = load(codes + 2 * kTileRows);
  const __m256i spare =
      _mm256_or_si256(_mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(a, 3), _mm256_set1_epi8(0x11)),
                                      _mm256_and_si256(_mm256_srli_epi16(b, 2), _mm256_set1_epi8(0x22))),
                      _mm256_and_si256(_mm256_srli_epi16(c, 1), _mm256_set1_epi8(0x44)));
  const __m256i pairs[4] = {a, b, c, spare};
  for (int k = 0; k < kBlockColumns; ++k)
    look_up(planes_of_8(codebook + 8 * k, pick), nibble(pairs[k / 2], k % 2), values[k]);
}

void decode_2bit(const uint8_t* codes, const uint16_t* codebook, Block values) {
  const __m128i pick[2] = {_mm_setr_epi8(0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6, 0, 2, 4, 6),
                           _mm_setr_epi8(8, 8, 8, 8, 10, 10, 10, 10, 12, 12, 12, 12, 14, 14, 14, 14)};
  for (int c = 0; c < kBlockColumns; ++c)
    look_up(planes_of_8(codebook + c / 2 * 8, pick[c % 2]), nibble(load(codes + c / 4 * kTileRows), c / 2 % 2),
            values[c]);
}

void decode_1bit(const uint8_t* codes, const uint16_t* codebook, Block values) {
  const __m128i pick[4] = {_mm_setr_epi8(0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2),
                           _mm_setr_epi8(4, 4, 6, 6, 4, 4, 6, 6, 4, 4, 6, 6, 4, 4, 6, 6),
                           _mm_setr_epi8(8, 8, 8, 8, 10, 10, 10, 10, 8, 8, 8, 8, 10, 10, 10, 10),
                           _mm_setr_epi8(12, 12, 12, 12, 12, 12, 12, 12, 14, 14, 14, 14, 14, 14, 14, 14)};
  for (int c = 0; c < kBlockColumns; ++c)
    look_up(planes_of_8(codebook + c / 4 * 8, pick[c % 4]), nibble(load(codes), c / 4), values[c]);
}

template <int Width>
void decode_bytes(const uint8_t* codes, const uint16_t* codebook, Block values) {
  for (int c = 0; c < kBlockColumns; ++c) {
    alignas(32) uint8_t planes[2 << Width];
    split_codebook(codebook + (c << Width), Width, planes);
    const WideWeights bytes = decode_wide<Width>(codes + c * kTileRows, planes);
    store_column(bytes.low, bytes.high, values[c]);
  }
}

// Eight rows of eight fp16 columns.
inline void transpose(const Block values, int row, __m128i out[8]) {
  __m128i in[8], pairs[8], fours[8];
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) in[c] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values[c] + row));
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    pairs[c] = _mm_unpacklo_epi16(in[2 * c], in[2 * c + 1]);      // rows 0-3 of columns 2c, 2c+1
    pairs[c + 4] = _mm_unpackhi_epi16(in[2 * c], in[2 * c + 1]);  // rows 4-7
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {  // h: rows 0-3 or 4-7
    fours[4 * h] = _mm_unpacklo_epi32(pairs[4 * h], pairs[4 * h + 1]);
    fours[4 * h + 1] = _mm_unpackhi_epi32(pairs[4 * h], pairs[4 * h + 1]);
    fours[4 * h + 2] = _mm_unpacklo_epi32(pairs[4 * h + 2], pairs[4 * h + 3]);
    fours[4 * h + 3] = _mm_unpackhi_epi32(pairs[4 * h + 2], pairs[4 * h + 3]);
    out[4 * h] = _mm_unpacklo_epi64(fours[4 * h], fours[4 * h + 2]);
    out[4 * h + 1] = _mm_unpackhi_epi64(fours[4 * h], fours[4 * h + 2]);
    out[4 * h + 2] = _mm_unpacklo_epi64(fours[4 * h + 1], fours[4 * h + 3]);
    out[4 * h + 3] = _mm_unpackhi_epi64(fours[4 * h + 1], fours[4 * h + 3]);
  }
}

void block(const uint8_t* block_codes, int width, const uint16_t* codebook, const float* row_scale, float* out,
           int64_t out_stride) {
  alignas(64) Block values;
  switch (width) {
    case 1: decode_1bit(block_codes, codebook, values); break;
    case 2: decode_2bit(block_codes, codebook, values); break;
    case 3: decode_3bit(block_codes, codebook, values); break;
    case 4: decode_4bit(block_codes, codebook, values); break;
    case 5: decode_bytes<5>(block_codes, codebook, values); break;
    case 6: decode_bytes<6>(block_codes, codebook, values); break;
    case 7: decode_bytes<7>(block_codes, codebook, values); break;
    default: decode_bytes<8>(block_codes, codebook, values);
  }
  for (int row = 0; row < kTileRows; row += 8) {
    __m128i rows[8];
    transpose(values, row, rows);
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      const __m256 value = _mm256_cvtph_ps(rows[r]);
      const __m256 scaled = row_scale ? _mm256_mul_ps(value, _mm256_broadcast_ss(row_scale + row + r)) : value;
      _mm256_storeu_ps(out + (row + r) * out_stride, scaled);
    }
  }
}

}  // namespace

const DequantizeKernels kDequantizeAvx2 = {block};

}  // namespace pyllmq::cpu

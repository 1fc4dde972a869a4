// fp16 codebook entries are looked up as two byte planes (two shuffles give 32 exact fp16 weights of a column), then
// 8 x 8 blocks are transposed in 16-bit lanes and widened: about one vector operation per weight.
#include <immintrin.h>

#include "codebook/cpu/dequantize.h"
#include "codebook/cpu/layout.h"
#include "codebook/cpu/nibble_avx2.h"
#include "codebook/cpu/wide_avx2.h"

namespace pyllmq::cpu {
namespace {

// values[column][row]: the fp16 weights of 8 columns of a tile.
using Block = uint16_t[kBlockColumns][kTileRows];

inline void store_column(__m256i low, __m256i high, uint16_t* column) {
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);  // rows 0-7|16-23, 8-15|24-31
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(column), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(column + 16), _mm256_permute2x128_si256(a, b, 0x31));
}

template <int Width>
void decode_nibbles(const uint8_t* codes, const uint16_t* codebook, Block values) {
  __m256i steps[4];
  load_steps<Width>(codes, steps);
#pragma GCC unroll 8
  for (int c = 0; c < kBlockColumns; ++c) {
    const BytePlanes planes = column_planes<Width>(codebook, c);
    const __m256i index = column_nibbles<Width>(steps, c);
    store_column(_mm256_shuffle_epi8(planes.low, index), _mm256_shuffle_epi8(planes.high, index), values[c]);
  }
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

void block(const uint8_t* tile_codes, StepOrder, int64_t slot, int width, const uint16_t* codebook,
           const float* row_scale, float* out, int64_t out_stride) {
  const uint8_t* block_codes = tile_codes + slot / kBlockColumns * block_bytes(width);
  alignas(64) Block values;
  switch (width) {
    case 1: decode_nibbles<1>(block_codes, codebook, values); break;
    case 2: decode_nibbles<2>(block_codes, codebook, values); break;
    case 3: decode_nibbles<3>(block_codes, codebook, values); break;
    case 4: decode_nibbles<4>(block_codes, codebook, values); break;
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

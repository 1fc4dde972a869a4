#include <immintrin.h>

#include "codebook/cpu/decode_int16.h"
#include "codebook/cpu/nibble_avx2.h"
#include "codebook/cpu/wide_avx2.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

// --- decode --------------------------------------------------------------------------------------------------------

// The codebook of 8 columns.
template <int Width>
void quantize_block(const uint16_t* codebook, const float* max_magnitude, uint16_t* entries) {
  alignas(32) float factors[kBlockColumns];
  for (int column = 0; column < kBlockColumns; ++column) factors[column] = to_int16(max_magnitude[column]);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto eight = [&](int first) {
    const __m256i column = _mm256_srli_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(first)), Width);
    const __m256 factor = _mm256_permutevar8x32_ps(_mm256_load_ps(factors), column);
    const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook + first)));
    return _mm256_cvtps_epi32(_mm256_mul_ps(values, factor));
  };
  for (int first = 0; first < kBlockColumns << Width; first += 16) {
    const __m256i both = _mm256_packs_epi32(eight(first), eight(first + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(entries + first), _mm256_permute4x64_epi64(both, 0xD8));
  }
}

template <int Width>
void split_columns(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  uint16_t entries[kBlockColumns << Width];
  for (; slots > 0; slots -= kBlockColumns, codebook += kBlockColumns << Width, max_magnitude += kBlockColumns) {
    quantize_block<Width>(codebook, max_magnitude, entries);
    for (int column = 0; column < kBlockColumns; ++column, split += split_bytes(Width)) {
      if constexpr (Width >= 5) {
        split_codebook(entries + (column << Width), Width, split);
      } else {
        const BytePlanes planes = column_planes<Width>(entries, column);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(split), _mm256_permute2x128_si256(planes.low, planes.high, 0x20));
      }
    }
  }
}

// Codes in the order in which the unpacks below put the rows 0..7, 8..15, 16..23 and 24..31 side by side: one permute
// of 32 codes in place of four of weights.
inline __m256i in_unpack_order(__m256i codes) {
  return _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

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
  for (; slots > 0; slots -= kBlockColumns, codes += block_bytes(Width), split += kBlockColumns * split_bytes(Width)) {
    for (int64_t line = 0; line < block_bytes(Width); line += 64) prefetch(codes + line, kDecoded);
    __m256i steps[4];
    if constexpr (Width <= 4) {
      load_steps<Width>(codes, steps);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        if (Width >= 3 || i < Width) steps[i] = in_unpack_order(steps[i]);
    }
    const auto column = [&](int c) -> BytePlanes {
      const uint8_t* own = split + c * split_bytes(Width);
      if constexpr (Width >= 5) {
        return decode_wide<Width>(in_unpack_order(load_32(codes + c * kTileRows)), own);
      } else {
        const __m256i index = column_nibbles<Width>(steps, c);
        return {_mm256_shuffle_epi8(broadcast16(own), index), _mm256_shuffle_epi8(broadcast16(own + 16), index)};
      }
    };
#pragma GCC unroll 4
    for (int c = 0; c < kBlockColumns; c += 2, weights += 2 * kHalfRows) store_pair(column(c), column(c + 1), weights);
  }
}

constexpr auto kSplit = instances<1, 8>([]<int Width>() { return split_columns<Width>; });
constexpr auto kDecode = instances<1, 8>([]<int Width>() { return decode_columns<Width>; });

void split_any(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  kSplit[width](codebook, max_magnitude, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots, const float*,
                uint8_t* weights) {
  kDecode[width](tile_codes + slot / kBlockColumns * block_bytes(width), split, slots, reinterpret_cast<int16_t*>(weights));
}

// --- multiply ------------------------------------------------------------------------------------------------------

// In place, in a register: left to itself gcc 12 keeps half of the sums on the stack and copies the others.
inline void add_in_place(__m256i& sum, __m256i value) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(value)); }

// Tokens x (16 * Halves) rows in registers.
template <int Tokens, int Halves>
void multiply_group(const int16_t* weights, const PackedGroup& group, int64_t slots, float* sums) {
  constexpr int vectors = 2 * Halves;
  const int32_t* x = group.x;
  const float* units = group.units;
  for (; slots > 0; slots -= kFlushColumns, units += Tokens) {
    asm volatile("" ::: "memory");  // else gcc 12 carries the fp32 sums from chain to chain on the stack
    __m256i sum[Tokens][vectors];
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[t][v] = _mm256_setzero_si256();
    for (int64_t chain = slots < kFlushColumns ? slots : kFlushColumns; chain > 0;
         chain -= 2, weights += 2 * kHalfRows, x += Tokens) {
      __m256i w[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) w[v] = load_32(weights + v / 2 * kDecodedColumns * kHalfRows + v % 2 * 16);
#pragma GCC unroll 6
      for (int t = 0; t < Tokens; ++t) {
        const __m256i x_t = _mm256_set1_epi32(x[t]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) add_in_place(sum[t][v], _mm256_madd_epi16(x_t, w[v]));
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        float* to = sums + t * kTileRows + v * 8;
        const __m256 total = _mm256_cvtepi32_ps(sum[t][v]);
        _mm256_storeu_ps(to, _mm256_fmadd_ps(total, _mm256_broadcast_ss(units + t), _mm256_loadu_ps(to)));
      }
  }
}

constexpr int64_t kTokenGroup = 6;  // 6 tokens x 16 rows: 12 of 16 registers hold sums
constexpr int64_t kFewTokens = 3;
constexpr auto kBoth = instances<1, kFewTokens>([]<int Tokens>() { return multiply_group<Tokens, 2>; });
constexpr auto kHalf = instances<kFewTokens + 1, kTokenGroup>([]<int Tokens>() { return multiply_group<Tokens, 1>; });

void multiply(const uint8_t* from, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const auto* weights = reinterpret_cast<const int16_t*>(from);
  const TokenGroups groups{tokens, kTokenGroup};
  for (int half = 0; half < 2; ++half)
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t begin = groups.begin(g), count = groups.size(g);
      const PackedGroup group = packed_group(packed, slots, begin, count);
      float* group_sums = sums + begin * kTileRows;
      if (count > kFewTokens)
        kHalf[count](weights + half * kDecodedColumns * kHalfRows, group, slots, group_sums + half * kHalfRows);
      else if (half == 0)
        kBoth[count](weights, group, slots, group_sums);
    }
}

}  // namespace

const DecodeKernels kDecodeInt16Avx2 = {.token_group = kTokenGroup,
                                        .weight_bytes = 2,
                                        .relative = true,
                                        .packed_bytes = packed_int16_bytes,
                                        .pack = pack_int16,
                                        .split_codebook = split_any,
                                        .decode = decode_any,
                                        .multiply = multiply,
                                        .add_outliers = add_outliers_loop};

}  // namespace pyllmq::cpu

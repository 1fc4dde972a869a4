#include <immintrin.h>

#include <cstring>

#include "codebook/cpu/layout.h"
#include "codebook/cpu/linear.h"
#include "codebook/cpu/planes_avx2.h"
#include "codebook/cpu/wide_avx2.h"
#include "codebook/cpu/wide_columns.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"
#include "runtime/simd.h"

namespace pyllmq::cpu {
namespace {

inline __m256 load_fp16(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }

// --- tables --------------------------------------------------------------------------------------------------------

template <int ColumnsPerLookup>
inline __m256 lookup_bounds(const float* x, const float* max_magnitude) {  // of 8 lookups, in any order
  if constexpr (ColumnsPerLookup == 1) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    return _mm256_and_ps(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(max_magnitude)), magnitude);
  } else {
    constexpr int half = ColumnsPerLookup / 2, next = 4 * ColumnsPerLookup;
    return _mm256_hadd_ps(lookup_bounds<half>(x, max_magnitude), lookup_bounds<half>(x + next, max_magnitude + next));
  }
}

template <int ColumnsPerLookup>
float largest_bound(const float* x, const float* max_magnitude, int64_t lookups) {
  __m256i largest = _mm256_setzero_si256();  // as integers, magnitudes order like floats and NaN comes out on top
  for (; lookups >= 8; lookups -= 8, x += 8 * ColumnsPerLookup, max_magnitude += 8 * ColumnsPerLookup)
    largest = _mm256_max_epu32(largest, _mm256_castps_si256(lookup_bounds<ColumnsPerLookup>(x, max_magnitude)));
  if (lookups > 0) {
    alignas(32) float last_x[8 * ColumnsPerLookup] = {}, last_magnitude[8 * ColumnsPerLookup] = {};
    std::memcpy(last_x, x, lookups * ColumnsPerLookup * sizeof(float));
    std::memcpy(last_magnitude, max_magnitude, lookups * ColumnsPerLookup * sizeof(float));
    largest = _mm256_max_epu32(largest, _mm256_castps_si256(lookup_bounds<ColumnsPerLookup>(last_x, last_magnitude)));
  }
  return bits_float(largest_lane(largest) & 0x7FFFFFFFu);
}

float panel_bound(const float* x, const float* max_magnitude, int64_t lookups, int columns_per_lookup) {
  if (columns_per_lookup == 1) return largest_bound<1>(x, max_magnitude, lookups);
  if (columns_per_lookup == 2) return largest_bound<2>(x, max_magnitude, lookups);
  return largest_bound<4>(x, max_magnitude, lookups);
}

template <TableKind Kind>
inline void store_table(__m256 entries_0_7, __m256 entries_8_15, uint8_t* table) {
  const PlanePairs planes = gather_planes<Kind>(entries_0_7, entries_8_15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(table), planes.low);
  if constexpr (table_planes(Kind) == 4) _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + 32), planes.high);
  if constexpr (table_planes(Kind) == 3)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(table + 32), _mm256_castsi256_si128(planes.high));
}

template <TableKind Kind>
void build(int width, StepOrder, const uint16_t* codebook, const float* x, int64_t lookups, uint8_t* tables) {
  constexpr int stride = table_planes(Kind) * kTableEntries;
  if (width == 4) {
    for (int64_t l = 0; l < lookups; ++l, codebook += 16, tables += stride) {
      const __m256 x0 = _mm256_broadcast_ss(x + l);
      store_table<Kind>(_mm256_mul_ps(x0, load_fp16(codebook)), _mm256_mul_ps(x0, load_fp16(codebook + 8)), tables);
    }
  } else if (width == 3) {  // entry 8 + c = entry c: the fourth bit of a nibble belongs to another column
    for (int64_t l = 0; l < lookups; ++l, codebook += 8, tables += stride) {
      const __m256 products = _mm256_mul_ps(_mm256_broadcast_ss(x + l), load_fp16(codebook));
      store_table<Kind>(products, products, tables);
    }
  } else if (width == 2) {
    const __m256i second_low = _mm256_setr_epi32(4, 4, 4, 4, 5, 5, 5, 5);
    const __m256i second_high = _mm256_setr_epi32(6, 6, 6, 6, 7, 7, 7, 7);
    for (int64_t l = 0; l < lookups; ++l, codebook += 8, tables += stride) {
      const __m256 both = load_fp16(codebook);
      const __m256 x1 = _mm256_broadcast_ss(x + 2 * l + 1);
      const __m256 first = _mm256_mul_ps(_mm256_broadcast_ss(x + 2 * l), _mm256_permute2f128_ps(both, both, 0));
      store_table<Kind>(_mm256_add_ps(first, _mm256_mul_ps(x1, _mm256_permutevar8x32_ps(both, second_low))),
                        _mm256_add_ps(first, _mm256_mul_ps(x1, _mm256_permutevar8x32_ps(both, second_high))), tables);
    }
  } else {
    const __m256i bit0 = _mm256_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1), bit1 = _mm256_setr_epi32(2, 2, 3, 3, 2, 2, 3, 3);
    const __m256i bit2 = _mm256_setr_epi32(4, 4, 4, 4, 5, 5, 5, 5);
    const __m256i bit3_low = _mm256_set1_epi32(6), bit3_high = _mm256_set1_epi32(7);
    for (int64_t l = 0; l < lookups; ++l, codebook += 8, tables += stride, x += 4) {
      const __m256 all = load_fp16(codebook);
      const auto product = [&](int column, __m256i pick) {
        return _mm256_mul_ps(_mm256_broadcast_ss(x + column), _mm256_permutevar8x32_ps(all, pick));
      };
      const __m256 low = _mm256_add_ps(product(0, bit0), product(1, bit1));
      const __m256 third = product(2, bit2);
      store_table<Kind>(_mm256_add_ps(low, _mm256_add_ps(third, product(3, bit3_low))),
                        _mm256_add_ps(low, _mm256_add_ps(third, product(3, bit3_high))), tables);
    }
  }
}

// --- lookups -------------------------------------------------------------------------------------------------------

// The sums of 32 rows for one token.
template <TableKind Kind>
struct Accumulators : PlaneSums<Kind> {
  using PlaneSums<Kind>::kPlanes;

  // Two lookups whose tables lie side by side.
  inline __attribute__((always_inline)) void add(__m256i index_a, __m256i index_b, const uint8_t* tables) {
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const __m256i a = _mm256_shuffle_epi8(broadcast16(tables + p * kTableEntries), index_a);
      const __m256i b = _mm256_shuffle_epi8(broadcast16(tables + (kPlanes + p) * kTableEntries), index_b);
      this->add_two(p, a, b);
    }
  }

  inline __attribute__((always_inline)) void flush(int64_t lookups, float unit, float* y) {
    // Rows in memory order per plane: bytes 2i are in `even`, bytes 2i+1 in `odd`; [0]: rows 0-7|16-23, [1]:
    // 8-15|24-31.
    __m256i sums[kPlanes][2];
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const __m256i e = this->even_sums(p);
      sums[p][0] = _mm256_unpacklo_epi16(e, this->odd[p]);
      sums[p][1] = _mm256_unpackhi_epi16(e, this->odd[p]);
    }
    const __m256i zero = _mm256_setzero_si256();
    __m256 part[4];  // rows 0-3|16-19, 4-7|20-23, 8-11|24-27, 12-15|28-31
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      part[i] = join_planes<Kind>(
          [&](int p) {
            return i % 2 ? _mm256_unpackhi_epi16(sums[p][i / 2], zero) : _mm256_unpacklo_epi16(sums[p][i / 2], zero);
          },
          lookups, unit);
    const auto add_rows = [y](int row, __m256 value) {
      _mm256_storeu_ps(y + row, _mm256_add_ps(_mm256_loadu_ps(y + row), value));
    };
    add_rows(0, _mm256_permute2f128_ps(part[0], part[1], 0x20));
    add_rows(8, _mm256_permute2f128_ps(part[2], part[3], 0x20));
    add_rows(16, _mm256_permute2f128_ps(part[0], part[1], 0x31));
    add_rows(24, _mm256_permute2f128_ps(part[2], part[3], 0x31));
  }
};

template <TableKind Kind, int Tokens>
void nibbles_of_tokens(const LookupWork& work, const TokenTables* tokens) {
  const __m256i low_nibble = _mm256_set1_epi8(15);
  const int64_t tile_bytes = work.lookups / 2 * kTileRows;
  const uint8_t* codes = work.codes;
  for (int64_t tile = 0; tile < work.tiles; ++tile) {
    Accumulators<Kind> sums[Tokens];
    const uint8_t* table[Tokens];
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t) {
      sums[t].clear();
      table[t] = tokens[t].tables;
    }
    const uint8_t* ahead = work.ahead_of(tile, tile_bytes);
    const auto add_step = [&]() __attribute__((always_inline)) {
      const __m256i pair = load_32(codes);
      const __m256i a = _mm256_and_si256(pair, low_nibble);
      const __m256i b = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low_nibble);
#pragma GCC unroll 2
      for (int t = 0; t < Tokens; ++t) {
        sums[t].add(a, b, table[t]);
        table[t] += 2 * table_planes(Kind) * kTableEntries;
      }
      codes += kTileRows;
    };
    int64_t steps = work.lookups / 2;
    for (; steps >= 2; steps -= 2, ahead += 2 * kTileRows) {
      __builtin_prefetch(ahead, 0, 3);
      add_step();
      add_step();
    }
    if (steps > 0) add_step();
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t) sums[t].flush(work.lookups, tokens[t].unit, tokens[t].y + tile * kTileRows);
  }
}

template <TableKind Kind, int Tokens>
void lookups_3bit_of_tokens(const LookupWork& work, const TokenTables* tokens) {
  const __m256i low_nibble = _mm256_set1_epi8(15);
  constexpr int pair_stride = 2 * table_planes(Kind) * kTableEntries;
  const int64_t tile_bytes = work.lookups / kBlockColumns * block_bytes(3);
  const uint8_t* codes = work.codes;
  for (int64_t tile = 0; tile < work.tiles; ++tile) {
    Accumulators<Kind> sums[Tokens];
    const uint8_t* table[Tokens];
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t) {
      sums[t].clear();
      table[t] = tokens[t].tables;
    }
    const uint8_t* ahead = work.ahead_of(tile, tile_bytes);
    for (int64_t block = work.lookups / kBlockColumns; block > 0; --block, codes += block_bytes(3), ahead += block_bytes(3)) {
      __builtin_prefetch(ahead, 0, 3);
      __builtin_prefetch(ahead + 64, 0, 3);
      const __m256i a = load_32(codes), b = load_32(codes + 32), c = load_32(codes + 64);
      const __m256i spare_a = _mm256_and_si256(_mm256_srli_epi16(a, 3), _mm256_set1_epi8(0x11));
      const __m256i spare_b = _mm256_and_si256(_mm256_srli_epi16(b, 2), _mm256_set1_epi8(0x22));
      const __m256i spare_c = _mm256_and_si256(_mm256_srli_epi16(c, 1), _mm256_set1_epi8(0x44));
      const __m256i pairs[4] = {a, b, c, _mm256_or_si256(_mm256_or_si256(spare_a, spare_b), spare_c)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i low = _mm256_and_si256(pairs[i], low_nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(pairs[i], 4), low_nibble);
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t) {
          sums[t].add(low, high, table[t]);
          table[t] += pair_stride;
        }
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t) sums[t].flush(work.lookups, tokens[t].unit, tokens[t].y + tile * kTileRows);
  }
}

// Two tokens of two planes keep 8 of the 16 registers as sums; four planes of one token do so alone.
template <TableKind Kind>
constexpr int kTokensAtOnce = table_planes(Kind) == 2 ? 2 : 1;
template <TableKind Kind>
constexpr auto kNibbles = instances<1, kTokensAtOnce<Kind>>([]<int Tokens>() { return nibbles_of_tokens<Kind, Tokens>; });
template <TableKind Kind>
constexpr auto kLookups3Bit =
    instances<1, kTokensAtOnce<Kind>>([]<int Tokens>() { return lookups_3bit_of_tokens<Kind, Tokens>; });

template <TableKind Kind>
constexpr TableKernels table_kernels() {
  return {build<Kind>, [](const LookupWork& work) { run_in_groups(kNibbles<Kind>, work); },
          [](const LookupWork& work) { run_in_groups(kLookups3Bit<Kind>, work); }};
}

// --- widths 5..8 ---------------------------------------------------------------------------------------------------

// 32 weights of one column, rows in order.
template <int Width>
inline void decode_column(const uint8_t* codes, const uint8_t* planes, float* weights) {
  const BytePlanes bytes = decode_wide<Width>(codes, planes);
  const __m256i a = _mm256_unpacklo_epi8(bytes.low, bytes.high);  // rows 0-7|16-23
  const __m256i b = _mm256_unpackhi_epi8(bytes.low, bytes.high);  // rows 8-15|24-31
  _mm256_store_ps(weights, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
  _mm256_store_ps(weights + 8, _mm256_cvtph_ps(_mm256_castsi256_si128(b)));
  _mm256_store_ps(weights + 16, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
  _mm256_store_ps(weights + 24, _mm256_cvtph_ps(_mm256_extracti128_si256(b, 1)));
}

template <int Width>
void decode_multiply(const uint8_t* codes, StepOrder, int64_t tiles, int64_t tile_bytes, int64_t columns,
                     const uint16_t* codebook, const float* x, int64_t tokens, float* y, int64_t y_stride) {
  alignas(64) uint8_t planes[kBytePanelColumns][2 << Width];
  for (int64_t k = 0; k < columns; ++k) split_codebook(codebook + (k << Width), Width, planes[k]);
  multiply_wide<Twice<Avx2>>(codes, tiles, tile_bytes, columns, x, tokens, y, y_stride,
                             [&](const uint8_t* tile, int64_t k, float* weights) {
                               const uint8_t* column = tile + k * kTileRows;
                               if (k % 2 == 0) prefetch(column, kLookupsAvx2);
                               decode_column<Width>(column, planes[k], weights);
                             });
}

// --- dtypes --------------------------------------------------------------------------------------------------------

void copy_to_fp32(const void* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }
void copy_from_fp32(const float* from, void* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

void fp16_row_to_fp32(const void* from, float* to, int64_t count) {
  const auto* half = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, load_fp16(half + i));
  for (; i < count; ++i) to[i] = fp16_to_fp32(half[i]);
}

void bf16_row_to_fp32(const void* from, float* to, int64_t count) {
  const auto* half = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
    _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  }
  for (; i < count; ++i) to[i] = bf16_to_fp32(half[i]);
}

void fp32_row_to_fp16(const float* from, void* to, int64_t count) {
  auto* half = static_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) half[i] = fp32_to_fp16(from[i]);
}

void fp32_row_to_bf16(const float* from, void* to, int64_t count) {
  auto* half = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; ++i) half[i] = fp32_to_bf16(from[i]);  // the compiler vectorises this
}

void transpose(const float* columns, int64_t count, float* rows, int64_t stride) {
  for (int64_t c = 0; c < count; c += 8)
    for (int row = 0; row < kTileRows / 2; row += 8) {
      __m256 square[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) square[i] = _mm256_loadu_ps(columns + (c + i) * (kTileRows / 2) + row);
      Avx2::transpose(square);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(rows + (row + i) * stride + c, square[i]);
    }
}

}  // namespace

const LinearKernels kLinearAvx2 = {
    {table_kernels<TableKind::bits28>(), table_kernels<TableKind::bits21>(), table_kernels<TableKind::bits16>(),
     table_kernels<TableKind::bits14>()},
    {decode_multiply<5>, decode_multiply<6>, decode_multiply<7>, decode_multiply<8>},
};

const RowKernels kRowAvx2 = {
    panel_bound,
    {copy_to_fp32, bf16_row_to_fp32, fp16_row_to_fp32},
    {copy_from_fp32, fp32_row_to_bf16, fp32_row_to_fp16},
    transpose,
};

}  // namespace pyllmq::cpu

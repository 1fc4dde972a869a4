// Lookups for layouts in fours: a register of 64 bytes holds 4 steps of 16 rows, a register of tables the tables of four
// lookups, so one vpermb looks up 4 columns of 16 rows and one vpdpbusd adds the four bytes of a row to its 32-bit sum:
// 2 operations per 64 lookups and plane, where byte shuffles and 16-bit sums take 8 (AVX2: 16 of half the size). Sums of
// 32 bits also make planes of 8 bits as cheap as planes of 7.
#include <immintrin.h>

#include "codebook/cpu/layout.h"
#include "codebook/cpu/linear.h"
#include "codebook/cpu/wide_columns.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kGroupBytes = 4 * kTileRows;  // 4 steps of 32 rows
constexpr int64_t kTableGroup = 4 * kTableEntries;

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }
inline __m512 load_fp16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512 load_8_fp16(const uint16_t* from) {  // twice
  const __m256 entries = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm512_broadcast_f32x8(entries);
}

// --- tables --------------------------------------------------------------------------------------------------------

// The 16 partial products of a lookup.
template <int Width>
inline __m512 partial_products(const uint16_t* codebook, const float* x) {
  const auto product = [&](int column, __m512 entries) { return _mm512_mul_ps(_mm512_set1_ps(x[column]), entries); };
  if constexpr (Width == 4) return product(0, load_fp16(codebook));
  const __m512 entries = load_8_fp16(codebook);
  if constexpr (Width == 3) return product(0, entries);  // entry 8 + c = entry c: that bit belongs to another column
  const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Entry `first` + the `bits` bits of the index from `bit` on.
  const auto pick = [&](int first, int bit, int bits) {
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(index, bit), _mm512_set1_epi32((1 << bits) - 1));
    return _mm512_permutexvar_ps(_mm512_add_epi32(code, _mm512_set1_epi32(first)), entries);
  };
  if constexpr (Width == 2) return _mm512_add_ps(product(0, pick(0, 0, 2)), product(1, pick(4, 2, 2)));
  return _mm512_add_ps(_mm512_add_ps(product(0, pick(0, 0, 1)), product(1, pick(2, 1, 1))),
                       _mm512_add_ps(product(2, pick(4, 2, 1)), product(3, pick(6, 3, 1))));
}

// Where plane 0 of a lookup's table is; plane p is kTableGroup * p further. Tables that one vpermb needs lie together.
template <int Width>
inline int64_t table_place(int64_t lookup, int planes) {
  const int64_t half = lookup % 2;
  if constexpr (Width != 3) {
    const int64_t group = lookup / 8, step = lookup % 8 / 2;
    return (group * 2 + half) * planes * kTableGroup + step * kTableEntries;
  }
  const int64_t group = lookup / 32, block = lookup % 32 / 8, pair = lookup % 8 / 2;
  return ((group * 4 + pair) * 2 + half) * planes * kTableGroup + block * kTableEntries;
}

template <TableKind Kind, int Width>
void build_width(const uint16_t* codebook, const float* x, int64_t lookups, uint8_t* tables) {
  constexpr int planes = table_planes(Kind), bits = plane_bits(Kind);
  const __m512i bias = _mm512_set1_epi32(1 << (table_bits(Kind) - 1));
  for (int64_t l = 0; l < lookups; ++l, codebook += entries_per_lookup(Width), x += columns_per_lookup(Width)) {
    prefetch(codebook, kCodebooks);
    const __m512i t = _mm512_add_epi32(_mm512_cvtps_epi32(partial_products<Width>(codebook, x)), bias);
    uint8_t* table = tables + table_place<Width>(l, planes);
#pragma GCC unroll 4
    for (int p = 0; p < planes; ++p) {
      __m512i plane = _mm512_srli_epi32(t, bits * p);
      if constexpr (bits < 8) plane = _mm512_and_si512(plane, _mm512_set1_epi32((1 << bits) - 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(table + p * kTableGroup), _mm512_cvtepi32_epi8(plane));
    }
  }
}

template <TableKind Kind>
void build(int width, StepOrder, const uint16_t* codebook, const float* x, int64_t lookups, uint8_t* tables) {
  switch (width) {
    case 1: return build_width<Kind, 1>(codebook, x, lookups, tables);
    case 2: return build_width<Kind, 2>(codebook, x, lookups, tables);
    case 3: return build_width<Kind, 3>(codebook, x, lookups, tables);
    default: return build_width<Kind, 4>(codebook, x, lookups, tables);
  }
}

// --- lookups -------------------------------------------------------------------------------------------------------

struct Rows {  // rows 0-15 and 16-31 of a tile
  __m512i half[2];
};

inline Rows load_rows(const uint8_t* codes) {
  prefetch(codes, kLookupsAvx512);
  prefetch(codes + 64, kLookupsAvx512);
  return {{load(codes), load(codes + 64)}};
}

// The sums of 32 rows for one token.
template <TableKind Kind>
struct Accumulators {
  static constexpr int kPlanes = table_planes(Kind), kBits = plane_bits(Kind);
  __m512i sum[kPlanes][2];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) sum[p][0] = sum[p][1] = _mm512_setzero_si512();
  }

  inline __attribute__((always_inline)) void add(const Rows& index, const uint8_t* tables) {
    const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const __m512i table = load(tables + p * kTableGroup);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) sum[p][h] = _mm512_dpbusd_epi32(sum[p][h], _mm512_permutexvar_epi8(index.half[h], table), ones);
    }
  }

  inline __attribute__((always_inline)) void flush(int64_t lookups, float unit, float* y) {
    const __m512i bias = _mm512_set1_epi32(static_cast<int>(lookups << (2 * kBits - 1)));
    const __m512 upper_unit = _mm512_set1_ps(static_cast<float>(1 << (kBits * (kPlanes - 2))) * unit);
    const auto join = [](__m512i low, __m512i high) { return _mm512_add_epi32(low, _mm512_slli_epi32(high, kBits)); };
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i upper = _mm512_sub_epi32(join(sum[kPlanes - 2][h], sum[kPlanes - 1][h]), bias);
      __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(upper), upper_unit);
      if constexpr (kPlanes >= 3) {
        const __m512i lower = kPlanes == 4 ? join(sum[0][h], sum[1][h]) : sum[0][h];
        part = _mm512_add_ps(part, _mm512_mul_ps(_mm512_cvtepi32_ps(lower), _mm512_set1_ps(unit)));
      }
      _mm512_storeu_ps(y + 16 * h, _mm512_add_ps(_mm512_loadu_ps(y + 16 * h), part));
    }
  }
};

// The lookups of both nibbles of a group of steps: index = 16 * (step of the group) + nibble.
template <TableKind Kind, int Tokens>
inline __attribute__((always_inline)) void add_nibbles(const Rows& codes, Accumulators<Kind>* sums, const uint8_t** tables) {
  const __m512i nibble = _mm512_set1_epi8(15), step = _mm512_set1_epi32(0x30201000);
  const auto index = [&](__m512i bytes) { return _mm512_ternarylogic_epi64(bytes, nibble, step, 0xEA); };
  const auto high = [](__m512i bytes) { return _mm512_srli_epi16(bytes, 4); };
  const Rows halves[2] = {{{index(codes.half[0]), index(codes.half[1])}},
                          {{index(high(codes.half[0])), index(high(codes.half[1]))}}};
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) sums[t].add(halves[n], tables[t] + n * table_planes(Kind) * kTableGroup);
    tables[t] += 2 * table_planes(Kind) * kTableGroup;
  }
}

// add_group(codes of a group, sums, tables) for all groups of each tile.
template <TableKind Kind, int Tokens, class AddGroup>
inline __attribute__((always_inline)) void lookup_tiles(const LookupWork& work, const TokenTables* tokens, int64_t groups,
                                                        int64_t group_bytes, AddGroup&& add_group) {
  const uint8_t* codes = work.codes;
  for (int64_t tile = 0; tile < work.tiles; ++tile) {
    Accumulators<Kind> sums[Tokens];
    const uint8_t* tables[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      sums[t].clear();
      tables[t] = tokens[t].tables;
    }
    for (int64_t g = 0; g < groups; ++g, codes += group_bytes) add_group(codes, sums, tables);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) sums[t].flush(work.lookups, tokens[t].unit, tokens[t].y + tile * kTileRows);
  }
}

template <TableKind Kind, int Tokens>
void nibbles_of_tokens(const LookupWork& work, const TokenTables* tokens) {
  lookup_tiles<Kind, Tokens>(work, tokens, work.lookups / 8, kGroupBytes,
                             [](const uint8_t* codes, auto* sums, const uint8_t** tables)
                                 __attribute__((always_inline)) { add_nibbles<Kind, Tokens>(load_rows(codes), sums, tables); });
}

template <TableKind Kind, int Tokens>
void lookups_3bit_of_tokens(const LookupWork& work, const TokenTables* tokens) {
  lookup_tiles<Kind, Tokens>(
      work, tokens, work.lookups / 32, 3 * kGroupBytes,
      [](const uint8_t* codes, auto* sums, const uint8_t** tables) __attribute__((always_inline)) {
        const Rows bytes[3] = {load_rows(codes), load_rows(codes + kGroupBytes), load_rows(codes + 2 * kGroupBytes)};
        Rows spare;  // the fourth bit of its nibbles belongs to no column, and tables do not look at it
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m512i a = _mm512_srli_epi16(bytes[0].half[h], 3), b = _mm512_srli_epi16(bytes[1].half[h], 2);
          const __m512i c = _mm512_srli_epi16(bytes[2].half[h], 1);
          const __m512i a_or_b = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x11), a, b, 0xCA);
          spare.half[h] = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x44), c, a_or_b, 0xCA);
        }
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) add_nibbles<Kind, Tokens>(bytes[i], sums, tables);
        add_nibbles<Kind, Tokens>(spare, sums, tables);
      });
}

// Sums of 16 of the 32 registers.
template <TableKind Kind>
constexpr int kTokensAtOnce = table_planes(Kind) == 2 ? 4 : 2;
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

// 16 weights; `codes` may hold other bits above the width.
template <int Width>
inline __m512 decode_rows(__m512i codes, const float* codebook) {
  if constexpr (Width >= 7) return _mm512_i32gather_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << Width) - 1)), codebook, 4);
  const auto of_32 = [&](int first) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(codebook + first), codes, _mm512_loadu_ps(codebook + first + 16));
  };
  if constexpr (Width == 5) return of_32(0);
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(codes, _mm512_set1_epi32(32)), of_32(0), of_32(32));
}

template <int Width>
void decode_multiply(const uint8_t* codes, StepOrder, int64_t tiles, int64_t tile_bytes, int64_t columns,
                     const uint16_t* codebook, const float* x, int64_t tokens, float* y, int64_t y_stride) {
  alignas(64) float entries[kBytePanelColumns << Width];
  for (int64_t e = 0; e < columns << Width; e += 16) _mm512_store_ps(entries + e, load_fp16(codebook + e));
  multiply_wide<Avx512>(
      codes, tiles, tile_bytes, columns, x, tokens, y, y_stride, [&](const uint8_t* tile, int64_t k, float* weights) {
        const Rows four = load_rows(tile + k / 4 * kGroupBytes);
        const __m128i shift = _mm_cvtsi64_si128(8 * (k % 4));
        for (int h = 0; h < 2; ++h)
          _mm512_store_ps(weights + 16 * h, decode_rows<Width>(_mm512_srl_epi32(four.half[h], shift), entries + (k << Width)));
      });
}

}  // namespace

const LinearKernels kLinearAvx512 = {
    {table_kernels<TableKind::bits28>(), table_kernels<TableKind::bits21>(), table_kernels<TableKind::bits16>(), {}},
    {decode_multiply<5>, decode_multiply<6>, decode_multiply<7>, decode_multiply<8>},
};

}  // namespace pyllmq::cpu

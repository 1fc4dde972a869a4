// 2:4 codes by byte shuffles. Position and code of a kept weight are one index into the 4 << bits partial products of
// its group: 16 of them are one shuffle's table, more are looked up 16 at a time: a shuffle yields 0 where its index is
// negative, so that with tables of differences (exclusive or) between one sixteen and the next
//
//   T[index] = T0[index] ^ (T0 ^ T1)[index - 16] ^ (T1 ^ T2)[index - 32] ^ ...      (indices modulo 16, 0 if negative)
//
// The first position is at most 2 and the second at least 1, so that of four sixteens (4 bits) three are looked up for
// each. A register holds 16 rows of two groups, one in each lane.
#include <immintrin.h>

#include "codebook/cpu/planes_avx2.h"
#include "runtime/prefetch.h"
#include "sparse/cpu/linear.h"

namespace pyllmq::cpu {
namespace {

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// --- tables --------------------------------------------------------------------------------------------------------

// The products of a block, and the largest of their magnitudes, NaN if there is one.
template <int Bits>
float multiply_codebook(const uint16_t* codebook, const float* x, int64_t slots, float* products) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i largest = _mm256_setzero_si256();  // as integers, magnitudes order like floats and NaN comes out on top
  for (int64_t slot = 0; slot < slots; slot += 4) {
    const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + slot));
    for (int i = 0; i < 4 << Bits; i += 8, codebook += 8, products += 8) {
      const __m256i column = _mm256_srli_epi32(_mm256_add_epi32(_mm256_set1_epi32(i), lane), Bits);
      const __m256 entries = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
      const __m256 product = _mm256_mul_ps(_mm256_permutevar_ps(four, column), entries);
      _mm256_store_ps(products, product);
      largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(product), _mm256_set1_epi32(0x7FFFFFFF)));
    }
  }
  return bits_float(largest_lane(largest));
}

inline PlanePairs operator^(const PlanePairs& a, const PlanePairs& b) {
  return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}

// One table of two groups, by planes.
template <TableKind Kind>
inline void store_table(const PlanePairs& a, const PlanePairs& b, uint8_t* table) {
  const auto store = [&](int p, __m256i plane) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + 32 * p), plane); };
  store(0, _mm256_permute2x128_si256(a.low, b.low, 0x20));
  store(1, _mm256_permute2x128_si256(a.low, b.low, 0x31));
  if constexpr (table_planes(Kind) >= 3) store(2, _mm256_permute2x128_si256(a.high, b.high, 0x20));
  if constexpr (table_planes(Kind) == 4) store(3, _mm256_permute2x128_si256(a.high, b.high, 0x31));
}

template <TableKind Kind, int Bits>
bool build_tables(const uint16_t* codebook, const float* x, int64_t slots, uint8_t* tables, float* unit) {
  constexpr int products_of_group = 4 << Bits, sixteens = products_of_group / 16, stride = 32 * table_planes(Kind);
  alignas(32) float products[kCellColumns << Bits];
  const float bound = multiply_codebook<Bits>(codebook, x, slots, products);
  if (bound != 0 && !(bound >= kSmallestBound && bound <= kLargestBound)) return false;
  const float to_fixed = bound == 0 ? 0 : fixed_point_scale(Kind, bound);
  *unit = bound == 0 ? 0 : 1 / to_fixed;
  const __m256 scale = _mm256_set1_ps(to_fixed);
  const auto sixteen = [&](const float* from) {
    return gather_planes<Kind>(_mm256_mul_ps(_mm256_load_ps(from), scale), _mm256_mul_ps(_mm256_load_ps(from + 8), scale));
  };
  for (int64_t group = 0; group < slots / 4; group += group % 2 == 0 ? 1 : 3) {  // with the group two further on
    const float* own = products + group * products_of_group;
    PlanePairs a[sixteens], b[sixteens];
    for (int i = 0; i < sixteens; ++i) {
      a[i] = sixteen(own + 16 * i);
      b[i] = sixteen(own + 2 * products_of_group + 16 * i);
    }
    const auto store = [&](const PlanePairs& of_a, const PlanePairs& of_b) {
      store_table<Kind>(of_a, of_b, tables);
      tables += stride;
    };
    store(a[0], b[0]);
    if constexpr (Bits == 4) store(a[1], b[1]);
    for (int i = 1; i < sixteens; ++i) store(a[i - 1] ^ a[i], b[i - 1] ^ b[i]);
  }
  return true;
}

template <TableKind Kind>
bool build(int bits, const uint16_t* codebook, const float* x, int64_t slots, uint8_t* tables, float* unit) {
  if (bits == 2) return build_tables<Kind, 2>(codebook, x, slots, tables, unit);
  if (bits == 3) return build_tables<Kind, 3>(codebook, x, slots, tables, unit);
  return build_tables<Kind, 4>(codebook, x, slots, tables, unit);
}

// --- lookups -------------------------------------------------------------------------------------------------------

template <int Bits>
struct Index {  // of the first and the second kept weights; [i]: into the i-th table that they read
  static constexpr int kReads = Bits - 1;
  __m256i first[kReads], second[kReads];
};

// Nibble 0 or 1 of 16 rows of two bytes of a batch, which are groups 2 b + nibble and 2 b + 2 + nibble.
template <int Bits>
inline __attribute__((always_inline)) Index<Bits> read_index(const uint8_t* batch, int nibble) {
  const auto low_nibble = [&](__m256i bytes) {
    return _mm256_and_si256(nibble == 0 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  };
  if constexpr (Bits == 2) {
    return {{low_nibble(load(batch))}, {low_nibble(load(batch + 64))}};
  } else {
    const __m256i positions = load(batch);
    const auto merge = [&](const uint8_t* codes, int place) {  // place: the bit where the position starts
      const __m256i shifted =
          place <= Bits ? _mm256_slli_epi16(positions, Bits - place) : _mm256_srli_epi16(positions, place - Bits);
      return _mm256_or_si256(_mm256_and_si256(shifted, _mm256_set1_epi8(3 << Bits)), low_nibble(load(codes)));
    };
    const __m256i first = merge(batch + 64, 4 * nibble), second = merge(batch + 128, 4 * nibble + 2);
    const auto minus = [](__m256i index, char by) { return _mm256_sub_epi8(index, _mm256_set1_epi8(by)); };
    if constexpr (Bits == 3) return {{first, minus(first, 16)}, {second, minus(second, 16)}};
    if constexpr (Bits == 4) return {{first, minus(first, 16), minus(first, 32)}, {second, minus(second, 32), minus(second, 48)}};
  }
}

template <TableKind Kind, int Bits>
struct Accumulators : PlaneSums<Kind> {
  using PlaneSums<Kind>::kPlanes;
  static constexpr int kStride = 32 * kPlanes, kTables = Bits == 4 ? 5 : Bits - 1;

  inline __attribute__((always_inline)) void add(const Index<Bits>& index, const uint8_t* tables) {
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const auto table = [&](int i) { return load(tables + i * kStride + 32 * p); };
      __m256i first = _mm256_shuffle_epi8(table(0), index.first[0]);
      __m256i second = _mm256_shuffle_epi8(table(Bits == 4 ? 1 : 0), index.second[0]);
#pragma GCC unroll 2
      for (int i = 1; i < Index<Bits>::kReads; ++i) {
        first = _mm256_xor_si256(first, _mm256_shuffle_epi8(table(Bits == 4 ? i + 1 : i), index.first[i]));
        second = _mm256_xor_si256(second, _mm256_shuffle_epi8(table(Bits == 4 ? i + 2 : i), index.second[i]));
      }
      this->add_two(p, first, second);
    }
  }

  // Bytes 2i are in `even`, bytes 2i+1 in `odd`, of both lanes, whose sums stay below 2^15.
  inline __attribute__((always_inline)) void flush(int64_t lookups, float unit, float* y) const {
    const auto both_lanes = [](__m256i sums) {
      return _mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    };
    __m128i sums[kPlanes][2];  // rows 0-7, 8-15
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const __m128i even = both_lanes(this->even_sums(p)), odd = both_lanes(this->odd[p]);
      sums[p][0] = _mm_unpacklo_epi16(even, odd);
      sums[p][1] = _mm_unpackhi_epi16(even, odd);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256 sum = join_planes<Kind>([&](int p) { return _mm256_cvtepu16_epi32(sums[p][half]); }, lookups, unit);
      _mm256_storeu_ps(y + 8 * half, _mm256_add_ps(_mm256_loadu_ps(y + 8 * half), sum));
    }
  }
};

template <TableKind Kind, int Bits, int Tokens>
void look_up_tokens(const CodeWork& work, const TokenTables* tokens) {
  using Sums = Accumulators<Kind, Bits>;
  Sums sums[Tokens];
  const uint8_t* table[Tokens];
#pragma GCC unroll 2
  for (int t = 0; t < Tokens; ++t) {
    sums[t].clear();
    table[t] = tokens[t].tables;
  }
  const uint8_t* cell = work.cell;
  for (int64_t slot = 0; slot < work.slots; slot += kBatchColumns, cell += code_batch_bytes(Bits)) {
    for (int line = 0; line < code_batch_bytes(Bits); line += 64) prefetch(cell + line, kCellsAvx2);
#pragma GCC unroll 2
    for (int bytes = 0; bytes < 64; bytes += 32)
#pragma GCC unroll 2
      for (int nibble = 0; nibble < 2; ++nibble) {
        const Index<Bits> index = read_index<Bits>(cell + bytes, nibble);
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t) {
          sums[t].add(index, table[t]);
          table[t] += Sums::kTables * Sums::kStride;
        }
      }
  }
#pragma GCC unroll 2
  for (int t = 0; t < Tokens; ++t) sums[t].flush(work.slots / 2, tokens[t].unit, tokens[t].y);
}

template <TableKind Kind, int Bits>
void look_up(const CodeWork& work) {
  constexpr int at_once = table_planes(Kind) == 2 ? 2 : 1;  // two tokens of two planes keep 8 of the 16 registers as sums
  int64_t t = 0;
  for (; t + at_once <= work.count; t += at_once) look_up_tokens<Kind, Bits, at_once>(work, work.tokens + t);
  for (; t < work.count; ++t) look_up_tokens<Kind, Bits, 1>(work, work.tokens + t);
}

template <TableKind Kind>
constexpr CodeTableKernels code_tables() {
  return {build<Kind>, {look_up<Kind, 2>, look_up<Kind, 3>, look_up<Kind, 4>}};
}

}  // namespace

const CodeTableKernels kCodeTablesAvx2[kTableKinds] = {code_tables<TableKind::bits28>(), code_tables<TableKind::bits21>(),
                                                       code_tables<TableKind::bits16>(), code_tables<TableKind::bits14>()};

}  // namespace pyllmq::cpu

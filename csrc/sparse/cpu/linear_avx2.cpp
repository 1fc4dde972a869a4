// AVX2 cannot spread values over the bits of a mask, so a byte of the mask picks a shuffle from a table of 256. 2:4
// positions pick among four x by vpermilps. Codes: codes_avx2.cpp, here they are expanded for many tokens.
#include <immintrin.h>

#include <cstring>

#include "sparse/cpu/linear.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

// Relative to where a kernel reads; what it steps over (masks, positions) is fetched with a call of its own.
inline void prefetch(const void* at) { cpu::prefetch(at, kCellsAvx2); }

// Where bit i of the byte is set: which value goes there; else zero (the top bit).
struct ExpandTables {
  alignas(64) uint8_t halves[256][16];
  alignas(64) uint8_t bytes[256][8];
};

constexpr ExpandTables make_tables() {
  ExpandTables tables{};
  for (int mask = 0; mask < 256; ++mask)
    for (int bit = 0, next = 0; bit < 8; ++bit) {
      const bool kept = mask >> bit & 1;
      tables.halves[mask][2 * bit] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
      tables.halves[mask][2 * bit + 1] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
      tables.bytes[mask][bit] = static_cast<uint8_t>(kept ? next : 0x80);
      next += kept;
    }
  return tables;
}
constexpr ExpandTables kExpand = make_tables();

inline __m128i load_16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m128i load_8(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
inline __m256i load_32(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline __m256 low_bf16(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 high_bf16(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline __m256 int8_to_fp32(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }

struct Rows {  // two columns (or kept weights) of 16 rows
  __m256 first[2], second[2];
};

inline __attribute__((always_inline)) __m128i expand_halves(uint32_t byte, const uint8_t*& values) {
  const __m128i spread = _mm_shuffle_epi8(load_16(values), load_16(kExpand.halves[byte]));
  values += 2 * _mm_popcnt_u32(byte);
  return spread;
}

// 8 rows of one column.
template <ValueType Type>
inline __attribute__((always_inline)) __m256 expand_eight(uint32_t byte, const uint8_t*& values) {
  if constexpr (Type == ValueType::fp16) return _mm256_cvtph_ps(expand_halves(byte, values));
  const uint8_t* from = values;
  values += value_bytes(Type) * _mm_popcnt_u32(byte);
  if constexpr (Type == ValueType::int8) return int8_to_fp32(_mm_shuffle_epi8(load_8(from), load_8(kExpand.bytes[byte])));
  // A table of words would need no widening, but 8 KiB of the L1 cache in place of 2: calls of fp32 took 7 % more.
  const __m256i place = _mm256_cvtepi8_epi32(load_8(kExpand.bytes[byte]));
  const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(from)), place);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), spread);  // a blend is three operations
}

template <ValueType Type>
inline __attribute__((always_inline)) Rows expand_pair(uint32_t mask, const uint8_t*& values) {
  const uint32_t byte[4] = {mask & 255, mask >> 8 & 255, mask >> 16 & 255, mask >> 24};
  Rows rows;
  if constexpr (Type == ValueType::bf16) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m128i low = expand_halves(byte[2 * half], values);
      const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), expand_halves(byte[2 * half + 1], values), 1);
      rows.first[half] = low_bf16(both);
      rows.second[half] = high_bf16(both);
    }
  } else {
    rows.first[0] = expand_eight<Type>(byte[0], values);
    rows.first[1] = expand_eight<Type>(byte[1], values);
    rows.second[0] = expand_eight<Type>(byte[2], values);
    rows.second[1] = expand_eight<Type>(byte[3], values);
  }
  return rows;
}

template <int Tokens>
struct Sums {
  static constexpr int kChains = Tokens <= 2 ? 2 : 1;
  __m256 sum[Tokens][kChains][2];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) sum[t][c][0] = sum[t][c][1] = _mm256_setzero_ps();
  }
  inline __attribute__((always_inline)) void store(float* sums) {
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256 total = sum[t][0][half];
        if constexpr (kChains == 2) total = _mm256_add_ps(total, sum[t][1][half]);
        float* to = sums + t * kTileRows + 8 * half;
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), total));
      }
  }
};

template <ValueType Type, int Tokens>
void multiply_bitmap(const CellWork& work) {
  Sums<Tokens> sums;
  sums.clear();
  constexpr int second = Sums<Tokens>::kChains - 1;
  const auto* masks = reinterpret_cast<const uint32_t*>(work.cell);
  const uint8_t* values = work.cell + work.slots * 2;
  for (int64_t line = 0; line < work.slots * 2; line += 64) prefetch(work.cell + line);
  const float* x = work.x;
  for (int64_t pair = 0; pair < work.slots / 2; ++pair, x += 2 * Tokens) {
    prefetch(values);
    const Rows w = expand_pair<Type>(masks[pair], values);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const __m256 x0 = _mm256_broadcast_ss(x + t), x1 = _mm256_broadcast_ss(x + Tokens + t);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        sums.sum[t][0][half] = _mm256_fmadd_ps(w.first[half], x0, sums.sum[t][0][half]);
        sums.sum[t][second][half] = _mm256_fmadd_ps(w.second[half], x1, sums.sum[t][second][half]);
      }
    }
  }
  sums.store(work.sums);
}

template <ValueType Type>
void expand_bitmap(const uint8_t* cell, int64_t slots, float* weights) {
  const auto* masks = reinterpret_cast<const uint32_t*>(cell);
  const uint8_t* values = cell + slots * 2;
  for (int64_t line = 0; line < slots * 2; line += 64) prefetch(cell + line);
  for (int64_t pair = 0; pair < slots / 2; ++pair, weights += 2 * kCellRows) {
    prefetch(values);
    const Rows w = expand_pair<Type>(masks[pair], values);
    for (int half = 0; half < 2; ++half) {
      _mm256_store_ps(weights + 8 * half, w.first[half]);
      _mm256_store_ps(weights + kCellRows + 8 * half, w.second[half]);
    }
  }
}

// --- 2:4 -----------------------------------------------------------------------------------------------------------

template <ValueType Type>
inline __attribute__((always_inline)) Rows load_two(const uint8_t* values) {
  Rows rows;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    if constexpr (Type == ValueType::bf16) {
      const __m256i both = load_32(values + 32 * half);
      rows.first[half] = low_bf16(both);
      rows.second[half] = high_bf16(both);
    } else {
      const auto eight = [&](int64_t place) -> __m256 {
        const uint8_t* from = values + place * value_bytes(Type);
        if constexpr (Type == ValueType::fp32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
        if constexpr (Type == ValueType::fp16) return _mm256_cvtph_ps(load_16(from));
        return int8_to_fp32(load_8(from));
      };
      rows.first[half] = eight(8 * half);
      rows.second[half] = eight(kCellRows + 8 * half);
    }
  }
  return rows;
}

template <ValueType Type>
constexpr int64_t kGroupBytes = 2 * kCellRows * value_bytes(Type);

template <ValueType Type, int Tokens>
void multiply_24(const CellWork& work) {
  Sums<Tokens> sums;
  sums.clear();
  constexpr int second = Sums<Tokens>::kChains - 1;
  const float* x = work.x;
  const uint8_t* cell = work.cell;
  for (int64_t slot = 0; slot < work.slots; slot += kBatchColumns) {
    __m256i place[2] = {load_32(cell), load_32(cell + 32)};
    prefetch(cell);
    cell += 4 * kCellRows;
    for (int g = 0; g < 8; ++g, cell += kGroupBytes<Type>, x += 4 * Tokens) {
      for (int64_t line = 0; line < kGroupBytes<Type>; line += 64) prefetch(cell + line);
      const Rows w = load_two<Type>(cell);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i next = _mm256_srli_epi32(place[half], 2);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + 4 * t));
          __m256 &a = sums.sum[t][0][half], &b = sums.sum[t][second][half];
          a = _mm256_fmadd_ps(w.first[half], _mm256_permutevar_ps(four, place[half]), a);
          b = _mm256_fmadd_ps(w.second[half], _mm256_permutevar_ps(four, next), b);
        }
        place[half] = _mm256_srli_epi32(place[half], 4);
      }
    }
  }
  sums.store(work.sums);
}

// Two kept weights of 8 rows to their places among four columns.
inline void spread(__m256i first_place, __m256i second_place, __m256 first, __m256 second, float* weights) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m256i column = _mm256_set1_epi32(c);
    const __m256 a = _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(first_place, column)), first);
    const __m256 b = _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(second_place, column)), second);
    _mm256_store_ps(weights + c * kCellRows, _mm256_or_ps(a, b));
  }
}

template <ValueType Type>
void expand_24(const uint8_t* cell, int64_t slots, float* weights) {
  const __m256i three = _mm256_set1_epi32(3);
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns) {
    const uint8_t* positions = cell;
    prefetch(cell);
    cell += 4 * kCellRows;
    for (int g = 0; g < 8; ++g, cell += kGroupBytes<Type>, weights += 4 * kCellRows) {
      prefetch(cell);
      const Rows w = load_two<Type>(cell);
      for (int half = 0; half < 2; ++half) {
        const __m256i own = _mm256_srl_epi32(load_32(positions + 32 * half), _mm_cvtsi32_si128(4 * g));
        const __m256i first = _mm256_and_si256(own, three), second = _mm256_and_si256(_mm256_srli_epi32(own, 2), three);
        spread(first, second, w.first[half], w.second[half], weights + 8 * half);
      }
    }
  }
}

// --- codes ---------------------------------------------------------------------------------------------------------

// entries[index] of 8 rows, among 8 << Doublings of them; the bits above the index may be anything.
template <int Doublings>
inline __attribute__((always_inline)) __m256 look_up(const float* entries, __m256i index) {
  if constexpr (Doublings == 3) {  // 8 permutes and 7 blends: 0.27 ns a weight, a gather from the L1 cache: 0.11
    return _mm256_i32gather_ps(entries, _mm256_and_si256(index, _mm256_set1_epi32(63)), 4);
  } else if constexpr (Doublings == 0) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(entries), index);
  } else {
    const __m256 low = look_up<Doublings - 1>(entries, index);
    const __m256 high = look_up<Doublings - 1>(entries + (4 << Doublings), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 29 - Doublings)));
  }
}

struct Index {  // into the codebooks of a group, of the two kept weights of 8 rows; bits above it may be anything
  __m256i first, second;
};

template <int Bits>
inline __attribute__((always_inline)) Index group_index(const uint8_t* batch, int g, int half) {
  const auto plane = [&](int p) {
    const __m256i bytes = _mm256_cvtepu8_epi32(load_8(batch + 64 * p + g / 2 * kCellRows + 8 * half));
    return _mm256_srl_epi32(bytes, _mm_cvtsi32_si128(g % 2 * 4));
  };
  if constexpr (Bits == 2) return {plane(0), plane(1)};
  const __m256i positions = plane(0), code_bits = _mm256_set1_epi32((1 << Bits) - 1);
  const auto merge = [&](__m256i codes, __m256i position) {
    return _mm256_or_si256(_mm256_and_si256(codes, code_bits), _mm256_slli_epi32(position, Bits));
  };
  return {merge(plane(1), positions), merge(plane(2), _mm256_srli_epi32(positions, 2))};
}

template <int Bits>
void expand_codes(const uint8_t* cell, StepOrder, int64_t slots, const uint16_t* codebook, float* weights) {
  const __m256i three = _mm256_set1_epi32(3);
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns, cell += code_batch_bytes(Bits)) {
    prefetch(cell);
    for (int g = 0; g < 8; ++g, codebook += 4 << Bits, weights += 4 * kCellRows) {
      alignas(32) float entries[4 << Bits];
      for (int i = 0; i < 4 << Bits; i += 8) _mm256_store_ps(entries + i, _mm256_cvtph_ps(load_16(codebook + i)));
      for (int half = 0; half < 2; ++half) {
        const Index index = group_index<Bits>(cell, g, half);
        const __m256 first = look_up<Bits - 1>(entries, index.first), second = look_up<Bits - 1>(entries, index.second);
        spread(_mm256_and_si256(_mm256_srli_epi32(index.first, Bits), three),
               _mm256_and_si256(_mm256_srli_epi32(index.second, Bits), three), first, second, weights + 8 * half);
      }
    }
  }
}

// --- few kept weights ----------------------------------------------------------------------------------------------

template <ValueType Type>
float dot_columns(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x) {
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  const auto add = [&](const uint8_t* value, const uint8_t* column, __m256& to) {
    const __m256i place = column_bytes == 4 ? load_32(column) : _mm256_cvtepu16_epi32(load_16(column));
    __m256 w;
    if constexpr (Type == ValueType::fp32) w = _mm256_loadu_ps(reinterpret_cast<const float*>(value));
    if constexpr (Type == ValueType::int8) w = int8_to_fp32(load_8(value));
    if constexpr (Type == ValueType::fp16) w = _mm256_cvtph_ps(load_16(value));
    if constexpr (Type == ValueType::bf16) w = low_bf16(_mm256_cvtepu16_epi32(load_16(value)));
    to = _mm256_fmadd_ps(w, _mm256_i32gather_ps(x, place, 4), to);
  };
  int which = 0;
  for (; count >= 8; count -= 8, values += 8 * value_bytes(Type), columns += 8 * column_bytes, which ^= 1) {
    prefetch(values);
    prefetch(columns);
    add(values, columns, sum[which]);
  }
  if (count > 0) {  // the rest, filled up with zeros
    alignas(32) uint8_t rest_values[32] = {}, rest_columns[32] = {};
    std::memcpy(rest_values, values, count * value_bytes(Type));
    std::memcpy(rest_columns, columns, count * column_bytes);
    __m256 last = _mm256_setzero_ps();
    add(rest_values, rest_columns, last);
    const __m256 used = _mm256_castsi256_ps(
        _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
    sum[which] = _mm256_add_ps(sum[which], _mm256_and_ps(last, used));  // 0 * x[0] may not be 0
  }
  const __m256 total = _mm256_add_ps(sum[0], sum[1]);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

template <ValueType Type>
inline float one_value(const uint8_t* values, int64_t i) {
  if constexpr (Type == ValueType::fp32) return reinterpret_cast<const float*>(values)[i];
  if constexpr (Type == ValueType::bf16) return bf16_to_fp32(reinterpret_cast<const uint16_t*>(values)[i]);
  if constexpr (Type == ValueType::fp16) return _cvtsh_ss(reinterpret_cast<const uint16_t*>(values)[i]);
  return reinterpret_cast<const int8_t*>(values)[i];
}

template <ValueType Type>
void dot_tokens(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x, float* sums) {
  __m256 sum[2][2];
  for (auto& chain : sum) chain[0] = chain[1] = _mm256_setzero_ps();
  const auto run = [&](auto* column) {
    const auto add = [&](int64_t i, __m256* to) {
      const __m256 value = _mm256_set1_ps(one_value<Type>(values, i));
      const float* own = x + column[i] * kColumnTokens;
      to[0] = _mm256_fmadd_ps(value, _mm256_loadu_ps(own), to[0]);
      to[1] = _mm256_fmadd_ps(value, _mm256_loadu_ps(own + 8), to[1]);
    };
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      add(i, sum[0]);
      add(i + 1, sum[1]);
    }
    if (i < count) add(i, sum[0]);
  };
  column_bytes == 2 ? run(reinterpret_cast<const uint16_t*>(columns)) : run(reinterpret_cast<const uint32_t*>(columns));
  _mm256_storeu_ps(sums, _mm256_add_ps(sum[0][0], sum[1][0]));
  _mm256_storeu_ps(sums + 8, _mm256_add_ps(sum[0][1], sum[1][1]));
}

#define PYLLMQ_FOUR(kernel, type) {kernel<type, 1>, kernel<type, 2>, kernel<type, 3>, kernel<type, 4>}
#define PYLLMQ_TYPES(kernel)                                                                                         \
  {PYLLMQ_FOUR(kernel, ValueType::fp32), PYLLMQ_FOUR(kernel, ValueType::bf16), PYLLMQ_FOUR(kernel, ValueType::fp16), \
   PYLLMQ_FOUR(kernel, ValueType::int8)}

}  // namespace

const SparseKernels kSparseAvx2 = {
    .few_tokens = 4,
    .few_code_tokens = 8,
    .code_tables = kCodeTablesAvx2,
    .bitmap = PYLLMQ_TYPES(multiply_bitmap),
    .sparse24 = PYLLMQ_TYPES(multiply_24),
    .expand_bitmap = {expand_bitmap<ValueType::fp32>, expand_bitmap<ValueType::bf16>, expand_bitmap<ValueType::fp16>,
                      expand_bitmap<ValueType::int8>},
    .expand_24 = {expand_24<ValueType::fp32>, expand_24<ValueType::bf16>, expand_24<ValueType::fp16>, expand_24<ValueType::int8>},
    .expand_codes = {expand_codes<2>, expand_codes<3>, expand_codes<4>},
    .dot_columns = {dot_columns<ValueType::fp32>, dot_columns<ValueType::bf16>, dot_columns<ValueType::fp16>,
                    dot_columns<ValueType::int8>},
    .dot_tokens = {dot_tokens<ValueType::fp32>, dot_tokens<ValueType::bf16>, dot_tokens<ValueType::fp16>,
                   dot_tokens<ValueType::int8>},
};

}  // namespace pyllmq::cpu

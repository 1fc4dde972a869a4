// Kept weights are spread over 16 rows by the expand instructions (of a register: from memory they are microcoded on
// some machines), 2:4 positions pick among four x by vpermilps, codes among 16, 32 or 64 products by vpermps and vpermi2ps.
#include <immintrin.h>

#include "sparse/cpu/linear.h"
#include "runtime/prefetch.h"

namespace pyllmq::cpu {
namespace {

// Relative to where a kernel reads; what it steps over (masks, positions) is fetched with a call of its own.
inline void prefetch(const void* at) { cpu::prefetch(at, kCellsAvx512); }

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }
// Of what an expansion reads: the pin keeps gcc from folding the load into it.
inline __m512i load_pinned(const void* from) {
  __m512i loaded = _mm512_loadu_si512(from);
  asm("" : "+v"(loaded));
  return loaded;
}
inline __m512 low_bf16(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 high_bf16(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline __m512 int8_to_fp32(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

struct Two {
  __m512 first, second;
};

// Columns 2 p and 2 p + 1 of 16 rows; `values` moves on.
template <ValueType Type>
inline __attribute__((always_inline)) Two expand_pair(uint32_t mask, const uint8_t*& values) {
  if constexpr (Type == ValueType::fp32) {
    const __m512i first = _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), load_pinned(values));
    const uint8_t* next = values + 4 * _mm_popcnt_u64(mask & 0xFFFF);
    const __m512i second = _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask >> 16), load_pinned(next));
    values += 4 * _mm_popcnt_u64(mask);
    return {_mm512_castsi512_ps(first), _mm512_castsi512_ps(second)};
  } else if constexpr (Type == ValueType::int8) {
    const __m256i both = _mm256_maskz_expand_epi8(mask, _mm512_castsi512_si256(load_pinned(values)));
    values += _mm_popcnt_u64(mask);
    return {int8_to_fp32(_mm256_castsi256_si128(both)), int8_to_fp32(_mm256_extracti128_si256(both, 1))};
  } else {
    const __m512i both = _mm512_maskz_expand_epi16(mask, load_pinned(values));
    values += 2 * _mm_popcnt_u64(mask);
    if constexpr (Type == ValueType::bf16) return {low_bf16(both), high_bf16(both)};
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
  }
}

template <int Tokens>
constexpr int kChains = Tokens == 1 ? 4 : 2;  // a multiply-add takes 4 cycles

template <int Tokens>
inline __attribute__((always_inline)) void store_sums(__m512 (&sum)[Tokens][kChains<Tokens>], float* sums) {
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
    __m512 total = _mm512_add_ps(sum[t][0], sum[t][1]);
    if constexpr (Tokens == 1) total = _mm512_add_ps(total, _mm512_add_ps(sum[t][2], sum[t][3]));
    _mm512_storeu_ps(sums + t * kTileRows, _mm512_add_ps(_mm512_loadu_ps(sums + t * kTileRows), total));
  }
}

template <ValueType Type, int Tokens>
void multiply_bitmap(const CellWork& work) {
  __m512 sum[Tokens][kChains<Tokens>];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int c = 0; c < kChains<Tokens>; ++c) sum[t][c] = _mm512_setzero_ps();
  const auto* masks = reinterpret_cast<const uint32_t*>(work.cell);
  const uint8_t* values = work.cell + work.slots * 2;
  for (int64_t line = 0; line < work.slots * 2; line += 64) prefetch(work.cell + line);
  const float* x = work.x;
  for (int64_t pair = 0; pair < work.slots / 2; pair += 4) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      if (p % 2 == 0 || Type == ValueType::fp32) prefetch(values);
      const Two w = expand_pair<Type>(masks[pair + p], values);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        __m512& a = sum[t][2 * p % kChains<Tokens>];
        __m512& b = sum[t][(2 * p + 1) % kChains<Tokens>];
        a = _mm512_fmadd_ps(w.first, _mm512_set1_ps(x[2 * p * Tokens + t]), a);
        b = _mm512_fmadd_ps(w.second, _mm512_set1_ps(x[(2 * p + 1) * Tokens + t]), b);
      }
    }
    x += 8 * Tokens;
  }
  store_sums<Tokens>(sum, work.sums);
}

template <ValueType Type>
void expand_bitmap(const uint8_t* cell, int64_t slots, float* weights) {
  const auto* masks = reinterpret_cast<const uint32_t*>(cell);
  const uint8_t* values = cell + slots * 2;
  for (int64_t line = 0; line < slots * 2; line += 64) prefetch(cell + line);
  for (int64_t pair = 0; pair < slots / 2; ++pair, weights += 2 * kCellRows) {
    prefetch(values);
    const Two w = expand_pair<Type>(masks[pair], values);
    _mm512_store_ps(weights, w.first);
    _mm512_store_ps(weights + kCellRows, w.second);
  }
}

// --- 2:4 -----------------------------------------------------------------------------------------------------------

// The first and the second kept weights of 16 rows.
template <ValueType Type>
inline __attribute__((always_inline)) Two load_two(const uint8_t* values) {
  if constexpr (Type == ValueType::fp32) return {_mm512_loadu_ps(values), _mm512_loadu_ps(values + 64)};
  if constexpr (Type == ValueType::bf16) return {low_bf16(load(values)), high_bf16(load(values))};
  if constexpr (Type == ValueType::fp16)
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))),
            _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32)))};
  return {int8_to_fp32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))),
          int8_to_fp32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16)))};
}

template <ValueType Type>
constexpr int64_t kGroupBytes = 2 * kCellRows * value_bytes(Type);

template <ValueType Type, int Tokens>
void multiply_24(const CellWork& work) {
  __m512 sum[Tokens][kChains<Tokens>];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int c = 0; c < kChains<Tokens>; ++c) sum[t][c] = _mm512_setzero_ps();
  const float* x = work.x;
  const uint8_t* cell = work.cell;
  for (int64_t slot = 0; slot < work.slots; slot += kBatchColumns) {
    const __m512i positions = load(cell);
    prefetch(cell);
    cell += 4 * kCellRows;
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, cell += kGroupBytes<Type>) {
      for (int64_t line = 0; line < kGroupBytes<Type>; line += 64) prefetch(cell + line);
      const Two w = load_two<Type>(cell);
      const __m512i first = _mm512_srli_epi32(positions, 4 * g), second = _mm512_srli_epi32(positions, 4 * g + 2);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(x + (g * Tokens + t) * 4));
        __m512& a = sum[t][2 * g % kChains<Tokens>];
        __m512& b = sum[t][(2 * g + 1) % kChains<Tokens>];
        a = _mm512_fmadd_ps(w.first, _mm512_permutevar_ps(four, first), a);
        b = _mm512_fmadd_ps(w.second, _mm512_permutevar_ps(four, second), b);
      }
    }
    x += kBatchColumns * Tokens;
  }
  store_sums<Tokens>(sum, work.sums);
}

template <ValueType Type>
void expand_24(const uint8_t* cell, int64_t slots, float* weights) {
  const __m512i place = _mm512_set1_epi32(3);
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns) {
    const __m512i positions = load(cell);
    prefetch(cell);
    cell += 4 * kCellRows;
    for (int g = 0; g < 8; ++g, cell += kGroupBytes<Type>) {
      prefetch(cell);
      const Two w = load_two<Type>(cell);
      const __m512i first = _mm512_and_si512(_mm512_srli_epi32(positions, 4 * g), place);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi32(positions, 4 * g + 2), place);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c, weights += kCellRows) {
        const __m512i column = _mm512_set1_epi32(c);
        const __m512 one = _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(first, column), w.first);
        _mm512_store_ps(weights, _mm512_mask_mov_ps(one, _mm512_cmpeq_epi32_mask(second, column), w.second));
      }
    }
  }
}

// --- codes ---------------------------------------------------------------------------------------------------------

// products[index] of 16 rows; the bits above the index may be anything.
template <int Bits>
inline __attribute__((always_inline)) __m512 look_up(const float* products, __m512i index) {
  const __m512 low = _mm512_loadu_ps(products);
  if constexpr (Bits == 2) return _mm512_permutexvar_ps(index, low);
  const __m512 first = _mm512_permutex2var_ps(low, index, _mm512_loadu_ps(products + 16));
  if constexpr (Bits == 3) return first;
  const __m512 second = _mm512_permutex2var_ps(_mm512_loadu_ps(products + 32), index, _mm512_loadu_ps(products + 48));
  return _mm512_mask_mov_ps(first, _mm512_movepi32_mask(_mm512_slli_epi32(index, 26)), second);
}

struct Index {  // into the products of a group, of the two kept weights of 16 rows
  __m512i first, second;
};

template <int Bits>
struct CodeBatch {
  __m512i a, b, c;  // 2 bits: the two planes of code | position << 2; else positions and two planes of codes

  explicit CodeBatch(const uint8_t* cell) : a(load(cell)), b(load(cell + 64)), c(Bits == 2 ? b : load(cell + 128)) {}

  inline __attribute__((always_inline)) Index group(int g) const {
    if constexpr (Bits == 2) return {_mm512_srli_epi32(a, 4 * g), _mm512_srli_epi32(b, 4 * g)};
    constexpr int merge = 0xCA;  // (code & mask) | (position & ~mask)
    const __m512i code_bits = _mm512_set1_epi32((1 << Bits) - 1);
    const auto shifted = [&](int by) { return by >= 0 ? _mm512_srli_epi32(a, by) : _mm512_slli_epi32(a, -by); };
    return {_mm512_ternarylogic_epi32(code_bits, _mm512_srli_epi32(b, 4 * g), shifted(4 * g - Bits), merge),
            _mm512_ternarylogic_epi32(code_bits, _mm512_srli_epi32(c, 4 * g), shifted(4 * g + 2 - Bits), merge)};
  }
};

template <int Bits>
void expand_codes(const uint8_t* cell, StepOrder, int64_t slots, const uint16_t* codebook, float* weights) {
  const __m512i place = _mm512_set1_epi32(3);
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns, cell += code_batch_bytes(Bits)) {
    prefetch(cell);
    const CodeBatch<Bits> batch(cell);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, codebook += 4 << Bits) {
      alignas(64) float entries[4 << Bits];
      for (int i = 0; i < 4 << Bits; i += 16)
        _mm512_store_ps(entries + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + i))));
      const Index index = batch.group(g);
      const __m512 first = look_up<Bits>(entries, index.first), second = look_up<Bits>(entries, index.second);
      const __m512i first_place = _mm512_and_si512(_mm512_srli_epi32(index.first, Bits), place);
      const __m512i second_place = _mm512_and_si512(_mm512_srli_epi32(index.second, Bits), place);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c, weights += kCellRows) {
        const __m512i column = _mm512_set1_epi32(c);
        const __m512 one = _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(first_place, column), first);
        _mm512_store_ps(weights, _mm512_mask_mov_ps(one, _mm512_cmpeq_epi32_mask(second_place, column), second));
      }
    }
  }
}

template <int Bits, int Tokens>
void multiply_codes(const CellWork& work) {
  __m512 sum[Tokens][kChains<Tokens>];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int c = 0; c < kChains<Tokens>; ++c) sum[t][c] = _mm512_setzero_ps();
  const float* x = work.x;
  const uint8_t* cell = work.cell;
  for (int64_t slot = 0; slot < work.slots; slot += kBatchColumns, cell += code_batch_bytes(Bits)) {
    for (int line = 0; line < code_batch_bytes(Bits); line += 64) prefetch(cell + line);
    const CodeBatch<Bits> batch(cell);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const Index index = batch.group(g);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const float* products = x + (g * Tokens + t) * (4 << Bits);
        __m512& one = sum[t][2 * g % kChains<Tokens>];
        __m512& two = sum[t][(2 * g + 1) % kChains<Tokens>];
        one = _mm512_add_ps(one, look_up<Bits>(products, index.first));
        two = _mm512_add_ps(two, look_up<Bits>(products, index.second));
      }
    }
    x += 8 * Tokens * (4 << Bits);
  }
  store_sums<Tokens>(sum, work.sums);
}

void build_products(const uint16_t* codebook, int bits, const float* x, float* products) {
  for (int i = 0; i < 4 << bits; i += 16) {
    const __m512i column = _mm512_srli_epi32(
        _mm512_add_epi32(_mm512_set1_epi32(i), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
        static_cast<unsigned>(bits));
    const __m512 own = _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), column);
    const __m512 entries = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + i)));
    _mm512_storeu_ps(products + i, _mm512_mul_ps(own, entries));
  }
}

// --- few kept weights ----------------------------------------------------------------------------------------------

template <ValueType Type>
inline __m512 load_values(const uint8_t* values, __mmask16 mask) {
  if constexpr (Type == ValueType::fp32) return _mm512_maskz_loadu_ps(mask, values);
  if constexpr (Type == ValueType::int8) return int8_to_fp32(_mm_maskz_loadu_epi8(mask, values));
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, values);
  if constexpr (Type == ValueType::fp16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <ValueType Type>
float dot_columns(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int which = 0;
  for (; count > 0; count -= 16, values += 16 * value_bytes(Type), columns += 16 * column_bytes, which ^= 1) {
    const auto mask = static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << count) - 1);
    const __m512i place = column_bytes == 4 ? _mm512_maskz_loadu_epi32(mask, columns)
                                            : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, columns));
    prefetch(values);
    prefetch(columns);
    const __m512 picked = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, place, x, 4);
    sum[which] = _mm512_fmadd_ps(load_values<Type>(values, mask), picked, sum[which]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
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
  __m512 sum[4];
  for (__m512& each : sum) each = _mm512_setzero_ps();
  const auto run = [&](auto* column) {
    const auto add = [&](int64_t i, __m512& to) {
      to = _mm512_fmadd_ps(_mm512_set1_ps(one_value<Type>(values, i)), _mm512_loadu_ps(x + column[i] * kColumnTokens), to);
    };
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add(i + c, sum[c]);
    for (; i < count; ++i) add(i, sum[0]);
  };
  column_bytes == 2 ? run(reinterpret_cast<const uint16_t*>(columns)) : run(reinterpret_cast<const uint32_t*>(columns));
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

#define PYLLMQ_EIGHT(kernel, type)                                     \
  {kernel<type, 1>, kernel<type, 2>, kernel<type, 3>, kernel<type, 4>, \
   kernel<type, 5>, kernel<type, 6>, kernel<type, 7>, kernel<type, 8>}
#define PYLLMQ_TYPES(kernel)                                                                                            \
  {PYLLMQ_EIGHT(kernel, ValueType::fp32), PYLLMQ_EIGHT(kernel, ValueType::bf16), PYLLMQ_EIGHT(kernel, ValueType::fp16), \
   PYLLMQ_EIGHT(kernel, ValueType::int8)}
#define PYLLMQ_FOUR(kernel, type) {kernel<type, 1>, kernel<type, 2>, kernel<type, 3>, kernel<type, 4>}

}  // namespace

const SparseKernels kSparseAvx512 = {
    .few_tokens = 8,
    .few_code_tokens = 4,
    .bitmap = PYLLMQ_TYPES(multiply_bitmap),
    .sparse24 = PYLLMQ_TYPES(multiply_24),
    .codes = {PYLLMQ_FOUR(multiply_codes, 2), PYLLMQ_FOUR(multiply_codes, 3), PYLLMQ_FOUR(multiply_codes, 4)},
    .expand_bitmap = {expand_bitmap<ValueType::fp32>, expand_bitmap<ValueType::bf16>, expand_bitmap<ValueType::fp16>,
                      expand_bitmap<ValueType::int8>},
    .expand_24 = {expand_24<ValueType::fp32>, expand_24<ValueType::bf16>, expand_24<ValueType::fp16>, expand_24<ValueType::int8>},
    .expand_codes = {expand_codes<2>, expand_codes<3>, expand_codes<4>},
    .build_products = build_products,
    .dot_columns = {dot_columns<ValueType::fp32>, dot_columns<ValueType::bf16>, dot_columns<ValueType::fp16>,
                    dot_columns<ValueType::int8>},
    .dot_tokens = {dot_tokens<ValueType::fp32>, dot_tokens<ValueType::bf16>, dot_tokens<ValueType::fp16>,
                   dot_tokens<ValueType::int8>},
};

}  // namespace pyllmq::cpu

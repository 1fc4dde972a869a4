// Kept weights are spread over 16 rows by the expand instructions (of a register: from memory they are microcoded on
// some machines), 2:4 positions pick among four x by vpermilps, codes among 16, 32 or 64 products by vpermps and vpermi2ps.
#include <immintrin.h>

#include "runtime/prefetch.h"
#include "sparse/cpu/linear_cells.h"

namespace pyllmq::cpu {
namespace {

inline void prefetch(const void* at) { cpu::prefetch(at, kCellsAvx512); }

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }
// Of what an expansion reads: the pin keeps gcc from folding the load into it.
inline __m512i load_pinned(const void* from) {
  __m512i loaded = _mm512_loadu_si512(from);
  asm("" : "+v"(loaded));
  return loaded;
}
inline __m512 int8_to_fp32(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

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
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns, cell += code_batch_bytes(Bits)) {
    prefetch(cell);
    const CodeBatch<Bits> batch(cell);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g, codebook += 4 << Bits, weights += 4 * kCellRows) {
      alignas(64) float entries[4 << Bits];
      for (int i = 0; i < 4 << Bits; i += 16)
        _mm512_store_ps(entries + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + i))));
      const Index index = batch.group(g);
      const __m512 first = look_up<Bits>(entries, index.first), second = look_up<Bits>(entries, index.second);
      spread<Avx512>(_mm512_srli_epi32(index.first, Bits), _mm512_srli_epi32(index.second, Bits), {first, second}, weights);
    }
  }
}

template <ValueType Type>
inline __m512 load_values(const uint8_t* values, __mmask16 mask) {
  if constexpr (Type == ValueType::fp32) return _mm512_maskz_loadu_ps(mask, values);
  if constexpr (Type == ValueType::int8) return int8_to_fp32(_mm_maskz_loadu_epi8(mask, values));
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, values);
  if constexpr (Type == ValueType::fp16) return _mm512_cvtph_ps(halves);
  return Avx512::first_bf16(_mm512_cvtepu16_epi32(halves));
}

struct CellsAvx512 {
  using V = Avx512;
  template <int Tokens>
  static constexpr int kChains = Tokens == 1 ? 4 : 2;
  static constexpr int kPairs = 4, kGroups = 8, kTokenChains = 4;
  static void prefetch(const void* at) { cpu::prefetch(at, kCellsAvx512); }

  template <ValueType Type>
  static inline __attribute__((always_inline)) Two<Avx512> expand_pair(uint32_t mask, const uint8_t*& values) {
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
      if constexpr (Type == ValueType::bf16) return {V::first_bf16(both), V::second_bf16(both)};
      return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
    }
  }

  template <ValueType Type>
  static float dot_columns(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x) {
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
};

template <int Bits, int Tokens>
void multiply_codes(const CellWork& work) {
  Sums<CellsAvx512, Tokens> sums;
  sums.clear();
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
        __m512 &one = sums.sum[t][2 * g % sums.kChains], &two = sums.sum[t][(2 * g + 1) % sums.kChains];
        one = _mm512_add_ps(one, look_up<Bits>(products, index.first));
        two = _mm512_add_ps(two, look_up<Bits>(products, index.second));
      }
    }
    x += 8 * Tokens * (4 << Bits);
  }
  sums.store(work.sums);
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

template <int Bits>
constexpr void set_codes(SparseKernels& row) {
  row.expand_codes[Bits - 2] = expand_codes<Bits>;
  auto* multiply = row.codes[Bits - 2];
  multiply[0] = multiply_codes<Bits, 1>;
  multiply[1] = multiply_codes<Bits, 2>;
  multiply[2] = multiply_codes<Bits, 3>;
  multiply[3] = multiply_codes<Bits, 4>;
}

constexpr SparseKernels kernels() {
  SparseKernels found = cell_kernels<CellsAvx512>(std::make_integer_sequence<int, 8>());
  found.few_code_tokens = 4;
  found.build_products = build_products;
  set_codes<2>(found);
  set_codes<3>(found);
  set_codes<4>(found);
  return found;
}

}  // namespace

constinit const SparseKernels kSparseAvx512 = kernels();

}  // namespace pyllmq::cpu

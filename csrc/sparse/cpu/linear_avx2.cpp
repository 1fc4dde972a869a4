// AVX2 cannot spread values over the bits of a mask, so a byte of the mask picks a shuffle from a table of 256. 2:4
// positions pick among four x by vpermilps. Codes: codes_avx2.cpp, here they are expanded for many tokens.
#include <immintrin.h>

#include <cstring>

#include "runtime/prefetch.h"
#include "sparse/cpu/expand_tables.h"
#include "sparse/cpu/linear_cells.h"

namespace pyllmq::cpu {
namespace {

inline void prefetch(const void* at) { cpu::prefetch(at, kCellsAvx2); }

using V = Twice<Avx2>;

inline __m128i load_16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m128i load_8(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
inline __m256i load_32(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
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
  if constexpr (Type == ValueType::int8) {
    const __m128i bytes = _mm_shuffle_epi8(load_8(from), load_8(kExpand.bytes[byte]));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  // A table of words would need no widening, but 8 KiB of the L1 cache in place of 2: calls of fp32 took 7 % more.
  const __m256i place = _mm256_cvtepi8_epi32(load_8(kExpand.bytes[byte]));
  const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(from)), place);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), spread);  // a blend is three operations
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
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns, cell += code_batch_bytes(Bits)) {
    prefetch(cell);
    for (int g = 0; g < 8; ++g, codebook += 4 << Bits, weights += 4 * kCellRows) {
      alignas(32) float entries[4 << Bits];
      for (int i = 0; i < 4 << Bits; i += 8) _mm256_store_ps(entries + i, _mm256_cvtph_ps(load_16(codebook + i)));
      const Index low = group_index<Bits>(cell, g, 0), high = group_index<Bits>(cell, g, 1);
      const auto places = [](__m256i a, __m256i b) { return V::shifted_right({a, b}, Bits); };
      const Two<V> found = {{look_up<Bits - 1>(entries, low.first), look_up<Bits - 1>(entries, high.first)},
                            {look_up<Bits - 1>(entries, low.second), look_up<Bits - 1>(entries, high.second)}};
      spread<V>(places(low.first, high.first), places(low.second, high.second), found, weights);
    }
  }
}

struct CellsAvx2 {
  using V = Twice<Avx2>;
  template <int Tokens>
  static constexpr int kChains = Tokens <= 2 ? 2 : 1;
  static constexpr int kPairs = 1, kGroups = 1, kTokenChains = 2;
  static void prefetch(const void* at) { cpu::prefetch(at, kCellsAvx2); }

  template <ValueType Type>
  static inline __attribute__((always_inline)) Two<V> expand_pair(uint32_t mask, const uint8_t*& values) {
    const uint32_t byte[4] = {mask & 255, mask >> 8 & 255, mask >> 16 & 255, mask >> 24};
    if constexpr (Type == ValueType::bf16) {
      __m256i both[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m128i low = expand_halves(byte[2 * half], values);
        both[half] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), expand_halves(byte[2 * half + 1], values), 1);
      }
      return {V::first_bf16({both[0], both[1]}), V::second_bf16({both[0], both[1]})};
    }
    const __m256 a = expand_eight<Type>(byte[0], values), b = expand_eight<Type>(byte[1], values);
    const __m256 c = expand_eight<Type>(byte[2], values), d = expand_eight<Type>(byte[3], values);
    return {{a, b}, {c, d}};
  }

  template <ValueType Type>
  static float dot_columns(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    const auto add = [&](const uint8_t* value, const uint8_t* column, __m256& to) {
      const __m256i place = column_bytes == 4 ? load_32(column) : _mm256_cvtepu16_epi32(load_16(column));
      __m256 w;
      if constexpr (Type == ValueType::fp32) w = _mm256_loadu_ps(reinterpret_cast<const float*>(value));
      if constexpr (Type == ValueType::int8) w = Avx2::load_int8(value);
      if constexpr (Type == ValueType::fp16) w = Avx2::load_fp16(value);
      if constexpr (Type == ValueType::bf16) w = Avx2::first_bf16(_mm256_cvtepu16_epi32(load_16(value)));
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
    return Avx2::total(_mm256_add_ps(sum[0], sum[1]));
  }
};

constexpr SparseKernels kernels() {
  SparseKernels found = cell_kernels<CellsAvx2>(std::make_integer_sequence<int, 4>());
  found.few_code_tokens = 8;
  found.code_tables = kCodeTablesAvx2;
  found.expand_codes[0] = expand_codes<2>;
  found.expand_codes[1] = expand_codes<3>;
  found.expand_codes[2] = expand_codes<4>;
  return found;
}

}  // namespace

constinit const SparseKernels kSparseAvx2 = kernels();

}  // namespace pyllmq::cpu

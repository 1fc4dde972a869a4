// The kernels of linear.h that differ between instruction sets in width only. A Cells says of one
//
//   V                             a vector of 16 rows (runtime/simd.h)
//   kChains<Tokens>               sums of a token that are added at the end: a multiply-add takes 4 cycles
//   kPairs, kGroups               pairs of columns and groups of four whose loops are unrolled
//   kTokenChains                  of dot_tokens
//   prefetch(at)                  relative to where a kernel reads; what it steps over (masks, positions) by a call of its own
//   expand_pair<Type>(mask, at)   columns 2 p and 2 p + 1 of a bitmap; `at`, where their values are, moves on
#pragma once
#include <utility>

#include "runtime/simd.h"
#include "sparse/cpu/linear.h"

namespace pyllmq::cpu {
namespace {

template <class V>
struct Two {  // columns, or kept weights, of 16 rows
  typename V::R first, second;
};

template <class Cells, int Tokens>
struct Sums {
  using V = typename Cells::V;
  static constexpr int kChains = Cells::template kChains<Tokens>;
  typename V::R sum[Tokens][kChains];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) sum[t][c] = V::set(0);
  }
  // x0 and x1 of a token, of the pair or group `place`.
  inline __attribute__((always_inline)) void add(int t, int place, const Two<V>& w, typename V::R x0, typename V::R x1) {
    auto &a = sum[t][2 * place % kChains], &b = sum[t][(2 * place + 1) % kChains];
    a = V::fma(w.first, x0, a);
    b = V::fma(w.second, x1, b);
  }
  inline __attribute__((always_inline)) void store(float* sums) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      auto total = sum[t][0];
      if constexpr (kChains >= 2) total = V::add(total, sum[t][1]);
      if constexpr (kChains == 4) total = V::add(total, V::add(sum[t][2], sum[t][3]));
      V::store(sums + t * kTileRows, V::add(V::load(sums + t * kTileRows), total));
    }
  }
};

// --- bitmap --------------------------------------------------------------------------------------------------------

template <class Cells, ValueType Type, int Tokens>
void multiply_bitmap(const CellWork& work) {
  using V = typename Cells::V;
  Sums<Cells, Tokens> sums;
  sums.clear();
  const auto* masks = reinterpret_cast<const uint32_t*>(work.cell);
  const uint8_t* values = work.cell + work.slots * 2;
  for (int64_t line = 0; line < work.slots * 2; line += 64) Cells::prefetch(work.cell + line);
  const float* x = work.x;
  for (int64_t pair = 0; pair < work.slots / 2; pair += Cells::kPairs, x += 2 * Cells::kPairs * Tokens) {
#pragma GCC unroll 4
    for (int p = 0; p < Cells::kPairs; ++p) {
      if (p % 2 == 0 || Type == ValueType::fp32) Cells::prefetch(values);
      const Two<V> w = Cells::template expand_pair<Type>(masks[pair + p], values);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) sums.add(t, p, w, V::set(x[2 * p * Tokens + t]), V::set(x[(2 * p + 1) * Tokens + t]));
    }
  }
  sums.store(work.sums);
}

template <class Cells, ValueType Type>
void expand_bitmap(const uint8_t* cell, int64_t slots, float* weights) {
  using V = typename Cells::V;
  const auto* masks = reinterpret_cast<const uint32_t*>(cell);
  const uint8_t* values = cell + slots * 2;
  for (int64_t line = 0; line < slots * 2; line += 64) Cells::prefetch(cell + line);
  for (int64_t pair = 0; pair < slots / 2; ++pair, weights += 2 * kCellRows) {
    Cells::prefetch(values);
    const Two<V> w = Cells::template expand_pair<Type>(masks[pair], values);
    V::store(weights, w.first);
    V::store(weights + kCellRows, w.second);
  }
}

// --- 2:4 -----------------------------------------------------------------------------------------------------------

// The first and the second kept weights of 16 rows.
template <class V, ValueType Type>
inline __attribute__((always_inline)) Two<V> load_two(const uint8_t* values) {
  const uint8_t* second = values + kCellRows * value_bytes(Type);
  if constexpr (Type == ValueType::bf16) {
    const auto pairs = V::load_index(values);
    return {V::first_bf16(pairs), V::second_bf16(pairs)};
  }
  if constexpr (Type == ValueType::fp16) return {V::load_fp16(values), V::load_fp16(second)};
  if constexpr (Type == ValueType::int8) return {V::load_int8(values), V::load_int8(second)};
  return {V::load(reinterpret_cast<const float*>(values)), V::load(reinterpret_cast<const float*>(second))};
}

template <ValueType Type>
constexpr int64_t kGroupBytes = 2 * kCellRows * value_bytes(Type);

template <class Cells, ValueType Type, int Tokens>
void multiply_24(const CellWork& work) {
  using V = typename Cells::V;
  Sums<Cells, Tokens> sums;
  sums.clear();
  const float* x = work.x;
  const uint8_t* cell = work.cell;
  for (int64_t slot = 0; slot < work.slots; slot += kBatchColumns) {
    auto place = V::load_index(cell);
    Cells::prefetch(cell);
    cell += 4 * kCellRows;
    for (int groups = 0; groups < 8; groups += Cells::kGroups)
#pragma GCC unroll 8
      for (int g = 0; g < Cells::kGroups; ++g, cell += kGroupBytes<Type>, x += 4 * Tokens) {
        for (int64_t line = 0; line < kGroupBytes<Type>; line += 64) Cells::prefetch(cell + line);
        const Two<V> w = load_two<V, Type>(cell);
        const auto next = V::shifted_right(place, 2);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) sums.add(t, g, w, V::look_up_four(x + 4 * t, place), V::look_up_four(x + 4 * t, next));
        place = V::shifted_right(place, 4);
      }
  }
  sums.store(work.sums);
}

// Two kept weights of 16 rows to their places, the low 2 bits, among four columns.
template <class V>
inline void spread(typename V::Index first_place, typename V::Index second_place, const Two<V>& w, float* weights) {
  const auto first = V::low_bits(first_place, 3), second = V::low_bits(second_place, 3);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c)
    V::store(weights + c * kCellRows, V::select(V::same(second, c), w.second, V::zero_unless(V::same(first, c), w.first)));
}

template <class Cells, ValueType Type>
void expand_24(const uint8_t* cell, int64_t slots, float* weights) {
  using V = typename Cells::V;
  for (int64_t slot = 0; slot < slots; slot += kBatchColumns) {
    auto place = V::load_index(cell);
    Cells::prefetch(cell);
    cell += 4 * kCellRows;
    for (int g = 0; g < 8; ++g, cell += kGroupBytes<Type>, weights += 4 * kCellRows) {
      Cells::prefetch(cell);
      spread<V>(place, V::shifted_right(place, 2), load_two<V, Type>(cell), weights);
      place = V::shifted_right(place, 4);
    }
  }
}

// --- few kept weights ----------------------------------------------------------------------------------------------

template <class Cells, ValueType Type>
void dot_tokens(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x, float* sums) {
  using V = typename Cells::V;
  constexpr int kChains = Cells::kTokenChains;
  typename V::R sum[kChains];
  for (auto& each : sum) each = V::set(0);
  const auto run = [&](auto* column) {
    const auto add = [&](int64_t i, typename V::R& to) {
      to = V::fma(V::set(value_at(Type, values, i)), V::load(x + column[i] * kTokensSideBySide), to);
    };
    int64_t i = 0;
    for (; i + kChains <= count; i += kChains)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add(i + c, sum[c]);
    for (; i < count; ++i) add(i, sum[0]);
  };
  column_bytes == 2 ? run(reinterpret_cast<const uint16_t*>(columns)) : run(reinterpret_cast<const uint32_t*>(columns));
  auto total = V::add(sum[0], sum[1]);
  if constexpr (kChains == 4) total = V::add(total, V::add(sum[2], sum[3]));
  V::store(sums, total);
}

// The row of these, for up to kTokens tokens; the others stay null.
template <class Cells, int... TokensLessOne>
constexpr SparseKernels cell_kernels(std::integer_sequence<int, TokensLessOne...>) {
  SparseKernels kernels{};
  kernels.few_tokens = sizeof...(TokensLessOne);
  const auto of_type = [&]<ValueType Type>() {
    constexpr int type = static_cast<int>(Type);
    ((kernels.bitmap[type][TokensLessOne] = multiply_bitmap<Cells, Type, TokensLessOne + 1>), ...);
    ((kernels.sparse24[type][TokensLessOne] = multiply_24<Cells, Type, TokensLessOne + 1>), ...);
    kernels.expand_bitmap[type] = expand_bitmap<Cells, Type>;
    kernels.expand_24[type] = expand_24<Cells, Type>;
    kernels.dot_columns[type] = Cells::template dot_columns<Type>;
    kernels.dot_tokens[type] = dot_tokens<Cells, Type>;
  };
  of_type.template operator()<ValueType::fp32>();
  of_type.template operator()<ValueType::bf16>();
  of_type.template operator()<ValueType::fp16>();
  of_type.template operator()<ValueType::int8>();
  return kernels;
}

}  // namespace
}  // namespace pyllmq::cpu

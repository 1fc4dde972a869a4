// The kernels of step_kernels.h for a vector type V (runtime/simd.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decode_step/cpu/step_functions.h"
#include "decode_step/cpu/step_kernels.h"
#include "runtime/counting.h"

namespace pyllmq::cpu {
namespace {

// --- norms ---------------------------------------------------------------------------------------------------------

// Sum of term(x[i]), in four chains.
template <class V, class Term>
float sum_of(const float* x, int64_t count, float missing, Term term) {
  constexpr int64_t width = V::width;
  typename V::R chains[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width)
    for (int c = 0; c < 4; ++c) chains[c] = V::add(chains[c], term(V::load(x + i + c * width)));
  for (; i < count; i += width) chains[0] = V::add(chains[0], term(V::load_part(x + i, count - i, missing)));
  return V::total(V::add(V::add(chains[0], chains[1]), V::add(chains[2], chains[3])));
}

template <class V>
void norm(NormKind kind, float eps, const float* weight, const float* bias, const float* x, int64_t count, float* y) {
  using R = typename V::R;
  const float inverse_count = 1.0f / static_cast<float>(count);
  const float mean = kind == NormKind::layer ? sum_of<V>(x, count, 0, [](R v) { return v; }) * inverse_count : 0;
  const float squares = sum_of<V>(x, count, mean, [mean](R v) {
    const R d = V::sub(v, V::set(mean));
    return V::mul(d, d);
  });
  const R inverse = V::set(1 / std::sqrt(squares * inverse_count + eps));
  for (int64_t i = 0; i < count; i += V::width) {
    R v = V::mul(V::sub(V::load_part(x + i, count - i, 0), V::set(mean)), inverse);
    if (weight != nullptr) v = V::mul(v, V::load_part(weight + i, count - i, 0));
    if (bias != nullptr) v = V::add(v, V::load_part(bias + i, count - i, 0));
    V::store_part(y + i, count - i, v);
  }
}

inline float to_fp32(float x) { return x; }
inline float to_fp32(uint16_t bf16) { return bf16_to_fp32(bf16); }

// --- attention -----------------------------------------------------------------------------------------------------

// Rows of the cache that will be read next, asked for a line at a time beside the arithmetic: eight rows are read side by
// side, which no prefetcher of the CPU follows. A cache in memory at 1800 positions: 107 ns a key without, 81 with.
struct Ahead {
  const uint8_t* rows;
  int64_t stride, element;  // in bytes; 0 where nothing is read next: the same line over and over, cheaper than a branch

  Ahead(const AttentionPart& part, const void* memory, int64_t row_stride, int64_t begin)
      : rows(static_cast<const uint8_t*>(memory)), stride(0), element(0) {
    if (begin >= part.ahead_end) return;
    element = element_bytes(part.dtype);
    stride = row_stride * element;
    rows += begin * stride;
  }
  void fetch(int64_t row, int64_t column) const { __builtin_prefetch(rows + row * stride + column * element); }
};

// scores[i, lane] = <q[., lane], k[i]>: rows of q stand side by side, so that each key is read once for all of them and
// nothing is summed across a register. Sums of 32 products are joined: one long chain would lose a digit at 256.
template <class V, int kKeys, class Number>
void score_keys(const float* q, const Number* k, int64_t stride, int64_t size, const Ahead& ahead, int64_t first_key,
                float* scores) {
  using R = typename V::R;
  for (int64_t begin = 0; begin < size; begin += 32) {
    const int64_t end = std::min<int64_t>(size, begin + 32);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      ahead.fetch(first_key + i, begin);
      if constexpr (sizeof(Number) == 4) ahead.fetch(first_key + i, begin + 16);
    }
    R sums[kKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) sums[i] = V::set(0);
    int64_t d = begin;
    if constexpr (sizeof(Number) == 2)
      for (; d + 2 <= end; d += 2) {
        const R first_of_rows = V::load(q + d * V::width), second_of_rows = V::load(q + (d + 1) * V::width);
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) {
          uint32_t two;
          std::memcpy(&two, k + i * stride + d, sizeof two);
          R first, second;
          V::set_two(two, first, second);
          sums[i] = V::fma(second, second_of_rows, V::fma(first, first_of_rows, sums[i]));
        }
      }
    for (; d < end; ++d) {
      const R of_rows = V::load(q + d * V::width);
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) sums[i] = V::fma(V::set(to_fp32(k[i * stride + d])), of_rows, sums[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      float* score = scores + i * V::width;
      V::store(score, begin == 0 ? sums[i] : V::add(V::load(score), sums[i]));
    }
  }
}

// out[r] = out[r] * keep[r] + sum over i of weights[i, r] * v[i], kVectors registers wide.
template <class V, int kRows, int kVectors, class Number>
void add_values(const float* weights, const Number* v, int64_t stride, int64_t keys, const float* keep, const Ahead& ahead,
                int64_t column, float* out, int64_t out_stride) {
  typename V::R sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[r][j] = V::mul(V::load(out + r * out_stride + j * V::width), V::set(keep[r]));
  for (int64_t i = 0; i < keys; ++i) {
    ahead.fetch(i, column);
    typename V::R value[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) value[j] = V::load(v + i * stride + j * V::width);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto weight = V::set(weights[i * V::width + r]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[r][j] = V::fma(weight, value[j], sums[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) V::store(out + r * out_stride + j * V::width, sums[r][j]);
}

template <class V, int kRows, class Number>
void add_values_to_rows(const float* weights, const Number* v, int64_t stride, int64_t keys, const float* keep,
                        const Ahead& ahead, float* out, int64_t size) {
  int64_t d = 0;
  for (; d + 2 * V::width <= size; d += 2 * V::width)
    add_values<V, kRows, 2>(weights, v + d, stride, keys, keep, ahead, d, out + d, size);
  if (d < size) add_values<V, kRows, 1>(weights, v + d, stride, keys, keep, ahead, d, out + d, size);
}

// Positions [begin, begin + count) in fp32, rows filled up to `padded`: where they lie, or converted into `room`.
inline const float* block_in_fp32(const AttentionPart& part, const void* memory, int64_t stride, int64_t size, int64_t padded,
                                  int64_t begin, int64_t count, float* room, int64_t* room_stride) {
  const auto* from = static_cast<const uint8_t*>(memory) + begin * stride * element_bytes(part.dtype);
  *room_stride = stride;
  if (part.dtype == DType::fp32 && size == padded) return reinterpret_cast<const float*>(from);
  *room_stride = padded;
  if (stride == size && size == padded) {
    part.to_fp32(from, room, count * size);
    return room;
  }
  for (int64_t i = 0; i < count; ++i) {
    part.to_fp32(from + i * stride * element_bytes(part.dtype), room + i * padded, size);
    std::fill(room + i * padded + size, room + (i + 1) * padded, 0.0f);
  }
  return room;
}

// Scores of hidden positions become -inf, soft cap and mask are applied. lane_row: the row of lane 0.
template <class V>
void limit_scores(const AttentionPart& part, int64_t begin, int64_t keys, int64_t lane_row, float* scores) {
  using R = typename V::R;
  if (part.soft_cap > 0)
    for (int64_t i = 0; i < keys; ++i) {
      const R s = V::mul(V::load(scores + i * V::width), V::set(1 / part.soft_cap));
      V::store(scores + i * V::width, V::mul(hyperbolic_tangent<V>(s), V::set(part.soft_cap)));
    }
  if (part.mask != nullptr)
    for (int64_t lane = 0; lane < std::min<int64_t>(V::width, part.rows - lane_row); ++lane) {
      const float* mask = part.mask + (lane_row + lane) / part.group * part.mask_query_stride + begin;
      for (int64_t i = 0; i < keys; ++i) scores[i * V::width + lane] += mask[i];
    }
  if (static_cast<float>(begin) >= part.latest_first && static_cast<float>(begin + keys) <= part.earliest_last) return;
  const R first = V::load(part.first + lane_row), last = V::load(part.last + lane_row);
  for (int64_t i = 0; i < keys; ++i) {
    const R position = V::set(static_cast<float>(begin + i));
    R s = V::select(V::above(first, position), V::set(-kInfinity), V::load(scores + i * V::width));
    V::store(scores + i * V::width, V::select(V::above(last, position), s, V::set(-kInfinity)));
  }
}

// Scores become weights exp(score - largest so far); keep: what earlier sums are to be multiplied by.
template <class V>
void soften(int64_t keys, float* scores, float* largest, float* sums, float* keep) {
  using R = typename V::R;
  const R before = V::load(largest);
  R found = before;
  for (int64_t i = 0; i < keys; ++i) found = V::max(found, V::load(scores + i * V::width));
  V::store(largest, found);
  const R base = V::select(V::above(found, V::set(-kInfinity)), found, V::set(0));
  const R kept = exponential<V, true>(V::sub(before, base));
  R sum = V::mul(V::load(sums), kept);
  for (int64_t i = 0; i < keys; ++i) {
    const R weight = exponential<V, true>(V::sub(V::load(scores + i * V::width), base));
    V::store(scores + i * V::width, weight);
    sum = V::add(sum, weight);
  }
  V::store(sums, sum);
  V::store(keep, kept);
}

// Some keys and their values, each `stride` numbers behind the one before.
template <class Number>
struct Block {
  int64_t begin, count;
  const Number *keys = nullptr, *values = nullptr;
  int64_t key_stride = 0, value_stride = 0;
};

// The sums of the part go on with one block.
template <class V, class Number>
void attend_to(const AttentionPart& part, const Block<Number>& block, const Ahead& values_ahead, const Ahead& keys_ahead) {
  constexpr int64_t width = V::width;
  const int64_t padded = rounded_up(part.value_size, width), keys = block.count, stride = block.key_stride;
  const Ahead nothing(part, part.q, 0, part.ahead_end);
  alignas(64) float scores[kBlockKeys * width], keep[width];
  const auto begin = static_cast<float>(block.begin), end = static_cast<float>(block.begin + keys);
  for (int64_t row = 0; row < part.rows; row += width) {
    const int64_t rows = std::min(width, part.rows - row);
    bool seen = false;
    for (int64_t r = row; r < row + rows; ++r) seen |= part.first[r] < end && part.last[r] > begin;
    if (!seen) continue;
    const float* q = part.q + row * part.head_size;
    const Ahead& ahead = row == 0 ? values_ahead : nothing;
    int64_t i = 0;
    for (; i + 8 <= keys; i += 8)
      score_keys<V, 8>(q, block.keys + i * stride, stride, part.head_size, ahead, i, scores + i * width);
    for (; i < keys; ++i) score_keys<V, 1>(q, block.keys + i * stride, stride, part.head_size, ahead, i, scores + i * width);
    limit_scores<V>(part, block.begin, keys, row, scores);
    soften<V>(keys, scores, part.largest + row, part.sums + row, keep);
    for (int64_t r = 0; r < rows; r += 4) {
      constexpr decltype(&add_values_to_rows<V, 1, Number>) add[4] = {
          add_values_to_rows<V, 1, Number>, add_values_to_rows<V, 2, Number>, add_values_to_rows<V, 3, Number>,
          add_values_to_rows<V, 4, Number>};
      add[std::min<int64_t>(4, rows - r) - 1](scores + r, block.values, block.value_stride, keys, keep + r,
                                              row + r == 0 ? keys_ahead : nothing, part.weighted + (row + r) * padded, padded);
    }
  }
}

template <class V>
void attend(const AttentionPart& part) {
  constexpr int64_t width = V::width;
  const int64_t lane_groups = ceil_div(part.rows, width);
  const int64_t padded = rounded_up(part.value_size, width);
  std::fill_n(part.largest, lane_groups * width, -kInfinity);
  std::fill_n(part.sums, lane_groups * width, 0.0f);
  std::fill_n(part.weighted, part.rows * padded, 0.0f);
  // Read where they lie: bf16 in registers becomes fp32 at 3 operations for 16 products.
  const bool in_place = part.dtype == DType::bf16 && part.value_size == padded;
  alignas(64) float key_room[kBlockKeys * kLargestHead], value_room[kBlockKeys * kLargestHead];
  for (int64_t begin = part.begin; begin < part.end; begin += kBlockKeys) {
    const int64_t keys = std::min(kBlockKeys, part.end - begin);
    const Ahead keys_ahead(part, part.keys, part.key_stride, begin + kBlockKeys);
    if (in_place) {
      const Ahead values_ahead(part, part.values, part.value_stride, begin);
      attend_to<V, uint16_t>(
          part,
          {begin, keys, static_cast<const uint16_t*>(part.keys) + begin * part.key_stride,
           static_cast<const uint16_t*>(part.values) + begin * part.value_stride, part.key_stride, part.value_stride},
          values_ahead, keys_ahead);
      continue;
    }
    Block<float> block{begin, keys};
    block.keys =
        block_in_fp32(part, part.keys, part.key_stride, part.head_size, part.head_size, begin, keys, key_room, &block.key_stride);
    block.values = block_in_fp32(part, part.values, part.value_stride, part.value_size, padded, begin, keys, value_room,
                                 &block.value_stride);
    // What is converted is read in one go, a block ahead; else the values of this block are asked for beside its keys.
    const bool converted = block.keys == key_room || block.values == value_room;
    const Ahead values_ahead(part, part.values, part.value_stride, converted ? begin + kBlockKeys : begin);
    attend_to<V>(part, block, values_ahead, keys_ahead);
  }
}

// --- MLP -----------------------------------------------------------------------------------------------------------

template <class V, class Function>
void activate_by(Function function, const float* gate, const float* up, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += V::width) {
    const auto a = function(V::load_part(gate + i, count - i, 0));
    V::store_part(y + i, count - i, up == nullptr ? a : V::mul(a, V::load_part(up + i, count - i, 0)));
  }
}

template <class V>
void activate(Activation activation, const float* gate, const float* up, int64_t count, float* y) {
  using R = typename V::R;
  switch (activation) {
    case Activation::silu: return activate_by<V>([](R x) { return V::mul(x, sigmoid<V>(x)); }, gate, up, count, y);
    case Activation::gelu: return activate_by<V>([](R x) { return V::mul(x, normal_distribution<V>(x)); }, gate, up, count, y);
    case Activation::gelu_tanh:  // (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
      return activate_by<V>(
          [](R x) {
            const R factor = V::fma(V::mul(x, x), V::set(0.0713548162726f), V::set(1.59576912161f));
            return V::mul(x, sigmoid<V>(V::mul(x, factor)));
          },
          gate, up, count, y);
    case Activation::relu:
      return activate_by<V>([](R x) { return V::select(V::above(V::set(0), x), V::set(0), x); }, gate, up, count, y);
    case Activation::relu_squared:
      return activate_by<V>([](R x) { return V::select(V::above(V::set(0), x), V::set(0), V::mul(x, x)); }, gate, up, count, y);
  }
}

// --- dense weights ---------------------------------------------------------------------------------------------------

template <class V, int kRows, int kTokens>
void dot(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t columns, float* sums) {
  typename V::R chains[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) chains[r][t] = V::set(0);
  const auto add = [&](auto load, int64_t c) {
    typename V::R of_token[kTokens];
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) of_token[t] = load(x + t * x_stride + c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto weight = load(w + r * w_stride + c);
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) chains[r][t] = V::fma(weight, of_token[t], chains[r][t]);
    }
  };
  int64_t c = 0;
  for (; c + V::width <= columns; c += V::width) add([](const float* from) { return V::load(from); }, c);
  if (c < columns) add([&](const float* from) { return V::load_part(from, columns - c, 0); }, c);
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) sums[t * kDotRows + r] += V::total(chains[r][t]);
}

// Sums of so many registers are joined: one long chain would lose a digit. A single chain of 1030 columns has the least rounding
// error with 32 (rms 4.7e-6; with 8 6.7e-6, with 64 5.3e-6).
template <class V>
constexpr int64_t kJoined = V::width == 1 ? 32 : 64;

template <class V>
void dot_rows(const float* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride, int64_t tokens, int64_t columns,
              float* sums) {
  for (int64_t c = 0; c < columns; c += kJoined<V> * V::width) {
    const int64_t width = std::min<int64_t>(kJoined<V> * V::width, columns - c);
    for (int64_t t = 0; t < tokens; t += 2) {
      const float* x_t = x + t * x_stride + c;
      float* sums_t = sums + t * kDotRows;
      if (rows == kDotRows) {
        (t + 1 < tokens ? dot<V, kDotRows, 2> : dot<V, kDotRows, 1>)(w + c, w_stride, x_t, x_stride, width, sums_t);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        (t + 1 < tokens ? dot<V, 1, 2> : dot<V, 1, 1>)(w + r * w_stride + c, w_stride, x_t, x_stride, width, sums_t + r);
    }
  }
}

constexpr StepKernels kKernels = {V::width, norm<V>, attend<V>, activate<V>, dot_rows<V>};

}  // namespace

template <Isa isa>
const StepKernels& step_kernels_for() {
  return kKernels;
}
template const StepKernels& step_kernels_for<Isa::PYLLMQ_ISA>();

}  // namespace pyllmq::cpu

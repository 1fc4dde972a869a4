// The kernels of sinkhorn.h for a vector type V of runtime/simd.h.
#pragma once
#include "runtime/simd.h"
#include "sinkhorn/cpu/sinkhorn.h"

namespace pyllmq::cpu {
namespace {

template <class V>
void logarithms(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += V::width)
    V::store_part(out + i, count - i, logarithm<V>(V::load_part(x + i, count - i, 1)));
}

template <class V>
float row_floor(const float* cost, const float* block, int64_t m) {
  auto low = V::set(kInfinity);
  auto bad = V::no_flag();
  const auto take = [&](typename V::R c, int64_t j) {
    bad = V::either(bad, V::is_nan(c));
    low = V::min(low, V::add(c, V::load(block + j)));
  };
  int64_t j = 0;
  for (; j + V::width <= m; j += V::width) take(V::load(cost + j), j);
  if (j < m) take(V::load_part(cost + j, m - j, kInfinity), j);
  return V::any(bad) ? __builtin_nanf("") : V::least(low);
}

template <class V>
void build_first(const float* cost, const double* u, const float* block, double inverse, int64_t n, int64_t m, int64_t stride,
                 float* k) {
  const auto scale = V::set(static_cast<float>(inverse));
  for (int64_t i = 0; i < n; ++i) {
    const auto low = V::set(static_cast<float>(u[i]));
    const auto put = [&](typename V::R cost_part, int64_t j) {
      const auto c = V::add(cost_part, V::load(block + j));
      V::store(k + i * stride + j, exponential<V>(V::mul(V::sub(low, c), scale)));
    };
    int64_t j = 0;
    for (; j + V::width <= m; j += V::width) put(V::load(cost + i * m + j), j);
    for (; j < stride; j += V::width) put(V::load_part(cost + i * m + j, m - j, kInfinity), j);
  }
}

template <class V>
void build(const float* cost, const double* u, const double* v, double inverse, int64_t n, int64_t m, int64_t stride, float* k) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < stride; j += V::width) {
      const auto c = V::load_part(cost + i * m + j, m - j, kInfinity);
      V::store(k + i * stride + j, exponential<V>(V::exponent(c, u[i], v + j, inverse)));
    }
}

// Four rows at once: their sums are reduced together. With kParts vectors to a row, at most 4, the rows, x and the column
// sums stay in registers (64x64: 380 cycles a pass in place of 900); with 0, any number, the rows come from the L1 cache again.
template <class V, bool kColumns, int kParts, class Update>
inline void rows_then_columns(const float* k, int64_t n, int64_t stride, const float* x, float* sums_out, const Update& update) {
  using R = typename V::R;
  constexpr int kHeld = kParts > 0 ? kParts : 1;
  R held_x[kHeld], held_sums[kHeld];
  if (kParts > 0) {
    for (int p = 0; p < kHeld; ++p) {
      held_x[p] = V::load(x + p * V::width);
      held_sums[p] = V::set(0);
    }
  } else if (kColumns) {
    for (int64_t j = 0; j < stride; j += V::width) V::store(sums_out + j, V::set(0));
  }
  for (int64_t i = 0; i < n; i += 4) {
    const float* row[4];  // a missing row is the first one again, its scaling 0
    for (int64_t r = 0; r < 4; ++r) row[r] = k + (i + r < n ? i + r : i) * stride;
    R held[kHeld][4], sum[4];
    for (int r = 0; r < 4; ++r) sum[r] = V::set(0);
    if (kParts > 0) {
      for (int p = 0; p < kHeld; ++p)
        for (int r = 0; r < 4; ++r) {
          held[p][r] = V::load(row[r] + p * V::width);
          sum[r] = V::fma(held[p][r], held_x[p], sum[r]);
        }
    } else {
      for (int64_t j = 0; j < stride; j += V::width) {
        const R part = V::load(x + j);
        for (int r = 0; r < 4; ++r) sum[r] = V::fma(V::load(row[r] + j), part, sum[r]);
      }
    }
    alignas(16) float scaling[4];
    store_four(scaling, update(i, V::sums(sum[0], sum[1], sum[2], sum[3])));
    if (!kColumns) continue;
    R factor[4];
    for (int r = 0; r < 4; ++r) factor[r] = V::set(scaling[r]);
    if (kParts > 0) {
      for (int p = 0; p < kHeld; ++p)
        for (int r = 0; r < 4; ++r) held_sums[p] = V::fma(held[p][r], factor[r], held_sums[p]);
    } else {
      const int64_t ahead = 4 * stride;
      for (int64_t j = 0; j < stride; j += V::width) {
        R column = V::load(sums_out + j);
        for (int r = 0; r < 4; ++r) {
          column = V::fma(V::load(row[r] + j), factor[r], column);
          __builtin_prefetch(row[r] + ahead + j);
        }
        V::store(sums_out + j, column);
      }
    }
  }
  if (kParts > 0 && kColumns)
    for (int p = 0; p < kHeld; ++p) V::store(sums_out + p * V::width, held_sums[p]);
}

template <class V, bool kColumns, class Update>
inline void rows_then_columns_of(const float* k, int64_t n, int64_t stride, const float* x, float* sums_out,
                                 const Update& update) {
  switch (V::width > 1 ? stride / V::width : 0) {
    case 1: return rows_then_columns<V, kColumns, 1>(k, n, stride, x, sums_out, update);
    case 2: return rows_then_columns<V, kColumns, 2>(k, n, stride, x, sums_out, update);
    case 3: return rows_then_columns<V, kColumns, 3>(k, n, stride, x, sums_out, update);
    case 4: return rows_then_columns<V, kColumns, V::width >= 16 ? 4 : 0>(k, n, stride, x, sums_out, update);
    default: return rows_then_columns<V, kColumns, 0>(k, n, stride, x, sums_out, update);
  }
}

template <class V>
float pass(const float* k, int64_t n, int64_t stride, const float* x, const RowUpdate& update, float* out, float* column_sums) {
  if (update.over == nullptr) {
    const float *times = update.times, *plus = update.plus;
    rows_then_columns_of<V, true>(k, n, stride, x, column_sums, [=](int64_t i, Four sums) {
      const Four scaling = load_four(times + i) * sums + load_four(plus + i);
      store_four(out + i, scaling);
      return scaling;
    });
    return 0;
  }
  const float* over = update.over;
  Four most = {0, 0, 0, 0};
  rows_then_columns_of<V, true>(k, n, stride, x, column_sums, [=, &most](int64_t i, Four sums) {
    const Four scaling = load_four(over + i) / larger(sums, Four{kTiny, kTiny, kTiny, kTiny});
    store_four(out + i, scaling);
    most = larger(scaling, most);
    return scaling;
  });
  const float most01 = most[0] > most[1] ? most[0] : most[1], most23 = most[2] > most[3] ? most[2] : most[3];
  return most01 > most23 ? most01 : most23;
}

template <class V>
void row_sums(const float* k, int64_t n, int64_t stride, const float* x, float* out) {
  rows_then_columns_of<V, false>(k, n, stride, x, nullptr, [=](int64_t i, Four sums) {
    store_four(out + i, sums);
    return sums;
  });
}

// sum_i K_ij x_i of kParts vectors of columns, at most 4. Several rows at a time: a sum waits 4 cycles for its last term.
template <class V, int kParts>
inline void sum_part(const float* k, int64_t n, int64_t stride, const float* x, typename V::R* total) {
  using R = typename V::R;
  constexpr int kRows = 8 / kParts;
  R sum[kRows][kParts];
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kParts; ++p) sum[r][p] = V::set(0);
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows)
    for (int r = 0; r < kRows; ++r) {
      const R factor = V::set(x[i + r]);
      for (int p = 0; p < kParts; ++p) sum[r][p] = V::fma(V::load(k + (i + r) * stride + p * V::width), factor, sum[r][p]);
    }
  for (; i < n; ++i)
    for (int p = 0; p < kParts; ++p) sum[0][p] = V::fma(V::load(k + i * stride + p * V::width), V::set(x[i]), sum[0][p]);
  for (int p = 0; p < kParts; ++p) {
    total[p] = sum[0][p];
    for (int r = 1; r < kRows; ++r) total[p] = V::add(total[p], sum[r][p]);
  }
}

// finish(j, sums of columns j and after) for each vector of columns.
template <class V, class Finish>
inline void sum_columns(const float* k, int64_t n, int64_t stride, const float* x, const Finish& finish) {
  for (int64_t j = 0; j < stride; j += 4 * V::width) {
    const int64_t parts = (stride - j) / V::width < 4 ? (stride - j) / V::width : 4;
    typename V::R total[4];
    switch (parts) {
      case 1: sum_part<V, 1>(k + j, n, stride, x, total); break;
      case 2: sum_part<V, 2>(k + j, n, stride, x, total); break;
      case 3: sum_part<V, 3>(k + j, n, stride, x, total); break;
      default: sum_part<V, 4>(k + j, n, stride, x, total);
    }
    for (int64_t p = 0; p < parts; ++p) finish(j + p * V::width, total[p]);
  }
}

template <class V>
void column_sums(const float* k, int64_t n, int64_t stride, const float* x, float* out) {
  sum_columns<V>(k, n, stride, x, [=](int64_t j, typename V::R sum) { V::store(out + j, sum); });
}

template <class V>
float scale_columns(const float* k, int64_t n, int64_t stride, const float* x, const float* over, float* out) {
  auto most = V::set(0);
  sum_columns<V>(k, n, stride, x, [=, &most](int64_t j, typename V::R sum) {
    const auto quotient = V::quotient(V::load(over + j), V::max(sum, V::set(kTiny)));
    most = V::max(most, quotient);
    V::store(out + j, quotient);
  });
  return V::most(most);
}

template <class V>
void transpose(const float* k, int64_t n, int64_t stride, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; i += V::width)
    for (int64_t j = 0; j < stride; j += V::width) {
      typename V::R square[V::width];
      for (int64_t r = 0; r < V::width; ++r) square[r] = i + r < n ? V::load(k + (i + r) * stride + j) : V::set(0);
      V::transpose(square);
      for (int64_t r = 0; r < V::width; ++r) V::store(out + (j + r) * rows + i, square[r]);
    }
}

template <class V>
float divide(const float* over, const float* sums, int64_t count, float* out) {
  auto most = V::set(0);
  for (int64_t j = 0; j < count; j += V::width) {
    const auto quotient = V::quotient(V::load(over + j), V::max(V::load(sums + j), V::set(kTiny)));
    most = V::max(most, quotient);
    V::store(out + j, quotient);
  }
  return V::most(most);
}

template <class V>
void plan(const float* k, const float* f, const float* g, int64_t n, int64_t m, int64_t stride, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const auto row = V::set(f[i]);
    const auto mass = [&](int64_t j) { return V::mul(V::mul(row, V::load(k + i * stride + j)), V::load(g + j)); };
    int64_t j = 0;
    for (; j + V::width <= m; j += V::width) V::store(out + i * m + j, mass(j));
    if (j < m) V::store_part(out + i * m + j, m - j, mass(j));
  }
}

template <class V>
void through_plan(const float* k, const float* f, const float* g, const float* grad, int64_t n, int64_t m, int64_t stride,
                  float* row_sums, float* column_sums) {
  for (int64_t j = 0; j < stride; j += V::width) V::store(column_sums + j, V::set(0));
  for (int64_t i = 0; i < n; ++i) {
    auto sum = V::set(0);
    for (int64_t j = 0; j < m; j += V::width) {
      const auto mass = V::mul(V::mul(V::set(f[i]), V::load(k + i * stride + j)), V::load(g + j));
      const auto part = V::mul(mass, V::load_part(grad + i * m + j, m - j, 0));
      sum = V::add(sum, part);
      V::store(column_sums + j, V::add(V::load(column_sums + j), part));
    }
    row_sums[i] = V::total(sum);
  }
}

// Tiles of 4 rows x 2 vectors in registers: 16 multiply-adds for 12 loads per iteration of the tape.
template <class V>
void outer_sums(const float* k, const OuterSums& sums, int64_t n, int64_t m, int64_t stride, float scale, bool add,
                float* grad_cost) {
  using R = typename V::R;
  constexpr int64_t kRows = 4;
  for (int64_t i = 0; i < n; i += kRows) {
    const int64_t rows = n - i < kRows ? n - i : kRows;
    int64_t row[kRows];
    for (int64_t r = 0; r < kRows; ++r) row[r] = i + (r < rows ? r : 0);
    for (int64_t j = 0; j < m; j += 2 * V::width) {
      const int64_t second = j + V::width < stride ? V::width : 0;
      R total[kRows][2];
      for (int64_t r = 0; r < kRows; ++r) total[r][0] = total[r][1] = V::set(0);
      const auto add_terms = [&](int64_t terms, const float* of_rows, int64_t of_rows_stride, const float* of_columns)
                                 __attribute__((always_inline)) {
                                   for (int64_t t = 0; t < terms; ++t) {
                                     const float* right = of_columns + t * sums.column_stride + j;
                                     const R right0 = V::load(right), right1 = V::load(right + second);
                                     for (int64_t r = 0; r < kRows; ++r) {
                                       const R left = V::set(of_rows[t * of_rows_stride + row[r]]);
                                       total[r][0] = V::fma(left, right0, total[r][0]);
                                       total[r][1] = V::fma(left, right1, total[r][1]);
                                     }
                                   }
                                 };
      add_terms(sums.f_terms, sums.f, sums.f_stride, sums.r);
      add_terms(sums.s_terms, sums.s, sums.s_stride, sums.g);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t part = 0; part < 2; ++part) {
          const int64_t column = j + part * V::width;
          if (column >= m) break;
          R sum = total[r][part];
          if (sums.grad_plan != nullptr) {
            const R first = V::mul(V::mul(V::set(sums.last_f[i + r]), V::load(sums.last_g + column)),
                                   V::load_part(sums.grad_plan + (i + r) * m + column, m - column, 0));
            sum = V::sub(sum, first);
          }
          sum = V::mul(V::mul(sum, V::set(scale)), V::load(k + (i + r) * stride + column));
          float* out = grad_cost + (i + r) * m + column;
          if (add) sum = V::add(sum, V::load_part(out, m - column, 0));
          V::store_part(out, m - column, sum);
        }
    }
  }
}

// ---- one problem per lane ---------------------------------------------------------------------------------------------

template <class V>
struct Halving {
  using Half = V;
};
template <class V>
struct Halving<Twice<V>> {
  using Half = V;
};
template <class V>
using HalfOf = typename Halving<V>::Half;

// Lane l of out[e] is from[l * stride + e]; lanes without a problem repeat the first.
template <class V>
inline void gather(const float* from, int64_t stride, int64_t entries, int64_t lanes, float* out) {
  if (stride == 0) {
    for (int64_t e = 0; e < entries; ++e) V::store(out + e * V::width, V::set(from[e]));
    return;
  }
  using H = HalfOf<V>;
  for (int64_t l = 0; l < V::width; l += H::width)
    for (int64_t e = 0; e < entries; e += H::width) {
      typename H::R square[H::width];
      for (int64_t r = 0; r < H::width; ++r)
        square[r] = H::load_part(from + (l + r < lanes ? l + r : 0) * stride + e, entries - e, 0);
      H::transpose(square);
      for (int64_t r = 0; r < H::width && e + r < entries; ++r) H::store(out + (e + r) * V::width + l, square[r]);
    }
}

template <class V>
inline void scatter(const float* from, int64_t entries, int64_t lanes, float* out) {
  using H = HalfOf<V>;
  if (entries == 4 && lanes == V::width) {
    for (int64_t l = 0; l < V::width; l += H::width) {
      typename H::R lines[4];
      for (int64_t e = 0; e < 4; ++e) lines[e] = H::load(from + e * V::width + l);
      H::transpose_fours(lines);
      for (int64_t r = 0; r < 4; ++r) H::store(out + l * 4 + r * H::width, lines[r]);
    }
    return;
  }
  for (int64_t l = 0; l < lanes; l += H::width)
    for (int64_t e = 0; e < entries; e += H::width) {
      typename H::R square[H::width];
      for (int64_t r = 0; r < H::width; ++r) square[r] = e + r < entries ? H::load(from + (e + r) * V::width + l) : H::set(0);
      H::transpose(square);
      for (int64_t r = 0; r < H::width && l + r < lanes; ++r) H::store_part(out + (l + r) * entries + e, entries - e, square[r]);
    }
}

template <class V>
struct SmallState {
  using R = typename V::R;
  float *k, *a, *b, *row_floor;
  float *over_a, *over_b;  // K with its rows divided by a, its columns by b: scalings are reciprocals then; all masses above 0
  R epsilon, mass, limit;
  typename V::Flag finite;  // all costs of the lane's problem

  static float* take(float*& room, int64_t count) {
    float* taken = room;
    room += count * V::width;
    return taken;
  }

  SmallState(const SmallProblem& p, float*& room) {
    k = take(room, p.n * p.m);
    a = take(room, p.n);
    b = take(room, p.m);
    row_floor = take(room, p.n);
    over_a = take(room, p.n * p.m);
    over_b = take(room, p.n * p.m);
    gather<V>(p.cost, p.cost_stride, p.n * p.m, p.lanes(), k);
    gather<V>(p.a, p.a_stride, p.n, p.lanes(), a);
    gather<V>(p.b, p.b_stride, p.m, p.lanes(), b);
    alignas(64) float lane_epsilon[V::width];
    for (int64_t l = 0; l < V::width; ++l) lane_epsilon[l] = p.epsilon[l < p.lanes() ? l : 0];
    epsilon = V::load(lane_epsilon);
    const R minus_inverse = V::div(V::set(-1), epsilon);
    R most = V::set(1);
    mass = V::set(0);
    for (int64_t i = 0; i < p.n; ++i) {
      most = V::max(most, at(a, i));
      mass = V::add(mass, at(a, i));
    }
    for (int64_t j = 0; j < p.m; ++j) most = V::max(most, at(b, j));
    limit = V::mul(most, V::set(kLargeScaling));
    R zeros = V::set(0);  // NaN once a cost was not finite
    for (int64_t i = 0; i < p.n; ++i) {
      R low = V::set(kInfinity);
      for (int64_t j = 0; j < p.m; ++j) {
        R c = at(k, i * p.m + j);
        zeros = V::fma(c, V::set(0), zeros);
        if (!p.full) {
          c = V::select(V::above(at(b, j), V::set(0)), c, V::set(kInfinity));
          put(k, i * p.m + j, c);
        }
        low = V::min(low, c);
      }
      low = V::select(V::above(V::set(kInfinity), low), low, V::set(0));
      put(row_floor, i, low);
      for (int64_t j = 0; j < p.m; ++j)
        put(k, i * p.m + j, exponential<V>(V::mul(V::sub(at(k, i * p.m + j), low), minus_inverse)));
    }
    finite = V::equal(zeros, V::set(0));
    if (!p.full) return;
    for (int64_t i = 0; i < p.n; ++i) {
      const R inverse = p.a_stride == 0 ? V::set(1 / p.a[i]) : V::div(V::set(1), at(a, i));
      for (int64_t j = 0; j < p.m; ++j) put(over_a, i * p.m + j, V::mul(at(k, i * p.m + j), inverse));
    }
    for (int64_t j = 0; j < p.m; ++j) {
      const R inverse = p.b_stride == 0 ? V::set(1 / p.b[j]) : V::div(V::set(1), at(b, j));
      for (int64_t i = 0; i < p.n; ++i) put(over_b, i * p.m + j, V::mul(at(k, i * p.m + j), inverse));
    }
  }

  static R at(const float* array, int64_t e) { return V::load(array + e * V::width); }
  static void put(float* array, int64_t e, R value) { V::store(array + e * V::width, value); }

  R start(int64_t j) const { return V::select(V::above(at(b, j), V::set(0)), V::set(1), V::set(0)); }
};

// Out-of-range scalings are looked for in the first iterations, where they change most, and then in every eighth.
inline bool looks_at_scalings(int64_t t, int64_t iterations) { return t < 4 || t % 8 == 7 || t == iterations - 1; }

// kN = kM = 0: sizes known at run time only. f, g of iteration t go to tape + t * (n + m) lanes when kTape. kFull: all masses
// are above 0. kStops: problems stop by themselves; without, an iteration of 4096 4x4 problems takes 3.9 us, with it 4.9.
template <class V, int kN, int kM, bool kFull, bool kTape, bool kStops>
typename V::Flag small_iterate(const SmallState<V>& state, int64_t n_given, int64_t m_given, int64_t iterations, float tolerance,
                               float* f, float* g, float* tape, float* count) {
  using R = typename V::R;
  using S = SmallState<V>;
  const int64_t n = kN ? kN : n_given, m = kM ? kM : m_given;
  const float *for_rows = kFull ? state.over_a : state.k, *for_columns = kFull ? state.over_b : state.k;
  R most = V::set(0);
  R counted = V::set(0);
  auto going = V::above(V::set(1), V::set(0));
  constexpr int64_t kRows = kN ? kN : kSmallEntries, kColumns = kM ? kM : kSmallEntries;
  R fs[kRows], gs[kColumns], before[kRows];
  for (int64_t i = 0; i < n; ++i) fs[i] = before[i] = V::set(0);
  for (int64_t j = 0; j < m; ++j) gs[j] = state.start(j);
  for (int64_t t = 0; t < iterations; ++t) {
    if (kStops)
      for (int64_t i = 0; i < n; ++i) before[i] = fs[i];
    for (int64_t i = 0; i < n; ++i) {
      R sum = V::set(kTiny);
      for (int64_t j = 0; j < m; ++j) sum = V::fma(S::at(for_rows, i * m + j), gs[j], sum);
      fs[i] = kFull ? V::reciprocal(sum) : V::quotient(S::at(state.a, i), sum);
    }
    if (kStops) {
      if (t > 0) {
        R missed = V::set(0);
        for (int64_t i = 0; i < n; ++i) {
          const R mass = S::at(state.a, i);
          const R change = V::sub(V::div(V::mul(mass, before[i]), V::max(fs[i], V::set(kTiny))), mass);
          missed = V::add(missed, V::max(change, V::sub(V::set(0), change)));
        }
        going = V::both(going, V::above(missed, V::mul(state.mass, V::set(tolerance))));
        for (int64_t i = 0; i < n; ++i) fs[i] = V::select(going, fs[i], before[i]);
        if (!V::any(going)) break;
      }
      counted = V::select(going, V::set(static_cast<float>(t + 1)), counted);
    }
    for (int64_t j = 0; j < m; ++j) {
      R sum = V::set(kTiny);
      for (int64_t i = 0; i < n; ++i) sum = V::fma(S::at(for_columns, i * m + j), fs[i], sum);
      const R scaling = kFull ? V::reciprocal(sum) : V::quotient(S::at(state.b, j), sum);
      gs[j] = kStops ? V::select(going, scaling, gs[j]) : scaling;
    }
    if (kStops || looks_at_scalings(t, iterations)) {
      for (int64_t i = 0; i < n; ++i) most = V::max(most, fs[i]);
      for (int64_t j = 0; j < m; ++j) most = V::max(most, gs[j]);
    }
    if (kTape) {
      for (int64_t i = 0; i < n; ++i) S::put(tape, t * (n + m) + i, fs[i]);
      for (int64_t j = 0; j < m; ++j) S::put(tape, t * (n + m) + n + j, gs[j]);
    }
  }
  for (int64_t i = 0; i < n; ++i) S::put(f, i, fs[i]);
  for (int64_t j = 0; j < m; ++j) S::put(g, j, gs[j]);
  V::store(count, kStops ? counted : V::set(static_cast<float>(iterations)));
  return V::above(most, state.limit);
}

template <class V, bool kTape, bool kStops>
typename V::Flag small_iterate_of(const SmallState<V>& state, const SmallProblem& p, int64_t iterations, float tolerance,
                                  float* f, float* g, float* tape, float* count) {
  const bool four = p.n == 4 && p.m == 4;
  const auto run = p.full ? (four ? small_iterate<V, 4, 4, true, kTape, kStops> : small_iterate<V, 0, 0, true, kTape, kStops>)
                          : (four ? small_iterate<V, 4, 4, false, kTape, kStops> : small_iterate<V, 0, 0, false, kTape, kStops>);
  return run(state, p.n, p.m, iterations, tolerance, f, g, tape, count);
}

template <class V>
SmallLanes small_forward(const SmallProblem& p, const SinkhornForward& out, float* room) {
  using S = SmallState<V>;
  const S state(p, room);
  float* f = S::take(room, p.n);
  float* g = S::take(room, p.m);
  alignas(64) float counted[V::width];
  const auto iterate = out.tolerance > 0 ? small_iterate_of<V, false, true> : small_iterate_of<V, false, false>;
  const auto beyond = iterate(state, p, out.iterations, out.tolerance, f, g, nullptr, counted);
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = 0; j < p.m; ++j)
      S::put(state.k, i * p.m + j, V::mul(V::mul(S::at(f, i), S::at(state.k, i * p.m + j)), S::at(g, j)));
  scatter<V>(state.k, p.n * p.m, p.lanes(), out.plan);
  for (int64_t i = 0; i < p.n; ++i) S::put(f, i, V::fma(logarithm<V>(S::at(f, i)), state.epsilon, S::at(state.row_floor, i)));
  for (int64_t j = 0; j < p.m; ++j) S::put(g, j, V::mul(logarithm<V>(S::at(g, j)), state.epsilon));
  scatter<V>(f, p.n, p.lanes(), out.u);
  scatter<V>(g, p.m, p.lanes(), out.v);
  for (int64_t l = 0; l < p.lanes(); ++l) out.count[l] = static_cast<int32_t>(counted[l]);
  const uint32_t taken = p.lanes() < 32 ? (uint32_t{1} << p.lanes()) - 1 : ~uint32_t{0};
  return {V::bits(beyond) & taken, ~V::bits(state.finite) & taken};
}

template <class V>
struct SmallAdjoint {
  const SmallState<V>& state;
  typename V::R counted;
  float *grad, *through, *gradient_a, *gradient_b, *outside_f, *outside_g, *tape;
};

template <class V, int kN, int kM>
void small_adjoint(const SmallAdjoint<V>& given, int64_t n_given, int64_t m_given, int64_t iterations) {
  using R = typename V::R;
  using S = SmallState<V>;
  const int64_t n = kN ? kN : n_given, m = kM ? kM : m_given;
  const S& state = given.state;
  float *grad = given.grad, *through = given.through, *gradient_a = given.gradient_a, *gradient_b = given.gradient_b;
  constexpr int64_t kRows = kN ? kN : kSmallEntries, kColumns = kM ? kM : kSmallEntries;
  const R zero = V::set(0), one = V::set(1);
  R inverse_a[kRows], inverse_b[kColumns], ds[kRows], dr[kColumns], dg[kColumns];
  for (int64_t i = 0; i < n; ++i) {
    const R mass = S::at(state.a, i);
    inverse_a[i] = V::zero_unless(V::above(mass, zero), V::div(one, V::max(mass, V::set(kTiny))));
    S::put(gradient_a, i, zero);
  }
  for (int64_t j = 0; j < m; ++j) {
    const R mass = S::at(state.b, j);
    inverse_b[j] = V::zero_unless(V::above(mass, zero), V::div(one, V::max(mass, V::set(kTiny))));
    S::put(gradient_b, j, zero);
    dg[j] = zero;
  }
  for (int64_t e = 0; e < n * m; ++e) S::put(through, e, zero);

  for (int64_t t = iterations - 1; t >= 0; --t) {
    const float* f = given.tape + t * (n + m) * V::width;
    const float* g = f + n * V::width;
    const auto last = V::equal(given.counted, V::set(static_cast<float>(t + 1)));
    R df[kRows];
    for (int64_t i = 0; i < n; ++i) df[i] = zero;
    if (V::any(last)) {
      for (int64_t i = 0; i < n; ++i)
        df[i] = V::zero_unless(V::above(S::at(state.a, i), zero), V::mul(state.epsilon, S::at(given.outside_f, i)));
      for (int64_t j = 0; j < m; ++j) {
        R sum = V::zero_unless(V::above(S::at(state.b, j), zero), V::mul(state.epsilon, S::at(given.outside_g, j)));
        for (int64_t i = 0; i < n; ++i) {
          const int64_t e = i * m + j;
          const R scaled = V::mul(V::mul(S::at(f, i), S::at(g, j)), S::at(grad, e));
          S::put(through, e, V::select(last, scaled, S::at(through, e)));
          const R part = V::mul(scaled, S::at(state.k, e));
          sum = V::add(sum, part);
          df[i] = V::add(df[i], part);
        }
        dg[j] = V::select(last, sum, dg[j]);
      }
      for (int64_t i = 0; i < n; ++i) df[i] = V::zero_unless(last, df[i]);
    }
    for (int64_t j = 0; j < m; ++j) {
      const R share = V::mul(dg[j], inverse_b[j]);
      S::put(gradient_b, j, V::add(S::at(gradient_b, j), share));
      dr[j] = V::mul(share, S::at(g, j));
      dg[j] = zero;
    }
    for (int64_t i = 0; i < n; ++i) {
      R sum = V::mul(S::at(state.k, i * m), dr[0]);
      for (int64_t j = 1; j < m; ++j) sum = V::fma(S::at(state.k, i * m + j), dr[j], sum);
      const R scaling = S::at(f, i);
      const R share = V::mul(V::sub(df[i], V::mul(scaling, sum)), inverse_a[i]);
      S::put(gradient_a, i, V::add(S::at(gradient_a, i), share));
      ds[i] = V::mul(share, scaling);
      for (int64_t j = 0; j < m; ++j) dg[j] = V::fma(S::at(state.k, i * m + j), ds[i], dg[j]);
    }
    const float* before = g - (n + m) * V::width;
    for (int64_t j = 0; j < m; ++j) {
      const R earlier = t > 0 ? S::at(before, j) : state.start(j);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t e = i * m + j;
        const R both = V::fma(S::at(f, i), dr[j], V::mul(ds[i], earlier));
        S::put(through, e, V::sub(S::at(through, e), both));
      }
      dg[j] = V::sub(zero, V::mul(dg[j], earlier));
    }
  }
}

template <class V>
uint32_t small_backward(const SmallProblem& p, const SinkhornBackward& out, float* room) {
  using R = typename V::R;
  using S = SmallState<V>;
  const int64_t n = p.n, m = p.m;
  const S state(p, room);
  float* last_f = S::take(room, n);
  float* last_g = S::take(room, m);
  float* grad = S::take(room, n * m);  // of the plan, then of the cost
  float* through = S::take(room, n * m);
  float* gradient_a = S::take(room, n);
  float* gradient_b = S::take(room, m);
  float* outside_f = S::take(room, n);  // d loss / d u, and below d loss / d v
  float* outside_g = S::take(room, m);
  alignas(64) float lane_count[V::width], unused[V::width];
  int64_t iterations = 0;
  for (int64_t l = 0; l < V::width; ++l) {
    const int64_t taken = std::abs(out.count[l < p.lanes() ? l : 0]);
    iterations = taken > iterations ? taken : iterations;
    lane_count[l] = static_cast<float>(taken);
  }
  float* tape = S::take(room, iterations * (n + m));
  const R counted = V::load(lane_count);
  gather<V>(out.grad_plan, n * m, n * m, p.lanes(), grad);
  gather<V>(out.grad_u, n, n, p.lanes(), outside_f);
  gather<V>(out.grad_v, m, m, p.lanes(), outside_g);
  const auto beyond = small_iterate_of<V, true, false>(state, p, iterations, 0.0f, last_f, last_g, tape, unused);
  const SmallAdjoint<V> adjoint{state, counted, grad, through, gradient_a, gradient_b, outside_f, outside_g, tape};
  (n == 4 && m == 4 ? small_adjoint<V, 4, 4> : small_adjoint<V, 0, 0>)(adjoint, n, m, iterations);
  const R minus_inverse = V::div(V::set(-1), state.epsilon);
  for (int64_t e = 0; e < n * m; ++e) S::put(grad, e, V::mul(V::mul(S::at(through, e), S::at(state.k, e)), minus_inverse));
  scatter<V>(grad, n * m, p.lanes(), out.grad_cost);
  scatter<V>(gradient_a, n, p.lanes(), out.grad_a);
  scatter<V>(gradient_b, m, p.lanes(), out.grad_b);
  return V::bits(beyond);
}

}  // namespace
}  // namespace pyllmq::cpu

// The kernels of sinkhorn.h for a vector type V; included by one file per instruction set, each with a V of its own in an
// anonymous namespace, so that no code compiled for one can be linked into another.
#pragma once
#include "cpu/sinkhorn.h"

namespace pyllmq::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();

// exp to 1e-7 relative for x <= 88; below -87, where the result leaves the normal numbers, exactly 0.
template <class V>
inline typename V::R exponential(typename V::R x) {
  using R = typename V::R;
  const R n = V::round(V::mul(x, V::set(1.44269504f)));
  // ln 2 in two parts, the first short enough for n times it to be exact
  R r = V::fma(n, V::set(-0x1.62e4p-1f), x);
  r = V::fma(n, V::set(-0x1.7f7d1cp-20f), r);
  R p = V::set(1.0f / 5040);
  p = V::fma(p, r, V::set(1.0f / 720));
  p = V::fma(p, r, V::set(1.0f / 120));
  p = V::fma(p, r, V::set(1.0f / 24));
  p = V::fma(p, r, V::set(1.0f / 6));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1));
  p = V::fma(p, r, V::set(1));
  return V::zero_unless(V::at_least(x, V::set(-87.0f)), V::scale2(p, n));
}

template <class V>
float row_floor(const float* cost, const float* block, int64_t m) {
  auto low = V::set(kInfinity);
  auto bad = V::no_flag();
  for (int64_t j = 0; j < m; j += V::width) {
    const auto c = V::load_part(cost + j, m - j, kInfinity);
    bad = V::either(bad, V::is_nan(c));
    low = V::min(low, V::add(c, V::load(block + j)));
  }
  return V::any(bad) ? __builtin_nanf("") : V::least(low);
}

template <class V>
void build(const float* cost, const double* u, const double* v, double inverse, int64_t n, int64_t m, int64_t stride,
           float* k) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < stride; j += V::width) {
      const auto c = V::load_part(cost + i * m + j, m - j, kInfinity);
      V::store(k + i * stride + j, exponential<V>(V::exponent(c, u[i], v + j, inverse)));
    }
}

// Four rows at once: their sums are reduced together, and each part of x and of the column sums is loaded for all four.
template <class V, bool kColumns, class Update>
inline void rows_then_columns(const float* k, int64_t n, int64_t stride, const float* x, float* sums_out,
                              const Update& update) {
  using R = typename V::R;
  if (kColumns)
    for (int64_t j = 0; j < stride; j += V::width) V::store(sums_out + j, V::set(0));
  for (int64_t i = 0; i < n; i += 4) {
    const int64_t rows = n - i < 4 ? n - i : 4;
    const float* k0 = k + i * stride;  // a missing row is the first one again, its scaling 0
    const float* k1 = rows > 1 ? k0 + stride : k0;
    const float* k2 = rows > 2 ? k0 + 2 * stride : k0;
    const float* k3 = rows > 3 ? k0 + 3 * stride : k0;
    R s0 = V::set(0), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t j = 0; j < stride; j += V::width) {
      const R part = V::load(x + j);
      s0 = V::fma(V::load(k0 + j), part, s0);
      s1 = V::fma(V::load(k1 + j), part, s1);
      s2 = V::fma(V::load(k2 + j), part, s2);
      s3 = V::fma(V::load(k3 + j), part, s3);
    }
    alignas(16) float sums[4];
    V::sums(s0, s1, s2, s3, sums);
    alignas(16) float scaling[4] = {0, 0, 0, 0};
    update(i, rows, sums, scaling);
    if (!kColumns) continue;
    const R f0 = V::set(scaling[0]), f1 = V::set(scaling[1]), f2 = V::set(scaling[2]), f3 = V::set(scaling[3]);
    for (int64_t j = 0; j < stride; j += V::width) {
      R column = V::load(sums_out + j);
      column = V::fma(V::load(k0 + j), f0, column);
      column = V::fma(V::load(k1 + j), f1, column);
      column = V::fma(V::load(k2 + j), f2, column);
      column = V::fma(V::load(k3 + j), f3, column);
      V::store(sums_out + j, column);
    }
  }
}

template <class V>
float pass(const float* k, int64_t n, int64_t stride, const float* x, const RowUpdate& update, float* out,
           float* column_sums) {
  float most = 0;
  if (update.over != nullptr) {
    rows_then_columns<V, true>(k, n, stride, x, column_sums,
                               [&](int64_t i, int64_t rows, const float* sums, float* scaling) {
                                 for (int64_t r = 0; r < rows; ++r) {
                                   const float s = sums[r] > kTiny ? sums[r] : kTiny;
                                   scaling[r] = out[i + r] = update.over[i + r] / s;
                                   most = scaling[r] > most ? scaling[r] : most;
                                 }
                               });
  } else {
    rows_then_columns<V, true>(k, n, stride, x, column_sums,
                               [&](int64_t i, int64_t rows, const float* sums, float* scaling) {
                                 for (int64_t r = 0; r < rows; ++r)
                                   scaling[r] = out[i + r] = update.times[i + r] * sums[r] + update.plus[i + r];
                               });
  }
  return most;
}

template <class V>
void row_sums(const float* k, int64_t n, int64_t stride, const float* x, float* out) {
  rows_then_columns<V, false>(k, n, stride, x, nullptr,
                              [&](int64_t i, int64_t rows, const float* sums, float*) {
                                for (int64_t r = 0; r < rows; ++r) out[i + r] = sums[r];
                              });
}

template <class V>
void column_sums(const float* k, int64_t n, int64_t stride, const float* x, float* out) {
  for (int64_t j = 0; j < stride; j += V::width) {
    auto sum = V::set(0);
    for (int64_t i = 0; i < n; ++i) sum = V::fma(V::load(k + i * stride + j), V::set(x[i]), sum);
    V::store(out + j, sum);
  }
}

template <class V>
float divide(const float* over, const float* sums, int64_t count, float* out) {
  auto most = V::set(0);
  for (int64_t j = 0; j < count; j += V::width) {
    const auto quotient = V::div(V::load(over + j), V::max(V::load(sums + j), V::set(kTiny)));
    most = V::max(most, quotient);
    V::store(out + j, quotient);
  }
  return V::most(most);
}

template <class V>
void plan(const float* k, const float* f, const float* g, int64_t n, int64_t m, int64_t stride, float* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; j += V::width)
      V::store_part(out + i * m + j, m - j,
                    V::mul(V::mul(V::set(f[i]), V::load(k + i * stride + j)), V::load(g + j)));
}

template <class V>
void through_plan(const float* k, const float* f, const float* g, const float* grad, int64_t n, int64_t m,
                  int64_t stride, float* row_sums, float* column_sums) {
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
      for (int64_t t = 0; t < sums.f_terms; ++t) {
        const float* right = sums.r + t * sums.column_stride + j;
        const R right0 = V::load(right), right1 = V::load(right + second);
        for (int64_t r = 0; r < kRows; ++r) {
          const R left = V::set(sums.f[t * sums.row_stride + row[r]]);
          total[r][0] = V::fma(left, right0, total[r][0]);
          total[r][1] = V::fma(left, right1, total[r][1]);
        }
      }
      for (int64_t t = 0; t < sums.s_terms; ++t) {
        const float* right = sums.g + t * sums.column_stride + j;
        const R right0 = V::load(right), right1 = V::load(right + second);
        for (int64_t r = 0; r < kRows; ++r) {
          const R left = V::set(sums.s[t * sums.row_stride + row[r]]);
          total[r][0] = V::fma(left, right0, total[r][0]);
          total[r][1] = V::fma(left, right1, total[r][1]);
        }
      }
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

// Lane l of out[e] is from[l * stride + e]; lanes without a problem repeat the first.
template <class V>
inline void gather(const float* from, int64_t stride, int64_t entries, int64_t lanes, float* out) {
  for (int64_t l = 0; l < V::width; ++l) {
    const float* problem = from + (l < lanes ? l : 0) * stride;
    for (int64_t e = 0; e < entries; ++e) out[e * V::width + l] = problem[e];
  }
}

template <class V>
inline void scatter(const float* from, int64_t entries, int64_t lanes, float* out) {
  for (int64_t l = 0; l < lanes; ++l)
    for (int64_t e = 0; e < entries; ++e) out[l * entries + e] = from[e * V::width + l];
}

template <class V>
struct SmallState {
  using R = typename V::R;
  float *k, *a, *b, *row_floor, *scalings;
  R epsilon, mass, limit;

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
    gather<V>(p.cost, p.cost_stride, p.n * p.m, p.lanes, k);
    gather<V>(p.a, p.n, p.n, p.lanes, a);
    gather<V>(p.b, p.m, p.m, p.lanes, b);
    alignas(64) float lane_epsilon[V::width];
    gather<V>(p.epsilon, 1, 1, p.lanes, lane_epsilon);
    epsilon = V::load(lane_epsilon);
    const R minus_inverse = V::div(V::set(-1), epsilon);
    R most = V::set(1);
    mass = V::set(0);
    for (int64_t i = 0; i < p.n; ++i) {
      R low = V::set(kInfinity);
      for (int64_t j = 0; j < p.m; ++j) {
        const R c = V::select(V::above(at(b, j), V::set(0)), at(k, i * p.m + j), V::set(kInfinity));
        put(k, i * p.m + j, c);
        low = V::min(low, c);
      }
      low = V::select(V::above(V::set(kInfinity), low), low, V::set(0));
      put(row_floor, i, low);
      for (int64_t j = 0; j < p.m; ++j)
        put(k, i * p.m + j, exponential<V>(V::mul(V::sub(at(k, i * p.m + j), low), minus_inverse)));
      most = V::max(most, at(a, i));
      mass = V::add(mass, at(a, i));
    }
    for (int64_t j = 0; j < p.m; ++j) most = V::max(most, at(b, j));
    limit = V::mul(most, V::set(kLargeScaling));
  }

  static R at(const float* array, int64_t e) { return V::load(array + e * V::width); }
  static void put(float* array, int64_t e, R value) { V::store(array + e * V::width, value); }

  R start(int64_t j) const { return V::select(V::above(at(b, j), V::set(0)), V::set(1), V::set(0)); }
};

// kN = kM = 0: sizes known at run time only. f, g of iteration t go to tape + t * (n + m) lanes when kTape.
template <class V, int kN, int kM, bool kTape>
typename V::Flag small_iterate(const SmallState<V>& state, int64_t n_given, int64_t m_given, int64_t iterations,
                               float tolerance, float* f, float* g, float* tape, float* count) {
  using R = typename V::R;
  using S = SmallState<V>;
  const int64_t n = kN ? kN : n_given, m = kM ? kM : m_given;
  const float* k = state.k;
  R most = V::set(0);
  R counted = V::set(0);
  auto going = V::above(V::set(1), V::set(0));
  R fs[kSmallEntries], gs[kSmallEntries];
  for (int64_t j = 0; j < m; ++j) gs[j] = state.start(j);
  for (int64_t t = 0; t < iterations; ++t) {
    R before[kSmallEntries];
    if (tolerance > 0)
      for (int64_t i = 0; i < n; ++i) before[i] = fs[i];
    for (int64_t i = 0; i < n; ++i) {
      R sum = V::mul(S::at(k, i * m), gs[0]);
      for (int64_t j = 1; j < m; ++j) sum = V::fma(S::at(k, i * m + j), gs[j], sum);
      fs[i] = V::mul(S::at(state.a, i), V::reciprocal(V::max(sum, V::set(kTiny))));
      most = V::max(most, fs[i]);
    }
    if (tolerance > 0) {
      if (t > 0) {
        R missed = V::set(0);
        for (int64_t i = 0; i < n; ++i) {
          const R mass = S::at(state.a, i);
          const R change = V::sub(V::div(V::mul(mass, before[i]), V::max(fs[i], V::set(kTiny))), mass);
          missed = V::add(missed, V::max(change, V::sub(V::set(0), change)));
        }
        going = V::both(going, V::above(missed, V::mul(state.mass, V::set(tolerance))));
        if (!V::any(going)) break;
        for (int64_t i = 0; i < n; ++i) fs[i] = V::select(going, fs[i], before[i]);
      }
      counted = V::select(going, V::set(static_cast<float>(t + 1)), counted);
    }
    for (int64_t j = 0; j < m; ++j) {
      R sum = V::mul(S::at(k, j), fs[0]);
      for (int64_t i = 1; i < n; ++i) sum = V::fma(S::at(k, i * m + j), fs[i], sum);
      const R scaling = V::mul(S::at(state.b, j), V::reciprocal(V::max(sum, V::set(kTiny))));
      gs[j] = tolerance > 0 ? V::select(going, scaling, gs[j]) : scaling;
      most = V::max(most, gs[j]);
    }
    if (kTape) {
      for (int64_t i = 0; i < n; ++i) S::put(tape, t * (n + m) + i, fs[i]);
      for (int64_t j = 0; j < m; ++j) S::put(tape, t * (n + m) + n + j, gs[j]);
    }
  }
  for (int64_t i = 0; i < n; ++i) S::put(f, i, fs[i]);
  for (int64_t j = 0; j < m; ++j) S::put(g, j, gs[j]);
  V::store(count, tolerance > 0 ? counted : V::set(static_cast<float>(iterations)));
  return V::above(most, state.limit);
}

template <class V>
uint32_t small_forward(const SmallProblem& p, int64_t iterations, float tolerance, float* room, float* plan, float* u,
                       float* v, int32_t* count) {
  using S = SmallState<V>;
  const S state(p, room);
  float* f = S::take(room, p.n);
  float* g = S::take(room, p.m);
  alignas(64) float counted[V::width];
  const auto beyond = p.n == 4 && p.m == 4 ? small_iterate<V, 4, 4, false>(state, 4, 4, iterations, tolerance, f, g,
                                                                           nullptr, counted)
                                           : small_iterate<V, 0, 0, false>(state, p.n, p.m, iterations, tolerance, f,
                                                                           g, nullptr, counted);
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = 0; j < p.m; ++j)
      S::put(state.k, i * p.m + j, V::mul(V::mul(S::at(f, i), S::at(state.k, i * p.m + j)), S::at(g, j)));
  scatter<V>(state.k, p.n * p.m, p.lanes, plan);
  for (int64_t l = 0; l < p.lanes; ++l) {
    count[l] = static_cast<int32_t>(counted[l]);
    for (int64_t i = 0; i < p.n; ++i)
      u[l * p.n + i] = state.row_floor[i * V::width + l] + p.epsilon[l] * __builtin_logf(f[i * V::width + l]);
    for (int64_t j = 0; j < p.m; ++j) v[l * p.m + j] = p.epsilon[l] * __builtin_logf(g[j * V::width + l]);
  }
  return V::bits(beyond);
}

template <class V>
uint32_t small_backward(const SmallProblem& p, int64_t iterations, const int32_t* count, const float* grad_plan,
                        const float* grad_u, const float* grad_v, float* room, float* grad_cost, float* grad_a,
                        float* grad_b) {
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
  float* tape = S::take(room, iterations * (n + m));
  alignas(64) float lane_count[V::width], unused[V::width];
  for (int64_t l = 0; l < V::width; ++l) lane_count[l] = static_cast<float>(count[l < p.lanes ? l : 0]);
  const R counted = V::load(lane_count);
  gather<V>(grad_plan, n * m, n * m, p.lanes, grad);
  gather<V>(grad_u, n, n, p.lanes, outside_f);
  gather<V>(grad_v, m, m, p.lanes, outside_g);
  const auto beyond =
      n == 4 && m == 4
          ? small_iterate<V, 4, 4, true>(state, 4, 4, iterations, 0, last_f, last_g, tape, unused)
          : small_iterate<V, 0, 0, true>(state, n, m, iterations, 0, last_f, last_g, tape, unused);

  const R zero = V::set(0), one = V::set(1);
  R inverse_a[kSmallEntries], inverse_b[kSmallEntries], ds[kSmallEntries], dr[kSmallEntries], dg[kSmallEntries];
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
    const float* f = tape + t * (n + m) * V::width;
    const float* g = f + n * V::width;
    const auto last = V::equal(counted, V::set(static_cast<float>(t + 1)));
    R df[kSmallEntries];
    for (int64_t i = 0; i < n; ++i) df[i] = zero;
    if (V::any(last)) {
      for (int64_t i = 0; i < n; ++i)
        df[i] = V::zero_unless(V::above(S::at(state.a, i), zero), V::mul(state.epsilon, S::at(outside_f, i)));
      for (int64_t j = 0; j < m; ++j) {
        R sum = V::zero_unless(V::above(S::at(state.b, j), zero), V::mul(state.epsilon, S::at(outside_g, j)));
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
  const R minus_inverse = V::div(V::set(-1), state.epsilon);
  for (int64_t e = 0; e < n * m; ++e)
    S::put(grad, e, V::mul(V::mul(S::at(through, e), S::at(state.k, e)), minus_inverse));
  scatter<V>(grad, n * m, p.lanes, grad_cost);
  scatter<V>(gradient_a, n, p.lanes, grad_a);
  scatter<V>(gradient_b, m, p.lanes, grad_b);
  return V::bits(beyond);
}

template <class V>
constexpr SinkhornKernels sinkhorn_kernels_of() {
  return {V::width,   row_floor<V>, build<V>,        pass<V>,       row_sums<V>,      column_sums<V>,
          divide<V>,  plan<V>,      through_plan<V>, outer_sums<V>, small_forward<V>, small_backward<V>};
}

}  // namespace
}  // namespace pyllmq::cpu

// The kernels of doubly_stochastic.h for a vector type V, which goes with those of sinkhorn_kernels.h.
//
// Each normalisation divides a line by its sum; the adjoint needs the line after the division and the sum. It keeps the sums
// and undoes the divisions as it goes back: 2 (n + m) numbers an iteration in place of 2 n m.
#pragma once
#include "sinkhorn/cpu/doubly_stochastic.h"
#include "sinkhorn/cpu/sinkhorn_kernels.h"

namespace pyllmq::cpu {
namespace {

// kSize = 0: sizes known at run time only. `row` and `column` are steps between entries; rows are what is summed first.
template <class V, int kSize>
struct Lines {
  using R = typename V::R;
  int64_t rows_given, columns_given;
  bool turned;

  int64_t rows() const { return kSize ? kSize : rows_given; }
  int64_t columns() const { return kSize ? kSize : columns_given; }
  int64_t at(int64_t i, int64_t j) const { return turned ? j * rows() + i : i * columns() + j; }

  template <bool kRows>
  int64_t lines() const {
    return kRows ? rows() : columns();
  }
  template <bool kRows>
  int64_t length() const {
    return kRows ? columns() : rows();
  }
  template <bool kRows>
  int64_t entry(int64_t line, int64_t e) const {
    return kRows ? at(line, e) : at(e, line);
  }

  // Every line divided by its sum + epsilon; the sums go to `sums` if it is there.
  template <bool kRows>
  void normalise(R* x, R epsilon, float* sums) const {
    for (int64_t line = 0; line < lines<kRows>(); ++line) {
      R sum = x[entry<kRows>(line, 0)];
      for (int64_t e = 1; e < length<kRows>(); ++e) sum = V::add(sum, x[entry<kRows>(line, e)]);
      sum = V::add(sum, epsilon);
      if (sums != nullptr) V::store(sums + line * V::width, sum);
      const R inverse = V::quotient(V::set(1), sum);
      for (int64_t e = 0; e < length<kRows>(); ++e) x[entry<kRows>(line, e)] = V::mul(x[entry<kRows>(line, e)], inverse);
    }
  }

  // The adjoint of that, and x as it was before.
  template <bool kRows>
  void undo(R* x, R* gradient, const float* sums) const {
    for (int64_t line = 0; line < lines<kRows>(); ++line) {
      const R sum = V::load(sums + line * V::width), inverse = V::quotient(V::set(1), sum);
      R dot = V::set(0);
      for (int64_t e = 0; e < length<kRows>(); ++e) {
        const int64_t at = entry<kRows>(line, e);
        dot = V::fma(gradient[at], x[at], dot);
        x[at] = V::mul(x[at], sum);
      }
      for (int64_t e = 0; e < length<kRows>(); ++e) {
        const int64_t at = entry<kRows>(line, e);
        gradient[at] = V::mul(V::sub(gradient[at], dot), inverse);
      }
    }
  }
};

template <class V, int kSize>
struct Normalising {
  using R = typename V::R;
  const DoublyStochastic& call;
  Lines<V, kSize> lines;
  float *logits, *exponentials, *sums;

  Normalising(const DoublyStochastic& given, int64_t first, int64_t lanes, float* room)
      : call(given),
        lines{given.columns_first ? given.m : given.n, given.columns_first ? given.n : given.m, given.columns_first} {
    const int64_t entries = call.n * call.m;
    logits = room;
    exponentials = logits + entries * V::width;
    sums = exponentials + 2 * entries * V::width;
    gather<V>(call.logits + first * entries, entries, entries, lanes, logits);
  }

  int64_t entries() const { return lines.rows() * lines.columns(); }
  float* sums_of(int64_t iteration) const { return sums + iteration * (call.n + call.m) * V::width; }
  R logit(int64_t e) const { return V::load(logits + e * V::width); }
  R row_top(int64_t i) const {
    R top = V::set(-kInfinity);
    for (int64_t j = 0; j < lines.columns(); ++j) top = V::max(top, logit(lines.at(i, j)));
    return top;
  }
  bool by_line() const { return call.softmax_start || call.shift == Shift::line; }

  R matrix_top() const {
    R top = V::set(-kInfinity);
    for (int64_t e = 0; e < entries(); ++e) top = V::max(top, logit(e));
    return top;
  }

  // Lanes whose logits have no limit.
  uint32_t refused() const {
    const bool shifted = call.softmax_start || call.shift != Shift::none;
    const R most = V::set(shifted ? kInfinity : kLargestUnshifted), nothing = V::set(-kInfinity);
    auto fine = V::above(V::set(1), V::set(0));
    for (int64_t e = 0; e < entries(); ++e) fine = V::both(fine, V::above(most, logit(e)));
    for (int64_t i = 0; i < lines.rows(); ++i) fine = V::both(fine, V::above(row_top(i), nothing));
    for (int64_t j = 0; j < lines.columns(); ++j) {
      R top = nothing;
      for (int64_t i = 0; i < lines.rows(); ++i) top = V::max(top, logit(lines.at(i, j)));
      fine = V::both(fine, V::above(top, nothing));
    }
    return ~V::bits(fine) & static_cast<uint32_t>((uint64_t{1} << V::width) - 1);
  }

  template <bool kKeep>
  void run(R* x) const {
    const R division = V::set(call.division_epsilon), added = V::set(call.matrix_epsilon);
    const R of_matrix = by_line() || call.shift == Shift::none ? V::set(0) : matrix_top();
    for (int64_t i = 0; i < lines.rows(); ++i) {
      const R top = by_line() ? row_top(i) : of_matrix;
      for (int64_t j = 0; j < lines.columns(); ++j) {
        const int64_t e = lines.at(i, j);
        x[e] = exponential<V>(V::sub(logit(e), top));
        if (kKeep) V::store(exponentials + e * V::width, x[e]);
      }
    }
    lines.template normalise<true>(x, call.softmax_start ? V::set(0) : division, kKeep ? sums_of(0) : nullptr);
    for (int64_t e = 0; e < entries(); ++e) x[e] = V::add(x[e], added);
    for (int64_t t = 0; t < call.iterations; ++t) {
      float* kept = kKeep ? sums_of(t) : nullptr;
      if (t > 0) lines.template normalise<true>(x, division, kept);
      lines.template normalise<false>(x, division, kKeep ? kept + lines.rows() * V::width : nullptr);
    }
  }

  void run_back(R* x, R* gradient) const {
    for (int64_t t = call.iterations - 1; t >= 0; --t) {
      lines.template undo<false>(x, gradient, sums_of(t) + lines.rows() * V::width);
      if (t > 0) lines.template undo<true>(x, gradient, sums_of(t));
    }
    // Through the first division, whose result was exponentials / sum, and through exp.
    R over_all = V::set(0);
    for (int64_t i = 0; i < lines.rows(); ++i) {
      const R inverse = V::quotient(V::set(1), V::load(sums_of(0) + i * V::width));
      R dot = V::set(0), over_line = V::set(0);
      for (int64_t j = 0; j < lines.columns(); ++j) {
        const int64_t e = lines.at(i, j);
        x[e] = V::mul(V::load(exponentials + e * V::width), inverse);
        dot = V::fma(gradient[e], x[e], dot);
      }
      for (int64_t j = 0; j < lines.columns(); ++j) {
        const int64_t e = lines.at(i, j);
        gradient[e] = V::mul(V::sub(gradient[e], dot), x[e]);
        over_line = V::add(over_line, gradient[e]);
      }
      over_all = V::add(over_all, over_line);
      if (!call.softmax_start && call.shift == Shift::line) {
        R ties = V::set(0);
        const R top = row_top(i);
        for (int64_t j = 0; j < lines.columns(); ++j) ties = V::add(ties, is_top(lines.at(i, j), top));
        const R share = V::div(over_line, ties);
        for (int64_t j = 0; j < lines.columns(); ++j) take_from_top(lines.at(i, j), top, share, gradient);
      }
    }
    if (call.softmax_start || call.shift != Shift::matrix) return;
    R ties = V::set(0);
    const R top = matrix_top();
    for (int64_t e = 0; e < entries(); ++e) ties = V::add(ties, is_top(e, top));
    const R share = V::div(over_all, ties);
    for (int64_t e = 0; e < entries(); ++e) take_from_top(e, top, share, gradient);
  }

  // The shift is the largest logit, and where several are the largest each has its share of the shift's gradient.
  R is_top(int64_t e, R top) const { return V::zero_unless(V::equal(logit(e), top), V::set(1)); }
  void take_from_top(int64_t e, R top, R share, R* gradient) const {
    gradient[e] = V::sub(gradient[e], V::zero_unless(V::equal(logit(e), top), share));
  }
};

template <class V, int kSize>
uint32_t normalise_group(const DoublyStochastic& call, int64_t first, int64_t lanes, float* room, float* out) {
  const Normalising<V, kSize> group(call, first, lanes, room);
  if (const uint32_t refused = group.refused()) return refused;
  typename V::R x[kSize ? kSize * kSize : kSmallEntries];
  group.template run<false>(x);
  for (int64_t e = 0; e < group.entries(); ++e) V::store(group.exponentials + e * V::width, x[e]);
  scatter<V>(group.exponentials, group.entries(), lanes, out + first * group.entries());
  return 0;
}

template <class V, int kSize>
void normalise_group_backward(const DoublyStochastic& call, int64_t first, int64_t lanes, float* room, const float* given,
                              float* out) {
  const Normalising<V, kSize> group(call, first, lanes, room);
  typename V::R x[kSize ? kSize * kSize : kSmallEntries], gradient[kSize ? kSize * kSize : kSmallEntries];
  float* staged = group.exponentials + group.entries() * V::width;
  gather<V>(given + first * group.entries(), group.entries(), group.entries(), lanes, staged);
  for (int64_t e = 0; e < group.entries(); ++e) gradient[e] = V::load(staged + e * V::width);
  group.template run<true>(x);
  group.run_back(x, gradient);
  for (int64_t e = 0; e < group.entries(); ++e) V::store(staged + e * V::width, gradient[e]);
  scatter<V>(staged, group.entries(), lanes, out + first * group.entries());
}

template <class V>
uint32_t normalise(const DoublyStochastic& call, int64_t first, int64_t lanes, float* room, float* out) {
  return (call.n == 4 && call.m == 4 ? normalise_group<V, 4> : normalise_group<V, 0>)(call, first, lanes, room, out);
}

template <class V>
void normalise_backward(const DoublyStochastic& call, int64_t first, int64_t lanes, float* room, const float* gradient,
                        float* out) {
  (call.n == 4 && call.m == 4 ? normalise_group_backward<V, 4> : normalise_group_backward<V, 0>)(call, first, lanes, room,
                                                                                                 gradient, out);
}

template <class V, class Small>
constexpr SinkhornKernels sinkhorn_kernels_of() {
  return {Small::width,
          row_floor<V>,
          build_first<V>,
          build<V>,
          logarithms<V>,
          pass<V>,
          row_sums<V>,
          column_sums<V>,
          scale_columns<V>,
          transpose<V>,
          divide<V>,
          plan<V>,
          through_plan<V>,
          outer_sums<V>,
          small_forward<Small>,
          small_backward<Small>,
          normalise<Small>,
          normalise_backward<Small>};
}

}  // namespace
}  // namespace pyllmq::cpu

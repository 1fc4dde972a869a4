// The kernels of split.h for a vector type V of runtime/simd.h.
#include "kmeans/cpu/split.h"
#include "runtime/simd.h"

namespace pyllmq::cpu {
namespace {

Split one_plainly(const SplitTerms& t, int64_t end, int64_t first, int64_t last) {
  Split best{-1.0, first};  // every gain is >= 0
  for (int64_t at = first; at <= last; ++at) {
    const double s = t.sum[end] - t.sum[at];
    const double share = t.inverse ? s * s * t.inverse[end - at] : s * s / (t.mass[end] - t.mass[at]);
    const double value = t.gain[at] + share;
    if (value > best.gain) best = {value, at};
  }
  return best;
}

template <class V>
struct Best {
  using W = typename V::Wide;
  typename W::R gain = W::set(-1.0);
  typename W::Place at = W::place(INT64_MAX);

  void offer(typename W::R value, typename W::Place candidate) {
    const auto better = W::above(value, gain);
    gain = W::select(better, value, gain);
    at = W::select(better, candidate, at);
  }
  void merge(const Best& other) {
    const auto better = W::above_or_earlier(other.gain, gain, other.at, at);
    gain = W::select(better, other.gain, gain);
    at = W::select(better, other.at, at);
  }
  // The best of all lanes, and of `split`.
  Split least(Split split) const {
    alignas(64) double gains[W::width];
    alignas(64) int64_t ats[W::width];
    W::store(gains, gain);
    W::store(ats, at);
    for (int lane = 0; lane < W::width; ++lane)
      if (gains[lane] > split.gain || (gains[lane] == split.gain && ats[lane] < split.at)) split = {gains[lane], ats[lane]};
    return split;
  }
};

// Candidates at .. at + width - 1 of one end.
template <class V, bool Uniform>
typename V::Wide::R candidates(const SplitTerms& t, typename V::Wide::R end_sum, typename V::Wide::R end_mass, int64_t end,
                               int64_t at) {
  using W = typename V::Wide;
  const auto s = W::sub(end_sum, W::load(t.sum + at)), square = W::mul(s, s);
  const auto share =
      Uniform ? W::mul(square, W::load_backwards(t.inverse + end - at)) : W::div(square, W::sub(end_mass, W::load(t.mass + at)));
  return W::add(W::load(t.gain + at), share);
}

template <class V, bool Uniform>
Split one_as(const SplitTerms& t, int64_t end, int64_t first, int64_t last) {
  using W = typename V::Wide;
  if (last - first < 7) return one_plainly(t, end, first, last);  // shorter than the reduction
  const auto end_sum = W::set(t.sum[end]), end_mass = Uniform ? end_sum : W::set(t.mass[end]);
  const auto step = W::place(W::width);
  auto place = W::place_from(first);
  Best<V> even, odd;  // two chains of compare and blend
  const auto offer = [&](Best<V>& to, int64_t at) {
    to.offer(candidates<V, Uniform>(t, end_sum, end_mass, end, at), place);
    place = W::later(place, step);
  };
  int64_t at = first;
  for (; at + 2 * W::width - 1 <= last; at += 2 * W::width) {
    offer(even, at);
    offer(odd, at + W::width);
  }
  if (at + W::width - 1 <= last) {
    offer(even, at);
    at += W::width;
  }
  if (at <= last) {  // some candidates a second time
    place = W::place_from(last - W::width + 1);
    offer(odd, last - W::width + 1);
  }
  return odd.least(even.least({-1.0, INT64_MAX}));
}

// One candidate of `width` ends.
template <class V, bool Uniform>
typename V::Wide::R ends(const SplitTerms& t, typename V::Wide::R end_sum, typename V::Wide::R end_mass, int64_t end,
                         int64_t at) {
  using W = typename V::Wide;
  const auto s = W::sub(end_sum, W::set(t.sum[at])), square = W::mul(s, s);
  const auto share =
      Uniform ? W::mul(square, W::load(t.inverse + end - at)) : W::div(square, W::sub(end_mass, W::set(t.mass[at])));
  return W::add(W::set(t.gain[at]), share);
}

// Two chains of compare and blend: of the ends, or where those fill one vector, of every other candidate.
template <class V, bool Uniform>
void group_as(const SplitTerms& t, int64_t end, int64_t first, int64_t last, double* gains, int64_t* ats) {
  using W = typename V::Wide;
  constexpr int parts = kGroup / W::width, together = 2 / parts;
  typename W::R sum[parts], mass[parts];
  Best<V> best[2];
#pragma GCC unroll 2
  for (int p = 0; p < parts; ++p) {
    sum[p] = W::load(t.sum + end + p * W::width);
    mass[p] = Uniform ? sum[p] : W::load(t.mass + end + p * W::width);
  }
  const auto offer = [&](int64_t at, int chain) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int p = 0; p < parts; ++p)
      best[chain + p].offer(ends<V, Uniform>(t, sum[p], mass[p], end + p * W::width, at), W::place(at));
  };
  int64_t at = first;
  for (; at + together - 1 <= last; at += together)
#pragma GCC unroll 2
    for (int chain = 0; chain < together; ++chain) offer(at + chain, chain);
  if (at <= last) offer(at, 0);
  if constexpr (parts == 1) best[0].merge(best[1]);
#pragma GCC unroll 2
  for (int p = 0; p < parts; ++p) {
    W::store(gains + p * W::width, best[p].gain);
    W::store(ats + p * W::width, best[p].at);
  }
}

template <class V>
Split one(const SplitTerms& t, int64_t end, int64_t first, int64_t last) {
  if constexpr (V::width == 1)
    return one_plainly(t, end, first, last);
  else
    return t.inverse ? one_as<V, true>(t, end, first, last) : one_as<V, false>(t, end, first, last);
}

template <class V>
void group(const SplitTerms& t, int64_t end, int64_t first, int64_t last, double* gains, int64_t* ats) {
  if constexpr (V::width == 1) {
    for (int i = 0; i < kGroup; ++i) {
      const Split best = one_plainly(t, end + i, first, last);
      gains[i] = best.gain;
      ats[i] = best.at;
    }
  } else {
    t.inverse ? group_as<V, true>(t, end, first, last, gains, ats) : group_as<V, false>(t, end, first, last, gains, ats);
  }
}

constexpr SplitKernels kKernels = {one<V>, group<V>};

}  // namespace

template <Isa isa>
const SplitKernels& split_kernels() {
  return kKernels;
}
template const SplitKernels& split_kernels<Isa::PYLLMQ_ISA>();

}  // namespace pyllmq::cpu

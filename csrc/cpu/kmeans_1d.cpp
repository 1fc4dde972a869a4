// Exact 1-D k-means. An optimal clustering of sorted points is a sequence of intervals, so with F_l[i] the best gain of
// cutting the first i points into l clusters,
//     F_l[i] = max_j F_{l-1}[j] + (S_i - S_j)^2 / (W_i - W_j),        SSE = sum w x^2 - F_k[m],
// where S and W are the prefix sums of w x and w. The cost is Monge, hence the best j rises with i and with l: each
// layer is a divide and conquer of O(m log m). Wang & Song 2011 (Ckmeans.1d.dp); Gronlund et al. 2017 (1701.07204).
#include "cpu/kmeans_1d.h"

#include "cpu/half.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace pyllmq::cpu {
namespace {

// ---- words ------------------------------------------------------------------------------------------------------

constexpr int kLloydIterations = 300;     // as sklearn's default; a few tens are usual
constexpr int64_t kRadixSortFrom = 1024;  // below, clearing 3 x 2048 counters costs more than std::sort

// The distinct values of positive weight, ascending, and the prefix sums of their weights and moments.
struct Points {
  std::vector<float> value;
  std::vector<double> centered;  // value - shift, exact: the shift is itself a float near the mean
  std::vector<double> weight;
  std::vector<double> mass;  // [m + 1]
  std::vector<double> sum;   // [m + 1], of weight * centered
  int64_t count() const { return static_cast<int64_t>(value.size()); }
};

struct Workspace {
  std::vector<uint64_t> sorted, scratch;  // order-preserving key << 32 | index
  Points points;
  std::vector<double> gain, next_gain;
  std::vector<uint16_t> back16;
  std::vector<uint32_t> back32;
  std::vector<int64_t> bounds;  // [k + 1], cluster c is [bounds[c], bounds[c + 1])
  std::vector<double> means, distance, trial, best_trial;
};

// ---- loads ------------------------------------------------------------------------------------------------------

uint32_t ordered_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

void sort_values(const float* values, int64_t n, Workspace& work) {
  work.sorted.resize(n);
  for (int64_t i = 0; i < n; ++i) work.sorted[i] = uint64_t{ordered_key(values[i])} << 32 | static_cast<uint64_t>(i);
  if (n < kRadixSortFrom) {
    std::sort(work.sorted.begin(), work.sorted.end());
    return;
  }
  work.scratch.resize(n);
  constexpr int kShift[3] = {32, 43, 54};  // digits of 11, 11 and 10 bits
  uint32_t counts[3][2048] = {};
  for (const uint64_t entry : work.sorted) {
    for (int pass = 0; pass < 3; ++pass) ++counts[pass][(entry >> kShift[pass]) & 2047];
  }
  for (int pass = 0; pass < 3; ++pass) {
    uint32_t start = 0;
    for (uint32_t& count : counts[pass]) start += std::exchange(count, start);
    for (const uint64_t entry : work.sorted) work.scratch[counts[pass][(entry >> kShift[pass]) & 2047]++] = entry;
    work.sorted.swap(work.scratch);
  }
}

void gather_points(const float* values, const float* weights, int64_t n, Workspace& work) {
  double mean = 0, total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double weight = weights ? weights[i] : 1.0;
    mean += weight * values[i];
    total += weight;
  }
  const double shift = static_cast<float>(mean / total);

  Points& points = work.points;
  points.value.clear();
  points.weight.clear();
  for (const uint64_t entry : work.sorted) {
    const auto index = static_cast<uint32_t>(entry);
    const double weight = weights ? weights[index] : 1.0;
    if (weight == 0) continue;
    if (!points.value.empty() && points.value.back() == values[index]) {
      points.weight.back() += weight;
    } else {
      points.value.push_back(values[index]);
      points.weight.push_back(weight);
    }
  }

  // A weight below 2^-53 of those before it would leave a cluster of mass 0; it moves no centroid, so it counts as 0.
  points.centered.clear();
  points.mass.assign(1, 0.0);
  points.sum.assign(1, 0.0);
  int64_t kept = 0;
  for (int64_t i = 0; i < points.count(); ++i) {
    const double mass = points.mass.back() + points.weight[i];
    if (mass == points.mass.back()) continue;
    const double centered = points.value[i] - shift;
    points.value[kept] = points.value[i];
    points.weight[kept++] = points.weight[i];
    points.centered.push_back(centered);
    points.mass.push_back(mass);
    points.sum.push_back(points.sum.back() + points.weight[i] * centered);
  }
  points.value.resize(kept);
  points.weight.resize(kept);
}

// ---- compute: exact -----------------------------------------------------------------------------------------------

template <typename Index>
struct Layer {
  const Points& points;
  SplitSearch search;
  const double* gain;   // of one cluster fewer
  double* next_gain;    // of this layer
  const Index* before;  // best splits of the layer before, a lower bound on this one's; null at the first
  Index* best;          // of this layer

  // Ends lo .. hi, whose best splits lie in first .. last.
  void solve(int64_t lo, int64_t hi, int64_t first, int64_t last) const {
    while (lo <= hi) {
      const int64_t end = lo + (hi - lo) / 2;
      // The bound by the layer before saves 25 % of the candidates at k = 16.
      const int64_t from = before ? std::max<int64_t>(first, before[end]) : first;
      const int64_t to = std::min(last, end - 1);
      const Split split = search(gain, points.sum.data(), points.mass.data(), end, std::min(from, to), to);
      next_gain[end] = split.gain;
      best[end] = static_cast<Index>(split.at);
      solve(lo, end - 1, first, split.at);
      lo = end + 1;
      first = split.at;
    }
  }
};

// Fills bounds[0 .. k] for m > k points. gain_by_k, if given, receives F_1[m] .. F_k[m]: the error of every smaller k.
template <typename Index>
void optimal_bounds(int k, SplitSearch search, Workspace& work, std::vector<Index>& back, double* gain_by_k = nullptr) {
  const Points& points = work.points;
  const int64_t m = points.count();
  work.bounds.assign(k + 1, m);
  work.bounds[0] = 0;
  work.gain.resize(m + 1);
  work.next_gain.resize(m + 1);
  work.gain[0] = 0;
  for (int64_t i = 1; i <= m; ++i) work.gain[i] = points.sum[i] * points.sum[i] / points.mass[i];
  if (gain_by_k) gain_by_k[0] = work.gain[m];
  if (k == 1) return;

  const int64_t row = m + 1;
  const int inner_layers = k - 2;
  if (back.size() < static_cast<size_t>(inner_layers) * row) back.resize(static_cast<size_t>(inner_layers) * row);
  for (int layer = 0; layer < inner_layers; ++layer) {
    const int clusters = layer + 2;
    const Index* before = layer ? back.data() + static_cast<size_t>(layer - 1) * row : nullptr;
    Index* best = back.data() + static_cast<size_t>(layer) * row;
    Layer<Index>{points, search, work.gain.data(), work.next_gain.data(), before, best}.solve(clusters, m, clusters - 1,
                                                                                             m - 1);
    work.gain.swap(work.next_gain);
    if (gain_by_k) gain_by_k[clusters - 1] = work.gain[m];
  }
  const Split split = search(work.gain.data(), points.sum.data(), points.mass.data(), m, k - 1, m - 1);
  if (gain_by_k) gain_by_k[k - 1] = split.gain;
  work.bounds[k - 1] = split.at;
  for (int layer = inner_layers - 1; layer >= 0; --layer) {
    work.bounds[layer + 1] = back[static_cast<size_t>(layer) * row + work.bounds[layer + 2]];
  }
}

// ---- compute: Lloyd -----------------------------------------------------------------------------------------------

// SplitMix64 (Steele, Lea & Flood 2014): the same stream on every platform, unlike std's distributions.
double next_uniform(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

int64_t draw(const std::vector<double>& cumulative, uint64_t& state) {
  const double target = next_uniform(state) * cumulative.back();
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), target);
  return std::min<int64_t>(found - cumulative.begin(), static_cast<int64_t>(cumulative.size()) - 1);
}

// Greedy k-means++ (Arthur & Vassilvitskii 2007), 2 + log k candidates per centre as sklearn does.
void seed_means(int k, uint64_t state, Workspace& work) {
  const Points& points = work.points;
  const int64_t m = points.count();
  const int candidates = 2 + static_cast<int>(std::log(static_cast<double>(k)));
  std::vector<double>& cumulative = work.next_gain;
  cumulative.assign(points.mass.begin() + 1, points.mass.end());
  work.means.assign(1, points.centered[draw(cumulative, state)]);
  work.distance.assign(m, std::numeric_limits<double>::infinity());
  work.trial.resize(m);
  work.best_trial.resize(m);

  const auto distances_with = [&](double mean, std::vector<double>& out) {
    double total = 0;
    for (int64_t i = 0; i < m; ++i) {
      const double offset = points.centered[i] - mean;
      out[i] = std::min(work.distance[i], points.weight[i] * offset * offset);
      total += out[i];
    }
    return total;
  };
  distances_with(work.means[0], work.trial);
  work.distance.swap(work.trial);
  while (static_cast<int>(work.means.size()) < k) {
    double total = 0;
    for (int64_t i = 0; i < m; ++i) cumulative[i] = total += work.distance[i];
    double best_total = std::numeric_limits<double>::infinity(), best_mean = points.centered[m - 1];
    for (int candidate = 0; candidate < candidates; ++candidate) {
      const double mean = points.centered[draw(cumulative, state)];
      const double left = distances_with(mean, work.trial);
      if (left < best_total) {
        best_total = left;
        best_mean = mean;
        work.best_trial.swap(work.trial);
      }
    }
    work.distance.swap(work.best_trial);
    work.means.push_back(best_mean);
  }
  std::sort(work.means.begin(), work.means.end());
}

void lloyd_bounds(int k, uint64_t seed, Workspace& work) {
  const Points& points = work.points;
  seed_means(k, seed, work);
  work.bounds.assign(k + 1, points.count());
  work.bounds[0] = 0;
  for (int iteration = 0; iteration < kLloydIterations; ++iteration) {
    bool moved = false;
    for (int c = 1; c < k; ++c) {
      const double threshold = (work.means[c - 1] + work.means[c]) / 2;
      const auto above = std::upper_bound(points.centered.begin(), points.centered.end(), threshold);
      const int64_t bound = above - points.centered.begin();
      moved |= bound != work.bounds[c];
      work.bounds[c] = bound;
    }
    if (!moved) return;
    for (int c = 0; c < k; ++c) {
      const int64_t begin = work.bounds[c], end = work.bounds[c + 1];
      if (begin == end) continue;  // an empty cluster keeps its centre
      work.means[c] = (points.sum[end] - points.sum[begin]) / (points.mass[end] - points.mass[begin]);
    }
  }
}

// ---- store --------------------------------------------------------------------------------------------------------

// Means are summed afresh, not read off the prefix sums: a light cluster behind heavy ones would lose its digits there.
void store_centroids(int k, const Workspace& work, float* centroids) {
  const Points& points = work.points;
  int stored = 0;
  for (int c = 0; c < k; ++c) {
    const int64_t begin = work.bounds[c], end = work.bounds[c + 1];
    if (begin == end) continue;
    const double origin = points.value[begin];
    double mass = 0, sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      mass += points.weight[i];
      sum += points.weight[i] * (points.value[i] - origin);
    }
    const auto mean = static_cast<float>(origin + sum / mass);
    centroids[stored++] = std::min(std::max(mean, points.value[begin]), points.value[end - 1]);
  }
  for (; stored < k; ++stored) centroids[stored] = centroids[stored - 1];
}

void store_codes(const float* values, int k, const Workspace& work, const float* centroids, uint8_t* codes) {
  uint8_t distinct[256] = {};  // the first code of each run of equal centroids; the others are never used
  int last = 0;
  for (int c = 1; c < k; ++c) {
    if (centroids[c] > centroids[distinct[last]]) distinct[++last] = static_cast<uint8_t>(c);
  }
  const auto centroid = [&](int run) { return double{centroids[distinct[run]]}; };
  int run = 0;
  for (const uint64_t entry : work.sorted) {
    const auto index = static_cast<uint32_t>(entry);
    while (run < last && 2.0 * values[index] > centroid(run) + centroid(run + 1)) ++run;
    codes[index] = distinct[run];
  }
}

// ---- launch -------------------------------------------------------------------------------------------------------

SplitSearch choose_search() {
#if defined(__x86_64__)
  if (active_isa() != Isa::scalar) return best_split_avx2;
#endif
  return best_split_scalar;
}

void solve_problem(const KMeans1dArguments& a, SplitSearch search, int64_t problem, Workspace& work) {
  const float* values = a.values + problem * a.n;
  const float* weights = a.weights ? a.weights + problem * a.weights_stride : nullptr;
  float* centroids = a.centroids + problem * a.k;
  sort_values(values, a.n, work);
  gather_points(values, weights, a.n, work);
  const int64_t m = work.points.count();
  if (m <= a.k) {
    work.bounds.resize(a.k + 1);
    for (int c = 0; c <= a.k; ++c) work.bounds[c] = std::min<int64_t>(c, m);
  } else if (a.method == KMeans1dMethod::lloyd) {
    lloyd_bounds(a.k, a.seed, work);
  } else if (m <= std::numeric_limits<uint16_t>::max()) {
    optimal_bounds(a.k, search, work, work.back16);
  } else {
    optimal_bounds(a.k, search, work, work.back32);
  }
  store_centroids(a.k, work, centroids);
  if (a.half_centroids) {
    std::transform(centroids, centroids + a.k, centroids, [](float c) { return fp16_to_fp32(fp32_to_fp16(c)); });
  }
  store_codes(values, a.k, work, centroids, a.codes + problem * a.n);
}

}  // namespace

Split best_split_scalar(const double* gain, const double* sum, const double* mass, int64_t end, int64_t first,
                        int64_t last) {
  Split best{-1.0, first};
  for (int64_t at = first; at <= last; ++at) {
    const double s = sum[end] - sum[at];
    const double value = gain[at] + s * s / (mass[end] - mass[at]);
    if (value > best.gain) best = {value, at};
  }
  return best;
}

// ---- entry --------------------------------------------------------------------------------------------------------

void kmeans_1d(const KMeans1dArguments& arguments) {
  const SplitSearch search = choose_search();
  // 0.3 ms at n = 4096, k = 4 and 1.8 ms at k = 16; the workspace of a chunk serves all its problems.
  const double cost_ns = static_cast<double>(arguments.problems) * static_cast<double>(arguments.n) * (14 + 15 * arguments.k);
  const int64_t grain = std::max<int64_t>(1, arguments.problems / (8 * num_threads()));
  parallel_for(arguments.problems, grain, cost_ns, [&](int64_t begin, int64_t end) {
    Workspace work;
    for (int64_t problem = begin; problem < end; ++problem) solve_problem(arguments, search, problem, work);
  });
}

}  // namespace pyllmq::cpu

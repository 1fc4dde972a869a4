#include "kmeans/cpu/lloyd.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace pyllmq::cpu {
namespace {

constexpr int kIterations = 300;  // as sklearn's default; a few tens are usual

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
std::vector<double> seed_means(const Points& points, int k, uint64_t state) {
  const int64_t m = points.count;
  const int candidates = 2 + static_cast<int>(std::log(static_cast<double>(k)));
  std::vector<double> cumulative(points.mass + 1, points.mass + m + 1);
  std::vector<double> distance(m, std::numeric_limits<double>::infinity()), trial(m), best_trial(m);
  std::vector<double> means(1, points.centered(draw(cumulative, state)));

  const auto distances_with = [&](double mean, std::vector<double>& out) {
    double total = 0;
    for (int64_t i = 0; i < m; ++i) {
      const double offset = points.centered(i) - mean;
      out[i] = std::min(distance[i], points.weight_of(i) * offset * offset);
      total += out[i];
    }
    return total;
  };
  distances_with(means[0], trial);
  distance.swap(trial);
  while (static_cast<int>(means.size()) < k) {
    double total = 0;
    for (int64_t i = 0; i < m; ++i) cumulative[i] = total += distance[i];
    double best_total = std::numeric_limits<double>::infinity(), best_mean = points.centered(m - 1);
    for (int candidate = 0; candidate < candidates; ++candidate) {
      const double mean = points.centered(draw(cumulative, state));
      const double left = distances_with(mean, trial);
      if (left < best_total) {
        best_total = left;
        best_mean = mean;
        best_trial.swap(trial);
      }
    }
    distance.swap(best_trial);
    means.push_back(best_mean);
  }
  std::sort(means.begin(), means.end());
  return means;
}

}  // namespace

void lloyd_bounds(const Points& points, int k, uint64_t seed, int64_t* bounds) {
  std::vector<double> means = seed_means(points, k, seed);
  std::fill(bounds + 1, bounds + k + 1, points.count);
  bounds[0] = 0;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    bool moved = false;
    for (int c = 1; c < k; ++c) {
      const double threshold = (means[c - 1] + means[c]) / 2 + points.shift;
      const auto above = [](double left, float right) { return left < right; };
      const int64_t bound = std::upper_bound(points.value, points.value + points.count, threshold, above) - points.value;
      moved |= bound != bounds[c];
      bounds[c] = bound;
    }
    if (!moved) return;
    for (int c = 0; c < k; ++c) {
      const int64_t begin = bounds[c], end = bounds[c + 1];
      if (begin == end) continue;  // an empty cluster keeps its centre
      means[c] = (points.sum[end] - points.sum[begin]) / (points.mass[end] - points.mass[begin]);
    }
  }
}

}  // namespace pyllmq::cpu

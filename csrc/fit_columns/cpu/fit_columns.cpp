#include "fit_columns/cpu/fit_columns.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "runtime/counting.h"
#include "runtime/half.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

constexpr int kTrimRounds = 4;
constexpr int64_t kAxpyRows = 2048;  // of one task when later columns are updated

struct Column {
  std::vector<float> target, points, importance, weights, lost, stored, centroids;
  std::vector<uint8_t> codes, kept, chosen;
  std::vector<int32_t> order;
};

// ---- one column -----------------------------------------------------------------------------------------------------

// c.kept = the `keep` weights with the largest c.lost, the first ones at a tie. Returns whether it was so before.
bool keep_worst(const FitColumnsArguments& a, int64_t keep, Column& c) {
  std::iota(c.order.begin(), c.order.end(), 0);
  std::nth_element(c.order.begin(), c.order.begin() + (keep - 1), c.order.end(),
                   [&](int32_t x, int32_t y) { return c.lost[x] > c.lost[y] || (c.lost[x] == c.lost[y] && x < y); });
  std::fill(c.chosen.begin(), c.chosen.begin() + a.rows, 0);
  for (int64_t i = 0; i < keep; ++i) c.chosen[c.order[i]] = 1;
  const bool same = c.chosen == c.kept;
  c.kept.swap(c.chosen);
  return same;
}

// Trimmed k-means: fit the others, keep the worst served, until that changes nothing. The first ones are those farthest from
// the mean: begun from the codebook of all, a single far weight would get a centroid of its own and hold it.
// Writes all of `c` but the target.
void fit(const FitColumnsArguments& a, int bits, int64_t keep, Column& c) {
  const int64_t n = a.rows;
  const int k = 1 << bits;
  for (int64_t r = 0; r < n; ++r) c.points[r] = c.target[r] / a.row_scale[r];
  float* centroids = c.centroids.data();
  uint8_t* codes = c.codes.data();
  if (keep > 0 && std::find(c.kept.begin(), c.kept.end(), 1) == c.kept.end()) {
    double sum = 0, mass = 0;
    for (int64_t r = 0; r < n; ++r) {
      sum += static_cast<double>(c.importance[r]) * c.points[r];
      mass += c.importance[r];
    }
    const auto mean = static_cast<float>(sum / mass);
    for (int64_t r = 0; r < n; ++r) c.lost[r] = c.importance[r] * (c.points[r] - mean) * (c.points[r] - mean);
    keep_worst(a, keep, c);
  }
  for (int round = 0; round < (keep > 0 ? kTrimRounds : 1); ++round) {
    for (int64_t r = 0; r < n; ++r) c.weights[r] = keep > 0 && c.kept[r] ? 0.0f : c.importance[r];
    kmeans_1d({c.points.data(), c.weights.data(), 0, 1, n, 1, &k, a.method, 0, true, false, &centroids, &codes, nullptr});
    if (keep == 0) break;
    for (int64_t r = 0; r < n; ++r) {
      const float offset = c.points[r] - centroids[codes[r]];
      c.lost[r] = offset * offset * c.importance[r];
    }
    if (keep_worst(a, keep, c)) break;
  }
  for (int64_t r = 0; r < n; ++r) c.stored[r] = centroids[codes[r]] * a.row_scale[r];
  if (keep > 0) {
    for (int64_t r = 0; r < n; ++r) {
      if (c.kept[r]) c.stored[r] = fp16_to_fp32(fp32_to_fp16(c.target[r]));
    }
  }
}

// sum w (old - t)^2 - (new - t)^2 as one difference of squares: near convergence the two sums agree in all their digits.
double fell_by(const FitColumnsArguments& a, const float* before, const Column& c) {
  double fell = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    const double old = before[r], now = c.stored[r];
    fell += a.row_weights[r] * (old - now) * (old + now - 2.0 * c.target[r]);
  }
  return fell;
}

void accept(const FitColumnsArguments& a, int64_t j, const Column& c) {
  std::copy(c.stored.begin(), c.stored.end(), a.stored + j * a.rows);
  std::copy(c.codes.begin(), c.codes.end(), a.codes + j * a.rows);
  std::copy(c.kept.begin(), c.kept.end(), a.kept + j * a.rows);
  std::copy(c.centroids.begin(), c.centroids.end(), a.centroids + j * 256);
}

// ---- the columns after it -------------------------------------------------------------------------------------------

void update_later(const FitColumnsArguments& a, int64_t j) {
  const int64_t later = a.columns - j - 1;
  if (later == 0) return;
  const float* move = a.moves + j * a.rows;
  const double cost_ns = 0.2 * static_cast<double>(later) * static_cast<double>(a.rows);
  const int64_t tasks = ceil_div(a.rows, kAxpyRows);
  parallel_for(tasks, 1, cost_ns, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kAxpyRows, last = std::min(end * kAxpyRows, a.rows);
    for (int64_t p = j + 1; p < a.columns; ++p) {
      const float factor = a.coupling[j * a.coupling_stride + p];
      float* out = a.block + p * a.rows;
      for (int64_t r = first; r < last; ++r) out[r] -= factor * move[r];
    }
  });
}

}  // namespace

// ---- entry ----------------------------------------------------------------------------------------------------------

double fit_columns(const FitColumnsArguments& a) {
  Column c;
  for (auto* floats : {&c.target, &c.points, &c.importance, &c.weights, &c.lost, &c.stored}) floats->resize(a.rows);
  for (auto* bytes : {&c.codes, &c.kept, &c.chosen}) bytes->resize(a.rows);
  c.centroids.resize(256);
  c.order.resize(a.rows);
  for (int64_t r = 0; r < a.rows; ++r) c.importance[r] = a.row_weights[r] * a.row_scale[r] * a.row_scale[r];

  double decrease = 0;
  for (int64_t j = 0; j < a.columns; ++j) {
    const float* values = a.block + j * a.rows;
    float* stored = a.stored + j * a.rows;
    float* move = a.moves + j * a.rows;
    const float pivot = a.pivot[j];
    if (a.descend && pivot == 0) {
      std::fill(move, move + a.rows, 0.0f);
      continue;
    }
    for (int64_t r = 0; r < a.rows; ++r) c.target[r] = a.descend ? stored[r] - values[r] / pivot : values[r];
    std::copy(a.kept + j * a.rows, a.kept + (j + 1) * a.rows, c.kept.begin());
    const bool finite = std::all_of(c.target.begin(), c.target.end(), [](float t) { return std::isfinite(t); });
    if (!finite && !a.descend) throw std::overflow_error(std::to_string(j));
    if (finite) fit(a, a.bits[j], a.kept_counts[j], c);
    if (a.descend) {
      const double fell = finite ? fell_by(a, stored, c) : 0.0;
      if (!(fell > 0 && std::isfinite(fell))) {
        std::fill(move, move + a.rows, 0.0f);
        continue;
      }
      decrease += pivot * fell;
      for (int64_t r = 0; r < a.rows; ++r) move[r] = stored[r] - c.stored[r];
    } else {
      for (int64_t r = 0; r < a.rows; ++r) {
        if (!std::isfinite(c.stored[r])) throw std::overflow_error(std::to_string(j));
        move[r] = (values[r] - c.stored[r]) / pivot;
      }
    }
    accept(a, j, c);
    update_later(a, j);
  }
  return decrease;
}

}  // namespace pyllmq::cpu

// An optimal clustering of sorted points is a sequence of intervals, so with F_l[i] the best gain of cutting the first i
// points into l clusters,
//     F_l[i] = max_j F_{l-1}[j] + (S_i - S_j)^2 / (W_i - W_j),        error = sum w x^2 - F_k[m],
// where S and W are the prefix sums of w x and w. The cost is Monge, hence the best j rises with i and with l: each
// layer is a divide and conquer of O(m log m). Wang & Song 2011 (Ckmeans.1d.dp); Gronlund et al. 2017 (1701.07204).
#include "kmeans/cpu/kmeans_1d.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "runtime/half.h"
#include "runtime/isa.h"
#include "kmeans/cpu/codes.h"
#include "kmeans/cpu/lloyd.h"
#include "kmeans/cpu/points.h"
#include "kmeans/cpu/program.h"
#include "kmeans/cpu/windowed.h"
#include "codebook/cpu/pack_codes.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kKeptBytes = 64 << 20;  // a thread keeps its workspace up to this size, so that calls allocate nothing

struct Kernels {
  const SplitKernels& splits;
  const SplitKernels& cell_splits;
  CodeKernel codes;
};

Kernels active_kernels() {
  const auto split = []<Isa isa>() -> const SplitKernels& { return split_kernels<isa>(); };
  // AVX2 also where there is AVX-512: short ranges take 30 against 37 us for 256 cells
  return {by_isa(split), by_isa(split, Isa::avx2), by_isa([]<Isa isa>() { return code_kernel<isa>(); })};
}

// ---- one clustering -------------------------------------------------------------------------------------------------

// Sums of f(i) in four chains: a single one would wait for each addition.
template <typename F>
double sum_over(int64_t begin, int64_t end, F f) {
  double chain[4] = {};
  for (; begin + 4 <= end; begin += 4) {
    for (int i = 0; i < 4; ++i) chain[i] += f(begin + i);
  }
  for (int i = 0; begin < end; ++begin, ++i) chain[i] += f(begin);
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

// Summed afresh, not read off the prefix sums: a light cluster behind heavy ones would lose its digits there.
double mean_of(const Points& points, int64_t begin, int64_t end) {
  const double origin = points.value[begin];
  const auto offset = [&](int64_t i) { return points.weight_of(i) * (points.value[i] - origin); };
  const auto weight = [&](int64_t i) { return points.weight_of(i); };
  const double mass = points.weight ? sum_over(begin, end, weight) : points.mass[end] - points.mass[begin];
  if (points.uniform) return origin + sum_over(begin, end, [&](int64_t i) { return points.value[i] - origin; }) / mass;
  return origin + sum_over(begin, end, offset) / mass;
}

double error_of(const Points& points, const int64_t* bounds, int k) {
  double error = 0;
  for (int c = 0; c < k; ++c) {
    if (bounds[c + 1] - bounds[c] < 2) continue;
    const double mean = mean_of(points, bounds[c], bounds[c + 1]);
    error += sum_over(bounds[c], bounds[c + 1], [&](int64_t i) {
      const double offset = points.value[i] - mean;
      return points.weight_of(i) * offset * offset;
    });
  }
  return error;
}

void store_centroids(const Points& points, const int64_t* bounds, int k, bool half, float* centroids) {
  int stored = 0;
  for (int c = 0; c < k; ++c) {
    if (bounds[c] == bounds[c + 1]) continue;
    const auto mean = static_cast<float>(mean_of(points, bounds[c], bounds[c + 1]));
    centroids[stored++] = std::min(std::max(mean, points.value[bounds[c]]), points.value[bounds[c + 1] - 1]);
  }
  for (; stored < k; ++stored) centroids[stored] = centroids[stored - 1];
  if (half) {
    std::transform(centroids, centroids + k, centroids, [](float c) { return fp16_to_fp32(fp32_to_fp16(c)); });
  }
}

void store_codes(CodeKernel kernel, const float* values, int64_t n, const float* centroids, int k, uint8_t* codes) {
  // Of equal centroids the first has the code; a threshold is the largest float that is not above the middle of two.
  float thresholds[kMaxK];
  uint8_t code_of[kMaxK] = {};
  int runs = 0;
  for (int c = 1; c < k; ++c) {
    const double low = centroids[code_of[runs]];
    if (!(centroids[c] > low)) continue;
    const double middle = (low + centroids[c]) / 2;
    const auto rounded = static_cast<float>(middle);
    thresholds[runs] = rounded > middle ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
    code_of[++runs] = static_cast<uint8_t>(c);
  }
  std::fill(thresholds + runs, thresholds + kMaxK, std::numeric_limits<float>::infinity());
  kernel(values, n, thresholds, runs == 0 ? 0 : code_bits(runs + 1), code_of, codes);
}

// ---- one problem ----------------------------------------------------------------------------------------------------

struct Job {
  const KMeans1dArguments& a;
  Kernels kernels;
  const double* inverse;  // 1 / i, for problems without weights and duplicates
  int k_max;

  int64_t workspace_bytes() const {
    const int64_t program = a.method == KMeans1dMethod::lloyd ? 0
                            : small()                         ? program_bytes<uint16_t>()
                                                              : program_bytes<uint32_t>();
    return points_bytes(a.n, a.weights != nullptr) + Workspace::need<int64_t>(k_max + 1) + Workspace::need<uint8_t>(a.n) +
           program;
  }

  void solve(int64_t problem, Workspace& workspace) const {
    workspace.reserve(workspace_bytes());
    const float* weights = a.weights ? a.weights + problem * a.weights_stride : nullptr;
    const Points points = gather_points(a.values + problem * a.n, weights, a.n, workspace);
    auto* bounds = workspace.take<int64_t>(k_max + 1);
    auto* bytes = workspace.take<uint8_t>(a.n);
    const auto store = [&](int which) { store_clustering(problem, which, points, bounds, bytes); };
    small() ? cluster<uint16_t>(points, bounds, workspace, store) : cluster<uint32_t>(points, bounds, workspace, store);
  }

 private:
  bool small() const { return a.n <= std::numeric_limits<uint16_t>::max(); }
  bool windows(int64_t count) const { return a.method == KMeans1dMethod::windowed && count > 2 * cells_for(k_max); }
  template <typename Index>
  int64_t program_bytes() const {
    const int64_t exact = Program<Index>::bytes(a.n, k_max);
    return windows(a.n) ? exact + Windowed<Index>::bytes(a.n, k_max) : exact;
  }

  // Calls store(which) with the bounds of each number of clusters in turn.
  template <typename Index, typename Store>
  void cluster(const Points& points, int64_t* bounds, Workspace& workspace, const Store& store) const {
    const int64_t m = points.count;
    const auto each = [&](auto&& solve) {
      for (int which = 0; which < a.counts; ++which) {
        const int k = a.ks[which];
        if (k < m) {
          solve(k);
        } else {
          for (int c = 0; c <= k; ++c) bounds[c] = std::min<int64_t>(c, m);
        }
        store(which);
      }
    };
    int k_run = 1;
    for (int which = 0; which < a.counts; ++which) {
      if (a.ks[which] < m) k_run = std::max(k_run, a.ks[which]);
    }
    if (a.method == KMeans1dMethod::lloyd) return each([&](int k) { lloyd_bounds(points, k, a.seed, bounds); });
    if (windows(m)) {
      Windowed<Index> windowed(points, inverse, k_max, kernels.splits, kernels.cell_splits, workspace);
      // Fewer where far outliers take most of them: then every bound is tried.
      if (windowed.cells() > k_max) return each([&](int k) { windowed.solve(k, bounds); });
    }
    Program<Index> program({m, points.sum, points.mass, points.uniform ? inverse : nullptr}, k_run, kernels.splits, workspace);
    program.run(k_run);
    each([&](int k) { program.trace(k, bounds); });
  }

  void store_clustering(int64_t problem, int which, const Points& points, const int64_t* bounds, uint8_t* bytes) const {
    const int k = a.ks[which];
    if (a.errors) a.errors[problem * a.counts + which] = error_of(points, bounds, k);
    if (!a.centroids) return;
    float* centroids = a.centroids[which] + problem * k;
    store_centroids(points, bounds, k, a.half_centroids, centroids);
    const float* values = a.values + problem * a.n;
    if (!a.packed) return store_codes(kernels.codes, values, a.n, centroids, k, a.codes[which] + problem * a.n);
    const int bits = code_bits(k);
    store_codes(kernels.codes, values, a.n, centroids, k, bytes);
    pack_row(bytes, a.codes[which] + problem * packed_row_bytes(a.n, bits), a.n, bits);
  }
};

}  // namespace

// ---- entry ----------------------------------------------------------------------------------------------------------

int code_bits(int k) {
  int bits = 1;
  while (1 << bits < k) ++bits;
  return bits;
}

void kmeans_1d(const KMeans1dArguments& arguments) {
  std::vector<double> inverse;
  if (!arguments.weights && arguments.method != KMeans1dMethod::lloyd) {
    inverse.resize(arguments.n + 1 + kLanes);
    for (size_t i = 1; i < inverse.size(); ++i) inverse[i] = 1.0 / static_cast<double>(i);
  }
  const Job job{arguments, active_kernels(), inverse.data(), *std::max_element(arguments.ks, arguments.ks + arguments.counts)};
  const double per_value_ns = 14 + (arguments.method == KMeans1dMethod::exact ? 5.0 * job.k_max : 1.0 * job.k_max);
  const double cost_ns = static_cast<double>(arguments.problems) * static_cast<double>(arguments.n) * per_value_ns;
  const int64_t grain = std::max<int64_t>(1, arguments.problems / (8 * num_threads()));
  parallel_for(arguments.problems, grain, cost_ns, [&](int64_t begin, int64_t end) {
    thread_local Workspace kept;
    Workspace own;
    Workspace& workspace = job.workspace_bytes() <= kKeptBytes ? kept : own;
    for (int64_t problem = begin; problem < end; ++problem) job.solve(problem, workspace);
  });
}

}  // namespace pyllmq::cpu

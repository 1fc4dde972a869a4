// Breadth first, since the recursion of the CPU's divide and conquer would leave a block idle: all ends of one level, each
// between neighbours of the levels above, whose best splits are known and bound its own.
//
//     level 0              x                 one end, the whole block as its team
//     level 1      x               x         two teams of half the block
//     level 2   x      x       x      x      ...
//     last      x x x x x x x x x x x x x    a thread per end, a few candidates each
#include "kmeans/cuda/kmeans_1d.h"

#include <algorithm>

#include "runtime/cuda/runtime.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 1 << 16;

struct Candidate {
  double gain;
  int64_t at;
};

// Equal gains: the lower one, so that the number of threads in a team does not matter.
PYLLMQ_DEVICE Candidate better(Candidate a, Candidate b) { return b.gain > a.gain || (b.gain == a.gain && b.at < a.at) ? b : a; }

PYLLMQ_DEVICE double share(double sum, double mass) { return mass > 0 ? sum * sum / mass : 0; }

struct Problem {
  const double *sums, *masses, *gain;  // gain: with one cluster fewer
  double* next_gain;
  const int32_t* before;  // best splits with one cluster fewer, a lower bound; null for the first layer
  int32_t* best;
  int64_t n;
  int64_t clusters;

  // The best of every `team`-th candidate from `member` on.
  PYLLMQ_MEMBER Candidate search(int64_t end, int64_t first, int64_t last, int member, int team) const {
    Candidate found{-1, n};
    const double sum = sums[end], mass = masses[end];
    for (int64_t at = first + member; at <= last; at += team)
      found = better(found, {gain[at] + share(sum - sums[at], mass - masses[at]), at});
    return found;
  }
};

PYLLMQ_DEVICE void solve_level(const Problem& p, int64_t stride, Candidate* of_thread) {
  const int64_t ends = p.n - p.clusters + 1, nodes = (ends - stride) / (2 * stride) + 1;
  int team = kThreads;
  while (team > 1 && nodes * team > kThreads) team /= 2;
  const int member = ptx::thread() % team, of_block = kThreads / team;
  for (int64_t begin = 0; begin < nodes; begin += of_block) {  // the same number of rounds for all threads
    const int64_t node = begin + ptx::thread() / team, offset = stride - 1 + 2 * stride * node;
    const int64_t end = p.clusters + offset;
    if (node < nodes) {
      int64_t first = offset >= stride ? p.best[end - stride] : p.clusters - 1;
      if (p.before && p.before[end] > first) first = p.before[end];
      int64_t last = offset + stride < ends ? p.best[end + stride] : end - 1;
      if (last > end - 1) last = end - 1;
      if (first > last) first = last;  // rounding of near ties
      of_thread[ptx::thread()] = p.search(end, first, last, member, team);
    }
    if (team > 1) ptx::sync_block();
    if (node < nodes && member == 0) {
      Candidate found = of_thread[ptx::thread()];
      for (int i = 1; i < team; ++i) found = better(found, of_thread[ptx::thread() + i]);
      p.next_gain[end] = found.gain;
      p.best[end] = static_cast<int32_t>(found.at);
    }
    if (team > 1) ptx::sync_block();
  }
  ptx::sync_block();
}

PYLLMQ_KERNEL void kmeans_1d_layers_kernel(const double* sums, const double* masses, double* gains, int32_t* best,
                                           int64_t problems, int64_t n, int k_max) {
  PYLLMQ_DYNAMIC_SHARED(shared);
  Candidate* of_thread = reinterpret_cast<Candidate*>(shared);
  for (int64_t problem = ptx::block(); problem < problems; problem += ptx::blocks()) {
    double* gain = gains + problem * 2 * (n + 1);
    double* next_gain = gain + n + 1;
    Problem p{sums + problem * (n + 1), masses + problem * (n + 1), gain, next_gain, nullptr, nullptr, n, 1};
    for (int64_t i = ptx::thread(); i <= n; i += kThreads) gain[i] = share(p.sums[i], p.masses[i]);
    ptx::sync_block();
    for (int clusters = 2; clusters <= k_max; ++clusters) {
      p.clusters = clusters;
      p.before = p.best;
      p.best = best + (problem * (k_max + 1) + clusters) * (n + 1);
      int64_t stride = 1;
      while (2 * stride <= n - clusters + 1) stride *= 2;
      for (; stride > 0; stride /= 2) solve_level(p, stride, of_thread);
      const double* finished = p.next_gain;
      p.next_gain = const_cast<double*>(p.gain);
      p.gain = finished;
    }
  }
}

}  // namespace

void kmeans_1d_layers(const double* sums, const double* masses, double* gains, int32_t* best, int64_t problems, int64_t n,
                      int k_max, uintptr_t stream) {
  if (problems == 0) return;
  PYLLMQ_LAUNCH(kmeans_1d_layers_kernel, std::min(problems, kMostBlocks), kThreads, kThreads * sizeof(Candidate), stream, sums,
                masses, gains, best, problems, n, k_max);
  check_launch("kmeans_1d_layers");
}

}  // namespace pyllmq::cuda

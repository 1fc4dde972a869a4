// A thread holds a problem, K and both sides in registers; costs lie in shared memory, where they come and plans go in whole
// lines. Threads whose offsets move rebuild K from there, the others of the warp wait.
//
//     tape [iteration][f, g, u, v][problem]: threads write neighbours
#include <algorithm>

#include "runtime/cuda/runtime.h"
#include "sinkhorn/cuda/sinkhorn.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int64_t kMostBlocks = 1 << 16;

template <int N>
struct Side {
  float mass[N], offset[N], scaling[N];
};

// Where a thread's costs lie, or its gradients: an odd number of words apart, so that 32 threads meet 32 banks.
PYLLMQ_DEVICE int stride_of(int entries) { return entries | 1; }

// Between [problems, entries] in memory and the threads' places, `visit(place, index)` for each number of the block.
template <class Visit>
PYLLMQ_DEVICE void for_each_staged(int64_t first, int64_t problems, int entries, const Visit& visit) {
  const int64_t left = problems - first;
  const int here = static_cast<int>(left < kThreads ? left : kThreads);
  int problem = ptx::thread() / entries, entry = ptx::thread() % entries;
  for (int i = ptx::thread(); i < here * entries; i += kThreads) {
    visit(problem * stride_of(entries) + entry, problem, entry);
    problem += kThreads / entries;
    entry += kThreads % entries;
    if (entry >= entries) {
      entry -= entries;
      ++problem;
    }
  }
}

PYLLMQ_DEVICE void stage(const float* from, int64_t stride, int64_t first, int64_t problems, int entries, float* to) {
  for_each_staged(first, problems, entries,
                  [=](int place, int problem, int entry) { to[place] = from[(first + problem) * stride + entry]; });
}

PYLLMQ_DEVICE void unstage(const float* from, int64_t first, int64_t problems, int entries, float* to) {
  for_each_staged(first, problems, entries,
                  [=](int place, int problem, int entry) { to[(first + problem) * entries + entry] = from[place]; });
}

// One problem; n and m may be smaller than N, then mass, scalings and K are 0 beyond.
template <int N>
struct Problem {
  float k[N][N];
  Side<N> a, b;
  Prices prices;
  const float* cost;
  int n, m;
  float limit;

  PYLLMQ_MEMBER void load(const SinkhornProblem& call, int64_t problem, const float* staged) {
    n = static_cast<int>(call.n);
    m = static_cast<int>(call.m);
    cost = staged;
    prices = prices_of(call, problem);
    float largest = 1;
    unrolled<N>([&](int i) {
      const float mass = i < n ? call.a[problem * call.a_stride + i] : 0;
      a.mass[i] = mass > 0 ? mass : 0;
      a.scaling[i] = 0;
      largest = larger(a.mass[i], largest);
    });
    unrolled<N>([&](int j) {
      const float mass = j < m ? call.b[problem * call.b_stride + j] : 0;
      b.mass[j] = mass > 0 ? mass : 0;
      b.scaling[j] = b.mass[j] > 0 ? 1 : 0;
      b.offset[j] = b.mass[j] > 0 ? 0 : -infinity();
      largest = larger(b.mass[j], largest);
    });
    limit = largest * kLargeScaling;
    first_offsets<true>();
    build(a.offset, b.offset);
  }

  PYLLMQ_MEMBER float cost_at(int i, int j) const { return i < n && j < m ? cost[i * m + j] : infinity(); }

  PYLLMQ_MEMBER void build(const float (&u)[N], const float (&v)[N]) {
    unrolled<N, N>([&](int i, int j) { k[i][j] = entry_of_k(u[i], v[j], cost_at(i, j), prices.inverse); });
  }

  // Makes the largest entry of each line of K about 1.
  template <bool kRows>
  PYLLMQ_MEMBER void first_offsets() {
    Side<N>& own = kRows ? a : b;
    const Side<N>& other = kRows ? b : a;
    unrolled<N>([&](int i) {
      float low = infinity();
      unrolled<N>([&](int j) {
        if (other.offset[j] != -infinity()) low = smaller((kRows ? cost_at(i, j) : cost_at(j, i)) - other.offset[j], low);
      });
      own.offset[i] = offset_of(own.mass[i], low);
    });
  }

  template <bool kRows>
  PYLLMQ_MEMBER float line_sum(int i, const float (&x)[N]) const {
    float sum = 0;
    unrolled<N>([&](int j) { sum = ptx::fma(kRows ? k[i][j] : k[j][i], x[j], sum); });
    return sum;
  }

  // False if a scaling left the range: then nothing of the other side has changed.
  template <bool kRows>
  PYLLMQ_MEMBER bool step() {
    Side<N>& own = kRows ? a : b;
    const Price& price = kRows ? prices.a : prices.b;
    float most = 0;
    unrolled<N>([&](int i) {
      const float sum = line_sum<kRows>(i, kRows ? b.scaling : a.scaling);
      own.scaling[i] = price.scaling(own.mass[i], sum, own.offset[i], prices.inverse);
      most = larger(own.scaling[i], most);
    });
    return !(most > limit);
  }

  // The step again in new offsets, which take up the other side's scalings.
  template <bool kRows>
  PYLLMQ_MEMBER void move() {
    Side<N>&own = kRows ? a : b, &other = kRows ? b : a;
    const Price& price = kRows ? prices.a : prices.b;
    unrolled<N>([&](int j) { absorb(other.offset[j], other.scaling[j], prices.inverse); });
    first_offsets<kRows>();
    build(a.offset, b.offset);
    unrolled<N>([&](int i) {
      const float sum = line_sum<kRows>(i, other.scaling);
      const Pair pair = price.moved(own.mass[i], sum, own.offset[i], prices.inverse);
      own.offset[i] = pair.offset;
      own.scaling[i] = pair.scaling;
    });
    if (!price.kept()) build(a.offset, b.offset);
  }
};

struct Tape {
  float* at;
  int64_t n, m, problems, problem;

  PYLLMQ_MEMBER float& number(int64_t iteration, int64_t number) const {
    return at[(iteration * 2 * (n + m) + number) * problems + problem];
  }
};

template <int N>
PYLLMQ_DEVICE void write_lines(const Tape& tape, int64_t iteration, int64_t from, const float (&rows)[N],
                               const float (&columns)[N]) {
  unrolled<N>([&](int i) {
    if (i < tape.n) tape.number(iteration, from + i) = rows[i];
  });
  unrolled<N>([&](int j) {
    if (j < tape.m) tape.number(iteration, from + tape.n + j) = columns[j];
  });
}

template <int N>
PYLLMQ_DEVICE void read_lines(const Tape& tape, int64_t iteration, int64_t from, float (&rows)[N], float (&columns)[N]) {
  unrolled<N>([&](int i) { rows[i] = i < tape.n ? tape.number(iteration, from + i) : 0; });
  unrolled<N>([&](int j) { columns[j] = j < tape.m ? tape.number(iteration, from + tape.n + j) : 0; });
}

// Iterations taken, negated if offsets moved.
template <int N, bool kStops>
PYLLMQ_DEVICE int32_t iterate(Problem<N>& p, const SinkhornForward& out, const Tape& tape) {
  bool moved = false;
  float mass = 0;
  unrolled<N>([&](int i) { mass += p.a.mass[i]; });
  const auto begin_to_move = [&](int64_t iteration) {
    if (!moved && tape.at != nullptr)  // from now on the tape holds offsets, too
      for (int64_t t = 0; t < iteration; ++t) write_lines(tape, t, tape.n + tape.m, p.a.offset, p.b.offset);
    moved = true;
  };
  int64_t t = 0;
  for (; t < out.iterations; ++t) {
    float scaling_before[N], offset_before[N];
    if (kStops) {
      unrolled<N>([&](int i) {
        scaling_before[i] = p.a.scaling[i];
        offset_before[i] = p.a.offset[i];
      });
    }
    if (!p.template step<true>()) {
      begin_to_move(t);
      p.template move<true>();
    }
    if (kStops && t > 0) {  // this row step shows what the rows of the plan before it sum to
      float missed = 0;
      unrolled<N>([&](int i) {
        if (p.a.mass[i] == 0) return;
        if (moved) scaling_before[i] *= ptx::exp((offset_before[i] - p.a.offset[i]) * p.prices.inverse);
        missed += ptx::magnitude(p.a.mass[i] * scaling_before[i] / p.a.scaling[i] - p.a.mass[i]);
      });
      if (missed <= out.tolerance * mass) {
        unrolled<N>([&](int i) { p.a.scaling[i] = p.a.mass[i] > 0 ? scaling_before[i] : 0; });
        break;
      }
    }
    if (!p.template step<false>()) {
      begin_to_move(t);
      p.template move<false>();
    }
    if (tape.at != nullptr) {
      write_lines(tape, t, 0, p.a.scaling, p.b.scaling);
      if (moved) write_lines(tape, t, tape.n + tape.m, p.a.offset, p.b.offset);
    }
  }
  return static_cast<int32_t>(moved ? -t : t);
}

template <int N, bool kStops>
PYLLMQ_KERNEL void __launch_bounds__(kThreads) small_kernel(const SinkhornProblem call, const SinkhornForward out) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto* staged = reinterpret_cast<float*>(memory);
  const int n = static_cast<int>(call.n), m = static_cast<int>(call.m), entries = n * m;
  float* mine = staged + ptx::thread() * stride_of(entries);
  for (int64_t first = ptx::block() * kThreads; first < call.problems; first += ptx::blocks() * kThreads) {
    stage(call.cost, call.cost_stride, first, call.problems, entries, staged);
    ptx::sync_block();
    const int64_t problem = first + ptx::thread();
    if (problem < call.problems) {
      Problem<N> p;
      p.load(call, problem, mine);
      out.count[problem] = iterate<N, kStops>(p, out, Tape{out.tape, call.n, call.m, call.problems, problem});
      unrolled<N, N>([&](int i, int j) {
        if (i < n && j < m) mine[i * m + j] = p.a.scaling[i] * p.k[i][j] * p.b.scaling[j];
      });
      unrolled<N>([&](int i) {
        if (i < n) out.u[problem * n + i] = potential(p.a.offset[i], p.a.scaling[i], p.prices.inverse);
      });
      unrolled<N>([&](int j) {
        if (j < m) out.v[problem * m + j] = potential(p.b.offset[j], p.b.scaling[j], p.prices.inverse);
      });
    }
    ptx::sync_block();
    unstage(staged, first, call.problems, entries, out.plan);
    ptx::sync_block();
  }
}

// Words as in docs/kernels-sinkhorn.md: r = g d beta / columns(P), s = f d alpha / rows(P). `through` is the gradient with
// respect to log K, at first that with respect to the plan.
template <int N>
PYLLMQ_DEVICE void adjoint(Problem<N>& p, const SinkhornBackward& out, const Tape& tape, float* through, float* marginals) {
  const int64_t taken = out.count[tape.problem], last = (taken < 0 ? -taken : taken) - 1, problem = tape.problem;
  const bool moved = taken < 0;
  const int n = p.n, m = p.m;
  const float inverse = p.prices.inverse;
  float u[N], v[N], f[N], g[N], d_alpha[N], d_beta[N];
  float *grad_a = marginals, *grad_b = marginals + N * kThreads;  // in shared memory: 8 x 8 would spill
  unrolled<N>([&](int i) {
    grad_a[i * kThreads] = grad_b[i * kThreads] = 0;
    u[i] = p.a.offset[i];
    v[i] = p.b.offset[i];
  });
  read_lines(tape, last, 0, f, g);
  if (moved) {
    read_lines(tape, last, tape.n + tape.m, u, v);
    p.build(u, v);
  }
  unrolled<N>([&](int j) { d_beta[j] = g[j] != 0 ? out.grad_v[problem * m + j] / inverse : 0; });
  unrolled<N>([&](int i) {
    d_alpha[i] = f[i] != 0 ? out.grad_u[problem * n + i] / inverse : 0;
    unrolled<N>([&](int j) {
      if (i >= n || j >= m) return;
      const float part = through[i * m + j] * (f[i] * p.k[i][j] * g[j]);
      through[i * m + j] = part;
      d_alpha[i] += part;
      d_beta[j] += part;
    });
  });
  for (int64_t t = last; t >= 0; --t) {
    if (moved && t < last) {
      read_lines(tape, t, tape.n + tape.m, u, v);
      p.build(u, v);
    }
    unrolled<N>([&](int j) {
      if (g[j] != 0) grad_b[j * kThreads] += d_beta[j] / p.b.mass[j];
      d_beta[j] = g[j] * p.prices.b.share(d_beta[j], p.b.mass[j], v[j], g[j], inverse);
    });
    unrolled<N>([&](int i) {
      unrolled<N>([&](int j) {
        const float part = f[i] * p.k[i][j] * d_beta[j];
        d_alpha[i] -= part;
        if (i < n && j < m) through[i * m + j] -= part;
      });
      if (f[i] != 0) grad_a[i * kThreads] += d_alpha[i] / p.a.mass[i];
      d_alpha[i] = f[i] * p.prices.a.share(d_alpha[i], p.a.mass[i], u[i], f[i], inverse);
    });
    float next_f[N];
    if (t > 0) {
      read_lines(tape, t - 1, 0, next_f, g);
      if (moved) {
        float unused[N];
        read_lines(tape, t - 1, tape.n + tape.m, unused, v);
        p.build(u, v);
      }
    } else {
      unrolled<N>([&](int j) {
        next_f[j] = 0;
        g[j] = p.b.mass[j] > 0 ? 1 : 0;
        v[j] = g[j] != 0 ? 0 : -infinity();
      });
      if (moved) p.build(u, v);
    }
    unrolled<N>([&](int j) {
      float sum = 0;
      unrolled<N>([&](int i) {
        const float part = d_alpha[i] * p.k[i][j] * g[j];
        sum += part;
        if (i < n && j < m) through[i * m + j] -= part;
      });
      d_beta[j] = -sum;
    });
    unrolled<N>([&](int i) {
      d_alpha[i] = 0;
      f[i] = next_f[i];
    });
  }
  unrolled<N>([&](int i) {
    unrolled<N>([&](int j) {
      if (i < n && j < m) through[i * m + j] *= -inverse;
    });
    if (i < n) out.grad_a[problem * n + i] = grad_a[i * kThreads];
    if (i < m) out.grad_b[problem * m + i] = grad_b[i * kThreads];
  });
}

template <int N>
PYLLMQ_KERNEL void __launch_bounds__(kThreads) small_backward_kernel(const SinkhornProblem call, const SinkhornBackward out) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  auto* costs = reinterpret_cast<float*>(memory);
  const int entries = static_cast<int>(call.n * call.m);
  float *gradients = costs + kThreads * stride_of(entries), *marginals = gradients + kThreads * stride_of(entries);
  for (int64_t first = ptx::block() * kThreads; first < call.problems; first += ptx::blocks() * kThreads) {
    stage(call.cost, call.cost_stride, first, call.problems, entries, costs);
    stage(out.grad_plan, entries, first, call.problems, entries, gradients);
    ptx::sync_block();
    const int64_t problem = first + ptx::thread();
    if (problem < call.problems) {
      Problem<N> p;
      p.load(call, problem, costs + ptx::thread() * stride_of(entries));
      const Tape tape{const_cast<float*>(out.tape), call.n, call.m, call.problems, problem};
      adjoint(p, out, tape, gradients + ptx::thread() * stride_of(entries), marginals + ptx::thread());
    }
    ptx::sync_block();
    unstage(gradients, first, call.problems, entries, out.grad_cost);
    ptx::sync_block();
  }
}

// `numbers` of shared memory for each thread
template <class Kernel, class Out>
void launch(Kernel* kernel, int64_t numbers, const SinkhornProblem& call, const Out& out, uintptr_t stream) {
  const int64_t blocks = std::min((call.problems + kThreads - 1) / kThreads, kMostBlocks);
  PYLLMQ_LAUNCH(kernel, blocks, kThreads, sizeof(float) * kThreads * numbers, stream, call, out);
  check_launch("sinkhorn_small");
}

}  // namespace

void sinkhorn_small(const SinkhornProblem& call, const SinkhornForward& out, uintptr_t stream) {
  const bool four = call.n <= 4 && call.m <= 4, stops = out.tolerance > 0;
  const auto kernel =
      four ? (stops ? small_kernel<4, true> : small_kernel<4, false>) : (stops ? small_kernel<8, true> : small_kernel<8, false>);
  launch(kernel, (call.n * call.m) | 1, call, out, stream);
}

void sinkhorn_small_backward(const SinkhornProblem& call, const SinkhornBackward& out, uintptr_t stream) {
  const bool four = call.n <= 4 && call.m <= 4;
  const auto kernel = four ? small_backward_kernel<4> : small_backward_kernel<8>;
  launch(kernel, 2 * ((call.n * call.m) | 1) + (four ? 8 : 16), call, out, stream);
}

}  // namespace pyllmq::cuda

// A team of blocks holds a problem, each block some of its rows: K in shared memory as far as it goes, the rows beyond computed
// anew from the costs in every pass. One pass over K an iteration.
//
//     block of a team      K g -> f = a / (K g) -> K^T f        row sums by shuffles within a warp (512 columns) or a block
//        |  partial column sums, one array a block, in L2
//     all blocks of it     sums -> g = b / sums                 every block computes all of g
//
// Small teams read all arrays; in large ones each block adds up some columns and the others read the sums. Blocks of a team
// wait for each other, so they are launched together; there is no wait where the team is one block.
#include <algorithm>

#include "runtime/counting.h"
#include "runtime/cuda/runtime.h"
#include "sinkhorn/cuda/sinkhorn.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int64_t kEntriesOfBlock = 16384;    // a team has a block for so many, if blocks are idle otherwise
constexpr int64_t kReadByEveryBlock = 12288;  // numbers of partial sums; beyond, each block adds up a part
constexpr int64_t kBlocksPerMultiprocessor = 8;
constexpr int kFlags = 2;  // beside the column sums: scalings out of range, mass missed

// Each of kWarps warps has rows of its own if kRowWarps is 1; otherwise all share every row. A lane has kColumns columns of
// kRows rows at once in registers.
template <int kWarps, int kRowWarps, int kColumns, int kRows>
struct Shape {
  static constexpr int warps = kWarps, columns = kColumns, rows = kRows;
  static constexpr bool shared_rows = kRowWarps > 1;
  static constexpr int threads = 32 * kWarps, row_threads = 32 * kRowWarps, groups = kWarps / kRowWarps;
  static constexpr int width = row_threads * kColumns;
  static constexpr int scratch = shared_rows ? 2 * kRows * kWarps : kWarps > 1 ? kWarps * width : 0;
};

struct Layout {
  int64_t teams, team, rows_each, resident;
};

struct Work {
  SinkhornProblem call;
  Layout layout;
  float* parts;         // [teams, 2, team, kFlags + m]
  float* totals;        // [teams, 2, kFlags + m]
  uint32_t* turns;      // [teams]
  uint32_t* counters;   // [teams]
  float* coefficients;  // backward: r [teams, iterations, m], then s [teams, iterations, n]
};

template <class Out>
struct Given {
  Work work;
  Out out;
};

// How the blocks of a problem wait for each other and add up what they have.
struct Team {
  int64_t rank, size, numbers;
  float *parts, *totals;
  uint32_t *counter, *turn;
  uint32_t phase;

  PYLLMQ_MEMBER void meet() const {
    ptx::sync_block();
    if (ptx::thread() == 0) {
      const uint32_t before = ptx::observe(turn), last = static_cast<uint32_t>(size - 1);
      if (ptx::count_to(counter, last) == last)
        ptx::publish(turn, before + 1);
      else
        ptx::wait_while(turn, before);
    }
    ptx::sync_block();
  }

  // Sums, or minima, of what the blocks of the team have. Arrays alternate, so one meeting is enough before they are used again.
  template <bool kMinimum, int kThreads>
  PYLLMQ_MEMBER void combine(float* values) {
    ptx::sync_block();
    if (size == 1) return;
    const int64_t buffer = phase++ & 1;
    float* all = parts + buffer * size * numbers;
    for (int64_t i = ptx::thread(); i < numbers; i += kThreads) all[rank * numbers + i] = values[i];
    meet();
    if (size * numbers <= kReadByEveryBlock) {
      for (int64_t i = ptx::thread(); i < numbers; i += kThreads) values[i] = of_all<kMinimum>(all, i);
    } else {
      float* total = totals + buffer * numbers;
      for (int64_t i = rank * kThreads + ptx::thread(); i < numbers; i += size * kThreads) total[i] = of_all<kMinimum>(all, i);
      meet();
      for (int64_t i = ptx::thread(); i < numbers; i += kThreads) values[i] = ptx::load_l2(total + i);
    }
    ptx::sync_block();
  }

 private:
  template <bool kMinimum>
  PYLLMQ_MEMBER float of_all(const float* all, int64_t i) const {
    float value = ptx::load_l2(all + i);
    for (int64_t block = 1; block < size; ++block) {
      const float other = ptx::load_l2(all + block * numbers + i);
      value = kMinimum ? smaller(other, value) : value + other;
    }
    return value;
  }
};

// What a block has of a problem, all in shared memory but the costs.
template <class S>
struct Part {
  const SinkhornProblem* call;
  Team team;
  Prices prices;
  const float* cost;  // of the block's first row
  int64_t m, first_row;
  int rows, rows_room, resident;
  bool moved;
  float limit;
  float *flags, *sums, *v, *g, *b, *u, *f, *a, *scratch, *k;
  float* free;  // what kernels have besides
  uint32_t toggle;

  PYLLMQ_MEMBER Part(const Work& work, uint8_t* memory) {
    call = &work.call;
    const Layout& layout = work.layout;
    m = work.call.m;
    const int64_t which = ptx::block() / layout.team;
    team.rank = ptx::block() % layout.team;
    team.size = layout.team;
    team.numbers = kFlags + m;
    team.parts = work.parts + which * 2 * team.size * team.numbers;
    team.totals = work.totals + which * 2 * team.numbers;
    team.counter = work.counters + which;
    team.turn = work.turns + which;
    team.phase = 0;
    toggle = 0;
    first_row = team.rank * layout.rows_each;
    const int64_t left = work.call.n - first_row;
    rows = static_cast<int>(left < layout.rows_each ? left : layout.rows_each);
    rows_room = static_cast<int>((layout.rows_each + S::rows - 1) / S::rows * S::rows);
    resident = static_cast<int>(layout.resident);
    flags = reinterpret_cast<float*>(memory);
    sums = flags + kFlags;
    v = sums + S::width;
    g = v + S::width;
    b = g + S::width;
    u = b + S::width;
    f = u + rows_room;
    a = f + rows_room;
    scratch = a + rows_room;
    free = scratch + S::scratch;
  }
  static constexpr int64_t floats(int64_t rows_room) { return kFlags + 4 * S::width + 3 * rows_room + S::scratch; }

  PYLLMQ_MEMBER int lane() const { return ptx::thread() % S::row_threads; }
  PYLLMQ_MEMBER int group() const { return ptx::thread() / S::row_threads; }
  PYLLMQ_MEMBER bool leads() const { return lane() == 0; }
  PYLLMQ_MEMBER int column(int c) const { return lane() + c * S::row_threads; }
  PYLLMQ_MEMBER float cost_at(int row, int64_t column) const { return cost[row * m + column]; }
  template <class Do>
  PYLLMQ_MEMBER void for_columns(const Do& act) const {
    for (int j = ptx::thread(); j < S::width; j += S::threads) act(j);
  }
  template <class Do>
  PYLLMQ_MEMBER void for_rows(const Do& act) const {
    for (int i = ptx::thread(); i < rows; i += S::threads) act(i);
  }
  template <class Do>  // act(row, column) for what of K lies in this block, a warp to a row
  PYLLMQ_MEMBER void for_entries(const Do& act) const {
    for (int row = ptx::thread() / 32; row < rows; row += S::warps)
      for (int j = ptx::thread() % 32; j < m; j += 32) act(row, j);
  }

  PYLLMQ_MEMBER void begin(int64_t problem) {
    ptx::sync_block();  // the problem before is done
    prices = prices_of(*call, problem);
    cost = call->cost + problem * call->cost_stride + first_row * m;
    moved = false;
    const float *a_of_all = call->a + problem * call->a_stride, *b_of_all = call->b + problem * call->b_stride;
    float largest = 1;
    for_columns([&](int j) {
      const float mass = j < m ? b_of_all[j] : 0;
      b[j] = mass > 0 ? mass : 0;
      v[j] = mass > 0 ? 0 : -infinity();
      g[j] = mass > 0 ? 1 : 0;
      largest = larger(mass, largest);
    });
    for (int i = ptx::thread(); i < rows_room; i += S::threads) {
      const float mass = i < rows ? a_of_all[first_row + i] : 0;
      a[i] = mass > 0 ? mass : 0;
      f[i] = 0;
    }
    for (int64_t i = ptx::thread(); i < call->n; i += S::threads) largest = larger(a_of_all[i], largest);
    PYLLMQ_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) largest = larger(ptx::shuffle_xor(largest, mask), largest);
    if (ptx::thread() % 32 == 0) sums[ptx::thread() / 32] = largest;
    ptx::sync_block();
    for (int warp = 0; warp < S::warps; ++warp) largest = larger(sums[warp], largest);
    limit = largest * kLargeScaling;
    row_offsets();
    build();
  }

  // Makes the largest entry of each row of K about 1.
  PYLLMQ_MEMBER void row_offsets() {
    for (int row = ptx::thread() / 32; row < rows; row += S::warps) {
      float low = infinity();
      for (int j = ptx::thread() % 32; j < m; j += 32)
        if (v[j] != -infinity()) low = smaller(cost_at(row, j) - v[j], low);
      PYLLMQ_UNROLL
      for (int mask = 16; mask > 0; mask /= 2) low = smaller(ptx::shuffle_xor(low, mask), low);
      if (ptx::thread() % 32 == 0) u[row] = offset_of(a[row], low);
    }
    ptx::sync_block();
  }

  PYLLMQ_MEMBER void column_offsets() {
    for_columns([&](int j) {
      float low = infinity();
      for (int row = 0; row < rows && j < m; ++row)
        if (u[row] != -infinity()) low = smaller(cost_at(row, j) - u[row], low);
      sums[j] = low;
    });
    if (ptx::thread() < kFlags) flags[ptx::thread()] = 0;
    team.template combine<true, S::threads>(flags);
    for_columns([&](int j) { v[j] = offset_of(b[j], sums[j]); });
    ptx::sync_block();
  }

  PYLLMQ_MEMBER void build() {
    for (int row = ptx::thread() / 32; row < resident; row += S::warps)
      for (int j = ptx::thread() % 32; j < S::width; j += 32)
        k[row * S::width + j] = row < rows && j < m ? entry_of_k(u[row], v[j], cost_at(row, j), prices.inverse) : 0;
    ptx::sync_block();
  }

  PYLLMQ_MEMBER float computed_entry(int row, int j) const {
    if (moved) return entry_of_k(u[row], v[j], cost_at(row, j), prices.inverse);
    // the first offsets of columns are 0
    return u[row] == -infinity() || v[j] != 0 ? 0 : ptx::exp((u[row] - cost_at(row, j)) * prices.inverse);
  }
  PYLLMQ_MEMBER float entry(int row, int j) const { return row < resident ? k[row * S::width + j] : computed_entry(row, j); }

  // Entries of kRows rows; 0 outside of the matrix.
  PYLLMQ_MEMBER void entries(int row, float (&e)[S::rows][S::columns]) const {
    if (row < resident) {
      unrolled<S::rows, S::columns>([&](int r, int c) { e[r][c] = k[(row + r) * S::width + column(c)]; });
    } else {
      unrolled<S::rows, S::columns>(
          [&](int r, int c) { e[r][c] = row + r < rows && column(c) < m ? computed_entry(row + r, column(c)) : 0; });
    }
  }

  // Sums over the threads that share a row, for all of them.
  PYLLMQ_MEMBER void add_up_rows(float (&dots)[S::rows]) {
    PYLLMQ_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) unrolled<S::rows>([&](int r) { dots[r] += ptx::shuffle_xor(dots[r], mask); });
    if constexpr (S::shared_rows) {
      float* of_warps = scratch + (toggle++ & 1) * S::rows * S::warps;  // in turns: one barrier is enough
      if (ptx::thread() % 32 == 0) unrolled<S::rows>([&](int r) { of_warps[r * S::warps + ptx::thread() / 32] = dots[r]; });
      ptx::sync_block();
      unrolled<S::rows>([&](int r) {
        dots[r] = 0;
        for (int warp = 0; warp < S::warps; ++warp) dots[r] += of_warps[r * S::warps + warp];
      });
    }
  }

  // The one pass: dots = K x, out_i = update(i, dot_i), sums = K^T out of this block's rows. `load(row, e, again)` gives entries
  // for the rows' sums and, where kTwice, others for the columns'.
  template <bool kTwice, class Load, class Update>
  PYLLMQ_MEMBER void pass(const float* x, const Load& load, const Update& update) {
    float held[S::columns], totals[S::columns];
    unrolled<S::columns>([&](int c) {
      held[c] = x[column(c)];
      totals[c] = 0;
    });
    for (int row = group() * S::rows; row < rows; row += S::groups * S::rows) {
      float e[S::rows][S::columns], again[kTwice ? S::rows : 1][S::columns], dots[S::rows];
      load(row, e, again);
      unrolled<S::rows>([&](int r) {
        dots[r] = 0;
        unrolled<S::columns>([&](int c) { dots[r] = ptx::fma(e[r][c], held[c], dots[r]); });
      });
      add_up_rows(dots);
      unrolled<S::rows>([&](int r) {
        const float scaling = row + r < rows ? update(row + r, dots[r]) : 0;
        unrolled<S::columns>(
            [&](int c) { totals[c] = ptx::fma(kTwice ? again[kTwice ? r : 0][c] : e[r][c], scaling, totals[c]); });
      });
    }
    add_up_columns(totals);
  }

  // What the rows of all blocks have to send.
  PYLLMQ_MEMBER float mass_of_rows() {
    float sum = 0;
    for_rows([&](int row) { sum += a[row]; });
    PYLLMQ_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    if (ptx::thread() % 32 == 0) sums[ptx::thread() / 32] = sum;
    ptx::sync_block();
    if (ptx::thread() == 0) {
      flags[0] = flags[1] = 0;
      for (int warp = 0; warp < S::warps; ++warp) flags[1] += sums[warp];
    }
    combine();
    return flags[1];
  }

  PYLLMQ_MEMBER void combine() { team.template combine<false, S::threads>(flags); }

  PYLLMQ_MEMBER void add_up_columns(const float (&totals)[S::columns]) {
    if constexpr (S::groups == 1) {
      unrolled<S::columns>([&](int c) { sums[column(c)] = totals[c]; });
    } else {
      unrolled<S::columns>([&](int c) { scratch[group() * S::width + column(c)] = totals[c]; });
      ptx::sync_block();
      for_columns([&](int j) {
        float sum = 0;
        unrolled<S::groups>([&](int other) { sum += scratch[other * S::width + j]; });
        sums[j] = sum;
      });
    }
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <class S>
struct Forward {
  Part<S> p;
  const SinkhornForward& out;
  float *f_before, *u_before, *of_leaders, *out_of_range;
  float mass;
  float* tape;

  PYLLMQ_MEMBER Forward(const Work& work, const SinkhornForward& out, uint8_t* memory) : p(work, memory), out(out) {
    f_before = p.free;
    u_before = f_before + p.rows_room;
    of_leaders = u_before + p.rows_room;
    out_of_range = of_leaders + 2 * S::groups;
    p.k = out_of_range + 1;
  }
  static constexpr int64_t floats(int64_t rows_room) { return Part<S>::floats(rows_room) + 2 * rows_room + 2 * S::groups + 1; }

  // sums = K^T of what update(row, K g of the row) says, over all blocks
  template <class Update>
  PYLLMQ_MEMBER void pass(const Update& update) {
    p.template pass<false>(p.g, [&](int row, auto& e, auto&) { p.entries(row, e); }, update);
  }
  PYLLMQ_MEMBER void column_sums() {
    pass([&](int row, float) { return p.f[row]; });
    if (ptx::thread() < kFlags) p.flags[ptx::thread()] = 0;
    p.combine();
  }

  // f = a / (K g) and its column sums. False if an f left the range: then g and the offsets are as before.
  PYLLMQ_MEMBER bool row_step(bool again) {
    float most = 0, missed = 0;
    pass([&](int row, float sum) {
      const float scaling = p.prices.a.scaling(p.a[row], sum, p.u[row], p.prices.inverse);
      if (p.leads()) {
        most = larger(scaling, most);
        if (out.tolerance > 0) missed += missed_by(row, scaling, again);
        p.f[row] = scaling;
      }
      return scaling;
    });
    share_flags(most > p.limit, missed);
    return !(p.flags[0] > 0);
  }

  PYLLMQ_MEMBER float missed_by(int row, float scaling, bool again) {
    if (!again) {
      f_before[row] = p.f[row];
      u_before[row] = p.u[row];
    } else {
      f_before[row] *= ptx::exp((u_before[row] - p.u[row]) * p.prices.inverse);
    }
    return p.a[row] == 0 ? 0 : ptx::magnitude(p.a[row] * f_before[row] / scaling - p.a[row]);
  }

  // Of the groups' leaders, then of the team, with the column sums.
  PYLLMQ_MEMBER void share_flags(bool beyond, float missed) {
    if (p.leads()) {
      of_leaders[2 * p.group()] = beyond ? 1.0f : 0.0f;
      of_leaders[2 * p.group() + 1] = missed;
    }
    if (S::groups > 1) ptx::sync_block();
    if (ptx::thread() == 0) {
      p.flags[0] = p.flags[1] = out_of_range[0] = 0;
      for (int group = 0; group < S::groups; ++group)
        for (int flag = 0; flag < kFlags; ++flag) p.flags[flag] += of_leaders[2 * group + flag];
    }
    p.combine();
  }

  PYLLMQ_MEMBER bool column_step() {
    p.for_columns([&](int j) {
      const float scaling = p.prices.b.scaling(p.b[j], p.sums[j], p.v[j], p.prices.inverse);
      if (scaling > p.limit) out_of_range[0] = 1;
      p.g[j] = scaling;
    });
    ptx::sync_block();
    return !(out_of_range[0] > 0);
  }

  // From now on the tape holds offsets, too: those of the iterations before are the first ones.
  PYLLMQ_MEMBER void begin_to_move(int64_t iteration) {
    if (!p.moved)
      for (int64_t t = 0; t < iteration; ++t) write_slot(t, p.call->n + p.m, p.u, p.v);
    p.moved = true;
  }

  // Once more in new offsets, which take up g, if scalings left the range.
  PYLLMQ_MEMBER void rows(int64_t iteration) {
    bool again = false;
    while (!row_step(again) && !again) {
      begin_to_move(iteration);
      p.for_columns([&](int j) { absorb(p.v[j], p.g[j], p.prices.inverse); });
      ptx::sync_block();
      p.row_offsets();
      p.build();
      again = true;
      if (p.prices.a.kept()) continue;
      rows_in_moved_offsets();
      break;
    }
  }

  // Where a marginal may be missed u takes up f, too.
  PYLLMQ_MEMBER void rows_in_moved_offsets() {
    pass([&](int row, float sum) {
      if (p.leads()) set_pair(p.u[row], p.f[row], p.prices.a.moved(p.a[row], sum, p.u[row], p.prices.inverse));
      return 0.0f;
    });
    ptx::sync_block();
    p.build();
    float missed = 0;
    pass([&](int row, float) {
      if (p.leads() && out.tolerance > 0) missed += missed_by(row, p.f[row], true);
      return p.f[row];
    });
    share_flags(false, missed);
  }

  PYLLMQ_MEMBER void move_columns(int64_t iteration) {
    begin_to_move(iteration);
    p.for_rows([&](int row) { absorb(p.u[row], p.f[row], p.prices.inverse); });
    ptx::sync_block();
    p.column_offsets();
    p.build();
    column_sums();
    p.for_columns([&](int j) { set_pair(p.v[j], p.g[j], p.prices.b.moved(p.b[j], p.sums[j], p.v[j], p.prices.inverse)); });
    ptx::sync_block();
    if (!p.prices.b.kept()) p.build();
  }

  PYLLMQ_MEMBER static void set_pair(float& offset, float& scaling, const Pair& pair) {
    offset = pair.offset;
    scaling = pair.scaling;
  }

  PYLLMQ_MEMBER void write_slot(int64_t iteration, int64_t from, const float* rows, const float* columns) {
    if (tape == nullptr) return;
    const int64_t n = p.call->n;
    float* slot = tape + iteration * 2 * (n + p.m) + from;
    p.for_rows([&](int row) { slot[p.first_row + row] = rows[row]; });
    if (p.team.rank == 0)
      p.for_columns([&](int j) {
        if (j < p.m) slot[n + j] = columns[j];
      });
  }

  PYLLMQ_MEMBER void run(int64_t problem) {
    const int64_t n = p.call->n, m = p.m;
    tape = out.tape == nullptr ? nullptr : out.tape + problem * out.iterations * 2 * (n + m);
    p.begin(problem);
    if (out.tolerance > 0) mass = p.mass_of_rows();
    int64_t t = 0;
    for (; t < out.iterations; ++t) {
      rows(t);
      if (out.tolerance > 0 && t > 0 && p.flags[1] <= out.tolerance * mass) {
        p.for_rows([&](int row) { p.f[row] = p.a[row] > 0 ? f_before[row] : 0; });
        break;
      }
      if (!column_step()) move_columns(t);
      write_slot(t, 0, p.f, p.g);
      if (p.moved) write_slot(t, n + m, p.u, p.v);
    }
    ptx::sync_block();
    float* plan = out.plan + (problem * n + p.first_row) * m;
    p.for_entries([&](int row, int j) { plan[row * m + j] = p.f[row] * p.entry(row, j) * p.g[j]; });
    p.for_rows([&](int row) { out.u[problem * n + p.first_row + row] = potential(p.u[row], p.f[row], p.prices.inverse); });
    if (p.team.rank > 0) return;
    p.for_columns([&](int j) {
      if (j < m) out.v[problem * m + j] = potential(p.v[j], p.g[j], p.prices.inverse);
    });
    if (ptx::thread() == 0) out.count[problem] = static_cast<int32_t>(p.moved ? -t : t);
  }
};

template <class S>
PYLLMQ_KERNEL void __launch_bounds__(S::threads) forward_kernel(const Given<SinkhornForward> given) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Forward<S> forward(given.work, given.out, memory);
  const Layout& layout = given.work.layout;
  for (int64_t problem = ptx::block() / layout.team; problem < given.work.call.problems; problem += layout.teams)
    forward.run(problem);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The adjoint of the loop, half step by half step, as in csrc/sinkhorn/cpu/sinkhorn.cpp. Where offsets moved, the tape has those
// of every iteration, and entries of K are computed in them.
template <class S>
struct Backward {
  Part<S> p;
  const SinkhornBackward& out;
  float *r, *d_beta, *grad_b, *v_before, *d_alpha, *grad_a;
  float *all_r, *all_s;
  const float* tape;
  int64_t problem, last;

  PYLLMQ_MEMBER Backward(const Work& work, const SinkhornBackward& out, uint8_t* memory) : p(work, memory), out(out) {
    r = p.free;
    d_beta = r + S::width;
    grad_b = d_beta + S::width;
    v_before = grad_b + S::width;
    d_alpha = v_before + S::width;
    grad_a = d_alpha + p.rows_room;
    p.k = grad_a + p.rows_room;
    all_r = work.coefficients + ptx::block() / work.layout.team * out.iterations * (work.call.n + work.call.m);
    all_s = all_r + out.iterations * work.call.m;
  }
  static constexpr int64_t floats(int64_t rows_room) { return Part<S>::floats(rows_room) + 4 * S::width + 2 * rows_room; }

  // Of f and g; offsets lie n + m numbers further on.
  PYLLMQ_MEMBER const float* rows_of(int64_t t) const { return tape + t * 2 * (p.call->n + p.m) + p.first_row; }
  PYLLMQ_MEMBER const float* columns_of(int64_t t) const { return tape + t * 2 * (p.call->n + p.m) + p.call->n; }
  PYLLMQ_MEMBER float g_before(int64_t t, int j) const { return t > 0 ? columns_of(t - 1)[j] : p.b[j] > 0 ? 1.0f : 0.0f; }
  PYLLMQ_MEMBER float offset_before(int64_t t, int j) const {
    if (t > 0) return columns_of(t - 1)[p.call->n + p.m + j];
    return p.b[j] > 0 ? 0 : -infinity();
  }

  PYLLMQ_MEMBER void read_rows(int64_t t) {
    p.for_rows([&](int row) {
      p.f[row] = rows_of(t)[row];
      if (p.moved) p.u[row] = rows_of(t)[p.call->n + p.m + row];
    });
  }

  PYLLMQ_MEMBER void through_the_plan() {
    const int64_t n = p.call->n, m = p.m;
    read_rows(last);
    p.for_columns([&](int j) {
      p.g[j] = j < m ? columns_of(last)[j] : 0;
      if (p.moved) p.v[j] = j < m ? columns_of(last)[n + m + j] : -infinity();
      grad_b[j] = 0;
    });
    ptx::sync_block();
    const float* gradient = out.grad_plan + (problem * n + p.first_row) * m;
    p.template pass<false>(
        p.g,
        [&](int row, auto& e, auto&) {
          p.entries(row, e);
          unrolled<S::rows, S::columns>(
              [&](int r, int c) { e[r][c] *= row + r < p.rows && p.column(c) < m ? gradient[(row + r) * m + p.column(c)] : 0; });
        },
        [&](int row, float sum) {
          const float f = p.f[row];
          if (p.leads()) {
            const float of_u = f != 0 ? out.grad_u[problem * n + p.first_row + row] / p.prices.inverse : 0;
            d_alpha[row] = of_u + f * sum;
            grad_a[row] = 0;
          }
          return f;
        });
    combine();
    p.for_columns([&](int j) {
      const float of_v = j < m && p.g[j] != 0 ? out.grad_v[problem * m + j] / p.prices.inverse : 0;
      d_beta[j] = of_v + p.g[j] * p.sums[j];
    });
  }

  PYLLMQ_MEMBER void combine() {
    if (ptx::thread() < kFlags) p.flags[ptx::thread()] = 0;
    p.combine();
  }

  template <bool kMoved>
  PYLLMQ_MEMBER void step(int64_t t) {
    p.for_columns([&](int j) {
      const float g = p.g[j];
      if (g != 0) grad_b[j] += d_beta[j] / p.b[j];
      r[j] = g * p.prices.b.share(d_beta[j], p.b[j], p.v[j], g, p.prices.inverse);
      if (j < p.m && p.team.rank == 0) all_r[t * p.m + j] = r[j];
      p.g[j] = j < p.m ? g_before(t, j) : 0;
      if (kMoved) v_before[j] = j < p.m ? offset_before(t, j) : -infinity();
    });
    ptx::sync_block();
    p.template pass<kMoved>(
        r,
        [&](int row, auto& e, auto& again) {
          p.entries(row, e);
          if constexpr (kMoved) {
            unrolled<S::rows, S::columns>([&](int i, int c) {
              again[i][c] = row + i < p.rows && p.column(c) < p.m ? entry_of_k(p.u[row + i], v_before[p.column(c)],
                                                                               p.cost_at(row + i, p.column(c)), p.prices.inverse)
                                                                  : 0;
            });
          }
        },
        [&](int row, float sum) {
          const float f = p.f[row], gradient = (t == last ? d_alpha[row] : 0) - f * sum;
          const float s = f * p.prices.a.share(gradient, p.a[row], p.u[row], f, p.prices.inverse);
          if (p.leads()) {
            if (f != 0) grad_a[row] += gradient / p.a[row];
            all_s[t * p.call->n + p.first_row + row] = s;
          }
          return s;
        });
    combine();
    p.for_columns([&](int j) {
      d_beta[j] = -p.g[j] * p.sums[j];
      if (kMoved) p.v[j] = v_before[j];
    });
    if (t > 0) read_rows(t - 1);
    ptx::sync_block();
  }

  // Everything that the iterations added to the gradient of log K, as one product of rank 2 x iterations.
  template <bool kMoved>
  PYLLMQ_MEMBER void product() {
    const int64_t n = p.call->n, m = p.m, offsets = n + m;
    const float* gradient = out.grad_plan + (problem * n + p.first_row) * m;
    float* grad_cost = out.grad_cost + (problem * n + p.first_row) * m;
    for (int row = p.group() * S::rows; row < p.rows; row += S::groups * S::rows) {
      float e[S::rows][S::columns], total[S::rows][S::columns];
      if (!kMoved) p.entries(row, e);
      unrolled<S::rows, S::columns>([&](int i, int c) { total[i][c] = 0; });
      for (int64_t t = 0; t <= last; ++t) {
        unrolled<S::columns>([&](int c) {
          const int j = p.column(c);
          if (j >= m) return;
          const float of_r = ptx::load_l2(all_r + t * m + j), before = g_before(t, j);
          unrolled<S::rows>([&](int i) {
            if (row + i >= p.rows) return;
            float left = rows_of(t)[row + i], right = all_s[t * n + p.first_row + row + i];
            if (kMoved) {
              const float u = rows_of(t)[offsets + row + i], cost = p.cost_at(row + i, j);
              left *= entry_of_k(u, columns_of(t)[offsets + j], cost, p.prices.inverse);
              right *= entry_of_k(u, offset_before(t, j), cost, p.prices.inverse);
            }
            total[i][c] = ptx::fma(left, of_r, ptx::fma(right, before, total[i][c]));
          });
        });
      }
      unrolled<S::rows, S::columns>([&](int i, int c) {
        const int j = p.column(c);
        if (row + i >= p.rows || j >= m) return;
        float first = rows_of(last)[row + i] * columns_of(last)[j] * gradient[(row + i) * m + j];
        if (kMoved)
          first *= entry_of_k(rows_of(last)[offsets + row + i], columns_of(last)[offsets + j], p.cost_at(row + i, j),
                              p.prices.inverse);
        const float of_log_k = kMoved ? total[i][c] - first : (total[i][c] - first) * e[i][c];
        grad_cost[(row + i) * m + j] = of_log_k * p.prices.inverse;
      });
    }
  }

  PYLLMQ_MEMBER void run(int64_t which) {
    const int64_t n = p.call->n, m = p.m, taken = out.count[which];
    const int resident = p.resident;
    problem = which;
    last = (taken < 0 ? -taken : taken) - 1;
    tape = out.tape + problem * out.iterations * 2 * (n + m);
    p.begin(problem);
    p.moved = taken < 0;
    if (p.moved) p.resident = 0;
    through_the_plan();
    for (int64_t t = last; t >= 0; --t) {
      if (p.moved)
        step<true>(t);
      else
        step<false>(t);
    }
    if (p.moved)
      product<true>();
    else
      product<false>();
    p.resident = resident;
    p.for_rows([&](int row) { out.grad_a[problem * n + p.first_row + row] = grad_a[row]; });
    if (p.team.rank == 0)
      p.for_columns([&](int j) {
        if (j < m) out.grad_b[problem * m + j] = grad_b[j];
      });
  }
};

template <class S>
PYLLMQ_KERNEL void __launch_bounds__(S::threads) backward_kernel(const Given<SinkhornBackward> given) {
  PYLLMQ_DYNAMIC_SHARED(memory);
  Backward<S> backward(given.work, given.out, memory);
  const Layout& layout = given.work.layout;
  for (int64_t problem = ptx::block() / layout.team; problem < given.work.call.problems; problem += layout.teams)
    backward.run(problem);
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <class Floats>
Layout layout_of(const SinkhornProblem& call, int width, int rows, const Floats& fixed) {
  const int64_t room = shared_bytes() / 4, blocks = multiprocessors();
  const auto resident_of = [&](int64_t team) {
    const int64_t here = ceil_div(ceil_div(call.n, team), rows) * rows;
    return std::min(here, std::max<int64_t>(0, room - fixed(here)) / width / rows * rows);
  };
  int64_t team = std::min({std::max<int64_t>(1, blocks / call.problems), ceil_div(call.n * call.m, kEntriesOfBlock), call.n});
  while (team < std::min(blocks, call.n) && resident_of(team) * team < call.n) ++team;
  const int64_t rows_each = ceil_div(call.n, team);
  team = ceil_div(call.n, rows_each);
  const int64_t teams = std::min(call.problems, team > 1 ? blocks / team : blocks * kBlocksPerMultiprocessor);
  return {teams, team, rows_each, resident_of(team)};
}

template <class Visit>
void with_shape(int64_t n, int64_t m, const Visit& visit) {
  if (n <= 32 && m <= 32) return visit(Shape<1, 1, 1, 4>{});
  if (m <= 64) return visit(Shape<8, 1, 2, 4>{});
  if (m <= 256) return visit(Shape<8, 1, 8, 4>{});
  if (m <= 512) return visit(Shape<8, 1, 16, 2>{});
  if (m <= 2048) return visit(Shape<16, 16, 4, 4>{});
  return visit(Shape<16, 16, 8, 4>{});
}

template <class Side, class S>
Layout layout_for(const SinkhornProblem& call) {
  return layout_of(call, S::width, S::rows, [](int64_t rows_room) { return Side::floats(rows_room); });
}

template <class Side, class S>
int64_t shared_floats(const Layout& layout) {
  return Side::floats(ceil_div(layout.rows_each, S::rows) * S::rows) + layout.resident * S::width;
}

int64_t partial_sums(const SinkhornProblem& call, const Layout& layout) {
  return layout.team > 1 ? layout.teams * 2 * (layout.team + 1) * (kFlags + call.m) : 0;
}

template <class Side, class S, class Kernel, class Out>
void launch(Kernel* kernel, const SinkhornProblem& call, const Out& out, float* workspace, uint32_t* counters, uintptr_t stream) {
  const Layout layout = layout_for<Side, S>(call);
  const size_t bytes = sizeof(float) * shared_floats<Side, S>(layout);
  Work work{call, layout, workspace, nullptr, nullptr, counters, nullptr};
  work.totals = work.parts + layout.teams * 2 * layout.team * (kFlags + call.m);
  work.turns = reinterpret_cast<uint32_t*>(workspace + partial_sums(call, layout));
  work.coefficients = workspace + partial_sums(call, layout) + layout.teams;
  const Given<Out> given{work, out};
  allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  if (layout.team > 1)
    PYLLMQ_LAUNCH_TOGETHER(kernel, layout.teams * layout.team, S::threads, bytes, stream, given);
  else
    PYLLMQ_LAUNCH(kernel, layout.teams, S::threads, bytes, stream, given);
  check_launch("sinkhorn");
}

}  // namespace

bool sinkhorn_fits(int64_t n, int64_t m) {
  if (n <= kSinkhornSmall && m <= kSinkhornSmall) return true;
  if (n > kSinkhornMostRows || m > kSinkhornMostColumns) return false;
  bool fits = false;
  with_shape(n, m, [&](auto shape) {
    using S = decltype(shape);
    const int64_t rows = ceil_div(ceil_div(n, std::min<int64_t>(n, multiprocessors())), S::rows) * S::rows;
    fits = 4 * std::max(Forward<S>::floats(rows), Backward<S>::floats(rows)) <= shared_bytes();
  });
  return fits;
}

SinkhornRoom sinkhorn_room(const SinkhornProblem& call, int64_t backward_iterations) {
  SinkhornRoom room{};
  if (sinkhorn_is_small(call)) return room;
  with_shape(call.n, call.m, [&](auto shape) {
    using S = decltype(shape);
    const Layout layout = backward_iterations > 0 ? layout_for<Backward<S>, S>(call) : layout_for<Forward<S>, S>(call);
    const int64_t coefficients = layout.teams * backward_iterations * (call.n + call.m);
    room = {partial_sums(call, layout) + layout.teams + coefficients, layout.team > 1 ? layout.teams : 0};
  });
  return room;
}

void sinkhorn(const SinkhornProblem& call, const SinkhornForward& out, float* workspace, uint32_t* counters, uintptr_t stream) {
  if (sinkhorn_is_small(call)) return sinkhorn_small(call, out, stream);
  with_shape(call.n, call.m, [&](auto shape) {
    using S = decltype(shape);
    launch<Forward<S>, S>(forward_kernel<S>, call, out, workspace, counters, stream);
  });
}

void sinkhorn_backward(const SinkhornProblem& call, const SinkhornBackward& out, float* workspace, uint32_t* counters,
                       uintptr_t stream) {
  if (sinkhorn_is_small(call)) return sinkhorn_small_backward(call, out, stream);
  with_shape(call.n, call.m, [&](auto shape) {
    using S = decltype(shape);
    launch<Backward<S>, S>(backward_kernel<S>, call, out, workspace, counters, stream);
  });
}

}  // namespace pyllmq::cuda

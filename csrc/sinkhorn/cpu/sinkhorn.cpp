#include "sinkhorn/cpu/sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "sinkhorn/cpu/lane_groups.h"

namespace pyllmq::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSameMass = 1e-3;  // reference_sinkhorn.SAME_MASS

int64_t padded(int64_t count) { return rounded_up(count, kLanes); }

// K^T beside K: both half steps add up whole vectors. Lines of one vector gain nothing (16x16: 0.87 times as fast).
bool has_both_ways(int64_t n, int64_t m) { return std::min(n, m) > kLanes && padded(n) * padded(m) <= kBothWays; }

[[noreturn]] void refuse(int64_t problem, const std::string& what) {
  throw std::invalid_argument("problem " + std::to_string(problem) + " of the batch: " + what);
}

[[noreturn]] void refuse_impossible(int64_t problem, const char* line, int64_t index) {
  refuse(problem, std::string(line) + " " + std::to_string(index) +
                      " has mass, but its cost is +inf (or masked) wherever the other side has mass; give it mass 0");
}

struct Mass {
  double sum;
  bool somewhere_zero;
};

Mass checked_mass(const float* marginal, int64_t count, const char* name, int64_t problem) {
  Mass mass{0, false};
  bool fine = true;
  for (int64_t i = 0; i < count; ++i) {
    fine &= marginal[i] >= 0 && marginal[i] <= std::numeric_limits<float>::max();
    mass.sum += marginal[i];
    mass.somewhere_zero |= marginal[i] == 0;
  }
  if (!fine)
    refuse(problem, std::string("marginal ") + name + " has a negative, infinite or NaN entry; allowed: finite, at least 0");
  return mass;
}

// True if all marginals are above 0.
bool check_marginals(const SinkhornProblem& p) {
  const bool balanced = std::isinf(p.rho_a) && std::isinf(p.rho_b);
  bool full = true, positive = true;
  const auto allowed = [](float epsilon) { return epsilon > 0 && epsilon <= std::numeric_limits<float>::max(); };
  for (int64_t q = 0; q < p.problems; ++q) positive &= allowed(p.epsilon[q]);
  for (int64_t q = 0; !positive && q < p.problems; ++q)
    if (!allowed(p.epsilon[q]))
      refuse(q, "epsilon must be positive and finite in every problem, here " + std::to_string(p.epsilon[q]));
  const bool shared = p.a_stride == 0 && p.b_stride == 0;
  for (int64_t q = 0; q < (shared ? std::min<int64_t>(p.problems, 1) : p.problems); ++q) {
    const Mass a = checked_mass(p.a + q * p.a_stride, p.n, "a", q), b = checked_mass(p.b + q * p.b_stride, p.m, "b", q);
    full &= !a.somewhere_zero && !b.somewhere_zero;
    if (balanced && std::abs(a.sum - b.sum) > kSameMass * std::max(a.sum, b.sum))
      refuse(q, "the marginals a and b do not sum alike (" + std::to_string(a.sum) + " and " + std::to_string(b.sum) +
                    "), so no plan has both; rescale one, or give unbalanced=");
  }
  return full;
}

// Costs that are NaN or -inf; a row or column with mass that may send it nowhere.
void check_possible(const SinkhornProblem& p, int64_t q) {
  const float *cost = p.cost + q * p.cost_stride, *a = p.a + q * p.a_stride, *b = p.b + q * p.b_stride;
  const auto open = [&](int64_t i, int64_t j) {
    return a[i] > 0 && b[j] > 0 && cost[i * p.m + j] < std::numeric_limits<float>::infinity();
  };
  for (int64_t e = 0; e < p.n * p.m; ++e)
    if (!(cost[e] > -std::numeric_limits<float>::infinity()))
      refuse(q, "cost has a NaN or -inf entry; allowed: finite, or +inf where no mass may go");
  for (int64_t i = 0; i < p.n; ++i) {
    bool some = a[i] == 0;
    for (int64_t j = 0; j < p.m; ++j) some |= open(i, j);
    if (!some) refuse_impossible(q, "row", i);
  }
  for (int64_t j = 0; j < p.m; ++j) {
    bool some = b[j] == 0;
    for (int64_t i = 0; i < p.n; ++i) some |= open(i, j);
    if (!some) refuse_impossible(q, "column", j);
  }
}

// ---- one problem, any size ---------------------------------------------------------------------------------------------

// Half step 2t is the row step of iteration t, 2t + 1 its column step. From `first` on, scalings are relative to u, v.
struct Epoch {
  int64_t first;
  std::vector<double> u, v;
};

// The scalings as each half step saw them: those it made, and those of the other side, in the offsets of that half step.
struct Record {
  float *row_f, *row_g, *column_f, *column_g;  // [iterations, n] and [iterations, stride]
  std::vector<Epoch> epochs;
};

class Loop {
 public:
  Loop(const SinkhornProblem& problem, const SinkhornKernels& kernels, Workspace& workspace)
      : p_(problem), kernels_(kernels), stride_(padded(problem.m)), both_ways_(has_both_ways(problem.n, problem.m)) {
    k_ = workspace.take<float>(p_.n * stride_);
    u_ = workspace.take<double>(p_.n);
    v_ = workspace.take<double>(stride_);
    old_u_ = workspace.take<double>(p_.n);
    a_ = workspace.take<float>(padded(p_.n));
    b_ = workspace.take<float>(stride_);
    f_ = workspace.take<float>(padded(p_.n));
    old_f_ = workspace.take<float>(padded(p_.n));
    sums_ = workspace.take<float>(std::max(padded(p_.n), stride_));
    g_ = workspace.take<float>(stride_);
    block_ = workspace.take<float>(stride_);
    if (both_ways_) transposed_ = workspace.take<float>(stride_ * padded(p_.n));
  }
  static int64_t bytes(const SinkhornProblem& p) {
    const int64_t n = padded(p.n), m = padded(p.m);
    return 4 * ((has_both_ways(p.n, p.m) ? 2 : 1) * n * m + 5 * n + 5 * m) + 8 * (2 * n + m) + 14 * 64;
  }

  void begin(int64_t q) {
    problem_ = q;
    cost_ = p_.cost + q * p_.cost_stride;
    epsilon_ = p_.epsilon[q];
    damp_a_ = std::isinf(p_.rho_a) ? 1 : p_.rho_a / (p_.rho_a + epsilon_);
    damp_b_ = std::isinf(p_.rho_b) ? 1 : p_.rho_b / (p_.rho_b + epsilon_);
    std::fill(a_, a_ + padded(p_.n), 0.0f);
    std::fill(f_, f_ + padded(p_.n), 0.0f);
    std::fill(b_, b_ + stride_, 0.0f);
    std::copy_n(p_.a + q * p_.a_stride, p_.n, a_);
    std::copy_n(p_.b + q * p_.b_stride, p_.m, b_);
    if (!balanced()) drop_impossible_columns();
    float largest = 1;
    for (int64_t i = 0; i < p_.n; ++i) largest = std::max(largest, a_[i]);
    for (int64_t j = 0; j < p_.m; ++j) largest = std::max(largest, b_[j]);
    limit_ = largest * kLargeScaling;
    // Columns without mass take no part: +inf keeps them out of the minimum, v = -inf out of K.
    for (int64_t j = 0; j < stride_; ++j) {
      block_[j] = b_[j] > 0 ? 0 : std::numeric_limits<float>::infinity();
      v_[j] = b_[j] > 0 ? 0 : -kInfinity;
      g_[j] = b_[j] > 0 ? 1 : 0;
    }
    for (int64_t i = 0; i < p_.n; ++i) {
      const float low = kernels_.row_floor(cost_ + i * p_.m, block_, p_.m);
      if (!(low > -std::numeric_limits<float>::infinity()))
        refuse(problem_, "cost has a NaN or -inf entry; allowed: finite, or +inf where no mass may go");
      set_row_offset(i, low);
    }
    kernels_.build_first(cost_, u_, block_, 1 / epsilon_, p_.n, p_.m, stride_, k_);
    if (both_ways_) kernels_.transpose(k_, p_.n, stride_, padded(p_.n), transposed_);
  }

  // One iteration. True if its row step shows that the plan before was near enough: then that plan's scalings stay.
  bool iterate(int64_t t, double tolerance, Record* record) {
    if (tolerance > 0 && t > 0) {
      std::copy_n(f_, p_.n, old_f_);
      std::copy_n(u_, p_.n, old_u_);
    }
    bool moved = false;
    if (!row_step()) {
      moved = true;
      move_rows(record, 2 * t);
    }
    if (tolerance > 0 && t > 0 && settled(tolerance, moved)) return true;
    if (record) keep(record->row_f + t * p_.n, record->row_g + t * stride_);
    if (!column_step()) {
      moved = true;
      move_columns(record, 2 * t + 1);
    }
    if (record) keep(record->column_f + t * p_.n, record->column_g + t * stride_);
    offsets_moved_ |= moved;
    return false;
  }

  int64_t run(int64_t iterations, double tolerance, float* tape, Record* record) {
    offsets_moved_ = false;
    if (record) record->epochs.assign(1, Epoch{-1, {u_, u_ + p_.n}, {v_, v_ + stride_}});
    int64_t t = 0;
    for (; t < iterations; ++t) {
      if (iterate(t, tolerance, record)) break;
      if (tape != nullptr) {
        std::copy_n(f_, p_.n, tape + t * (p_.n + p_.m));
        std::copy_n(g_, p_.m, tape + t * (p_.n + p_.m) + p_.n);
      }
    }
    return t;
  }

  bool offsets_moved() const { return offsets_moved_; }
  bool balanced() const { return damp_a_ == 1 && damp_b_ == 1; }
  int64_t stride() const { return stride_; }
  const float* k() const { return k_; }
  const float* a() const { return a_; }
  const float* b() const { return b_; }
  const float* start() const { return g_; }  // between begin() and run()
  double epsilon() const { return epsilon_; }
  double damp_a() const { return damp_a_; }
  double damp_b() const { return damp_b_; }

  void results(float* plan, float* u, float* v) const {
    kernels_.plan(k_, f_, g_, p_.n, p_.m, stride_, plan);
    kernels_.logarithms(f_, p_.n, u);
    kernels_.logarithms(g_, p_.m, v);
    for (int64_t i = 0; i < p_.n; ++i) u[i] = static_cast<float>(u_[i] + epsilon_ * u[i]);
    for (int64_t j = 0; j < p_.m; ++j) v[j] = static_cast<float>(v_[j] + epsilon_ * v[j]);
  }

  void use(const Epoch& epoch) {
    std::copy(epoch.u.begin(), epoch.u.end(), u_);
    std::copy(epoch.v.begin(), epoch.v.end(), v_);
    build();
  }

  // What a half step's plan sums to in a line of this mass: the mass itself, or what its price made of it.
  double line_sum(double mass, double offset, double scaling, double rho) const {
    if (std::isinf(rho)) return mass;
    return mass * std::exp(-(offset + epsilon_ * (std::log(scaling) - std::log(mass))) / rho);
  }
  double u(int64_t i) const { return u_[i]; }
  double v(int64_t j) const { return v_[j]; }

 private:
  void build() {
    kernels_.build(cost_, u_, v_, 1 / epsilon_, p_.n, p_.m, stride_, k_);
    if (both_ways_) kernels_.transpose(k_, p_.n, stride_, padded(p_.n), transposed_);
  }

  void set_row_offset(int64_t i, double low) {
    if (low == kInfinity) {
      if (a_[i] > 0 && std::isinf(p_.rho_a) && std::isinf(p_.rho_b)) refuse_impossible(problem_, "row", i);
      a_[i] = 0;
    }
    u_[i] = a_[i] > 0 ? low : -kInfinity;
  }

  void drop_impossible_columns() {
    for (int64_t j = 0; j < p_.m; ++j) {
      bool open = false;
      for (int64_t i = 0; i < p_.n && !open; ++i)
        open = a_[i] > 0 && cost_[i * p_.m + j] < std::numeric_limits<float>::infinity();
      if (!open) b_[j] = 0;
    }
  }

  // f = a (K g)^-damp in the offsets: e^(u / epsilon) f' is the scaling itself. Out of range comes back as infinite.
  float damped(float mass, float sum, double offset, double damp) const {
    if (mass == 0) return 0;
    const double logarithm = std::log(mass) - damp * std::log(std::max(sum, kTiny)) + (damp - 1) * offset / epsilon_;
    return std::abs(logarithm) > 25 ? std::numeric_limits<float>::infinity() : static_cast<float>(std::exp(logarithm));
  }

  bool row_step() {
    if (balanced() && both_ways_) return kernels_.scale_columns(transposed_, p_.m, padded(p_.n), g_, a_, f_) <= limit_;
    if (balanced()) return kernels_.pass(k_, p_.n, stride_, g_, {a_, nullptr, nullptr}, f_, sums_) <= limit_;
    kernels_.row_sums(k_, p_.n, stride_, g_, f_);
    bool fine = true;
    for (int64_t i = 0; i < p_.n; ++i) {
      f_[i] = damped(a_[i], f_[i], u_[i], damp_a_);
      fine &= f_[i] <= limit_;
    }
    if (fine) kernels_.column_sums(k_, p_.n, stride_, f_, sums_);
    return fine;
  }

  bool column_step() {
    if (balanced() && both_ways_) return kernels_.scale_columns(k_, p_.n, stride_, f_, b_, g_) <= limit_;
    if (balanced()) return kernels_.divide(b_, sums_, stride_, g_) <= limit_;
    bool fine = true;
    for (int64_t j = 0; j < p_.m; ++j) {
      g_[j] = damped(b_[j], sums_[j], v_[j], damp_b_);
      fine &= g_[j] <= limit_;
    }
    return fine;
  }

  // The row step in new offsets: v takes g up, u makes the largest entry of every row of K exactly 1, so sums are safe.
  void move_rows(Record* record, int64_t half_step) {
    for (int64_t j = 0; j < p_.m; ++j) {
      v_[j] += epsilon_ * std::log(g_[j]);
      g_[j] = b_[j] > 0 ? 1 : 0;
    }
    for (int64_t i = 0; i < p_.n; ++i) {
      double low[8];
      std::fill(low, low + 8, kInfinity);
      const float* cost = cost_ + i * p_.m;
      int64_t j = 0;
      for (; j + 8 <= p_.m; j += 8)
        for (int64_t l = 0; l < 8; ++l) {
          const double reduced = cost[j + l] - v_[j + l];
          low[l] = reduced < low[l] ? reduced : low[l];
        }
      for (; j < p_.m; ++j) low[0] = std::min(low[0], cost[j] - v_[j]);
      set_row_offset(i, *std::min_element(low, low + 8));
    }
    build();
    kernels_.row_sums(k_, p_.n, stride_, g_, f_);
    if (balanced()) {
      kernels_.divide(a_, f_, padded(p_.n), f_);
    } else {
      for (int64_t i = 0; i < p_.n; ++i) {
        if (a_[i] == 0) continue;
        u_[i] += epsilon_ * (std::log(a_[i]) - damp_a_ * std::log(f_[i])) + (damp_a_ - 1) * u_[i];
        f_[i] = 1;
      }
      build();
    }
    if (record) record->epochs.push_back({half_step, {u_, u_ + p_.n}, {v_, v_ + stride_}});
    kernels_.column_sums(k_, p_.n, stride_, f_, sums_);
  }

  void move_columns(Record* record, int64_t half_step) {
    for (int64_t i = 0; i < p_.n; ++i) {
      u_[i] += epsilon_ * std::log(f_[i]);
      f_[i] = a_[i] > 0 ? 1 : 0;
    }
    std::fill(v_, v_ + p_.m, kInfinity);
    for (int64_t i = 0; i < p_.n; ++i) {
      const float* cost = cost_ + i * p_.m;
      const double offset = u_[i];
      for (int64_t j = 0; j < p_.m; ++j) v_[j] = cost[j] - offset < v_[j] ? cost[j] - offset : v_[j];
    }
    for (int64_t j = 0; j < p_.m; ++j) {
      if (v_[j] == kInfinity && b_[j] > 0) refuse_impossible(problem_, "column", j);
      if (b_[j] == 0) v_[j] = -kInfinity;
    }
    build();
    kernels_.column_sums(k_, p_.n, stride_, f_, sums_);
    if (balanced()) {
      kernels_.divide(b_, sums_, stride_, g_);
    } else {
      for (int64_t j = 0; j < p_.m; ++j) {
        if (b_[j] == 0) continue;
        v_[j] += epsilon_ * (std::log(b_[j]) - damp_b_ * std::log(sums_[j])) + (damp_b_ - 1) * v_[j];
        g_[j] = 1;
      }
      build();
    }
    if (record) record->epochs.push_back({half_step, {u_, u_ + p_.n}, {v_, v_ + stride_}});
  }

  // Is the plan before this row step near enough? If so its scalings come back, in the offsets of now.
  bool settled(double tolerance, bool moved) {
    double missed = 0, mass = 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      if (a_[i] == 0) continue;
      if (moved) old_f_[i] = static_cast<float>(old_f_[i] * std::exp((old_u_[i] - u_[i]) / epsilon_));
      missed += std::abs(static_cast<double>(a_[i]) * old_f_[i] / f_[i] - a_[i]);
      mass += a_[i];
    }
    if (missed > tolerance * mass) return false;
    std::swap(f_, old_f_);
    offsets_moved_ |= moved;
    return true;
  }

  void keep(float* f, float* g) const {
    std::copy_n(f_, p_.n, f);
    std::copy_n(g_, stride_, g);
  }

  const SinkhornProblem& p_;
  const SinkhornKernels& kernels_;
  const int64_t stride_;
  const bool both_ways_;
  int64_t problem_ = 0;
  const float* cost_ = nullptr;
  double epsilon_ = 1, damp_a_ = 1, damp_b_ = 1;
  float limit_ = 0;
  bool offsets_moved_ = false;
  float *k_, *a_, *b_, *f_, *old_f_, *g_, *sums_, *block_, *transposed_ = nullptr;
  double *u_, *v_, *old_u_;
};

void forward_one(Loop& loop, const SinkhornProblem& p, const SinkhornForward& out, int64_t q) {
  loop.begin(q);
  float* tape = out.tape == nullptr ? nullptr : out.tape + q * out.iterations * (p.n + p.m);
  const int64_t count = loop.run(out.iterations, out.tolerance, tape, nullptr);
  out.count[q] = static_cast<int32_t>(loop.offsets_moved() ? -count : count);
  loop.results(out.plan + q * p.n * p.m, out.u + q * p.n, out.v + q * p.m);
}

// The adjoint of the loop, half step by half step: with d alpha, d beta the gradients with respect to the logarithms of
// the scalings,  r = g d beta / columns(P),  d alpha = [of the plan] - f (K r),  s = f d alpha / rows(P),  d beta = -g (K^T s).
class Adjoint {
 public:
  Adjoint(const SinkhornProblem& problem, const SinkhornBackward& out, const SinkhornKernels& kernels, Workspace& workspace)
      : p_(problem), out_(out), kernels_(kernels), loop_(problem, kernels, workspace), stride_(loop_.stride()) {
    const int64_t n = padded(p_.n), longest = out.iterations;
    record_.row_f = workspace.take<float>(longest * n);
    record_.row_g = workspace.take<float>(longest * stride_);
    record_.column_f = workspace.take<float>(longest * n);
    record_.column_g = workspace.take<float>(longest * stride_);
    r_ = workspace.take<float>(longest * stride_);
    s_ = workspace.take<float>(longest * n);
    rows_ = n;
    d_alpha_ = workspace.take<float>(n);
    times_ = workspace.take<float>(n);
    plus_ = workspace.take<float>(n);
    d_beta_ = workspace.take<float>(stride_);
  }
  static int64_t bytes(const SinkhornProblem& p, int64_t iterations) {
    return Loop::bytes(p) + 4 * (3 * iterations + 5) * (padded(p.n) + padded(p.m)) + 12 * 64;
  }

  void run(int64_t q) {
    q_ = q;
    const int64_t n = p_.n, m = p_.m, count = std::abs(out_.count[q]);
    loop_.begin(q);
    if (out_.tape != nullptr && out_.count[q] > 0) {
      read_tape(out_.tape + q * out_.iterations * (n + m), count);
    } else {
      loop_.run(count, 0, nullptr, &record_);
    }
    float *grad_a = out_.grad_a + q * n, *grad_b = out_.grad_b + q * m;
    std::fill_n(grad_a, n, 0.0f);
    std::fill_n(grad_b, m, 0.0f);

    const int64_t last = count - 1;
    kernels_.through_plan(loop_.k(), record_.column_f + last * n, record_.column_g + last * stride_, out_.grad_plan + q * n * m,
                          n, m, stride_, plus_, d_beta_);
    const auto epsilon = static_cast<float>(loop_.epsilon());
    for (int64_t i = 0; i < n; ++i) d_alpha_[i] = loop_.a()[i] > 0 ? plus_[i] + epsilon * out_.grad_u[q * n + i] : 0;
    for (int64_t j = 0; j < m; ++j) d_beta_[j] = loop_.b()[j] > 0 ? d_beta_[j] + epsilon * out_.grad_v[q * m + j] : 0;

    std::fill(times_, times_ + rows_, 0.0f);
    std::fill(plus_, plus_ + rows_, 0.0f);
    flushed_ = false;
    epoch_ = static_cast<int64_t>(record_.epochs.size()) - 1;
    column_end_ = row_end_ = count;
    for (int64_t t = last; t >= 0; --t) {
      if (2 * t + 1 < record_.epochs[epoch_].first) leave_epoch(t + 1, t + 1, count);
      column_adjoint(t, grad_b);
      const bool together = 2 * t >= record_.epochs[epoch_].first;
      row_coefficients(t);
      float* s = s_ + t * rows_;
      if (together) {
        kernels_.pass(loop_.k(), n, stride_, r_ + t * stride_, {nullptr, times_, plus_}, s, d_beta_);
      } else {
        kernels_.row_sums(loop_.k(), n, stride_, r_ + t * stride_, s);
        for (int64_t i = 0; i < n; ++i) s[i] = times_[i] * s[i] + plus_[i];
        leave_epoch(t, t + 1, count);
        // f, and what the row sums to, in the offsets of the row step
        for (int64_t i = 0; i < n; ++i) s[i] *= row_weight(t, i);
        kernels_.column_sums(loop_.k(), n, stride_, s, d_beta_);
      }
      row_adjoint(t, grad_a);
    }
    leave_epoch(0, 0, count);
  }

 private:
  void read_tape(const float* tape, int64_t count) {
    const int64_t n = p_.n, m = p_.m;
    record_.epochs.assign(1, Epoch{-1, {}, {}});
    const float* before = loop_.start();
    for (int64_t t = 0; t < count; ++t) {
      const float *f = tape + t * (n + m), *g = f + n;
      std::copy_n(f, n, record_.row_f + t * n);
      std::copy_n(f, n, record_.column_f + t * n);
      std::copy_n(before, stride_, record_.row_g + t * stride_);
      float* own = record_.column_g + t * stride_;
      std::copy_n(g, m, own);
      std::fill(own + m, own + stride_, 0.0f);
      before = own;
    }
  }

  void column_adjoint(int64_t t, float* grad_b) {
    const float *b = loop_.b(), *g = record_.column_g + t * stride_;
    float* r = r_ + t * stride_;
    const bool balanced = std::isinf(p_.rho_b);
    const auto damp = static_cast<float>(loop_.damp_b());
    for (int64_t j = 0; j < p_.m; ++j) {
      const float share = b[j] > 0 ? d_beta_[j] / b[j] : 0;
      grad_b[j] += share;
      r[j] = share * g[j];
    }
    if (!balanced)
      for (int64_t j = 0; j < p_.m; ++j)
        if (b[j] > 0) r[j] *= damp * static_cast<float>(b[j] / loop_.line_sum(b[j], loop_.v(j), g[j], p_.rho_b));
    std::fill(r + p_.m, r + stride_, 0.0f);
  }

  float row_weight(int64_t t, int64_t i) const {
    const float mass = loop_.a()[i], f = record_.row_f[t * p_.n + i];
    if (mass == 0) return 0;
    if (std::isinf(p_.rho_a)) return f / mass;
    return static_cast<float>(loop_.damp_a() * f / loop_.line_sum(mass, loop_.u(i), f, p_.rho_a));
  }

  // s = times * (K r) + plus. Where the row step stands in other offsets, s is only d alpha at first.
  void row_coefficients(int64_t t) {
    const int64_t n = p_.n;
    const float* f = record_.column_f + t * n;
    if (2 * t < record_.epochs[epoch_].first) {
      for (int64_t i = 0; i < n; ++i) {
        times_[i] = -f[i];
        plus_[i] = d_alpha_[i];
      }
    } else if (std::isinf(p_.rho_a)) {
      const float* a = loop_.a();
      for (int64_t i = 0; i < n; ++i) {
        const float weight = a[i] > 0 ? f[i] / a[i] : 0;
        times_[i] = -f[i] * weight;
        plus_[i] = d_alpha_[i] * weight;
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const float weight = row_weight(t, i);
        times_[i] = -f[i] * weight;
        plus_[i] = d_alpha_[i] * weight;
      }
    }
    std::fill_n(d_alpha_, n, 0.0f);
  }

  void row_adjoint(int64_t t, float* grad_a) {
    const int64_t n = p_.n;
    const float *a = loop_.a(), *s = s_ + t * rows_, *f = record_.row_f + t * n, *g = record_.row_g + t * stride_;
    if (std::isinf(p_.rho_a)) {
      for (int64_t i = 0; i < n; ++i) grad_a[i] += f[i] > 0 ? s[i] / f[i] : 0;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const float weight = row_weight(t, i);
        grad_a[i] += weight > 0 ? s[i] / (weight * a[i]) : 0;
      }
    }
    for (int64_t j = 0; j < p_.m; ++j) d_beta_[j] *= -g[j];
  }

  // Column steps from `columns` on and row steps from `rows` on were in this epoch: their share of the gradient, then K of
  // the epoch before.
  void leave_epoch(int64_t columns, int64_t rows, int64_t count) {
    const int64_t n = p_.n, m = p_.m, last = count - 1;
    OuterSums sums{};
    if (!flushed_) {
      sums.grad_plan = out_.grad_plan + q_ * n * m;
      sums.last_f = record_.column_f + last * n;
      sums.last_g = record_.column_g + last * stride_;
    }
    sums.f = record_.column_f + columns * n;
    sums.r = r_ + columns * stride_;
    sums.s = s_ + rows * rows_;
    sums.g = record_.row_g + rows * stride_;
    sums.f_stride = n;
    sums.s_stride = rows_;
    sums.column_stride = stride_;
    sums.f_terms = column_end_ - columns;
    sums.s_terms = row_end_ - rows;
    kernels_.outer_sums(loop_.k(), sums, n, m, stride_, static_cast<float>(1 / loop_.epsilon()), flushed_,
                        out_.grad_cost + q_ * n * m);
    flushed_ = true;
    column_end_ = columns;
    row_end_ = rows;
    if (--epoch_ >= 0) loop_.use(record_.epochs[epoch_]);
  }

  const SinkhornProblem& p_;
  const SinkhornBackward& out_;
  const SinkhornKernels& kernels_;
  Loop loop_;
  const int64_t stride_;
  int64_t rows_ = 0, q_ = 0, epoch_ = 0, column_end_ = 0, row_end_ = 0;
  bool flushed_ = false;
  Record record_{};
  float *r_, *s_, *d_alpha_, *times_, *plus_, *d_beta_;
};

// ---- batches ----------------------------------------------------------------------------------------------------------

bool is_small(const SinkhornProblem& p) { return p.n * p.m <= kSmallEntries && std::isinf(p.rho_a) && std::isinf(p.rho_b); }

SmallProblem group_of(const SinkhornProblem& p, int64_t first, int64_t lanes, bool full) {
  SmallProblem group{p, full};
  group.cost += first * p.cost_stride;
  group.a += first * p.a_stride;
  group.b += first * p.b_stride;
  group.epsilon += first;
  group.problems = lanes;
  return group;
}
SinkhornForward group_of(const SinkhornProblem& p, SinkhornForward out, int64_t first) {
  out.plan += first * p.n * p.m;
  out.u += first * p.n;
  out.v += first * p.m;
  out.count += first;
  return out;
}
SinkhornBackward group_of(const SinkhornProblem& p, SinkhornBackward out, int64_t first) {
  out.grad_plan += first * p.n * p.m;
  out.grad_cost += first * p.n * p.m;
  out.grad_u += first * p.n;
  out.grad_v += first * p.m;
  out.grad_a += first * p.n;
  out.grad_b += first * p.m;
  out.count += first;
  return out;
}

bool has_no_zero(const float* marginal, int64_t stride, int64_t problems, int64_t count) {
  return std::all_of(marginal, marginal + (stride == 0 ? count : problems * count), [](float mass) { return mass > 0; });
}

Workspace& workspace_of(int64_t bytes) {
  thread_local Workspace workspace;
  workspace.reserve(bytes);
  return workspace;
}

double cost_ns(const SinkhornProblem& p, double passes) {
  return kNsPerEntry * passes * static_cast<double>(p.problems) * static_cast<double>(p.n * p.m);
}

}  // namespace

const SinkhornKernels& sinkhorn_kernels() {
  return by_isa([]<Isa isa>() -> const SinkhornKernels& { return sinkhorn_kernels_for<isa>(); });
}

void sinkhorn(const SinkhornProblem& p, const SinkhornForward& out) {
  const SinkhornKernels& kernels = sinkhorn_kernels();
  const bool full = check_marginals(p);
  const double work = cost_ns(p, 2.0 * static_cast<double>(out.iterations) + 20);
  if (!is_small(p)) {
    parallel_for(p.problems, 1, work, [&](int64_t begin, int64_t end) {
      Loop loop(p, kernels, workspace_of(Loop::bytes(p)));
      for (int64_t q = begin; q < end; ++q) forward_one(loop, p, out, q);
    });
    return;
  }
  for_lane_groups(p.problems, small_room(p.n, p.m, 0), work, [&](int64_t first, int64_t lanes, float* room) {
    const SmallLanes found = kernels.small_forward(group_of(p, first, lanes, full), group_of(p, out, first), room);
    if (full && (found.not_finite | found.again) == 0) return;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (!full || found.not_finite >> lane & 1) check_possible(p, first + lane);
      if (!(found.again >> lane & 1)) continue;
      Loop loop(p, kernels, workspace_of(Loop::bytes(p)));
      forward_one(loop, p, out, first + lane);
    }
  });
}

void sinkhorn_backward(const SinkhornProblem& p, const SinkhornBackward& out) {
  const SinkhornKernels& kernels = sinkhorn_kernels();
  const double work = cost_ns(p, 4.0 * static_cast<double>(out.iterations) + 20);
  if (!is_small(p)) {
    parallel_for(p.problems, 1, work, [&](int64_t begin, int64_t end) {
      Adjoint adjoint(p, out, kernels, workspace_of(Adjoint::bytes(p, out.iterations)));
      for (int64_t q = begin; q < end; ++q) adjoint.run(q);
    });
    return;
  }
  const bool full = has_no_zero(p.a, p.a_stride, p.problems, p.n) && has_no_zero(p.b, p.b_stride, p.problems, p.m);
  for_lane_groups(p.problems, small_room(p.n, p.m, out.iterations), work, [&](int64_t first, int64_t lanes, float* room) {
    const uint32_t again = kernels.small_backward(group_of(p, first, lanes, full), group_of(p, out, first), room);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (!(again >> lane & 1)) continue;
      Adjoint adjoint(p, out, kernels, workspace_of(Adjoint::bytes(p, out.iterations)));
      adjoint.run(first + lane);
    }
  });
}

}  // namespace pyllmq::cpu

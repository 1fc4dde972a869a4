#include "runtime/thread_pool.h"

#include "runtime/trace.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <pthread.h>
#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyllmq::cpu {
namespace {

constexpr int kSpinPauses = 64;
constexpr auto kIdleBeforeSleep = std::chrono::microseconds(150);
constexpr auto kHotAfterwards = std::chrono::milliseconds(2);
constexpr int kMaxThreads = 1024;

thread_local bool inside_task = false;
std::atomic<int> hot_regions{0};
std::atomic<int64_t> hot_until{0};  // ticks of the steady clock

bool is_hot() { return hot_regions.load() > 0 || std::chrono::steady_clock::now().time_since_epoch().count() < hot_until.load(); }

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` does nothing on most cores, this waits some 10 ns, as x86's pause does
#endif
}

// Spins on `ready` for a little, then gives the core away between looks; returns false if `patience` ran out first and
// the threads are not hot.
template <class Ready>
bool spin_until(Ready ready, std::chrono::steady_clock::duration patience) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < kSpinPauses; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
    sched_yield();
    if (std::chrono::steady_clock::now() - start > patience && !is_hot()) return ready();
  }
}

struct Job {
  detail::ChunkFunction function = nullptr;
  void* context = nullptr;
  int64_t count = 0;
  int64_t grain = 1;
};

void run_inline(const Job& job) {
  for (int64_t begin = 0; begin < job.count; begin += job.grain)
    job.function(job.context, begin, std::min(job.count, begin + job.grain));
}

class ThreadPool {
 public:
  void run(const Job& job, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return run_inline(job);
    if (static_cast<int>(workers_.size()) != threads - 1) resize(threads);

    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    error_ = nullptr;
    gate_.fetch_or(kOpen);
    generation_.fetch_add(1);
    wake_sleepers();

    work();

    gate_.fetch_and(~kOpen);
    spin_until([this] { return gate_.load(std::memory_order_acquire) == 0; }, std::chrono::hours(24 * 365));
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void resize_when_idle(int threads) {
    std::lock_guard<std::mutex> turn(turn_);
    if (static_cast<int>(workers_.size()) != threads - 1) resize(threads);
  }

  WorkerSleep worker_sleep() const { return {wakeups_.load(), sleepers_.load()}; }

  void wake_sleepers() {
    if (sleepers_.load() == 0) return;
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
    }  // a worker between its last look and its wait holds this
    wake_.notify_all();
  }

 private:
  static constexpr int64_t kOpen = int64_t{1} << 32;  // gate_ = kOpen while a job may be entered + workers inside

  void resize(int threads) {
    stop_.store(true);
    generation_.fetch_add(1);
    wake_sleepers();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false);
    const uint64_t seen = generation_.load();
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, seen] { worker_loop(seen); });
  }

  void worker_loop(uint64_t seen) {
    inside_task = true;
    for (;;) {
      const auto changed = [this, seen] { return generation_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(changed, kIdleBeforeSleep)) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [this, seen] { return generation_.load() != seen || hot_regions.load() > 0; });
        sleepers_.fetch_sub(1);
        wakeups_.fetch_add(1);
        if (generation_.load() == seen) continue;
      }
      seen = generation_.load();
      if (stop_.load()) return;
      // A worker that wakes late finds the gate shut and goes back: the caller never waits for sleepers.
      if (gate_.fetch_add(1) & kOpen) {
        const Traced traced(Part::work);
        work();
      }
      gate_.fetch_sub(1);
    }
  }

  void work() {
    const bool outer = std::exchange(inside_task, true);
    for (;;) {
      const int64_t begin = next_.fetch_add(job_.grain, std::memory_order_relaxed);
      if (begin >= job_.count) break;
      try {
        job_.function(job_.context, begin, std::min(job_.count, begin + job_.grain));
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
        next_.store(job_.count);
      }
    }
    inside_task = outer;
  }

  std::mutex turn_;  // held by the caller whose job runs
  std::vector<std::thread> workers_;
  Job job_;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<int64_t> gate_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int64_t> wakeups_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::clamp(CPU_COUNT(&set), 1, kMaxThreads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

std::atomic<int>& wanted_threads() {
  static std::atomic<int> threads{usable_cores()};
  return threads;
}

// The pool is never destroyed: its workers end with the process. A forked child has none of them, so it drops the
// inherited pool (a leak of some hundred bytes, whatever state its mutexes were copied in) and makes one of its own.
std::atomic<ThreadPool*> live_pool{nullptr};
std::mutex creation_mutex;

void forget_pool_after_fork() {
  live_pool.store(nullptr);
  new (&creation_mutex) std::mutex;
  inside_task = false;
  hot_regions = 0;
}

ThreadPool& pool() {
  if (ThreadPool* found = live_pool.load(std::memory_order_acquire)) return *found;
  std::lock_guard<std::mutex> lock(creation_mutex);
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_after_fork);
  (void)registered;
  if (live_pool.load() == nullptr) live_pool.store(new ThreadPool, std::memory_order_release);
  return *live_pool.load();
}

}  // namespace

int num_threads() { return wanted_threads().load(); }

void set_num_threads(int threads) {
  if (threads < 1 || threads > kMaxThreads)
    throw std::invalid_argument("num_threads = " + std::to_string(threads) + "; allowed: 1.." + std::to_string(kMaxThreads));
  if (inside_task) throw std::runtime_error("set_num_threads was called inside a parallel task; call it outside");
  wanted_threads().store(threads);
  if (live_pool.load() != nullptr) pool().resize_when_idle(threads);
}

WorkerSleep worker_sleep() { return pool().worker_sleep(); }

HotThreads::HotThreads() {
  if (hot_regions.fetch_add(1) == 0 && num_threads() > 1) pool().wake_sleepers();
}

HotThreads::~HotThreads() {
  hot_until.store((std::chrono::steady_clock::now() + kHotAfterwards).time_since_epoch().count());
  hot_regions.fetch_sub(1);
}

namespace detail {

void run_chunks(int64_t count, int64_t grain, double cost_ns, ChunkFunction function, void* context) {
  if (count <= 0) return;
  const Job job{function, context, count, std::max<int64_t>(grain, 1)};
  const int threads = num_threads();
  const double threshold = hot_regions.load(std::memory_order_relaxed) > 0 ? kHotThresholdNs : kParallelThresholdNs;
  if (threads == 1 || inside_task || cost_ns < threshold || count <= job.grain) return run_inline(job);
  pool().run(job, threads);
}

}  // namespace detail
}  // namespace pyllmq::cpu

// Fork-join over dynamic chunks on threads of our own (no OpenMP: a pure spin pool was measured to lose 8 ms a call
// when the machine is busy, and two OpenMP runtimes in one process fight over the cores).
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace pyllmq::cpu {

// Work below this single-thread cost runs on the calling thread: waking another one costs 5-50 us, and 1-2 where it spins.
constexpr double kParallelThresholdNs = 30e3, kHotThresholdNs = 5e3;

int num_threads();
void set_num_threads(int threads);  // 1..1024; waits for a running parallel_for; throws inside a task

// While one exists, and 2 ms beyond, the workers spin for work: one wake-up for all calls of a token, sleep between
// generations.
class HotThreads {
 public:
  HotThreads();
  ~HotThreads();
  HotThreads(const HotThreads&) = delete;
  HotThreads& operator=(const HotThreads&) = delete;
};

struct WorkerSleep {
  int64_t wakeups;  // so far
  int asleep;
};
WorkerSleep worker_sleep();

namespace detail {
using ChunkFunction = void (*)(void* context, int64_t begin, int64_t end);
void run_chunks(int64_t count, int64_t grain, double cost_ns, ChunkFunction function, void* context);
}  // namespace detail

// Calls body(begin, end) for ranges of at most `grain` indices that cover [0, count) exactly once, on the caller and
// the workers. cost_ns is the estimated single-thread time of it all. Nested calls, and calls made while another thread
// uses the pool, run on the calling thread. The first exception of a body is thrown here after all threads have left.
template <class Body>
void parallel_for(int64_t count, int64_t grain, double cost_ns, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::run_chunks(
      count, grain, cost_ns, [](void* context, int64_t begin, int64_t end) { (*static_cast<Plain*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

}  // namespace pyllmq::cpu

#include "runtime/trace.h"

#include <pthread.h>

#include <chrono>
#include <mutex>
#include <new>
#include <utility>

namespace pyllmq::cpu {
namespace {

std::mutex mutex;
std::vector<Span> spans;

int thread_number() {
  static std::atomic<int> threads{0};
  thread_local const int number = threads.fetch_add(1);
  return number;
}

}  // namespace

namespace detail {

std::atomic<bool> tracing{false};

void keep_span(Part part, int64_t begin) {
  const Span span{part, thread_number(), begin, trace_clock()};
  std::lock_guard<std::mutex> lock(mutex);
  if (tracing.load()) spans.push_back(span);
}

}  // namespace detail

int64_t trace_clock() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A thread of the parent may have held the mutex.
static void forget_trace_after_fork() {
  new (&mutex) std::mutex;
  detail::tracing.store(false);
  new (&spans) std::vector<Span>;
}

void start_trace() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_trace_after_fork);
  (void)registered;
  std::lock_guard<std::mutex> lock(mutex);
  spans.clear();
  detail::tracing.store(true);
}

std::vector<Span> take_trace() {
  std::lock_guard<std::mutex> lock(mutex);
  detail::tracing.store(false);
  return std::exchange(spans, {});
}

}  // namespace pyllmq::cpu

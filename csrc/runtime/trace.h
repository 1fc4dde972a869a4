// Where the time of a token goes: spans of what each thread does, kept while tracing is on. Off, a span costs one load.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace pyllmq::cpu {

enum class Part { step, linear, attention, work };  // work: a worker inside a parallel_for

struct Span {
  Part part;
  int thread;          // numbered as they appear since the program began
  int64_t begin, end;  // of trace_clock
};

int64_t trace_clock();  // ns of the steady clock
void start_trace();
std::vector<Span> take_trace();  // and stops

namespace detail {
extern std::atomic<bool> tracing;
void keep_span(Part part, int64_t begin);
}  // namespace detail

class Traced {
 public:
  explicit Traced(Part part) : part_(part), begin_(detail::tracing.load(std::memory_order_relaxed) ? trace_clock() : 0) {}
  ~Traced() {
    if (begin_ != 0) detail::keep_span(part_, begin_);
  }
  Traced(const Traced&) = delete;
  Traced& operator=(const Traced&) = delete;

 private:
  const Part part_;
  const int64_t begin_;
};

}  // namespace pyllmq::cpu

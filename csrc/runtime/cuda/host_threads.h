// Host work on as many threads as it is worth: packing happens once, and the CPU back end's pool is not of this extension.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace pyllmq::cuda {

constexpr int64_t kWeightsPerThread = 1 << 20;  // below this, starting a thread costs more than it saves

// body(first, behind the last) for parts of `count`, which are of so many weights.
template <class Body>
void in_parts(int64_t weights, int64_t count, const Body& body) {
  const int64_t wanted = std::min(count, weights / kWeightsPerThread + 1);
  const int64_t threads = std::min<int64_t>(wanted, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([&, i] { body(i * count / threads, (i + 1) * count / threads); });
  body(0, count / threads);
  for (std::thread& other : others) other.join();
}

}  // namespace pyllmq::cuda

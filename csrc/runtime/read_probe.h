// How fast the threads of the pool read memory: what a kernel that reads a weight once cannot beat.
#pragma once
#include <cstdint>

namespace pyllmq::cpu {

// Sum of the `bytes` / 8 words at `memory`, so that no load can be left out.
uint64_t sum_words(const uint64_t* memory, int64_t bytes);

}  // namespace pyllmq::cpu

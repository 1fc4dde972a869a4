// How fast the threads of the pool read memory: what a kernel that reads a weight once cannot beat.
#pragma once
#include <cstdint>

namespace pyllmq::cpu {

// Sum of the `bytes` / 8 words at `memory`, so that no load can be left out.
uint64_t sum_words(const uint64_t* memory, int64_t bytes);

// A range is read as so many streams side by side: on 2 cores with DDR5 one stream each reached 22 GB/s, four 30, which is
// what torch's fp32 F.linear reads there; prefetching added nothing.
constexpr int kReadStreams = 4;

// One function per ISA; AVX-512 machines run that of AVX2.
uint64_t sum_range_scalar(const uint64_t* at, int64_t words);
uint64_t sum_range_avx2(const uint64_t* at, int64_t words);

}  // namespace pyllmq::cpu

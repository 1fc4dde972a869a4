// Tests only: runs CUDA kernel bodies on a CPU, one fiber per thread, one cluster of blocks after the other, or all of a launch
// together.
//
// What it finds: wrong indices, layouts, masks and sums; a missing barrier (fibers of a warp run one after the other, in
// either order, warps in turn or one as far as it gets, and an asynchronous copy or wgmma runs as late as the kernel allows);
// shared memory read before it was written (it is full of NaN); lanes of a warp that meet at different instructions; barriers
// that some thread never reaches; what a launch that begins early does too early, and shared memory read of a block that has
// left.
// What it cannot find: races between blocks, the cost of anything, and whatever the hardware does differently.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda_emulator/waits.h"
#include "runtime/half.h"

#define PYLLMQ_KERNEL
#define PYLLMQ_DEVICE static inline
#define PYLLMQ_MEMBER
#define PYLLMQ_COLD static inline
#define PYLLMQ_UNROLL
#define __launch_bounds__(...)
#define PYLLMQ_DYNAMIC_SHARED(name) uint8_t* name = ::pyllmq::cuda::emulator::dynamic_shared()
#define PYLLMQ_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                        \
  (static_cast<void>(stream),                                                                    \
   ::pyllmq::cuda::emulator::launch({static_cast<int64_t>(blocks), 1, static_cast<int>(threads), \
                                     static_cast<size_t>(shared_bytes), false, [=] { (kernel)(__VA_ARGS__); }}))
#define PYLLMQ_LAUNCH_TOGETHER(kernel, blocks, threads, shared_bytes, stream, argument) \
  (static_cast<void>(stream),                                                           \
   ::pyllmq::cuda::emulator::launch_together(blocks, threads, shared_bytes, [=] { (kernel)(argument); }))
#define PYLLMQ_LAUNCH_CLUSTERS(kernel, cluster, blocks, threads, shared_bytes, stream, argument)                         \
  (static_cast<void>(stream),                                                                                            \
   ::pyllmq::cuda::emulator::launch({static_cast<int64_t>(blocks), static_cast<int>(cluster), static_cast<int>(threads), \
                                     static_cast<size_t>(shared_bytes), true, [=] { (kernel)(argument); }}))
#define PYLLMQ_LAUNCH_EARLY(kernel, blocks, threads, shared_bytes, stream, argument) \
  PYLLMQ_LAUNCH_CLUSTERS(kernel, 1, blocks, threads, shared_bytes, stream, argument)

namespace pyllmq::cuda::emulator {

// What a kernel is made to leave out, so that tests see it found.
enum class Fault : int { none, first_cluster_barrier, second_cluster_barrier, wait_for_previous };

// How fibers, blocks and copies are ordered; a correct kernel gives the same bits for every setting.
struct Schedule {
  bool last_thread_first = false;
  bool last_block_first = false;
  bool eager_copies = false;  // an asynchronous copy lands when issued, not when waited for; wgmma reads its operands then
  bool warps_apart = false;   // of what can run always the first, so that a warp gets as far ahead as it may; else all in turn
  bool blocks_apart = false;  // with warps_apart: up to six blocks run at once; the first that counts itself waits for the others
  // Launches run at `finish`: of one that may begin early the first cluster as far as it comes before it waits, then what was
  // launched before, then the rest.
  bool early_launches = false;
  Fault fault = Fault::none;
};
extern Schedule schedule;

// Whether the device is of compute capability 9.0, which decides what runs, or of 8.0.
extern bool is_hopper;

struct Launch {
  int64_t blocks;
  int cluster, threads;
  size_t shared_bytes;
  bool early;
  std::function<void()> kernel;
};
void launch(Launch wanted);
void finish();  // until all that was launched is over
void launch_together(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);
int64_t launches();  // since the process started

int thread();
int64_t block();
int64_t blocks();
uint8_t* dynamic_shared();

enum class Meeting : int {
  none,
  block_barrier,
  cluster_barrier,
  previous_launch,
  warp_barrier,
  shuffle,
  mma,
  sparse_mma,
  integer_mma,
  phase,
  multiplication
};
// Waits until all threads of the block or warp came to the same meeting. The last one to come calls `work` with what each
// lane brought; `brought` lives on the fibers' stacks.
using WarpWork = void (*)(void* const* brought);
void meet_block();
void meet_cluster();
const uint8_t* of_block(const void* own, int rank);  // where it stands in the shared memory of another block of the cluster
void wait_for_previous();
void meet_warp(Meeting meeting, void* brought, WarpWork work);
void let_other_blocks_run();
void wait_while(const uint32_t* word, uint32_t value);  // lets the other fibers run until another block has changed it

void copy_async(void* to, const void* from, int bytes);
void commit_async();
void wait_async(int latest_left);

struct Mma {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
  bool bf16;
  uint32_t positions;  // of a sparse a
  int selector;
};
void mma(Meeting meeting, Mma held);

// Barriers in shared memory; the fields of a word. None that was not made has a valid number of threads.
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int expected_bytes);
void barrier_wait(uint64_t* barrier, int parity);
void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier);

uint64_t matrix_at(const void* shared, int step);
uint64_t narrow_matrix_at(const void* shared);
void wgmma(int n, float* c, const uint32_t* a_registers, uint64_t a, uint64_t b);  // a lies in shared memory without registers
void commit_wgmma();
void wait_wgmma(int latest_left);

struct IntegerMma {
  int* c;
  const uint32_t* a;
  const uint32_t* b;
};
void integer_mma(IntegerMma held);

}  // namespace pyllmq::cuda::emulator

namespace pyllmq::cuda::ptx {

static inline int thread() { return emulator::thread(); }
static inline int64_t block() { return emulator::block(); }
static inline int64_t blocks() { return emulator::blocks(); }

static inline void store_16(uint8_t* to, uint32_t step, uint32_t count, const uint32_t (&words)[4]) {
  std::memcpy(to + uint64_t{step} * count, words, 16);
}

static inline void sync_block(emulator::Place at = emulator::Place::current()) {
  if (!emulator::is_left_out(at)) emulator::meet_block();
}
static inline void sync_warp(emulator::Place at = emulator::Place::current()) {
  if (!emulator::is_left_out(at)) emulator::meet_warp(emulator::Meeting::warp_barrier, nullptr, nullptr);
}
static inline void sync_cluster(emulator::Place at = emulator::Place::current()) {
  if (!emulator::is_left_out(at)) emulator::meet_cluster();
}
static inline void sync_cluster_after_reads(emulator::Place at = emulator::Place::current()) {
  if (!emulator::is_left_out(at)) emulator::meet_cluster();
}
static inline float load_of_block(const float* own, int rank) {
  return *reinterpret_cast<const float*>(emulator::of_block(own, rank));
}

static inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t pool = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = pool >> (8 * (nibble & 7)) & 0xFF;
    if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;  // what the instruction does: replicate the sign
    d |= byte << (8 * i);
  }
  return d;
}

template <int kBits>
static inline uint32_t shift_by_multiplying(uint32_t word) {
  return word >> kBits;
}

float shuffle_xor(float value, int mask);

uint32_t shuffle(uint32_t value, int lane);
uint32_t shuffle_up(uint32_t value, int distance);
uint32_t transpose(uint32_t pair);

template <bool kBf16 = false>
static inline void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  emulator::mma(emulator::Meeting::mma, {c, a, b, kBf16, 0, 0});
}

template <bool kBf16, int kSelector>
static inline void mma_sp_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions) {
  emulator::mma(emulator::Meeting::sparse_mma, {c, a, b, kBf16, positions, kSelector});
}

static inline void mma_m16n8k32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulator::integer_mma({c, a, b}); }

template <bool kOnce = false>
static inline void copy_async_16(void* shared, const void* global) {
  emulator::copy_async(shared, global, 16);
}
static inline void commit_async() { emulator::commit_async(); }
template <int kLatestLeft>
static inline void wait_async(emulator::Place at = emulator::Place::current()) {
  if (!emulator::is_left_out(at)) emulator::wait_async(kLatestLeft + emulator::is_weaker(at));
}

static inline void prefetch(const void* global) { static_cast<void>(*static_cast<const volatile uint8_t*>(global)); }

using SharedAddress = uintptr_t;
static inline SharedAddress shared_address(const void* shared) { return reinterpret_cast<SharedAddress>(shared); }
static inline uint32_t load_shared_word(SharedAddress from) { return *reinterpret_cast<const uint32_t*>(from); }

template <int kTo, int kFrom, bool kOnce = false>
static inline void copy_async_16_if(bool wanted, SharedAddress to, const void* from) {
  if (wanted) copy_async_16(reinterpret_cast<void*>(to + kTo), static_cast<const uint8_t*>(from) + kFrom);
}

using Barrier = uint64_t;
static inline void barrier_init(Barrier* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
static inline void barrier_arrive(Barrier* barrier) { emulator::barrier_arrive(barrier, 0); }
static inline void barrier_arrive_and_expect(Barrier* barrier, int bytes) { emulator::barrier_arrive(barrier, bytes); }
static inline void barrier_wait(Barrier* barrier, int parity, emulator::Place at = emulator::Place::current()) {
  if (!emulator::is_left_out(at)) emulator::barrier_wait(barrier, parity);
}
static inline void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
  emulator::copy_bulk(shared, global, bytes, barrier);
}
static inline void fence_async() {}
static inline void let_next_begin() {}
static inline void wait_for_previous() { emulator::wait_for_previous(); }
static inline uint64_t matrix_at(const void* shared, int step) { return emulator::matrix_at(shared, step); }
static inline uint64_t narrow_matrix_at(const void* shared) { return emulator::narrow_matrix_at(shared); }
template <int kN>
static inline void wgmma(float (&c)[kN / 2], uint64_t a, uint64_t b) {
  emulator::wgmma(kN, c, nullptr, a, b);
}
template <int kN>
static inline void wgmma(float (&c)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  emulator::wgmma(kN, c, a, 0, b);
}
static inline void wgmma_begin() {}
static inline void wgmma_commit() { emulator::commit_wgmma(); }
template <int kLatestLeft>
static inline void wgmma_wait(emulator::Place at = emulator::Place::current()) {
  if (!emulator::is_left_out(at)) emulator::wait_wgmma(kLatestLeft + emulator::is_weaker(at));
}
template <int kCount>
static inline void hold(float (&)[kCount]) {}

static inline float load_l2(const float* from) { return *from; }
static inline uint32_t count_to(uint32_t* counter, uint32_t last) {
  const uint32_t old = *counter;
  *counter = old >= last ? 0 : old + 1;
  emulator::let_other_blocks_run();
  return old;
}
static inline void add_shared(uint32_t* word, uint32_t value) { *word += value; }
static inline uint32_t observe(const uint32_t* word) { return *word; }
static inline void publish(uint32_t* word, uint32_t value) { *word = value; }
static inline void wait_while(const uint32_t* word, uint32_t value) { emulator::wait_while(word, value); }

static inline uint16_t fp32_to_fp16(float value) { return cpu::fp32_to_fp16(value); }
static inline float fp16_to_fp32(uint16_t half) { return cpu::fp16_to_fp32(half); }
static inline uint16_t fp32_to_bf16(float value) { return cpu::fp32_to_bf16(value); }
static inline uint32_t subtract_fp16x2(uint32_t a, uint32_t b) {
  const auto half = [&](int shift) {
    return static_cast<uint32_t>(cpu::fp32_to_fp16(cpu::fp16_to_fp32(static_cast<uint16_t>(a >> shift)) -
                                                   cpu::fp16_to_fp32(static_cast<uint16_t>(b >> shift))))
           << shift;
  };
  return half(0) | half(16);
}
static inline int nearest_integer(float value) {
  if (std::isnan(value)) return 0;
  return static_cast<int>(std::nearbyint(std::fmin(std::fmax(static_cast<double>(value), -0x1p31), 0x1p31 - 1)));
}
static inline float magnitude(float value) { return std::fabs(value); }
static inline float exp(float value) { return std::exp(value); }
static inline double exp(double value) { return std::exp(value); }
static inline float log(float value) { return std::log(value); }
static inline double log(double value) { return std::log(value); }
static inline float erf(float value) { return std::erf(value); }
static inline float quotient(float a, float b) { return a / b; }
static inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
static inline float bits_to_fp32(uint32_t bits) { return cpu::bits_float(bits); }
static inline uint32_t fp32_to_bits(float value) { return cpu::float_bits(value); }

}  // namespace pyllmq::cuda::ptx

#include "cuda_emulator/emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runtime/cuda/runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifndef __x86_64__
#error "the emulator switches fibers by x86-64 code"
#endif

// Saves the callee-saved registers of System V, swaps stacks, restores them.
extern "C" void pyllmq_emulator_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(.text
.globl pyllmq_emulator_switch
.hidden pyllmq_emulator_switch
.type pyllmq_emulator_switch, @function
pyllmq_emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace pyllmq::cuda::emulator {

Schedule schedule;
bool is_hopper = false;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;
constexpr size_t kGuardBytes = 64;
constexpr size_t kMostSharedBytes[] = {163 << 10, 227 << 10};  // what a block gets on compute capability 8.0 and 9.0
constexpr uint8_t kPoison = 0xFF;                              // fp16, bf16 and fp32 of these bytes are NaN
constexpr int kMostYields = 1 << 22;
constexpr int kMostBlocksApart = 6;  // as many as have room on the device

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// What the 128 threads of a warp group ask for by one instruction each.
constexpr int kWarpGroup = 128;
struct Wgmma {
  int n, arrived = 0;
  uint64_t a, b;
  bool done[kWarpGroup / kWarp] = {};  // a warp's rows
  float* c[kWarpGroup];
  const uint32_t* a_registers[kWarpGroup];  // or null
  int of_warp(int warp) const {
    int count = 0;
    for (int lane = 0; lane < kWarp; ++lane) count += c[warp * kWarp + lane] != nullptr;
    return count;
  }
};

struct Fiber {
  void* stack_pointer;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Meeting waits_for;
  int cluster_barriers;  // that it came to
  const void* waits_at;  // a barrier, or a multiplication
  bool done;
  std::vector<std::vector<Copy>> copies;                      // groups, the last one still open
  std::vector<std::vector<std::shared_ptr<Wgmma>>> products;  // the same
};

struct BulkCopy {
  Copy copy;
  uint64_t* barrier;
};

struct WarpGroup {
  std::vector<std::shared_ptr<Wgmma>> asked;  // that not all threads have come to
};

struct Warp {
  int arrived;
  Meeting meeting;
  void* brought[kWarp];
};

struct Block {
  std::vector<uint8_t> shared;
  int at_barrier;
  std::vector<BulkCopy> copies;  // under way
};

struct Machine {
  std::vector<Fiber> fibers;  // of all blocks that run at once
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  std::vector<Block> running;
  const std::function<void()>* kernel;
  void* main_stack_pointer;
  int64_t first_block, blocks;
  int current, threads, at_cluster_barrier;
  int held_block = -1;  // of those that run at once
  size_t shared_bytes;
  std::string failure;

  int count() const { return threads * static_cast<int>(running.size()); }
  Block& block() { return running[current / threads]; }
};
Machine machine;
int64_t launch_count = 0;
std::vector<Launch> waiting;  // launches of which nothing has run, in order

[[noreturn]] void fail(const std::string& why) {
  machine.failure = why;
  void* abandoned;
  pyllmq_emulator_switch(&abandoned, machine.main_stack_pointer);
  std::abort();
}

bool land_copy();

// The next fiber that is neither finished nor waiting, or the first; ends the blocks when all are finished.
void run_next() {
  Machine& m = machine;
  const int self = m.current, count = m.count(), step = schedule.last_thread_first ? count - 1 : 1;
  if (schedule.warps_apart) {
    for (int i = 0; i < count; ++i) {
      const int first = schedule.last_thread_first ? count - 1 - i : i;
      if (m.fibers[first].done || m.fibers[first].waits_for != Meeting::none || first / m.threads == m.held_block) continue;
      m.current = first;
      if (first != self) pyllmq_emulator_switch(&m.fibers[self].stack_pointer, m.fibers[first].stack_pointer);
      return;
    }
    if (std::exchange(m.held_block, -1) >= 0) return run_next();
  }
  int next = self;
  do {
    next = (next + step) % count;
    Fiber& fiber = m.fibers[next];
    if (!fiber.done && fiber.waits_for == Meeting::none) {
      m.current = next;
      if (next != self) pyllmq_emulator_switch(&m.fibers[self].stack_pointer, fiber.stack_pointer);
      return;
    }
  } while (next != self);
  if (land_copy()) return run_next();
  int done = 0, at_barrier = 0, early = 0;
  for (int i = 0; i < count; ++i) {
    done += m.fibers[i].done;
    at_barrier += m.fibers[i].waits_for == Meeting::block_barrier;
    early += m.fibers[i].waits_for == Meeting::previous_launch;
  }
  if (early > 0) return pyllmq_emulator_switch(&m.fibers[self].stack_pointer, m.main_stack_pointer);
  if (done < count)
    fail("deadlock: " + std::to_string(done) + " of " + std::to_string(count) + " threads have left, " +
         std::to_string(at_barrier) +
         " wait at a block barrier, the others at a cluster's, a warp's meeting or a barrier's phase");
  void* finished;
  pyllmq_emulator_switch(&finished, m.main_stack_pointer);
}

void fiber_main() {
  (*machine.kernel)();
  machine.fibers[machine.current].done = true;
  run_next();
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  // The last frames of the thread that ended here never returned, so their red zones are still marked.
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);
#endif
  fiber.waits_for = Meeting::none;
  fiber.done = false;
  fiber.cluster_barriers = 0;
  fiber.copies.assign(1, {});
  fiber.products.assign(1, {});
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) / 64 * 64;
  auto* at = reinterpret_cast<void**>(top - 64);
  *--at = nullptr;  // fiber_main's own return address: it never returns
  *--at = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--at = nullptr;
  fiber.stack_pointer = at;
}

void run_waiting();

// All fibers wait, some of them for what was launched before.
void run_previous() {
  Machine early = std::move(machine);
  machine = {};
  run_waiting();
  machine = std::move(early);
  for (int i = machine.count() - 1; i >= 0; --i)
    if (machine.fibers[i].waits_for == Meeting::previous_launch) {
      machine.fibers[i].waits_for = Meeting::none;
      machine.current = i;
    }
  pyllmq_emulator_switch(&machine.main_stack_pointer, machine.fibers[machine.current].stack_pointer);
}

void run_blocks(int64_t first) {
  Machine& m = machine;
  m.first_block = first;
  for (Block& block : m.running) {
    block.at_barrier = 0;
    block.copies.clear();
    block.shared.assign(m.shared_bytes + 2 * kGuardBytes, kPoison);
  }
  for (Warp& warp : m.warps) warp.arrived = 0;
  for (WarpGroup& group : m.groups) group.asked.clear();
  m.at_cluster_barrier = 0;
  m.held_block = -1;
  for (int i = 0; i < m.count(); ++i) prepare(m.fibers[i]);
  m.current = schedule.last_thread_first ? m.count() - 1 : 0;
  pyllmq_emulator_switch(&m.main_stack_pointer, m.fibers[m.current].stack_pointer);
  const auto is_early = [](const Fiber& fiber) { return !fiber.done && fiber.waits_for == Meeting::previous_launch; };
  while (m.failure.empty() && std::any_of(m.fibers.begin(), m.fibers.begin() + m.count(), is_early)) run_previous();
  if (!m.failure.empty()) throw std::runtime_error("emulator: " + m.failure);
  for (const Block& block : m.running)
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (block.shared[i] != kPoison || block.shared[kGuardBytes + m.shared_bytes + i] != kPoison)
        throw std::runtime_error("emulator: shared memory was written outside of the " + std::to_string(m.shared_bytes) +
                                 " bytes of the launch");
  for (const Block& block : m.running)
    if (!block.copies.empty()) throw std::runtime_error("emulator: a block left before its bulk copies landed");
  for (const WarpGroup& group : m.groups)
    if (!group.asked.empty()) throw std::runtime_error("emulator: a wgmma that some threads of a warp group never came to");
  for (int i = 0; i < m.count(); ++i) {
    for (const auto& group : m.fibers[i].copies)
      if (!group.empty()) throw std::runtime_error("emulator: a thread left before its asynchronous copies landed");
    for (const auto& group : m.fibers[i].products)
      if (!group.empty()) throw std::runtime_error("emulator: a thread left before its wgmma was done");
  }
}

void begin_launch(const Launch& wanted, int64_t at_once) {
  Machine& m = machine;
  if (wanted.blocks < 1 || wanted.blocks > 0x7FFFFFFF || wanted.threads < 1 || wanted.threads > 1024 || wanted.threads % kWarp ||
      wanted.shared_bytes > kMostSharedBytes[is_hopper] || wanted.cluster < 1 || wanted.cluster > 8 ||
      wanted.blocks % wanted.cluster || (wanted.early && !is_hopper))
    throw std::runtime_error("emulator: a launch of " + std::to_string(wanted.blocks) + " blocks of " +
                             std::to_string(wanted.threads) + " threads with " + std::to_string(wanted.shared_bytes) +
                             " bytes of shared memory in clusters of " + std::to_string(wanted.cluster));
  m.failure.clear();
  m.kernel = &wanted.kernel;
  m.blocks = wanted.blocks;
  m.threads = wanted.threads;
  m.shared_bytes = wanted.shared_bytes;
  m.running.resize(at_once);
  if (m.fibers.size() < static_cast<size_t>(m.count())) m.fibers.resize(m.count());
  m.warps.resize(m.count() / kWarp);
  m.groups.resize(m.count() / kWarpGroup + 1);
}

void run(const Launch& wanted) {
  const bool together = schedule.blocks_apart && wanted.cluster == 1 && wanted.blocks <= kMostBlocksApart;
  const int64_t at_once = together ? wanted.blocks : wanted.cluster;
  begin_launch(wanted, at_once);
  for (int64_t i = 0; i < wanted.blocks; i += at_once) run_blocks(schedule.last_block_first ? wanted.blocks - at_once - i : i);
}

// The last launch and, as late as it allows, those before.
void run_waiting() {
  if (waiting.empty()) return;
  const Launch last = std::move(waiting.back());
  waiting.pop_back();
  if (!last.early) run_waiting();
  run(last);
  if (waiting.empty()) return;
  waiting.clear();
  throw std::runtime_error("emulator: a launch that may begin early is over before it has waited for the one before");
}

}  // namespace

void launch(Launch wanted) {
  ++launch_count;
  waiting.push_back(std::move(wanted));
  if (!schedule.early_launches) finish();
}

void finish() {
  try {
    run_waiting();
  } catch (...) {
    waiting.clear();
    throw;
  }
}

void launch_together(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (blocks > multiprocessors())
    throw std::runtime_error("emulator: " + std::to_string(blocks) + " blocks cannot all run at once");
  finish();
  ++launch_count;
  const Launch wanted{blocks, 1, threads, shared_bytes, false, kernel};
  begin_launch(wanted, blocks);
  run_blocks(0);
}

int64_t launches() { return launch_count; }
int thread() { return machine.current % machine.threads; }
int64_t block() { return machine.first_block + machine.current / machine.threads; }
int64_t blocks() { return machine.blocks; }
uint8_t* dynamic_shared() {
  return machine.block().shared.data() + kGuardBytes;  // operator new aligns to 16 bytes
}

void meet_block() {
  Machine& m = machine;
  Block& block = m.block();
  const int first = m.current / m.threads * m.threads;
  if (++block.at_barrier < m.threads) {
    m.fibers[m.current].waits_for = Meeting::block_barrier;
    run_next();
    return;
  }
  block.at_barrier = 0;
  for (int i = first; i < first + m.threads; ++i)
    if (m.fibers[i].waits_for == Meeting::block_barrier) m.fibers[i].waits_for = Meeting::none;
}

void meet_cluster() {
  Machine& m = machine;
  Fiber& fiber = m.fibers[m.current];
  const int left_out = schedule.fault == Fault::first_cluster_barrier    ? 1
                       : schedule.fault == Fault::second_cluster_barrier ? 2
                                                                         : 0;
  if (++fiber.cluster_barriers == left_out) return;
  if (++m.at_cluster_barrier < m.count()) {
    fiber.waits_for = Meeting::cluster_barrier;
    run_next();
    return;
  }
  m.at_cluster_barrier = 0;
  for (int i = 0; i < m.count(); ++i)
    if (m.fibers[i].waits_for == Meeting::cluster_barrier) m.fibers[i].waits_for = Meeting::none;
}

const uint8_t* of_block(const void* own, int rank) {
  Machine& m = machine;
  if (rank < 0 || rank >= static_cast<int>(m.running.size())) fail("a cluster has no block of that rank");
  const auto begin = m.fibers.begin() + rank * m.threads;
  if (std::all_of(begin, begin + m.threads, [](const Fiber& fiber) { return fiber.done; }))
    fail("shared memory is read of a block that has left");
  return m.running[rank].shared.data() + (static_cast<const uint8_t*>(own) - m.block().shared.data());
}

void wait_for_previous() {
  if (waiting.empty() || schedule.fault == Fault::wait_for_previous) return;
  machine.fibers[machine.current].waits_for = Meeting::previous_launch;
  run_next();
}

void let_other_blocks_run() {
  if (!schedule.blocks_apart || machine.running.size() == 1 || machine.held_block >= 0) return;
  machine.held_block = machine.current / machine.threads;
  run_next();
}

void wait_while(const uint32_t* word, uint32_t value) {
  for (int yields = 0; *word == value; ++yields) {
    if (yields == kMostYields) fail("a thread waits for another block, which never comes");
    run_next();
  }
}

void meet_warp(Meeting meeting, void* brought, WarpWork work) {
  Machine& m = machine;
  const int lane = m.current % kWarp, first = m.current - lane;
  Warp& warp = m.warps[m.current / kWarp];
  if (warp.arrived > 0 && warp.meeting != meeting) fail("lanes of one warp meet at different instructions");
  warp.meeting = meeting;
  warp.brought[lane] = brought;
  if (++warp.arrived < kWarp) {
    m.fibers[m.current].waits_for = meeting;
    run_next();
    return;
  }
  warp.arrived = 0;
  if (work != nullptr) work(warp.brought);
  for (int i = 0; i < kWarp; ++i)
    if (m.fibers[first + i].waits_for == meeting) m.fibers[first + i].waits_for = Meeting::none;
}

void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("an asynchronous copy is not aligned to its size");
  if (schedule.eager_copies)
    std::memcpy(to, from, bytes);
  else
    machine.fibers[machine.current].copies.back().push_back({to, from, bytes});
}

void commit_async() { machine.fibers[machine.current].copies.emplace_back(); }

void wait_async(int latest_left) {
  auto& groups = machine.fibers[machine.current].copies;
  const int closed = static_cast<int>(groups.size()) - 1;
  for (int i = 0; i < closed - latest_left; ++i) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

namespace {

// A word in shared memory: threads that are missing, threads of a phase, bytes that are missing, parity of the phase.
struct Phase {
  uint16_t missing, arrivals;
  int32_t bytes_and_parity;
  int bytes() const { return bytes_and_parity >> 1; }
  int parity() const { return bytes_and_parity & 1; }
};
static_assert(sizeof(Phase) == sizeof(uint64_t));

Phase& phase_of(uint64_t* barrier) {
  auto& phase = *reinterpret_cast<Phase*>(barrier);
  if (phase.arrivals == 0 || phase.arrivals > 1024) fail("a barrier that was not made");
  return phase;
}

void wake(Meeting meeting, const void* at) {
  for (Fiber& fiber : machine.fibers)
    if (fiber.waits_for == meeting && fiber.waits_at == at) fiber.waits_for = Meeting::none;
}

void wait_for(Meeting meeting, const void* at) {
  machine.fibers[machine.current].waits_for = meeting;
  machine.fibers[machine.current].waits_at = at;
  run_next();
}

void settle(uint64_t* barrier) {
  Phase& phase = phase_of(barrier);
  if (phase.missing != 0 || phase.bytes() != 0) return;
  phase.missing = phase.arrivals;
  phase.bytes_and_parity ^= 1;
  wake(Meeting::phase, barrier);
}

// Bulk copies land as late as they may: where all threads wait. Whether there was one.
bool land_copy() {
  for (Block& block : machine.running) {
    if (block.copies.empty()) continue;
    const auto which = schedule.last_thread_first ? block.copies.end() - 1 : block.copies.begin();
    const BulkCopy landing = *which;
    block.copies.erase(which);
    std::memcpy(landing.copy.to, landing.copy.from, landing.copy.bytes);
    phase_of(landing.barrier).bytes_and_parity -= 2 * landing.copy.bytes;
    settle(landing.barrier);
    return true;
  }
  return false;
}

// What a wgmma's descriptors count from: shared memory begins at a multiple of 1024 bytes at the latest.
uint8_t* matrix_base() { return reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(dynamic_shared()) / 1024 * 1024); }

// Element `column` of row `row` of a matrix that a descriptor describes, swizzled by the address as the hardware does it.
float element_of(uint64_t descriptor, int row, int column) {
  const bool narrow = descriptor >> 62 == 2;
  const uint64_t step = (descriptor >> 32 & 0x3FFF) * 16;
  uint64_t at = (descriptor & 0x3FFF) * 16 + row / 8 * step + row % 8 * (narrow ? 64 : 128) + column * 2;
  at ^= (at >> 7 & (narrow ? 3 : 7)) << 4;
  uint16_t half;
  std::memcpy(&half, matrix_base() + at, 2);
  return cpu::fp16_to_fp32(half);
}

// Of the registers as of mma_m16n8k16.
float a_of(const Wgmma& asked, int i, int k) {
  const int thread = i / 16 * 32 + i % 8 * 4 + k % 8 / 2;
  if (asked.a_registers[thread] == nullptr) return element_of(asked.a, k, i);
  return cpu::fp16_to_fp32(static_cast<uint16_t>(asked.a_registers[thread][i / 8 % 2 + k / 8 * 2] >> (k % 2 * 16)));
}

// A warp's 16 of the 64 rows.
void multiply(Wgmma& asked, int warp) {
  if (asked.done[warp]) return;
  constexpr int kRows = 16, kDepth = 16;
  std::vector<float> a(kRows * kDepth), b(kDepth * asked.n);
  for (int k = 0; k < kDepth; ++k) {
    for (int i = 0; i < kRows; ++i) a[i * kDepth + k] = a_of(asked, warp * kRows + i, k);
    for (int j = 0; j < asked.n; ++j) b[k * asked.n + j] = element_of(asked.b, j, k);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int e = 0; e < asked.n / 2; ++e) {
      const int i = lane / 4 + e / 2 % 2 * 8, j = e / 4 * 8 + lane % 4 * 2 + e % 2;
      for (int k = 0; k < kDepth; ++k) asked.c[warp * kWarp + lane][e] += a[i * kDepth + k] * b[k * asked.n + j];
    }
  asked.done[warp] = true;
}

// Whether the threads came that a warp's rows wait for: its own where warps run apart, which the hardware may let them, else all
// of the warp group, for which it may wait.
bool is_ready(const Wgmma& asked, int warp) {
  return schedule.warps_apart ? asked.of_warp(warp) == kWarp : asked.arrived == kWarpGroup;
}

}  // namespace

void barrier_init(uint64_t* barrier, int arrivals) {
  *reinterpret_cast<Phase*>(barrier) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}

void barrier_arrive(uint64_t* barrier, int expected_bytes) {
  Phase& phase = phase_of(barrier);
  if (phase.missing == 0) fail("more threads arrive at a barrier than it is for");
  phase.bytes_and_parity += 2 * expected_bytes;
  --phase.missing;
  settle(barrier);
}

void barrier_wait(uint64_t* barrier, int parity) {
  while (phase_of(barrier).parity() == parity) wait_for(Meeting::phase, barrier);
}

void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    fail("a bulk copy is not aligned to 16 bytes");
  Phase& phase = phase_of(barrier);
  if (schedule.eager_copies) {
    std::memcpy(to, from, bytes);
    phase.bytes_and_parity -= 2 * bytes;
  } else {
    machine.block().copies.push_back({{to, from, bytes}, barrier});
  }
  settle(barrier);
}

uint64_t matrix_at(const void* shared, int step) {
  const auto at = static_cast<uint64_t>(static_cast<const uint8_t*>(shared) - matrix_base());
  if (at / 128 % 8 != 0 || step % 1024 != 0) fail("a matrix of wgmma begins within 8 rows");
  return uint64_t{1} << 62 | static_cast<uint64_t>(step >> 4) << 32 | uint64_t{1} << 16 | at >> 4;
}

uint64_t narrow_matrix_at(const void* shared) {
  const auto at = static_cast<uint64_t>(static_cast<const uint8_t*>(shared) - matrix_base());
  if (at % 512 != 0) fail("a matrix of wgmma with rows of 64 bytes begins within 8 rows");
  return uint64_t{2} << 62 | uint64_t{512 >> 4} << 32 | uint64_t{1} << 16 | at >> 4;
}

void wgmma(int n, float* c, const uint32_t* a_registers, uint64_t a, uint64_t b) {
  Machine& m = machine;
  const int thread = m.current % m.threads;
  auto& asked = m.groups[m.current / kWarpGroup].asked;
  size_t mine = 0;  // the first that this thread has not come to
  while (mine < asked.size() && asked[mine]->c[thread % kWarpGroup] != nullptr) ++mine;
  if (mine == asked.size()) asked.push_back(std::make_shared<Wgmma>(Wgmma{n, 0, a, b, {}, {}, {}}));
  const auto product = asked[mine];
  if (product->n != n || product->a != a || product->b != b) fail("threads of a warp group ask for different wgmma");
  product->c[thread % kWarpGroup] = c;
  product->a_registers[thread % kWarpGroup] = a_registers;
  m.fibers[m.current].products.back().push_back(product);
  if (++product->arrived == kWarpGroup) asked.erase(asked.begin() + static_cast<std::ptrdiff_t>(mine));
  for (int warp = 0; warp < kWarpGroup / kWarp; ++warp) {
    if (!is_ready(*product, warp)) continue;
    if (schedule.eager_copies) multiply(*product, warp);
    wake(Meeting::multiplication, product.get());
  }
}

void commit_wgmma() { machine.fibers[machine.current].products.emplace_back(); }

void wait_wgmma(int latest_left) {
  auto& groups = machine.fibers[machine.current].products;
  while (static_cast<int>(groups.size()) - 1 > latest_left) {
    for (const auto& product : groups.front()) {
      const int warp = machine.current % machine.threads % kWarpGroup / kWarp;
      while (!is_ready(*product, warp)) wait_for(Meeting::multiplication, product.get());
      multiply(*product, warp);
    }
    groups.erase(groups.begin());
  }
}

namespace {

float half_of(const Mma& held, uint32_t word, int which) {
  const auto bits = static_cast<uint16_t>(word >> (16 * which));
  return held.bf16 ? cpu::bf16_to_fp32(bits) : cpu::fp16_to_fp32(bits);
}

// Columns of A behind register r of lane 4g + t, and whether position `which` of its group is one that the PTX ISA allows.
constexpr int kGroup = 4;
int kept_column(void* const* brought, int lane, int r, int which) {
  const int g = lane / 4, group = lane % 4 + 4 * (r >> 1);
  const auto& quad = *static_cast<const Mma*>(brought[lane]);
  const auto& holder = *static_cast<const Mma*>(brought[4 * g + 2 * quad.selector + group / 4]);
  const uint32_t nibble = holder.positions >> (group % 4 * 4 + 16 * (r & 1)) & 15;
  if ((nibble & 3) >= nibble >> 2) fail("positions of mma.sp do not ascend");
  return group * kGroup + static_cast<int>(which == 0 ? nibble & 3 : nibble >> 2);
}

template <bool kSparse>
void multiply(void* const* brought) {
  constexpr int kDepth = kSparse ? 32 : 16;
  float a[16][kDepth] = {}, b[kDepth][8], c[16][8];
  bool read[16][kDepth] = {};  // what a sparse A does not keep meets no b, not even one that is not finite
  for (int lane = 0; lane < kWarp; ++lane) {
    const Mma& held = *static_cast<const Mma*>(brought[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        const int row = g + 8 * (r & 1), k = kSparse ? kept_column(brought, lane, r, half) : 2 * t + half + 8 * (r >> 1);
        a[row][k] = half_of(held, held.a[r], half);
        read[row][k] = true;
      }
      for (int r = 0; r < kDepth / 8; ++r) b[2 * t + half + 8 * r][g] = half_of(held, held.b[r], half);
    }
    for (int e = 0; e < 4; ++e) c[g + 8 * (e >> 1)][2 * t + (e & 1)] = held.c[e];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < 8; ++j)
        if (read[i][k]) c[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int e = 0; e < 4; ++e) static_cast<Mma*>(brought[lane])->c[e] = c[lane / 4 + 8 * (e >> 1)][2 * (lane % 4) + (e & 1)];
}

void multiply_integers(void* const* brought) {
  int a[16][32], b[32][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& held = *static_cast<const IntegerMma*>(brought[lane]);
    const int g = lane / 4, t = lane % 4;
    const auto signed_byte = [](uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); };
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r & 1)][4 * t + i + 16 * (r >> 1)] = signed_byte(held.a[r], i);
      for (int r = 0; r < 2; ++r) b[4 * t + i + 16 * r][g] = signed_byte(held.b[r], i);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e >> 1), column = 2 * (lane % 4) + (e & 1);
      for (int k = 0; k < 32; ++k) static_cast<IntegerMma*>(brought[lane])->c[e] += a[row][k] * b[k][column];
    }
}

struct Shuffle {
  uint32_t value, result;
  int from;  // lane
};

void exchange(void* const* brought) {
  for (int lane = 0; lane < kWarp; ++lane) {
    auto& self = *static_cast<Shuffle*>(brought[lane]);
    self.result = static_cast<const Shuffle*>(brought[self.from])->value;
  }
}

}  // namespace

void mma(Meeting meeting, Mma held) { meet_warp(meeting, &held, meeting == Meeting::mma ? multiply<false> : multiply<true>); }

void integer_mma(IntegerMma held) { meet_warp(Meeting::integer_mma, &held, multiply_integers); }

}  // namespace pyllmq::cuda::emulator

namespace pyllmq::cuda::ptx {

uint32_t shuffle(uint32_t value, int lane) {
  emulator::Shuffle held{value, 0, lane};
  emulator::meet_warp(emulator::Meeting::shuffle, &held, emulator::exchange);
  return held.result;
}

uint32_t shuffle_up(uint32_t value, int distance) {
  const int lane = thread() % emulator::kWarp;
  return shuffle(value, lane < distance ? lane : lane - distance);
}

uint32_t transpose(uint32_t pair) {
  const int lane = thread() % emulator::kWarp, row = lane / 4, shift = row % 2 * 16;
  const auto element = [&](int from_row) { return shuffle(pair, from_row * 4 + row / 2) >> shift & 0xFFFF; };
  const uint32_t first = element(lane % 4 * 2);
  return first | element(lane % 4 * 2 + 1) << 16;
}

float shuffle_xor(float value, int mask) {
  return bits_to_fp32(shuffle(fp32_to_bits(value), (thread() % emulator::kWarp) ^ mask));
}

}  // namespace pyllmq::cuda::ptx

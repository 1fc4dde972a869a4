// The vocabulary of the CUDA files: every PTX instruction that a kernel uses is one function here, every launch one macro.
// Compiled by g++ (tests only) the same names come from emulator/emulator.h, and the kernel bodies run on a CPU.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PYLLMQ_KERNEL __global__
#define PYLLMQ_DEVICE __device__ __forceinline__
#define PYLLMQ_MEMBER __device__ __forceinline__
#define PYLLMQ_COLD static __device__ __noinline__  // what is long and rarely runs: one copy of its code a kernel
#define PYLLMQ_UNROLL _Pragma("unroll")
#define PYLLMQ_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]
#define PYLLMQ_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// Where a kernel of what only compute capability 9.0 has is compiled for another: nothing but static shared memory, by which the
// host knows (has_code).
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYLLMQ_NO_CODE                            \
  __shared__ volatile int none[kNoCodeBytes / 4]; \
  none[0] = 0;                                    \
  return;
#endif
// All blocks run at once, or the launch is refused: they may wait for each other.
#define PYLLMQ_LAUNCH_TOGETHER(kernel, blocks, threads, shared_bytes, stream, argument)                                    \
  do {                                                                                                                     \
    auto held = argument;                                                                                                  \
    void* held_arguments[] = {&held};                                                                                      \
    cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads), \
                                held_arguments, shared_bytes, reinterpret_cast<cudaStream_t>(stream));                     \
  } while (false)
// A launch that may begin while the one before it in the same stream is under way, if that one lets it: what that one writes is
// there, and what it reads may be overwritten, after wait_for_previous, to which each of its threads comes. `cluster` blocks that
// follow each other run at once and see each other's shared memory. Code for compute capability 9.0 only (code_version).
#define PYLLMQ_LAUNCH_CLUSTERS(kernel, cluster, blocks, threads, shared_bytes, stream, argument)                              \
  do {                                                                                                                        \
    auto held = argument;                                                                                                     \
    void* held_arguments[] = {&held};                                                                                         \
    cudaLaunchAttribute attributes[2]{};                                                                                      \
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;                                                    \
    attributes[0].val.programmaticStreamSerializationAllowed = 1;                                                             \
    attributes[1].id = cudaLaunchAttributeClusterDimension;                                                                   \
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};                                                    \
    const cudaLaunchConfig_t launch{dim3(static_cast<unsigned>(blocks)),    dim3(threads), static_cast<size_t>(shared_bytes), \
                                    reinterpret_cast<cudaStream_t>(stream), attributes,    (cluster) > 1 ? 2u : 1u};          \
    cudaLaunchKernelExC(&launch, reinterpret_cast<const void*>(kernel), held_arguments);                                      \
  } while (false)
#define PYLLMQ_LAUNCH_EARLY(kernel, blocks, threads, shared_bytes, stream, argument) \
  PYLLMQ_LAUNCH_CLUSTERS(kernel, 1, blocks, threads, shared_bytes, stream, argument)

namespace pyllmq::cuda::ptx {

PYLLMQ_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
PYLLMQ_DEVICE int64_t block() { return blockIdx.x; }
PYLLMQ_DEVICE int64_t blocks() { return gridDim.x; }

PYLLMQ_DEVICE void sync_block() { __syncthreads(); }
PYLLMQ_DEVICE void sync_warp() { __syncwarp(); }

// The blocks of a cluster (PYLLMQ_LAUNCH_CLUSTERS) meet, and what they wrote to shared memory is there for all of them:
// MEMBAR.ALL of each warp, which after reads alone is not needed.
PYLLMQ_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
PYLLMQ_DEVICE void sync_cluster_after_reads() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// What stands in the shared memory of the cluster's block of that rank where `own` is in this one's. It must not have left.
PYLLMQ_DEVICE float load_of_block(const float* own, int rank) {
  float value = *own;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f32 %0, [a]; }"
               : "=f"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank)
               : "memory");
#endif
  return value;
}

// Byte i of the result is byte (selector >> 4i & 7) of {b, a}, or where bit 3 of that nibble is set its sign: 0 or 0xFF.
PYLLMQ_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// word >> kBits, by the pipe of multiplications: that of shifts has `permute`, too, and is what decoding waits for. The factor is
// one that the compiler does not know, or it would write a shift.
static __constant__ uint32_t shift_factors[2] = {1u << 16, 1u << 31};
template <int kBits>
PYLLMQ_DEVICE uint32_t shift_by_multiplying(uint32_t word) {
  static_assert(kBits == 16 || kBits == 1, "what kernels use");
  return __umulhi(word, shift_factors[kBits == 1]);
}

PYLLMQ_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

// What the warp's lane holds.
PYLLMQ_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }
// What the lane `distance` below holds; the lanes below `distance` get their own value.
PYLLMQ_DEVICE uint32_t shuffle_up(uint32_t value, int distance) { return __shfl_up_sync(0xFFFFFFFFu, value, distance); }

// 16 bytes to to + step * count of global memory, whose address is one instruction.
PYLLMQ_DEVICE void store_16(uint8_t* to, uint32_t step, uint32_t count, const uint32_t (&words)[4]) {
  asm volatile("{ .reg .u64 a; mad.wide.u32 a, %1, %2, %0; st.global.v4.b32 [a], {%3, %4, %5, %6}; }" ::"l"(to), "r"(step),
               "r"(count), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Of a matrix [8, 8] of 16 bits whose row i the lanes 4i..4i+3 hold, two elements each, the transpose in the same order.
PYLLMQ_DEVICE uint32_t transpose(uint32_t pair) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
  return d;
}

// c += a * b: fp16 or bf16 [16, 16] x [16, 8], summed in fp32. With g = lane / 4 and t = lane % 4, a lane holds
// a = {A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]}, b = {B[2t..][g], B[2t+8..][g]}, c = {C[g][2t..], C[g+8][2t..]}.
template <bool kBf16 = false>
PYLLMQ_DEVICE void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kBf16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += a * b: int8 [16, 32] x [32, 8], summed in int32. A lane holds a = {A[g][4t..4t+3], A[g+8][4t..], A[g][4t+16..],
// A[g+8][4t+16..]}, b = {B[4t..][g], B[4t+16..][g]}, c as above.
PYLLMQ_DEVICE void mma_m16n8k32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define PYLLMQ_MMA_SP "mma.sp::ordered_metadata"  // the plain form may be slow on newer devices, says the PTX ISA
#else
#define PYLLMQ_MMA_SP "mma.sp"
#endif

// c += a * b where a [16, 32] is 2:4 sparse: register r of a = the two kept of A[g + 8 (r % 2)][4 (t + 4 (r / 2))..+3], b[i] =
// B[8i + 2t..][g]. Positions come from the lanes t = 2 kSelector + c: bits 4n..4n+3 of their low half are first | second << 2
// of A[g][16c + 4n..+3], the high half is row g + 8; the first is below the second.
template <bool kBf16, int kSelector>
PYLLMQ_DEVICE void mma_sp_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions) {
  if constexpr (kBf16)
    asm volatile(PYLLMQ_MMA_SP
                 ".sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, "
                 "{%0,%1,%2,%3}, %12, %13;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions),
                   "n"(kSelector));
  else
    asm volatile(PYLLMQ_MMA_SP
                 ".sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, "
                 "{%0,%1,%2,%3}, %12, %13;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions),
                   "n"(kSelector));
}

// What L2 gives up first: for what is read once. A constant, which copies take at no cost.
PYLLMQ_DEVICE uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes from global to shared memory, past the L1 cache; there after wait_async and a barrier. kOnce: nobody reads them again
// soon.
template <bool kOnce = false>
PYLLMQ_DEVICE void copy_async_16(void* shared, const void* global) {
  if constexpr (kOnce) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(global), "l"(read_once())
                 : "memory");
    return;
  }
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
PYLLMQ_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLatestLeft>  // waits until at most so many of this thread's latest groups are still under way
PYLLMQ_DEVICE void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatestLeft) : "memory");
}

// Asks for the 128 bytes around an address, which a copy soon finds in L2.
PYLLMQ_DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// A byte address in shared memory: sums of such addresses stay as they are written, one instruction each, where a pointer's
// would be split into an offset and the block's base.
using SharedAddress = uint32_t;
PYLLMQ_DEVICE SharedAddress shared_address(const void* shared) {
  uint32_t address;
  asm volatile("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(shared));
  return address;
}
PYLLMQ_DEVICE uint32_t load_shared_word(SharedAddress from) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from));
  return word;
}

// copy_async_16 from from + kFrom to to + kTo, where it is wanted: such offsets are part of the instruction.
template <int kTo, int kFrom, bool kOnce = false>
PYLLMQ_DEVICE void copy_async_16_if(bool wanted, SharedAddress to, const void* from) {
  if constexpr (kOnce) {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %0, 0; @p cp.async.cg.shared.global.L2::cache_hint [%1+%2], [%3+%4], 16, %5; }" ::"r"(
            static_cast<int>(wanted)),
        "r"(to), "n"(kTo), "l"(from), "n"(kFrom), "l"(read_once())
        : "memory");
    return;
  }
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p cp.async.cg.shared.global [%1+%2], [%3+%4], 16; }" ::"r"(
                   static_cast<int>(wanted)),
               "r"(to), "n"(kTo), "l"(from), "n"(kFrom)
               : "memory");
}

// Lets a launch begin that may begin early (PYLLMQ_LAUNCH_CLUSTERS), once all blocks have come here; and waits in it for the end
// of the one before, and so of all before that one, which has waited itself.
PYLLMQ_DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
PYLLMQ_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- what only compute capability 9.0 has (sm_90a): warp groups of 128 threads multiply what lies in shared memory
// -------------

// A barrier in shared memory, of phases 0, 1, 0, ...: a phase is over when so many threads have arrived, and all bytes have that
// one of them said to expect. What they wrote is then there for whoever waits.
using Barrier = uint64_t;
PYLLMQ_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
PYLLMQ_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
PYLLMQ_DEVICE void barrier_arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until a phase of that parity is over; of a barrier that was just made, the one before its first.
PYLLMQ_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra over; bra again; over: }" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// A multiple of 16 bytes from global to shared memory, requested by one thread; they count as bytes that the barrier expects.
PYLLMQ_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Between a thread's own reads and writes of shared memory and those of copy_bulk and wgmma, which go another way.
PYLLMQ_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// How wgmma finds a matrix of 16 bits: rows of 128 bytes, 8 to a kilobyte, whose chunk c of 16 bytes stands in place c ^ row % 8;
// the next 8 rows `step` bytes further. The same for all threads of a warp group; begins at a multiple of 1024 bytes, or within
// the first row.
PYLLMQ_DEVICE uint64_t matrix_at(const void* shared, int step) {
  return uint64_t{1} << 62 | static_cast<uint64_t>(step >> 4) << 32 | uint64_t{1} << 16 | (shared_address(shared) & 0x3FFFF) >> 4;
}

// The same with rows of 64 bytes, 8 to half a kilobyte, and chunk c in place c ^ row / 2 % 4; begins at a multiple of 512 bytes.
PYLLMQ_DEVICE uint64_t narrow_matrix_at(const void* shared) {
  return uint64_t{2} << 62 | uint64_t{512 >> 4} << 32 | uint64_t{1} << 16 | (shared_address(shared) & 0x3FFFF) >> 4;
}

#define PYLLMQ_NUMBERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define PYLLMQ_NUMBERS_16 PYLLMQ_NUMBERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define PYLLMQ_NUMBERS_32 PYLLMQ_NUMBERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PYLLMQ_NUMBERS_64                                                                                                    \
  PYLLMQ_NUMBERS_32                                                                                                          \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61" \
  ",%62,%63"
#define PYLLMQ_NUMBERS_128                                                                                                   \
  PYLLMQ_NUMBERS_64                                                                                                          \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93" \
  ",%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118"  \
  ",%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define PYLLMQ_SUMS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define PYLLMQ_SUMS_8(i) PYLLMQ_SUMS_4(i), PYLLMQ_SUMS_4(i + 4)
#define PYLLMQ_SUMS_16(i) PYLLMQ_SUMS_8(i), PYLLMQ_SUMS_8(i + 8)
#define PYLLMQ_SUMS_32(i) PYLLMQ_SUMS_16(i), PYLLMQ_SUMS_16(i + 16)
#define PYLLMQ_SUMS_64(i) PYLLMQ_SUMS_32(i), PYLLMQ_SUMS_32(i + 32)
#define PYLLMQ_SUMS_128(i) PYLLMQ_SUMS_64(i), PYLLMQ_SUMS_64(i + 64)
#define PYLLMQ_WGMMA(n, sums, a_number, b_number)                                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" PYLLMQ_NUMBERS_##sums "}, %" #a_number ", %" #b_number \
                                                                                                ", 1, 1, 1, 1, 0;"               \
               : PYLLMQ_SUMS_##sums(0)                                                                                           \
               : "l"(a), "l"(b))

// c += a * b: fp16 [64, 16] x [16, kN], summed in fp32; under way until wgmma_wait. In memory a row of a's matrix is one k with
// 64 m, a row of b's one n with 64 k, of which 16 are taken. With g = lane / 4 and t = lane % 4 a lane of warp w holds c[4j + e]
// = C[16w + g + 8 (e / 2)][8j + 2t + e % 2].
template <int kN>
PYLLMQ_DEVICE void wgmma(float (&c)[kN / 2], uint64_t a, uint64_t b) {
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256, "what kernels use");
  if constexpr (kN == 16) PYLLMQ_WGMMA(16, 8, 8, 9);
  if constexpr (kN == 32) PYLLMQ_WGMMA(32, 16, 16, 17);
  if constexpr (kN == 64) PYLLMQ_WGMMA(64, 32, 32, 33);
  if constexpr (kN == 128) PYLLMQ_WGMMA(128, 64, 64, 65);
  if constexpr (kN == 256) PYLLMQ_WGMMA(256, 128, 128, 129);
}

#define PYLLMQ_WGMMA_REGISTERS(n, sums, a0, a1, a2, a3, b_number)                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" PYLLMQ_NUMBERS_##sums \
               "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b_number ", 1, 1, 1, 0;"          \
               : PYLLMQ_SUMS_##sums(0)                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// The same with a in registers, which stay as they are until it is done: of warp w rows 16w.. of a as mma_m16n8k16 wants them.
template <int kN>
PYLLMQ_DEVICE void wgmma(float (&c)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kN == 16 || kN == 32 || kN == 64, "what kernels use");
  if constexpr (kN == 16) PYLLMQ_WGMMA_REGISTERS(16, 8, 8, 9, 10, 11, 12);
  if constexpr (kN == 32) PYLLMQ_WGMMA_REGISTERS(32, 16, 16, 17, 18, 19, 20);
  if constexpr (kN == 64) PYLLMQ_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36);
}
PYLLMQ_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }  // sums may be used
PYLLMQ_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLatestLeft>  // until at most so many of the latest groups are under way
PYLLMQ_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLatestLeft) : "memory");
}
// Keeps the compiler from moving what reads or writes sums to the other side.
template <int kCount>
PYLLMQ_DEVICE void hold(float (&c)[kCount]) {
  PYLLMQ_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// What another block wrote: read from L2, where all blocks see the same.
PYLLMQ_DEVICE float load_l2(const float* from) { return __ldcg(from); }
// Returns the old value; counts 0..last and starts again at 0. What blocks wrote before they counted is there for one that counts
// later; the other threads of a block are on either side of a barrier. One thread's MEMBAR.ALL, where __threadfence by all
// threads before and behind was two MEMBAR.SC of each warp.
PYLLMQ_DEVICE uint32_t count_to(uint32_t* counter, uint32_t last) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
  return old;
}
// To a word in shared memory.
PYLLMQ_DEVICE void add_shared(uint32_t* word, uint32_t value) { atomicAdd(word, value); }
// A word through which blocks wait for each other: what was written before `publish` is there after `observe` saw it.
PYLLMQ_DEVICE uint32_t observe(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
PYLLMQ_DEVICE void publish(uint32_t* word, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
PYLLMQ_DEVICE void wait_while(const uint32_t* word, uint32_t value) {
  while (observe(word) == value) {
  }
}

PYLLMQ_DEVICE uint16_t fp32_to_fp16(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
PYLLMQ_DEVICE float fp16_to_fp32(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
PYLLMQ_DEVICE uint16_t fp32_to_bf16(float value) {
  uint16_t half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
// Two fp16 differences.
PYLLMQ_DEVICE uint32_t subtract_fp16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// Rounded to even; NaN gives 0, and what is too large the largest.
PYLLMQ_DEVICE int nearest_integer(float value) { return __float2int_rn(value); }
PYLLMQ_DEVICE float magnitude(float value) { return fabsf(value); }
PYLLMQ_DEVICE float exp(float value) { return expf(value); }  // to 1 unit in the last place
PYLLMQ_DEVICE double exp(double value) { return ::exp(value); }
PYLLMQ_DEVICE float log(float value) { return logf(value); }
PYLLMQ_DEVICE double log(double value) { return ::log(value); }
PYLLMQ_DEVICE float erf(float value) { return erff(value); }  // to 2 units in the last place
// a / b to 2 units in the last place, for b between 2^-126 and 2^126: 3 instructions, an exact one takes 8 and a branch
PYLLMQ_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
PYLLMQ_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
PYLLMQ_DEVICE float bits_to_fp32(uint32_t bits) { return __uint_as_float(bits); }
PYLLMQ_DEVICE uint32_t fp32_to_bits(float value) { return __float_as_uint(value); }

}  // namespace pyllmq::cuda::ptx
#else
#include "cuda_emulator/emulator.h"
#endif

namespace pyllmq::cuda {

enum class DType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

PYLLMQ_DEVICE float bf16_to_fp32(uint16_t half) { return ptx::bits_to_fp32(static_cast<uint32_t>(half) << 16); }

PYLLMQ_DEVICE float load_element(const void* from, DType dtype, int64_t index) {
  if (dtype == DType::fp32) return static_cast<const float*>(from)[index];
  const uint16_t half = static_cast<const uint16_t*>(from)[index];
  return dtype == DType::fp16 ? ptx::fp16_to_fp32(half) : bf16_to_fp32(half);
}

PYLLMQ_DEVICE void store_element(void* to, DType dtype, int64_t index, float value) {
  if (dtype == DType::fp32)
    static_cast<float*>(to)[index] = value;
  else
    static_cast<uint16_t*>(to)[index] = dtype == DType::fp16 ? ptx::fp32_to_fp16(value) : ptx::fp32_to_bf16(value);
}

PYLLMQ_DEVICE void store_nan(void* to, DType dtype, int64_t count, int threads) {
  for (int64_t i = ptx::block() * threads + ptx::thread(); i < count; i += ptx::blocks() * threads)
    store_element(to, dtype, i, ptx::bits_to_fp32(0x7FC00000u));
}

// act(0), act(1), ..., act(kCount - 1), unrolled; of two counts act(i, j).
template <int kCount, class Act>
PYLLMQ_DEVICE void unrolled(const Act& act) {
  PYLLMQ_UNROLL
  for (int i = 0; i < kCount; ++i) act(i);
}
template <int kOuter, int kInner, class Act>
PYLLMQ_DEVICE void unrolled(const Act& act) {
  PYLLMQ_UNROLL
  for (int i = 0; i < kOuter; ++i) PYLLMQ_UNROLL
  for (int j = 0; j < kInner; ++j) act(i, j);
}

// An array of a layout, by its place in the header.
template <class T, class Header>
PYLLMQ_DEVICE const T* section(const Header& h, int64_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(&h) + offset);
}

// N words at an address aligned to their size: one load instruction.
template <int kWords>
struct alignas(kWords % 4 == 0   ? 16
               : kWords % 2 == 0 ? 8
                                 : 4) Words {
  uint32_t word[kWords];
  PYLLMQ_MEMBER uint32_t operator[](int i) const { return word[i]; }
};
template <int kWords>
PYLLMQ_DEVICE Words<kWords> load_words(const void* from) {
  return *static_cast<const Words<kWords>*>(from);
}

}  // namespace pyllmq::cuda

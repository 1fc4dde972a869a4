// How far ahead kernels ask for what they read in order: a row for each instruction set and kind of reading.
#pragma once
#include <cstdint>

namespace pyllmq::cpu {

struct Ahead {        // bytes
  int to_l1;          // from the L2 to the L1 cache
  int to_l2;          // from memory; 0: no second request. It keeps more lines on their way than an L1 cache has line buffers
  bool once = false;  // to_l1 is asked for from memory, and not kept behind it
};

// Codes looked up in tables. 4096 x 4096 at 4 bits from memory, 2 threads, AVX-512: 246 us; 2048 alone 290, far alone 371, none
// 375. The far one is touchy: 6 KiB takes a fifth longer than 4 at 4 bits, 8 a sixth longer at 3 (Intel). Zen 5, the
// three ways in turns, 4 / 3 / 2 bits: 1 and 4 KiB 187, 137, 88 us; 2 and 8 KiB 179, 137, 90; once, 8 KiB 175, 132, 87, and the
// same loop without arithmetic 155, 120, 80. 16384 x 4096: 1140, 1000, 890. On Intel asking once takes 2.6 times as long.
static constexpr Ahead kLookupsAvx2{1024, 6144};
extern const Ahead kLookupsAvx512;  // by the processor's maker
// Cells of the sparse formats. AVX2: 2:4 takes 6 % longer with 2 and 16 KiB, codes of 2 bits 283 in place of 262 us, and 278 with
// 1/2 and 4. AVX-512, 2:4 in bf16 and fp32: 690 and 1154 us, 718 and 1280 where the second is 16 KiB; bitmaps take as long
// with either; one distance alone: 1.3 to 1.6 times as long.
static constexpr Ahead kCellsAvx2{1024, 4096}, kCellsAvx512{2048, 4096};
// Codes decoded to weights: the same block of the next tile in a panel of 256 lookups, which arrives while this tile is
// multiplied. 8-11 % faster than without (AVX2, 4 and 2 bits, 8 and 16 tokens); 1024 bytes: 0-8 %.
static constexpr Ahead kDecoded{4096, 0};
// Codebooks that tables are built from, read once per call as well (AVX-512).
static constexpr Ahead kCodebooks{2048, 0};

static inline void prefetch(const void* at, Ahead ahead) {
  if (ahead.once)
    __builtin_prefetch(static_cast<const uint8_t*>(at) + ahead.to_l1, 0, 0);
  else
    __builtin_prefetch(static_cast<const uint8_t*>(at) + ahead.to_l1, 0, 3);
  if (ahead.to_l2 > 0) __builtin_prefetch(static_cast<const uint8_t*>(at) + ahead.to_l2, 0, 2);
}

}  // namespace pyllmq::cpu

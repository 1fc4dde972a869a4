// Codes -> pairs of fp16 weights in registers, for the layout of layout.h.
//
// A lane decodes one of its columns at a time: 8 rows, given as the 8 nibbles of a word, become 4 registers; register i
// holds rows 16i + 2g (low half) and 16i + 2g + 1 of that column. Up to 4 bits the codebook sits in registers and is looked
// up by byte permutation, 4 rows per instruction; a 16-entry table in shared memory would cost a load per weight.
#pragma once
#include "codebook/cuda/layout.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

// Codes of two columns of a lane, t + 8*half and t + 8*half + 4, as nibbles; `part` as in layout.h.
template <int kPart>
PYLLMQ_DEVICE void column_codes(const uint8_t* part, int lane, int half, uint32_t (&codes)[2]) {
  const auto* words = reinterpret_cast<const uint32_t*>(part);
  if constexpr (kPart == 4) {
    const Words<2> pair = load_words<2>(part + lane * 16 + half * 8);
    codes[0] = pair[0];
    codes[1] = pair[1];
  } else if constexpr (kPart == 3) {
    const uint32_t w0 = words[lane], w1 = words[32 + lane];
    if (half == 0) {
      codes[0] = w0 & 0x77777777u;
      codes[1] = w1 & 0x77777777u;
    } else {
      const uint32_t w2 = words[64 + lane];
      codes[0] = w2 & 0x77777777u;
      codes[1] = (w0 >> 3 & 0x11111111u) | (w1 >> 2 & 0x22222222u) | (w2 >> 1 & 0x44444444u);
    }
  } else if constexpr (kPart == 2) {
    const uint32_t word = words[lane * 2 + half];
    codes[0] = word & 0x33333333u;
    codes[1] = word >> 2 & 0x33333333u;
  } else {
    const uint32_t word = words[lane] >> (2 * half);
    codes[0] = word & 0x11111111u;
    codes[1] = word >> 1 & 0x11111111u;
  }
}

// Which of four entries, given as low and high bytes, are pairs: selectors of `permute`.
struct Zip {
  uint32_t first, second;
};
constexpr Zip kNeighbours{0x5140, 0x7362};   // entries 0 and 1, 2 and 3
constexpr Zip kEverySecond{0x6240, 0x7351};  // 0 and 2, 1 and 3

// One column's codebook of up to 4 bits in registers.
template <int kWidth>
struct RegisterTable {
  static constexpr int kWords = (2 << kWidth) / 4;
  uint32_t word[kWords];

  PYLLMQ_MEMBER void load(const uint8_t* group_table, int column) {
    constexpr int kStep = kWords < 4 ? kWords : 4;
    PYLLMQ_UNROLL
    for (int i = 0; i < kWords; i += kStep) {
      const Words<kStep> loaded = load_words<kStep>(group_table + (column * kWords + i) * 4);
      unrolled<kStep>([&](int k) { word[i + k] = loaded.word[k]; });
    }
  }

  // top_bits: 0x44444444, in a register where one is free: an instruction takes one constant.
  PYLLMQ_MEMBER void decode(uint32_t codes, uint32_t (&pairs)[4], uint32_t top_bits = 0x44444444u) const {
    if constexpr (kWidth <= 2) {
      // Code c becomes the two nibbles 2c, 2c+1, which select the two bytes of its entry: one permute gives two rows.
      unrolled<2>([&](int odd) {
        const uint32_t selectors = (codes >> (4 * odd) & 0x03030303u) * 0x22u + 0x10101010u;
        pairs[2 * odd] = ptx::permute(word[0], word[kWords - 1], selectors);
        pairs[2 * odd + 1] = ptx::permute(word[0], word[kWords - 1], selectors >> 16);
      });
    } else {
      unrolled<2>([&](int i) { decode_four(codes, 16 * i, kEverySecond, pairs[i], pairs[i + 2], top_bits); });
    }
  }

  // The four codes from bit `shift` on, 0 or 16, of 3 or 4 bits: low and high bytes of their entries, then zipped to two pairs.
  PYLLMQ_MEMBER void decode_four(uint32_t codes, int shift, Zip zip, uint32_t& first, uint32_t& second,
                                 uint32_t top_bits = 0x44444444u) const {
    const uint32_t low = lookup(codes, shift, 0, top_bits), high = lookup(codes, shift, kWords / 2, top_bits);
    first = ptx::permute(low, high, zip.first);
    second = ptx::permute(low, high, zip.second);
  }

 private:
  // Entries of one byte plane for the four codes from bit `shift` on.
  PYLLMQ_MEMBER uint32_t lookup(uint32_t codes, int shift, int first, uint32_t top_bits) const {
    const auto shifted = [&](uint32_t word) { return shift == 0 ? word : ptx::shift_by_multiplying<16>(word); };
    const uint32_t low_bits = shifted(codes & 0x77777777u);
    const uint32_t lower = ptx::permute(word[first], word[first + 1], low_bits);
    if constexpr (kWidth == 3) return lower;
    // 16 entries are two permutes; a third takes byte i of the one or the other by the code's top bit.
    const uint32_t upper = ptx::permute(word[first + 2], word[first + 3], low_bits);
    const uint32_t choose = (ptx::shift_by_multiplying<1>(codes) & top_bits) | 0x32103210u;
    return ptx::permute(lower, upper, shifted(choose));
  }
};

// Widths 5..8: codes of two columns, their low nibbles and the bits above, looked up in fp16 codebooks in memory.
template <int kWidth>
struct MemoryTable {
  const uint16_t* entries;  // of one column

  PYLLMQ_MEMBER void decode(uint32_t low, uint32_t high, uint32_t (&pairs)[4]) const {
    unrolled<4>([&](int i) {
      const int first = 4 * nibble_of(i, 0), second = 4 * nibble_of(i, 1);
      const uint32_t even = entries[(low >> first & 15) | (high >> first & 15) << 4];
      const uint32_t odd = entries[(low >> second & 15) | (high >> second & 15) << 4];
      pairs[i] = even | odd << 16;
    });
  }
};

}  // namespace pyllmq::cuda

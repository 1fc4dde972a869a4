// A row's kept weights as the layout `columns` (layout.h) holds them, times x in shared memory.
#pragma once
#include "runtime/cuda/words.cuh"
#include "sparse/cuda/layout.h"

namespace pyllmq::cuda {

constexpr int kWarpEntries = 32 * kEntryGroup;

// x of a panel by column; the last is 0: where steps that fill up may end.
template <int kTokens>
using PanelX = float[kPanelColumns + 1][kTokens];

// Eight entries of a lane as they are stored.
template <ValueType kType>
struct Entries {
  static constexpr int kValueBytes = kType == ValueType::fp32 ? 4 : kType == ValueType::int8 ? 1 : 2;
  static constexpr int kWords = kEntryGroup * kValueBytes / 4;
  Words<2> steps;
  Words<kWords> values;

  PYLLMQ_MEMBER void load(const uint8_t* values_from, const uint8_t* steps_from, int64_t entry) {
    steps = load_words<2>(steps_from + entry);
    values = load_words<kWords>(values_from + entry * kValueBytes);
  }
  PYLLMQ_MEMBER int step(int i) const { return static_cast<int>(steps[i / 4] >> (8 * (i % 4)) & 255); }
  PYLLMQ_MEMBER float value(int i) const {
    if constexpr (kType == ValueType::fp32) return ptx::bits_to_fp32(values[i]);
    if constexpr (kType == ValueType::bf16)
      return ptx::bits_to_fp32(i % 2 == 0 ? values[i / 2] << 16 : values[i / 2] & 0xFFFF0000u);
    if constexpr (kType == ValueType::fp16) return ptx::fp16_to_fp32(static_cast<uint16_t>(values[i / 2] >> (i % 2 * 16)));
    return static_cast<float>(static_cast<int8_t>(values[i / 4] >> (i % 4 * 8)));
  }
};

// Sums of one row's entries in one panel, of this lane.
template <ValueType kType, int kTokens>
PYLLMQ_DEVICE void add_row(const SparseHeader& h, const PanelX<kTokens>& x, int64_t begin, int64_t end, float (&sums)[kTokens]) {
  const auto* values = section<uint8_t>(h, h.data_offset);
  const auto* steps = section<uint8_t>(h, h.steps_offset);
  const int lane = ptx::thread() % 32;
  int64_t entry = begin + lane * kEntryGroup;
  Entries<kType> next = {};
  if (entry < end) next.load(values, steps, entry);
  int column = 0;  // of the last entry of the lanes' turn before
  for (int64_t turn = begin; turn < end; turn += kWarpEntries) {
    const bool here = entry < end;
    const Entries<kType> now = next;
    entry += kWarpEntries;
    if (entry < end) next.load(values, steps, entry);

    int advance = 0;
    unrolled<kEntryGroup>([&](int i) { advance += here ? now.step(i) : 0; });
    uint32_t through = static_cast<uint32_t>(advance);  // this lane and those below
    PYLLMQ_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t below = ptx::shuffle_up(through, distance);
      if (lane >= distance) through += below;
    }
    int at = column + static_cast<int>(through) - advance;
    column += static_cast<int>(ptx::shuffle(through, 31));
    if (!here) continue;
    unrolled<kEntryGroup>([&](int i) {
      at += now.step(i);
      const int place = at < kPanelColumns ? at : kPanelColumns;
      const float value = now.value(i);
      unrolled<kTokens>([&](int token) { sums[token] = fmaf(value, x[place][token], sums[token]); });
    });
  }
}

}  // namespace pyllmq::cuda

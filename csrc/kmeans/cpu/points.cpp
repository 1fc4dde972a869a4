#include "kmeans/cpu/points.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "runtime/counting.h"

namespace pyllmq::cpu {
namespace {

constexpr int64_t kRadixSortFrom = 96;     // below, std::sort costs less than clearing and adding up counters
constexpr int64_t kWideDigitsFrom = 2048;  // 3 digits of 11 bits against 4 of 8: 6144 counters against 1024

uint32_t ordered_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

float value_of(uint32_t key) {
  const uint32_t bits = key ^ ((key >> 31) ? 0x80000000u : 0xFFFFFFFFu);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The key of an entry is its upper 32 bits; an entry of 32 bits is all key.
template <int DigitBits, typename Entry>
Entry* radix_sort(Entry* entries, Entry* scratch, int64_t n) {
  constexpr int kPasses = ceil_div(32, DigitBits), kFirst = 8 * sizeof(Entry) - 32;
  constexpr uint32_t kMask = (1u << DigitBits) - 1;
  const auto digit = [](Entry entry, int pass) { return static_cast<uint32_t>(entry >> (kFirst + pass * DigitBits)) & kMask; };
  uint32_t counts[kPasses][kMask + 1] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][digit(entries[i], pass)];
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    if (counts[pass][digit(entries[0], pass)] == n) continue;  // bf16 and fp16 values: the low digits are all alike
    uint32_t start = 0;
    for (uint32_t& count : counts[pass]) start += std::exchange(count, start);
    for (int64_t i = 0; i < n; ++i) scratch[counts[pass][digit(entries[i], pass)]++] = entries[i];
    std::swap(entries, scratch);
  }
  return entries;
}

template <typename Entry>
const Entry* sorted(Entry* entries, Entry* scratch, int64_t n) {
  if (n >= kWideDigitsFrom) return radix_sort<11>(entries, scratch, n);
  if (n >= kRadixSortFrom) return radix_sort<8>(entries, scratch, n);
  std::sort(entries, entries + n);
  return entries;
}

struct Arrays {
  float* value;
  double *weight, *mass, *sum;
};

Points gather_unweighted(const uint32_t* keys, int64_t n, const Arrays& to) {
  const float shift = value_of(keys[n / 2]);  // the median is within one standard deviation of the mean
  to.mass[0] = to.sum[0] = 0;
  int64_t last = -1;
  float previous = 0;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {                // no branch: duplicates overwrite the entry of their first
    const float value = value_of(keys[i]) + 0.0f;  // -0 is 0
    last += i == 0 || value != previous;
    previous = value;
    sum += static_cast<double>(value) - shift;
    to.value[last] = value;
    to.mass[last + 1] = static_cast<double>(i + 1);
    to.sum[last + 1] = sum;
  }
  const int64_t count = last + 1;
  return {count, to.value, nullptr, to.mass, to.sum, shift, count == n};
}

Points gather_weighted(const uint64_t* entries, const float* weights, int64_t n, const Arrays& to) {
  double mean = 0, total = 0;
  int64_t merged = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double weight = weights[static_cast<uint32_t>(entries[i])];
    if (weight == 0) continue;
    const float value = value_of(static_cast<uint32_t>(entries[i] >> 32)) + 0.0f;
    mean += weight * value;
    total += weight;
    if (merged > 0 && to.value[merged - 1] == value) {
      to.weight[merged - 1] += weight;
    } else {
      to.value[merged] = value;
      to.weight[merged++] = weight;
    }
  }
  const auto shift = static_cast<float>(mean / total);

  // A weight below 2^-53 of those before it would leave a cluster of mass 0; it moves no centroid, so it counts as 0.
  int64_t count = 0;
  to.mass[0] = to.sum[0] = 0;
  for (int64_t i = 0; i < merged; ++i) {
    const double weight = to.weight[i], mass = to.mass[count] + weight;
    if (mass == to.mass[count]) continue;
    to.value[count] = to.value[i];
    to.weight[count] = weight;
    to.mass[count + 1] = mass;
    to.sum[count + 1] = to.sum[count] + weight * (static_cast<double>(to.value[i]) - shift);
    ++count;
  }
  return {count, to.value, to.weight, to.mass, to.sum, shift, false};
}

}  // namespace

int64_t points_bytes(int64_t n, bool weighted) {
  const int64_t entries = weighted ? 2 * Workspace::need<uint64_t>(n) : 2 * Workspace::need<uint32_t>(n);
  return entries + Workspace::need<float>(n) + 3 * Workspace::need<double>(n + 1 + kLanes);
}

Points gather_points(const float* values, const float* weights, int64_t n, Workspace& workspace) {
  const Arrays to{workspace.take<float>(n), workspace.take<double>(n + 1 + kLanes), workspace.take<double>(n + 1 + kLanes),
                  workspace.take<double>(n + 1 + kLanes)};
  if (!weights) {
    auto* keys = workspace.take<uint32_t>(n);
    auto* scratch = workspace.take<uint32_t>(n);
    std::transform(values, values + n, keys, ordered_key);
    return gather_unweighted(sorted(keys, scratch, n), n, to);
  }
  auto* entries = workspace.take<uint64_t>(n);
  auto* scratch = workspace.take<uint64_t>(n);
  for (int64_t i = 0; i < n; ++i) entries[i] = uint64_t{ordered_key(values[i])} << 32 | static_cast<uint64_t>(i);
  return gather_weighted(sorted(entries, scratch, n), weights, n, to);
}

}  // namespace pyllmq::cpu

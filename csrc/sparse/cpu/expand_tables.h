// For each byte of a mask the shuffle that spreads the next kept values over its bits.
#pragma once
#include <cstdint>

namespace pyllmq::cpu {
namespace {

// Where bit i of the byte is set: which value goes there; else zero (the top bit).
struct ExpandTables {
  alignas(64) uint8_t halves[256][16];
  alignas(64) uint8_t bytes[256][8];
};

constexpr ExpandTables make_tables() {
  ExpandTables tables{};
  for (int mask = 0; mask < 256; ++mask)
    for (int bit = 0, next = 0; bit < 8; ++bit) {
      const bool kept = mask >> bit & 1;
      tables.halves[mask][2 * bit] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
      tables.halves[mask][2 * bit + 1] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
      tables.bytes[mask][bit] = static_cast<uint8_t>(kept ? next : 0x80);
      next += kept;
    }
  return tables;
}
constexpr ExpandTables kExpand = make_tables();

}  // namespace
}  // namespace pyllmq::cpu

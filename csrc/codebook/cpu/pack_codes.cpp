#include "codebook/cpu/pack_codes.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "runtime/instances.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the bit stream is read through little-endian words");

// Eight codes are one 64-bit word with a code per byte, and `bits` packed bytes. Three halving steps close (or open)
// the gaps: byte pairs, then 16-bit pairs, then 32-bit pairs. Plain integer code reaches memory speed, no SIMD needed.
constexpr uint64_t repeat(int width, int field) {  // `field` ones at the bottom of every `width` bits
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += width) mask |= ((uint64_t{1} << field) - 1) << at;
  return mask;
}

template <int Bits>
inline uint64_t squeeze(uint64_t v) {
  constexpr uint64_t m0 = repeat(16, Bits), m1 = repeat(32, 2 * Bits), m2 = repeat(64, 4 * Bits);
  v = (v & m0) | (v >> (8 - Bits) & m0 << Bits);
  v = (v & m1) | (v >> (16 - 2 * Bits) & m1 << (2 * Bits));
  return (v & m2) | (v >> (32 - 4 * Bits) & m2 << (4 * Bits));
}

template <int Bits>
inline uint64_t spread(uint64_t v) {
  constexpr uint64_t m0 = repeat(16, Bits), m1 = repeat(32, 2 * Bits), m2 = repeat(64, 4 * Bits);
  v = (v & m2) | (v & m2 << (4 * Bits)) << (32 - 4 * Bits);
  v = (v & m1) | (v & m1 << (2 * Bits)) << (16 - 2 * Bits);
  return (v & m0) | (v & m0 << Bits) << (8 - Bits);
}

template <int Bits>
bool pack_row_bits(const uint8_t* codes, uint8_t* packed, int64_t columns) {
  constexpr uint64_t too_wide = Bits == 8 ? 0 : ~repeat(8, Bits % 8);
  uint64_t seen = 0;
  for (; columns >= 8; columns -= 8, codes += 8, packed += Bits) {
    uint64_t v;
    std::memcpy(&v, codes, 8);
    seen |= v;
    v = squeeze<Bits>(v);
    std::memcpy(packed, &v, Bits);
  }
  if (columns > 0) {
    uint64_t v = 0;
    std::memcpy(&v, codes, columns);
    seen |= v;
    v = squeeze<Bits>(v);
    std::memcpy(packed, &v, packed_row_bytes(columns, Bits));
  }
  return (seen & too_wide) == 0;
}

template <int Bits>
void unpack_row_bits(const uint8_t* packed, uint8_t* codes, int64_t columns) {
  // Whole words while the row has them (spread drops the surplus): assembling 3, 5, 6 or 7 bytes costs 7 times as much.
  for (; columns * Bits >= 64; columns -= 8, codes += 8, packed += Bits) {
    uint64_t v;
    std::memcpy(&v, packed, 8);
    v = spread<Bits>(v);
    std::memcpy(codes, &v, 8);
  }
  for (; columns >= 8; columns -= 8, codes += 8, packed += Bits) {
    uint64_t v = 0;
    std::memcpy(&v, packed, Bits);
    v = spread<Bits>(v);
    std::memcpy(codes, &v, 8);
  }
  if (columns > 0) {
    uint64_t v = 0;
    std::memcpy(&v, packed, packed_row_bytes(columns, Bits));
    v = spread<Bits>(v);
    std::memcpy(codes, &v, columns);
  }
}

constexpr auto kPackRow = instances<1, 8>([]<int Bits>() { return pack_row_bits<Bits>; });
constexpr auto kUnpackRow = instances<1, 8>([]<int Bits>() { return unpack_row_bits<Bits>; });

void check(const void* codes, const void* packed, int64_t rows, int64_t columns, int bits) {
  if (bits < 1 || bits > 8) throw std::invalid_argument("bits = " + std::to_string(bits) + "; allowed: 1..8");
  if (rows < 0 || columns < 0 || columns > INT64_MAX / 16 || (columns > 0 && rows > INT64_MAX / 16 / columns))
    throw std::invalid_argument("codes have shape [" + std::to_string(rows) + ", " + std::to_string(columns) +
                                "]; both sizes must be >= 0 and their product must fit in 63 bits");
  if (rows > 0 && columns > 0 && (codes == nullptr || packed == nullptr))
    throw std::invalid_argument("codes and packed must not be null when rows * columns > 0");
}

int64_t rows_per_chunk(int64_t columns) { return std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(columns, 1)); }

}  // namespace

bool pack_row(const uint8_t* codes, uint8_t* packed, int64_t columns, int bits) { return kPackRow[bits](codes, packed, columns); }

void unpack_row(const uint8_t* packed, uint8_t* codes, int64_t columns, int bits) { kUnpackRow[bits](packed, codes, columns); }

void pack_codes(const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t columns, int bits) {
  check(codes, packed, rows, columns, bits);
  if (columns == 0) return;
  std::atomic<int64_t> bad_row{-1};
  parallel_for(rows, rows_per_chunk(columns), 0.3 * rows * columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      if (!pack_row(codes + r * columns, packed + r * packed_row_bytes(columns, bits), columns, bits)) bad_row = r;
  });
  if (bad_row >= 0)
    throw std::invalid_argument("row " + std::to_string(bad_row) + " holds a code that does not fit in " + std::to_string(bits) +
                                " bits; codes must be below " + std::to_string(1 << bits));
}

void unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t columns, int bits) {
  check(codes, packed, rows, columns, bits);
  if (columns == 0) return;
  parallel_for(rows, rows_per_chunk(columns), 0.3 * rows * columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      unpack_row(packed + r * packed_row_bytes(columns, bits), codes + r * columns, columns, bits);
  });
}

}  // namespace pyllmq::cpu

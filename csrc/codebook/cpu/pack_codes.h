// b-bit codes <-> bytes, LSB first within a row's bit stream, rows padded with zero bits to whole bytes (docs/formats.md).
#pragma once
#include <cstdint>

namespace pyllmq::cpu {

constexpr int64_t packed_row_bytes(int64_t columns, int bits) { return (columns * bits + 7) / 8; }

// One row. Returns false (pack) if a code does not fit in `bits`; reads and writes exactly packed_row_bytes.
bool pack_row(const uint8_t* codes, uint8_t* packed, int64_t columns, int bits);
void unpack_row(const uint8_t* packed, uint8_t* codes, int64_t columns, int bits);

// Whole matrices on the thread pool: codes uint8 [rows, columns], packed uint8 [rows, packed_row_bytes].
void pack_codes(const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t columns, int bits);
void unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t columns, int bits);

}  // namespace pyllmq::cpu

// b-bit codes <-> bytes on the device; the bit order of docs/formats.md. codes uint8 [rows, columns], packed uint8
// [rows, ceil(columns * bits / 8)]; bits of a code beyond `bits` are dropped.
#pragma once
#include <cstdint>

namespace pyllmq::cuda {

void pack_codes(const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t columns, int bits, uintptr_t stream);
void unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t columns, int bits, uintptr_t stream);

}  // namespace pyllmq::cuda

// One thread per byte written: packing happens at load and save, never on the way of a token.
#include "codebook/cuda/pack_codes.h"

#include <algorithm>

#include "runtime/cuda/runtime.h"
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16;

PYLLMQ_KERNEL void pack_codes_kernel(const uint8_t* codes, uint8_t* packed, int64_t count, int64_t columns, int64_t row_bytes,
                                     int bits) {
  for (int64_t i = ptx::block() * kThreads + ptx::thread(); i < count; i += ptx::blocks() * kThreads) {
    const uint8_t* row = codes + i / row_bytes * columns;
    const int64_t first_bit = i % row_bytes * 8;
    uint32_t byte = 0;
    for (int64_t k = first_bit / bits; k < columns && k * bits < first_bit + 8; ++k) {
      const uint32_t code = row[k] & ((1u << bits) - 1);
      const int shift = static_cast<int>(k * bits - first_bit);  // below 0 where the code began in the byte before
      byte |= shift >= 0 ? code << shift : code >> -shift;
    }
    packed[i] = static_cast<uint8_t>(byte);
  }
}

PYLLMQ_KERNEL void unpack_codes_kernel(const uint8_t* packed, uint8_t* codes, int64_t count, int64_t columns, int64_t row_bytes,
                                       int bits) {
  for (int64_t i = ptx::block() * kThreads + ptx::thread(); i < count; i += ptx::blocks() * kThreads) {
    const int64_t first_bit = i % columns * bits;
    const uint8_t* from = packed + i / columns * row_bytes + first_bit / 8;
    const int shift = static_cast<int>(first_bit % 8);
    uint32_t code = from[0] >> shift;
    if (shift + bits > 8) code |= static_cast<uint32_t>(from[1]) << (8 - shift);
    codes[i] = static_cast<uint8_t>(code & ((1u << bits) - 1));
  }
}

template <class Kernel>
void run(Kernel kernel, const char* name, const uint8_t* from, uint8_t* to, int64_t count, int64_t columns, int bits,
         uintptr_t stream) {
  if (count == 0) return;
  const int64_t grid = std::min((count + kThreads - 1) / kThreads, kMostBlocks);
  PYLLMQ_LAUNCH(kernel, grid, kThreads, 0, stream, from, to, count, columns, (columns * bits + 7) / 8, bits);
  check_launch(name);
}

}  // namespace

void pack_codes(const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t columns, int bits, uintptr_t stream) {
  run(pack_codes_kernel, "pack_codes", codes, packed, rows * ((columns * bits + 7) / 8), columns, bits, stream);
}

void unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t columns, int bits, uintptr_t stream) {
  run(unpack_codes_kernel, "unpack_codes", packed, codes, rows * columns, columns, bits, stream);
}

}  // namespace pyllmq::cuda

// The reference row. std::fma, although it is slow without hardware for it: the SIMD rows then agree bit for bit.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "codebook/cpu/decode.h"

namespace pyllmq::cpu {
namespace {

void split_codebook(int width, const uint16_t* codebook, const float*, int64_t slots, uint8_t* split) {
  const int64_t bytes = int64_t{2} << width;
  for (int64_t slot = 0; slot < slots; ++slot)
    std::memcpy(split + slot * split_bytes(width), reinterpret_cast<const uint8_t*>(codebook) + slot * bytes, bytes);
}

void decode(int width, StepOrder order, const uint8_t* tile_codes, int64_t first, const uint8_t* split, int64_t slots,
            const float* row_scale, uint8_t* to) {
  auto* weights = reinterpret_cast<float*>(to);
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int row = 0; row < kTileRows; ++row) {
      const int code = read_code(tile_codes, order, width, first + slot, row);
      uint16_t entry;
      std::memcpy(&entry, split + slot * split_bytes(width) + 2 * code, 2);
      const float value = fp16_to_fp32(entry);
      weights[(row / kHalfRows * kDecodedColumns + slot) * kHalfRows + row % kHalfRows] =
          row_scale ? value * row_scale[row] : value;
    }
}

constexpr int64_t kTokenGroup = 6;

void multiply(const uint8_t* from, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const auto* weights = reinterpret_cast<const float*>(from);
  const TokenGroups groups{tokens, kTokenGroup};
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t begin = groups.begin(g), count = groups.size(g);
    const float* x = reinterpret_cast<const float*>(packed) + begin * slots;
    for (int64_t t = 0; t < count; ++t)
      for (int row = 0; row < kTileRows; ++row) {
        const float* column = weights + row / kHalfRows * kDecodedColumns * kHalfRows + row % kHalfRows;
        for (int64_t first = 0; first < slots; first += kChainColumns) {
          float sum = 0;
          for (int64_t slot = first; slot < std::min(slots, first + kChainColumns); ++slot)
            sum = std::fma(x[slot * count + t], column[slot * kHalfRows], sum);
          sums[(begin + t) * kTileRows + row] += sum;
        }
      }
  }
}

}  // namespace

const DecodeKernels kDecodeScalar = {.token_group = kTokenGroup,
                                     .weight_bytes = 4,
                                     .packed_bytes = packed_fp32_bytes,
                                     .pack = pack_fp32,
                                     .split_codebook = split_codebook,
                                     .decode = decode,
                                     .multiply = multiply};

}  // namespace pyllmq::cpu

// Codes of the original values: how many thresholds lie below each.
#pragma once

#include <cstdint>

namespace pyllmq::cpu {

constexpr int kMaxK = 256;

// thresholds: ascending, padded with infinity to kMaxK. 2^bits is above the number of finite ones. code_of [kMaxK] maps
// that count to a code.
using CodeKernel = void (*)(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of,
                            uint8_t* codes);
void codes_scalar(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of, uint8_t* codes);
void codes_avx2(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of, uint8_t* codes);
void codes_avx512(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of, uint8_t* codes);

}  // namespace pyllmq::cpu

// Codes of the original values: how many thresholds lie below each.
#pragma once

#include <cstdint>

#include "runtime/isa.h"

namespace pyllmq::cpu {

constexpr int kMaxK = 256;

// thresholds: ascending, padded with infinity to kMaxK. 2^bits is above the number of finite ones. code_of [kMaxK] maps
// that count to a code.
using CodeKernel = void (*)(const float* values, int64_t n, const float* thresholds, int bits, const uint8_t* code_of,
                            uint8_t* codes);
template <Isa isa>
CodeKernel code_kernel();

}  // namespace pyllmq::cpu

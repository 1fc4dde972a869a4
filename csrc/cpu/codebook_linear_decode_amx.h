#pragma once
#include "cpu/codebook_linear_decode.h"

namespace pyllmq::cpu {

// Asks the kernel once for the tile registers, which it grants per process. Call only where the CPU has AMX.
bool amx_permitted();

extern const DecodeKernels kDecodeAmxFast;  // fours
extern const DecodeKernels kDecodeAmxHigh;  // fours

}  // namespace pyllmq::cpu

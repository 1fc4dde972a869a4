#if defined(__AVX512F__)
#include "decode_step/cpu/step_kernels_of.h"

namespace pyllmq::cpu {

const StepKernels kStepAvx512 = step_kernels_of<Avx512>();

}  // namespace pyllmq::cpu
#endif

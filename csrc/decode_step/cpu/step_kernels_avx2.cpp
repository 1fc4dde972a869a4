#if defined(__AVX2__)
#include "decode_step/cpu/step_kernels_of.h"

namespace pyllmq::cpu {

const StepKernels kStepAvx2 = step_kernels_of<Avx2>();

}  // namespace pyllmq::cpu
#endif

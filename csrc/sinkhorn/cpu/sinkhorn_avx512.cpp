#include "sinkhorn/cpu/doubly_stochastic_kernels.h"

namespace pyllmq::cpu {

const SinkhornKernels kSinkhornAvx512 = sinkhorn_kernels_of<Avx512, Twice<Avx512>>();

}  // namespace pyllmq::cpu

#include "sinkhorn/cpu/doubly_stochastic_kernels.h"

namespace pyllmq::cpu {

const SinkhornKernels kSinkhornAvx2 = sinkhorn_kernels_of<Avx2, Twice<Avx2>>();

}  // namespace pyllmq::cpu

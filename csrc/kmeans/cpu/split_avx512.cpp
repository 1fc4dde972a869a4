#include "kmeans/cpu/split_kernels.h"

namespace pyllmq::cpu {

const SplitKernels kSplitAvx512{one<Avx512>, group<Avx512>};

}  // namespace pyllmq::cpu

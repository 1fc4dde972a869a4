#include "kmeans/cpu/split_kernels.h"

namespace pyllmq::cpu {

const SplitKernels kSplitAvx2{one<Avx2>, group<Avx2>};

}  // namespace pyllmq::cpu

#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

namespace pyllmq::cuda {

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

}  // namespace pyllmq::cuda

// What the bindings may ask of the CUDA runtime, without seeing a CUDA header.
#pragma once

namespace pyllmq::cuda {

// Version of the linked static runtime, major * 1000 + minor * 10. Needs no driver.
int runtime_version();

}  // namespace pyllmq::cuda

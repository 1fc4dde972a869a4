#include <type_traits>

#include "sinkhorn/cpu/doubly_stochastic_kernels.h"

namespace pyllmq::cpu {
namespace {

// A step of the small loop waits 70 cycles for its own results, in which the other half works.
using Small = std::conditional_t<V::width == 1, V, Twice<V>>;
constexpr SinkhornKernels kKernels = sinkhorn_kernels_of<V, Small>();

}  // namespace

template <Isa isa>
const SinkhornKernels& sinkhorn_kernels_for() {
  return kKernels;
}
template const SinkhornKernels& sinkhorn_kernels_for<Isa::PYLLMQ_ISA>();

}  // namespace pyllmq::cpu

"""routed_experts: one expert after the other, each by packed_linear of its layout."""

from __future__ import annotations

from torch import Tensor

from ...operations import PACKED_LINEAR, ROUTED_EXPERTS, PackedExperts, WeightOperand, anything, by_expert
from .rows import BECAUSE, ORDER


def routed_experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: PackedExperts) -> Tensor:
    def linear(x: Tensor, operand: WeightOperand, bias: Tensor | None) -> Tensor:
        kernel = PACKED_LINEAR.kernel_for(x.device, x.dtype, operand.layout, x.shape[0], operand.meta)
        return kernel(x, operand, bias, experts.precision)

    def run(index: int, x: Tensor) -> Tensor:
        biases = (None if all_ is None else all_[index] for all_ in (experts.up_bias, experts.down_bias))
        up_bias, down_bias = biases
        hidden = experts.gate(linear(x, experts.up[index], up_bias))
        return linear(hidden.contiguous(), experts.down[index], down_bias)

    return by_expert(hidden_states, top_k_index, top_k_weights, len(experts.up), run)


ROUTED_EXPERTS.register("reference.routed_experts", ORDER, anything, routed_experts, BECAUSE)

"""routed_experts in one native call (csrc/experts/routed_experts.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch import Support
from ...operations import ROUTED_EXPERTS, ExpertsProblem, PackedExperts
from . import runtime
from .runtime import DTYPE_CODE, ORDER, PRECISION_CODE


def native(experts: PackedExperts) -> Any:
    gate, rows = experts.gate, experts.up[0].shape[0]
    units = rows // 2 if gate.gated else rows
    first, stride = (1, 2) if gate.interleaved else (units, 1)
    return runtime.extension().RoutedExperts(
        up=tuple(map(runtime.bound, experts.up)),
        down=tuple(map(runtime.bound, experts.down)),
        up_bias=_numbers(experts.up_bias),
        down_bias=_numbers(experts.down_bias),
        units=units,
        gate_rows=(0, stride),
        up_rows=(first, stride) if gate.gated else None,
        activation=gate.activation,
        limit=gate.limit,
        alpha=gate.alpha,
        offset=gate.offset,
        precision=PRECISION_CODE[experts.precision],
    )


def _numbers(bias: Tensor | None) -> list[float]:
    return [] if bias is None else bias.flatten().tolist()


def routed_experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: PackedExperts) -> Tensor:
    if experts.bound is None:
        experts.bound = native(experts)
    runtime.kernels()
    out = torch.empty_like(hidden_states)
    experts.bound(
        hidden_states.data_ptr(),
        out.data_ptr(),
        DTYPE_CODE[hidden_states.dtype],
        *top_k_index.shape,
        top_k_index.data_ptr(),
        top_k_weights.data_ptr(),
    )
    return out


def supports(problem: ExpertsProblem) -> Support:
    if others := [layout for layout in problem.layouts if not layout.startswith("cpu.")]:
        return False, f"reads the layouts 'cpu.*', some experts are laid out as {', '.join(others)}"
    return runtime.takes_activations(problem)


because = "one wake-up for all experts of a token; each expert is decoded once"
ROUTED_EXPERTS.register("cpu.routed_experts", ORDER, supports, routed_experts, because)

"""routed_experts of codebook weights: experts found by a table of addresses (triton_kernels/routed_experts.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Support
from ...formats.codebook import WIDTHS
from ...operations import ACTIVATIONS, ROUTED_EXPERTS, ExpertsProblem, PackedExperts, WeightOperand
from . import runtime
from .codebook import CodebookLayout
from .runtime import ORDER

LAYOUT = "triton.codebook"


def addresses(layout: CodebookLayout) -> list[int]:
    """A row of the kernel's table."""
    common = (
        layout.row_segment,
        layout.row_scale,
        layout.outlier_row_offsets,
        layout.outlier_columns,
        layout.outlier_values,
    )
    found = [tensor.data_ptr() if tensor.numel() else 0 for tensor in (*common, layout.outlier_replaced)]
    groups = {group.bits: group for group in layout.groups}
    for bits in WIDTHS:
        group = groups.get(bits)
        tensors = () if group is None else (group.codes, group.columns, group.codebook)
        found += [0] * 4 if group is None else [*(tensor.data_ptr() for tensor in tensors), group.slots]
    return found


def projection(operands: Sequence[WeightOperand], bias: Tensor | None) -> dict[str, Any]:
    """The fields of the kernel's `Projection`."""
    layouts = [CodebookLayout.of(operand) for operand in operands]
    device = layouts[0].blob.device
    if len(shapes := {operand.shape for operand in operands}) > 1:
        raise ValueError(f"the Linears of the experts have several shapes: {sorted(shapes)}; needs one for all of them")
    ((rows, columns),) = shapes
    wide = {layout.outlier_columns.dtype for layout in layouts if layout.outliers}
    if len(wide) > 1:
        raise ValueError(
            f"the experts' outlier_columns have several dtypes: {sorted(map(str, wide))}; needs one for all of them"
        )
    return {
        "table": torch.tensor([addresses(layout) for layout in layouts], dtype=torch.int64, device="cpu").to(device),
        "bias": None if bias is None else bias.to(device).contiguous(),
        "rows": rows,
        "columns": columns,
        "widths": sum(1 << bits for bits in {group.bits for layout in layouts for group in layout.groups}),
        "one_segment": all(group.one_segment for layout in layouts for group in layout.groups),
        "consecutive": all(len(layout.groups) == 1 for layout in layouts),
        "wide": wide == {torch.int32},
    }


def routed_experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: PackedExperts) -> Tensor:
    if experts.bound is None:
        from ...triton_kernels.routed_experts import Experts, Projection

        gate = experts.gate
        up = Projection(**projection(experts.up, experts.up_bias))
        down = Projection(**projection(experts.down, experts.down_bias))
        units = up.rows // 2 if gate.gated else up.rows
        if (down.rows, down.columns) != (up.columns, units):
            raise ValueError(f"down is [{down.rows}, {down.columns}]; needs [{up.columns}, {units}], as up says")
        activation = tuple(ACTIVATIONS).index(gate.activation)
        experts.bound = Experts(up, down, activation, gate.gated, gate.interleaved, gate.limit, gate.alpha, gate.offset)
    given = hidden_states, top_k_index, top_k_weights
    found: Tensor = runtime.launch("routed_experts.routed_experts", hidden_states, *given, experts.bound)
    return found


def supports(problem: ExpertsProblem) -> Support:
    if problem.layouts != (LAYOUT,):
        return False, f"reads the layout {LAYOUT!r}, the experts are laid out as {', '.join(problem.layouts)}"
    return runtime.takes_activations(problem)


because = "experts found by a table of addresses; the list of work is made on the device"
ROUTED_EXPERTS.register("triton.routed_experts", ORDER, supports, routed_experts, because)

"""routed_experts: experts found by tables of addresses, one for each kind of weights (triton_kernels/routed_experts.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch import Support
from ...formats.codebook import WIDTHS
from ...operations import ACTIVATIONS, ROUTED_EXPERTS, ExpertsProblem, PackedExperts, WeightOperand
from ..checkpoints import SPARSE_KINDS
from . import runtime
from .codebook import CodebookLayout
from .runtime import ORDER
from .sparse import SparseLayout

LAYOUTS = tuple(f"triton.{kind}" for kind in ("codebook", *SPARSE_KINDS))


class Row(NamedTuple):
    """An expert in a table of addresses, whose fields triton_kernels/routed_experts.py names."""

    part: tuple[int, str, bool]
    """Kind, dtype of values, `wide`: experts that have these in common share a launch."""
    fields: list[int]
    widths: tuple[int, ...]
    one_segment: bool
    consecutive: bool


def row_of(operand: WeightOperand) -> Row:
    if operand.layout == "triton.codebook":
        return _row_of_codebook(CodebookLayout.of(operand))
    layout = SparseLayout.of(operand)
    values, wide = str(layout.values.dtype).removeprefix("torch."), _is_wide(layout)
    if layout.is_24:
        tensors = (layout.positions, layout.scale, *_of_outliers(layout), layout.values, layout.codebook)
        return Row((1, values, wide), [*_addresses(*tensors), layout.bits], (layout.bits,), True, True)
    fields = [*_addresses(layout.masks, layout.scale), 0, 0, 0, 0]
    fields += _addresses(layout.ranks, layout.row_offsets, layout.values)
    return Row((2, values, layout.ranks.dtype == torch.int32), fields, (), True, True)


def _row_of_codebook(layout: CodebookLayout) -> Row:
    fields = _addresses(layout.row_segment, layout.row_scale, *_of_outliers(layout))
    groups = {group.bits: group for group in layout.groups}
    for bits in WIDTHS:
        group = groups.get(bits)
        fields += [0] * 4 if group is None else [*_addresses(group.codes, group.columns, group.codebook), group.slots]
    one_segment = all(group.one_segment for group in layout.groups)
    return Row((0, "uint8", _is_wide(layout)), fields, tuple(groups), one_segment, len(groups) == 1)


def _of_outliers(layout: CodebookLayout | SparseLayout) -> tuple[Tensor, ...]:
    return layout.outlier_row_offsets, layout.outlier_columns, layout.outlier_values, layout.outlier_replaced


def _is_wide(layout: CodebookLayout | SparseLayout) -> bool:
    return layout.outliers > 0 and layout.outlier_columns.dtype == torch.int32


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]


def projection(operands: Sequence[WeightOperand], bias: Tensor | None) -> Any:
    """The kernel's `Projection`."""
    from ...triton_kernels.routed_experts import FIELDS, Part, Projection

    device = operands[0].tensors[0].device
    rows = [row_of(operand) for operand in operands]
    parts = []
    for part in sorted({row.part for row in rows}):
        mine = [row for row in rows if row.part == part]
        table = torch.zeros(len(rows), FIELDS.value, dtype=torch.int64, device="cpu")
        for place, row in enumerate(rows):
            if row.part == part:
                table[place, : len(row.fields)] = torch.tensor(row.fields, dtype=torch.int64, device="cpu")
        kind, values, wide = part
        widths = sum(1 << bits for bits in {bits for row in mine for bits in row.widths})
        one_segment, consecutive = all(row.one_segment for row in mine), all(row.consecutive for row in mine)
        parts.append(Part(table.to(device), kind, widths, values, one_segment, consecutive, wide))
    held = None if bias is None else bias.to(device).contiguous()
    return Projection(tuple(parts), held, len(operands), *operands[0].shape)


def routed_experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: PackedExperts) -> Tensor:
    if experts.bound is None:
        from ...triton_kernels.routed_experts import Experts

        experts.check_shapes()
        gate = experts.gate
        projections = projection(experts.up, experts.up_bias), projection(experts.down, experts.down_bias)
        activation = tuple(ACTIVATIONS).index(gate.activation)
        experts.bound = Experts(
            *projections, activation, gate.gated, gate.interleaved, gate.limit, gate.alpha, gate.offset
        )
    given = hidden_states, top_k_index, top_k_weights
    found: Tensor = runtime.launch("routed_experts.routed_experts", hidden_states, *given, experts.bound)
    return found


def supports(problem: ExpertsProblem) -> Support:
    if others := [layout for layout in problem.layouts if layout not in LAYOUTS]:
        return False, f"reads the layouts 'triton.*', some experts are laid out as {', '.join(others)}"
    return runtime.takes_activations(problem)


because = "experts of any format found by tables of addresses; the list of work is made on the device"
ROUTED_EXPERTS.register("triton.routed_experts", ORDER, supports, routed_experts, because)

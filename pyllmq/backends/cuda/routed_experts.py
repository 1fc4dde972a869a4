"""routed_experts: a list of work by expert is made on the device (csrc/experts/cuda/routed_experts.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Support
from ...layouts import WeightOperand
from ...operations import ROUTED_EXPERTS, ExpertsProblem, PackedExperts
from ..checkpoints import SPARSE_KINDS
from . import codebook, runtime
from .runtime import DTYPE_CODE, ORDER
from .sparse import Meta

LAYOUTS = (codebook.LAYOUT, *(f"cuda.{kind}" for kind in SPARSE_KINDS))

MOST_SUM_BYTES = 256 << 20
"""Of fp32 sums between the Linears; more tokens are taken in waves, each of which reads the chosen experts. 32768 rows of 2048,
which are 4096 tokens of Qwen3-30B-A3B."""

Kind = tuple[str, int, int]
"""("codebook", 0, 0) or (kind, values, bits) as a SparseOperand takes them: experts of one kind share a launch."""


def addresses_of(operands: Sequence[WeightOperand]) -> tuple[int, ...]:
    return tuple(operand.tensors[0].data_ptr() for operand in operands)


def bind(experts: PackedExperts) -> Any:
    """Reads the layouts' headers, so it waits for the device: once, at the first call, which no graph may record."""
    experts.check_shapes()
    gate, units = experts.gate, experts.units
    device = experts.up[0].tensors[0].device
    up_first, stride = (-1, 1) if not gate.gated else (1, 2) if gate.interleaved else (units, 1)
    fields: dict[str, Any] = {}
    for name, operands, bias in (("up", experts.up, experts.up_bias), ("down", experts.down, experts.down_bias)):
        sizes = [operand.tensors[0].numel() for operand in operands]
        kinds = [kind_of(operand) for operand in operands]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        places = [numbers[kind] for kind in kinds]
        table = torch.tensor(
            list(zip(addresses_of(operands), sizes, places, strict=True)), dtype=torch.int64, device="cpu"
        )
        largest = largest_of(operands, sizes, kinds)
        fields |= {
            f"{name}_layouts": table.to(device),
            f"{name}_kinds": [(*kind, largest[kind]) for kind in numbers],
            f"{name}_bias": None if bias is None else bias.to(device).contiguous(),
            f"{name}_rows": operands[0].shape[0],
            f"{name}_columns": operands[0].shape[1],
        }
    return runtime.extension().RoutedExperts(
        experts=len(experts.up),
        units=units,
        gate_first=0,
        up_first=up_first,
        stride=stride,
        activation=gate.activation,
        limit=gate.limit,
        alpha=gate.alpha,
        offset=gate.offset,
        sum_bytes=MOST_SUM_BYTES,
        **fields,
    )


def kind_of(operand: WeightOperand) -> Kind:
    if operand.layout == codebook.LAYOUT:
        return "codebook", 0, 0
    meta = Meta(*operand.meta)
    return "columns" if meta.columns else operand.kind, meta.values, meta.bits


def largest_of(operands: Sequence[WeightOperand], sizes: Sequence[int], kinds: Sequence[Kind]) -> dict[Kind, int]:
    """What a launch must have room for: blocks of rows of a codebook, bytes of a cell of the others."""
    _cuda, found = runtime.extension(), dict.fromkeys(kinds, 0)
    books = [(each, size) for each, size in zip(operands, sizes, strict=True) if each.layout == codebook.LAYOUT]
    if books:
        headers = torch.stack([each.tensors[0][: _cuda.codebook_header_bytes] for each, _ in books]).cpu()
        aligned = [header.clone() for header in headers]
        blocks = (
            _cuda.codebook_layout_blocks(each.data_ptr(), size) for each, (_, size) in zip(aligned, books, strict=True)
        )
        found[kind_of(books[0][0])] = max(blocks)
    for operand, kind in zip(operands, kinds, strict=True):
        if operand.layout != codebook.LAYOUT:
            found[kind] = max(found[kind], Meta(*operand.meta).stage_bytes)
    return found


def routed_experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: PackedExperts) -> Tensor:
    device, dtype, tokens = hidden_states.device, DTYPE_CODE[hidden_states.dtype], hidden_states.shape[0]
    out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=device)
    with runtime.current(device):
        if experts.bound is None:
            experts.bound = bind(experts)
        native, choices = experts.bound, top_k_index.shape[1]
        workspace = torch.empty(
            runtime.extension().routed_experts_workspace(native, tokens, choices, dtype),
            dtype=torch.uint8,
            device=device,
        )
        runtime.extension().routed_experts(
            native,
            hidden_states.data_ptr(),
            out.data_ptr(),
            dtype,
            tokens,
            choices,
            top_k_index.data_ptr(),
            top_k_weights.data_ptr(),
            workspace.data_ptr(),
            runtime.stream(device),
        )
    return out


def supports(problem: ExpertsProblem) -> Support:
    if others := [layout for layout in problem.layouts if layout not in LAYOUTS]:
        return False, f"reads the layouts 'cuda.*', some experts are laid out as {', '.join(others)}"
    return runtime.takes_activations(problem)


because = "five launches whatever was chosen, none of which waits for the host; a tile of tokens shares one decoding"
ROUTED_EXPERTS.register("cuda.routed_experts", ORDER, supports, routed_experts, because)

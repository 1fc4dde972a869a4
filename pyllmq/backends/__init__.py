"""Back ends: each module registers its kernels in `pyllmq.dispatch` and answers `available() -> (ok, why)`."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import CHECKPOINT, WeightOperand, forced_backend
from . import cpu, cuda, reference, triton

__all__ = [
    "cpu",
    "cuda",
    "layout_codes",
    "machine_layout",
    "operand_from_layout",
    "prepack",
    "reference",
    "report",
    "triton",
]

_WITH_LAYOUT = {cpu.LAYOUT: cpu, cuda.LAYOUT: cuda, triton.LAYOUT: triton}
"""By name; of two back ends for one type of device the first that works makes the layout."""


def machine_layout(device: str) -> str:
    """Name of the layout that weights get on that type of device; `checkpoint` where no back end has one of its own."""
    for name, backend in _WITH_LAYOUT.items():
        if device == backend.DEVICE and forced_backend() in (None, name) and backend.available()[0]:
            return name
    return CHECKPOINT


def prepack(operand: WeightOperand) -> WeightOperand:
    """The codebook operand in the layout that is fastest on the device where its tensors lie.

    Only the checkpoint layout can be prepacked. Without a back end for the device, or with PYLLMQ_BACKEND=reference, the
    operand comes back as it is: the reference back end reads the checkpoint layout.
    """
    if operand.layout != CHECKPOINT:
        return operand
    layout = machine_layout(operand.tensors[0].device.type)
    return operand if layout == CHECKPOINT else _WITH_LAYOUT[layout].prepack(operand)


def operand_from_layout(layout: str, blob: Tensor, out_features: int, in_features: int) -> WeightOperand:
    """The operand whose machine layout is `blob`, the first tensor of what `prepack` made."""
    if layout == triton.LAYOUT:
        return triton.operand_from_blob(blob, out_features, in_features)
    return WeightOperand(layout, (blob,), out_features, in_features)


def layout_codes(operand: WeightOperand) -> Tensor:
    """The codes, uint8 [N, K], of an operand in a machine layout."""
    if operand.layout not in _WITH_LAYOUT:
        raise ValueError(
            f"the codes cannot be rebuilt from the layout {operand.layout!r}; allowed: {', '.join(map(repr, _WITH_LAYOUT))}"
        )
    return _WITH_LAYOUT[operand.layout].layout_codes(operand)


def report() -> dict[str, tuple[bool, str]]:
    """For every back end: does it work here, and why (not)."""
    return {
        "cpu": cpu.available(),
        "cuda": cuda.available(),
        "triton": triton.available(),
        "reference": reference.available(),
    }

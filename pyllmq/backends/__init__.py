"""Back ends: each module registers its kernels in `pyllmq.dispatch` and answers `available() -> (ok, why)`."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import CHECKPOINT, WeightOperand, forced_backend
from . import cpu, cuda, reference

__all__ = ["cpu", "cuda", "layout_codes", "machine_layout", "prepack", "reference", "report"]

_WITH_LAYOUT = {cpu.LAYOUT: cpu, cuda.LAYOUT: cuda}


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
        "triton": triton_available(),
        "reference": reference.available(),
    }


def triton_available() -> tuple[bool, str]:
    return False, "this version ships no Triton kernels yet"

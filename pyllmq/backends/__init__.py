"""Back ends: each module registers its kernels in `pyllmq.dispatch` and answers `available() -> (ok, why)`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import BITMAP, CHECKPOINT, SPARSE24, SPARSE24_CODEBOOK, WeightOperand, forced_backend
from . import cpu, cpu_sparse, cuda, cuda_sparse, reference, triton, triton_sparse

__all__ = [
    "cpu",
    "cpu_sparse",
    "cuda",
    "cuda_sparse",
    "layout_codes",
    "machine_layout",
    "operand_from_layout",
    "prepack",
    "reference",
    "report",
    "triton",
    "triton_sparse",
    "unpack_layout",
]

SPARSE_LAYOUTS = (BITMAP, SPARSE24, SPARSE24_CODEBOOK)
_SPARSE: tuple[ModuleType, ...] = (cpu_sparse, cuda_sparse, triton_sparse)
"""Back ends with layouts of their own for the sparse formats, in the order in which they are asked."""

_WITH_LAYOUT = {cpu.LAYOUT: cpu, cuda.LAYOUT: cuda, triton.LAYOUT: triton}
"""By name; of two back ends for one type of device the first that works makes the layout."""


def machine_layout(device: str) -> str:
    """Name of the layout that weights get on that type of device; `checkpoint` where no back end has one of its own."""
    for name, backend in _WITH_LAYOUT.items():
        if device == backend.DEVICE and forced_backend() in (None, name) and backend.available()[0]:
            return name
    return CHECKPOINT


def prepack(operand: WeightOperand) -> WeightOperand:
    """The operand in the layout that is fastest on the device where its tensors lie.

    Only checkpoint layouts can be prepacked. Without a back end for the device, or with PYLLMQ_BACKEND=reference, the
    operand comes back as it is: the reference back end reads the checkpoint layouts.
    """
    if operand.layout in SPARSE_LAYOUTS:
        backend = _sparse_backend(operand)
        return operand if backend is None else backend.prepack(operand)
    if operand.layout != CHECKPOINT:
        return operand
    layout = machine_layout(operand.tensors[0].device.type)
    return operand if layout == CHECKPOINT else _WITH_LAYOUT[layout].prepack(operand)


def operand_from_layout(layout: str, blob: Tensor, out_features: int, in_features: int) -> WeightOperand:
    """The operand whose machine layout is `blob`, the first tensor of what `prepack` made."""
    if layout == triton.LAYOUT:
        return triton.operand_from_blob(blob, out_features, in_features)
    for backend in (cuda_sparse, triton_sparse):
        if layout.startswith(f"{backend.NAME}."):
            return backend.operand_from_blob(layout, blob, out_features, in_features)
    return WeightOperand(layout, (blob,), out_features, in_features)


def layout_codes(operand: WeightOperand) -> Tensor:
    """The codes, uint8 [N, K], of an operand in a machine layout."""
    if operand.layout not in _WITH_LAYOUT:
        raise ValueError(
            f"the codes cannot be rebuilt from the layout {operand.layout!r}; allowed: {', '.join(map(repr, _WITH_LAYOUT))}"
        )
    return _WITH_LAYOUT[operand.layout].layout_codes(operand)


def _sparse_backend(operand: WeightOperand) -> ModuleType | None:
    device = operand.tensors[0].device.type
    for backend in _SPARSE:
        asked = forced_backend() in (None, backend.NAME)
        if asked and device == backend.DEVICE and operand.layout in backend.LAYOUTS and backend.available()[0]:
            return backend
    return None


def unpack_layout(operand: WeightOperand, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """The checkpoint tensors, of these shapes and dtypes, of a sparse operand in a machine layout."""
    for backend in _SPARSE:
        if operand.layout.startswith(f"{backend.NAME}."):
            return backend.unpack_layout(operand, shapes)
    known = [layout for backend in _SPARSE for layout in backend.LAYOUTS.values()]
    raise ValueError(f"the layout {operand.layout!r} cannot be unpacked; allowed: {', '.join(map(repr, known))}")


def report() -> dict[str, tuple[bool, str]]:
    """For every back end: does it work here, and why (not)."""
    return {
        "cpu": cpu.available(),
        "cuda": cuda.available(),
        "triton": triton.available(),
        "reference": reference.available(),
    }

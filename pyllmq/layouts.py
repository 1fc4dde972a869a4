"""A packed weight as kernels read it, and how each back end lays it out in memory.

A layout is named <back end>.<kind>. `checkpoint.<kind>` are the tensors as they stand in a file: the reference back end reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dispatch import forced_backend

CHECKPOINT = "checkpoint"
"""Stands where a back end's name stands in the names of machine layouts."""

Fields = Mapping[str, Tensor]
"""Checkpoint tensors by name; those that a weight does not have are absent."""
Shape = tuple[int, int]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Key -> (shape, dtype) of every tensor that a checkpoint holds for a weight."""


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory does not hold its values: torch may negate them only as they are read
    (`z.conj().imag`), and `frombuffer` and files of other writers put them at addresses that no kernel takes."""
    tensor = tensor.resolve_neg()
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def for_kernels(tensor: Tensor) -> Tensor:
    """The same, and contiguous."""
    return readable(tensor.contiguous())


@dataclass(eq=False)
class WeightOperand:
    """A packed weight as kernels read it: `tensors` and `meta`, whose meaning `layout` names, of a matrix `shape` [N, K]."""

    kind: str
    layout: str
    tensors: tuple[Tensor, ...]
    meta: tuple[int, ...]
    """What a launch must know and would have to wait for if it stood on the device."""
    shape: Shape
    bound: Any = field(default=None, repr=False)
    """What the layout's back end made of the tensors at its first call, such as an object of its extension. Never copied."""
    chosen_at: int = field(default=-1, repr=False)
    """`dispatch.changes` when a kernel was chosen whose `bound` serves tensors in one native call: it does while the table is the
    same."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": None}


@dataclass(frozen=True, eq=False)
class Layout:
    """How one back end keeps weights of one kind in memory."""

    backend: str
    kind: str
    order: int
    """Of two layouts that serve a device the one with the lower order is made."""
    holds: tuple[str, ...]
    """Names of the checkpoint tensors that it can give back; the others stay beside it."""
    serves: Callable[[str], bool]
    """Does the back end work here for that device, "cuda:1" say?"""
    prepack: Callable[[Fields, Shape], WeightOperand]
    """The operand in this layout, on the device where the tensors lie. They are read, not kept."""
    unpack: Callable[[WeightOperand, Shapes, Fields], dict[str, Tensor]]
    """The tensors that `holds` names, as they were prepacked: from an operand, all tensors' shapes, and those beside it."""
    from_blob: Callable[[Tensor, Shape], WeightOperand]
    """The operand whose first tensor is this one, after a copy or a move. May wait for the device: at load, never in a call."""
    settle: Callable[[WeightOperand], WeightOperand | None] = lambda operand: operand
    """An operand that was copied or unpickled, in memory as kernels like it; None where another machine's must be made anew."""

    @property
    def name(self) -> str:
        return f"{self.backend}.{self.kind}"


_LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> None:
    _LAYOUTS[layout.name] = layout


def layouts() -> list[Layout]:
    """All machine layouts, in the order in which they are asked for."""
    return sorted(_LAYOUTS.values(), key=lambda layout: layout.order)


def machine_layout(name: str) -> Layout:
    """By name. Raises ValueError for any other, `checkpoint.<kind>` too."""
    if name not in _LAYOUTS:
        raise ValueError(f"there is no machine layout {name!r}; allowed: {', '.join(map(repr, _LAYOUTS))}")
    return _LAYOUTS[name]


def layout_for(kind: str, device: str) -> Layout | None:
    """What weights of a kind get on that device; None where no back end has a layout: they stay as in a checkpoint."""
    for layout in layouts():
        if layout.kind == kind and forced_backend() in (None, layout.backend) and layout.serves(device):
            return layout
    return None

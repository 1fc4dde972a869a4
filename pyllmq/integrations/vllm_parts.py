"""Which parts of which packed modules a vLLM layer holds: gathered while its tensors arrive. Needs no vLLM.

The tensors of a packed module come as they stand in the checkpoint; as soon as a module's are complete, this rank's rows or
columns are cut out. After loading, codebooks of the same widths become segments of one weight, one call; others stay side by
side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..formats import CodebookWeight, FormatError, PackedWeight, Structure
from ..operations import ACTIVATIONS, Gate
from ..structure import of_module, weight_of


@dataclass(frozen=True)
class Piece:
    """One packed module of the checkpoint and the part of it that one output partition of a vLLM layer needs."""

    name: str
    structure: Structure
    rows: tuple[int, int]
    columns: tuple[int, int]

    def cut(self, weight: PackedWeight) -> PackedWeight:
        if self.rows != (0, self.structure.out_features):
            weight = weight.cut_rows(*self.rows)
        if self.columns != (0, self.structure.in_features):
            weight = weight.cut_columns(*self.columns)
        return weight


@dataclass
class Arrivals:
    """The tensors of a layer's modules as the loader brings them, until a module is complete and its pieces are cut."""

    pieces: Sequence[Piece]
    waiting: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    parts: dict[int, PackedWeight] = field(default_factory=dict)

    def add(self, name: str, key: str, tensor: Tensor) -> None:
        structure = next(piece.structure for piece in self.pieces if piece.name == name)
        tensors = self.waiting.setdefault(name, {})
        tensors[key] = tensor
        if set(tensors) < set(structure.tensors()):
            return
        weight = _checked(name, structure, tensors)
        self.parts |= {i: piece.cut(weight) for i, piece in enumerate(self.pieces) if piece.name == name}
        self.waiting[name] = {}

    def weights(self) -> list[PackedWeight]:
        """The parts in the order of the layer's outputs; neighbours that can share a call are one weight."""
        missing = [piece.name for i, piece in enumerate(self.pieces) if i not in self.parts]
        if missing:
            raise _incomplete(missing)
        parts = [self.parts[i] for i in range(len(self.pieces))]
        books = [part for part in parts if isinstance(part, CodebookWeight)]
        if len(books) == len(parts) and all(torch.equal(book.column_bits, books[0].column_bits) for book in books):
            return [CodebookWeight.concatenate(books)]
        return parts


def pieces_of_layer(
    layer: Any, names: Sequence[str], structures: Mapping[str, Structure], outputs: Sequence[int], inputs: int
) -> list[Piece]:
    """What this rank's layer, with partitions of `outputs` rows and `inputs` columns, takes from its modules.

    `names` is one module for each partition (q, k, v), or one for all of them where the checkpoint holds them as one.
    """
    if len(names) not in (1, len(outputs)):
        raise ValueError(f"{', '.join(names)} cannot fill {len(outputs)} partitions")
    rank, ranks = int(getattr(layer, "tp_rank", 0)), int(getattr(layer, "tp_size", 1))
    replicas = [1, *[getattr(layer, "num_kv_head_replicas", 1)] * (len(outputs) - 1)]
    pieces, first = [], 0
    for i, size in enumerate(outputs):
        name = names[i if len(names) > 1 else 0]
        structure = structures[name]
        start = 0 if len(names) > 1 else first
        # A column-parallel layer has fewer rows than the checkpoint, a replicated or row-parallel one has all of them.
        if (size if len(names) > 1 else sum(outputs)) < structure.out_features:
            start += size * (rank // replicas[i])
            size_of_all = size * ranks // replicas[i]
        else:
            size_of_all = size
        first += size_of_all
        column = 0 if inputs == structure.in_features else inputs * rank
        piece = Piece(name, structure, (start, start + size), (column, column + inputs))
        if piece.rows[1] > structure.out_features or piece.columns[1] > structure.in_features:
            raise ValueError(
                f"{name} is [{structure.out_features}, {structure.in_features}], too small for rows {piece.rows[0]} to "
                f"{piece.rows[1]} and columns {piece.columns[0]} to {piece.columns[1]}, which rank {rank} of {ranks} needs"
            )
        pieces.append(piece)
    return pieces


# ---- experts --------------------------------------------------------------------------------------------------------


def modules_of_experts(
    prefix: str, structures: Mapping[str, Structure], names: Sequence[str]
) -> list[tuple[list[str], str]]:
    """Of each expert of the layer `prefix` the packed modules that are gate and up, and down; none if the experts are dense.

    A stack's experts are called `expert_3_up` and `expert_3_down`, those of a list `3.` and what `names` says of gate, up and down.
    """
    *first, last = names
    found: list[tuple[list[str], str]] = []
    while True:
        stacked = [f"{prefix}.expert_{len(found)}_{part}" for part in ("up", "down")]
        listed = [f"{prefix}.{len(found)}.{name}" for name in (*first, last)]
        expert = next((each for each in (stacked, listed) if each[-1] in structures), None)
        if expert is None or not all(name in structures for name in expert):
            break
        found.append((expert[:-1], expert[-1]))
    return found


@dataclass
class ExpertArrivals:
    """One expert's weights and biases as its tensors arrive, and the part of them that this rank holds."""

    up: Arrivals
    down: Arrivals
    biases: dict[str, Tensor] = field(default_factory=dict)
    """By module."""
    holds_bias: bool = True
    """Does this rank add the bias of down? The ranks' outputs are summed."""

    @classmethod
    def of(
        cls, ups: Sequence[str], down: str, structures: Mapping[str, Structure], gate: Gate, rank: int, ranks: int
    ) -> ExpertArrivals:
        """Raises ValueError where the ranks do not get units alike, or the modules do not fit each other."""
        inputs, units = structures[down].out_features, structures[down].in_features
        if units % ranks:
            raise ValueError(f"{down} has {units} inputs, which {ranks} ranks cannot share alike")
        begin, end = units * rank // ranks, units * (rank + 1) // ranks
        both = gate.gated and len(ups) == 1
        for name in ups:
            shape, needed = (structures[name].out_features, structures[name].in_features), (units * (1 + both), inputs)
            if shape != needed:
                raise ValueError(f"{name} is {list(shape)} where {down} needs {list(needed)}")
        rows = [(begin, end)]
        if both:
            rows = [(2 * begin, 2 * end)] if gate.interleaved or ranks == 1 else [*rows, (units + begin, units + end)]
        up = [Piece(name, structures[name], part, (0, inputs)) for name in ups for part in rows]
        return cls(
            Arrivals(up), Arrivals([Piece(down, structures[down], (0, inputs), (begin, end))]), holds_bias=rank == 0
        )

    def add(self, name: str, key: str, tensor: Tensor) -> None:
        if key == "bias":
            self.biases[name] = tensor
            return
        (self.down if name == self.down.pieces[0].name else self.up).add(name, key, tensor)

    def weights(self) -> tuple[PackedWeight, PackedWeight]:
        """Gate and up as one, and down. Raises ValueError where gate and up cannot be one weight."""
        up, down = self.up.weights(), self.down.weights()
        if len(up) > 1:
            names = " and ".join(dict.fromkeys(piece.name for piece in self.up.pieces))
            raise ValueError(
                f"{names}: parts of gate and up are one weight only as codebooks whose columns have the same widths; serve it "
                "without tensor parallelism"
            )
        return up[0], down[0]

    def bias(self) -> tuple[Tensor | None, Tensor | None]:
        """fp32, of gate and up, and of down."""
        found = [self.biases.get(piece.name) for piece in self.up.pieces]
        up = [bias[slice(*piece.rows)] for bias, piece in zip(found, self.up.pieces, strict=True) if bias is not None]
        down = self.biases.get(self.down.pieces[0].name)
        if down is not None and not self.holds_bias:
            down = torch.zeros_like(down)
        return torch.cat(up).float() if up else None, None if down is None else down.float()


def gate_named(activation: str, limit: float | None, alpha: float | None, offset: float | None) -> Gate:
    """What vLLM's MoEActivation of this value computes. Raises ValueError for one that no kernel knows."""
    if activation in ("swigluoai", "swigluoai_uninterleave"):
        given = 7.0 if limit is None else limit, 1.702 if alpha is None else alpha, 1.0 if offset is None else offset
        return Gate("silu", True, activation == "swigluoai", *given)
    name = activation.removesuffix("_no_mul").replace("relu2", "relu_squared")
    if name not in ACTIVATIONS or (activation == "relu2") or any(value is not None for value in (limit, alpha, offset)):
        raise ValueError(
            f"packed experts have no activation {activation!r} with limit {limit}, alpha {alpha} and offset {offset}; compress the "
            "model with --exclude experts"
        )
    return Gate(name, gated=not activation.endswith("_no_mul"))


def with_dense(
    tensors: Iterable[tuple[str, Tensor]], dense: Mapping[str, Structure], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder as they come, but one `weight` [N, K] for each packed module in `dense`."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors:
        name, _, leaf = key.rpartition(".")
        if name not in dense or leaf not in dense[name].tensors():
            yield key, tensor
            continue
        held = waiting.setdefault(name, {})
        held[leaf] = tensor
        if len(held) == len(dense[name].tensors()):
            yield f"{name}.weight", _checked(name, dense[name], waiting.pop(name)).dequantize(dtype)
    if waiting:
        raise _incomplete(waiting)


def _checked(name: str, structure: Structure, tensors: Mapping[str, Tensor]) -> PackedWeight:
    with of_module(name):
        return weight_of(structure, tensors)


def _incomplete(names: Iterable[str]) -> FormatError:
    return FormatError(f"the folder lacks tensors of {', '.join(names)}; it is incomplete, copy or compress it again")


ALWAYS_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""Of models that do not say so (StableLM)."""

PLAIN_QKV = ("qkv_proj", "c_attn")
"""Modules of all of q, k and v with q's rows first, then k's, then v's. Others may go head by head (BLOOM, Falcon), and are put in
order by code of the model that knows dense weights only."""


def modules_of_prefix(
    prefix: str, structures: Mapping[str, Structure], fused: Mapping[str, Sequence[str]]
) -> list[str]:
    """Packed modules of the checkpoint behind the vLLM layer `prefix`; none if it is dense."""
    if prefix in structures:
        return [prefix]
    parent, _, leaf = prefix.rpartition(".")
    fused = {**ALWAYS_FUSED, **fused}
    names = [f"{parent}.{part}" if parent else part for part in fused.get(leaf, ())]
    packed = [name for name in names if name in structures]
    if packed and len(packed) < len(names):
        dense = [name for name in names if name not in structures]
        raise ValueError(
            f"vLLM runs {', '.join(names)} as one layer, but {', '.join(dense)} {'is' if len(dense) == 1 else 'are'} dense; "
            "compress all of them or none"
        )
    return packed

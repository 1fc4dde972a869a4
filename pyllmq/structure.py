"""What all formats share: what fixes a packed weight's shapes, the weight itself, its checks, and the registry of formats.

A format is one file: a `Structure` and a layer, with a `PackedWeight` unless it is made of other packed weights. `register_format`
makes them known to loading, saving and the reference back end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import ops
from .layouts import CHECKPOINT, Fields, Shape, Shapes, WeightOperand, for_kernels, layout_for

MAX_UINT16_COLUMNS = 1 << 16


class FormatError(ValueError):
    """Tensors or a description that are not a valid packed weight; the message says what was found and what is allowed."""


@contextmanager
def of_module(name: str) -> Iterator[None]:
    """Within it a FormatError begins with the name of the module that it is about."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error


# ---- structures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """Everything that fixes the shapes of a packed weight: what `config.json` holds for each module.

    A format's own adds fields of its own, integers and strings; what else is wrong with them `__post_init__` says.
    """

    out_features: int
    in_features: int

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise FormatError(f"a weight of shape [{self.out_features}, {self.in_features}]; both must be at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """The inverse of `to_dict`, checked."""
        given = {f.name: getattr(f.type, "__name__", f.type) for f in fields(cls)}
        if values.get("kind") != cls.kind:
            raise FormatError(f"kind is {values.get('kind')!r}; this structure reads: {cls.kind!r}")
        if set(values) != {"kind", *given}:
            raise FormatError(
                f"a {cls.kind} is described by the keys {sorted(('kind', *given))}, given: {sorted(values)}"
            )
        for name, kind in given.items():
            if kind in ("int", "bool") and type(values[name]).__name__ != kind:
                raise FormatError(f"{name} is {values[name]!r}; sizes must be integers, and switches true or false")
        return cls(**{name: values[name] for name in given})

    def tensors(self) -> Shapes:
        """Key -> (shape, dtype) of every tensor that a checkpoint holds for this weight."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored, positions, scales and codebooks included, in bits per weight of the dense matrix."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.__dict__}

    def describe(self) -> str:
        """What a layer's repr says beside its sizes."""
        return ""


@dataclass(frozen=True)
class CompositeStructure(Structure):
    """Of a module made of packed weights: its tensors are its children's, each under the child's name."""

    children: Mapping[str, Structure]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.children or any("." in name or not name for name in self.children):
            raise FormatError(
                f"the children of a {self.kind} are {list(self.children)}; each needs a name without dots"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        described = values.get("children")
        if not isinstance(described, Mapping) or not all(isinstance(child, Mapping) for child in described.values()):
            raise FormatError(f"children is {described!r}; it must map names to descriptions")
        children = {name: structure_from_dict(child) for name, child in described.items()}
        return super().from_dict({**values, "children": children})

    def tensors(self) -> Shapes:
        return {f"{name}.{key}": spec for name, child in self.children.items() for key, spec in child.tensors().items()}

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"children": {name: child.to_dict() for name, child in self.children.items()}}

    def describe(self) -> str:
        return ", ".join(f"{name}={child.kind}" for name, child in self.children.items())


# ---- packed weights -------------------------------------------------------------------------------------------------


class OfStructure:
    """What a weight knows by its structure."""

    structure: Any

    @property
    def out_features(self) -> int:
        return self.structure.out_features

    @property
    def in_features(self) -> int:
        return self.structure.in_features

    @property
    def nbytes(self) -> int:
        """Bytes stored, all tensors together."""
        return self.structure.nbytes

    @property
    def bits_per_weight(self) -> float:
        return self.structure.bits_per_weight


@dataclass(frozen=True, eq=False)
class PackedWeight(OfStructure):
    """One packed matrix in checkpoint form: `tensors` are those that `structure` asks for, checked."""

    structure: Any
    tensors: dict[str, Tensor]

    structure_type: ClassVar[type[Structure]]
    fields: ClassVar[tuple[str, ...]]
    """Names of the checkpoint tensors in the order of an operand, where an absent one is empty."""
    column_unit: ClassVar[int] = 1
    """Columns can be cut at multiples of it."""

    # ---- what a format says -----------------------------------------------------------------------------------------

    @classmethod
    def structure_of(cls, tensors: Fields, out_features: int, in_features: int) -> Any:
        """The structure that these tensors are of. Raises FormatError where they do not even say that."""
        return cls.structure_type(out_features, in_features)

    @staticmethod
    def check(structure: Any, tensors: Fields) -> None:
        """Raises FormatError for content, of the right shapes and dtypes, on which kernels would read outside of it."""

    @staticmethod
    def decode(field: Fields, shape: Shape) -> Tensor:
        """Checkpoint tensors -> the dense matrix fp32 [N, K], in plain torch on any device: what defines the format."""
        raise NotImplementedError

    @classmethod
    def decode_rows(cls, field: Fields, shape: Shape, ids: Tensor) -> Tensor:
        """The rows `ids`, int64 [M] inside of it, of what `decode` gives: fp32 [M, K]."""
        return cls.decode(field, shape)[ids]

    @classmethod
    def gradients(cls, weight_gradient: Tensor, operand: WeightOperand) -> dict[str, Tensor]:
        """dL/dW fp32 [N, K] -> the gradients of those tensors of a checkpoint operand that ask for one."""
        return {}

    def tensors_of_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of the rows start..stop-1; they may be views."""
        raise NotImplementedError

    def tensors_of_columns(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of the columns start..stop-1; they may be views."""
        raise NotImplementedError

    # ---- what all have ----------------------------------------------------------------------------------------------

    @classmethod
    def from_tensors(cls, tensors: Fields, out_features: int, in_features: int) -> Any:
        """Checkpoint tensors (without the module's prefix) -> the weight, after checking every byte that a kernel relies on.

        Raises FormatError that names the key, what it holds and what is allowed.
        """
        structure = cls.structure_of(tensors, out_features, in_features)
        expect_all(tensors, structure.tensors())
        cls.check(structure, tensors)
        return cls(structure, {key: for_kernels(tensors[key]) for key in structure.tensors()})

    @classmethod
    def named(cls, operand: WeightOperand) -> dict[str, Tensor]:
        """The tensors of a checkpoint operand by name; absent ones are empty."""
        return dict(zip(cls.fields, operand.tensors, strict=True))

    def cut_rows(self, start: int, stop: int) -> Any:
        """The rows start..stop-1 as a weight of their own, [stop - start, K], in memory of its own.

        Raises FormatError unless 0 <= start < stop <= N.
        """
        expect_cut("rows", start, stop, self.out_features)
        tensors = {key: tensor.clone() for key, tensor in self.tensors_of_rows(start, stop).items()}
        return self.from_tensors(tensors, stop - start, self.in_features)

    def cut_columns(self, start: int, stop: int) -> Any:
        """The columns start..stop-1 as a weight of their own, [N, stop - start], in memory of its own.

        Raises FormatError unless 0 <= start < stop <= K and both are multiples of `column_unit` (stop may be K).
        """
        expect_cut("columns", start, stop, self.in_features, self.column_unit)
        tensors = {key: tensor.clone() for key, tensor in self.tensors_of_columns(start, stop).items()}
        return self.from_tensors(tensors, self.out_features, stop - start)

    @property
    def kind(self) -> str:
        return self.structure_type.kind

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def checkpoint_operand(self) -> WeightOperand:
        """The tensors as they are, in the order of `fields`; absent ones are empty."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.device)
        tensors = tuple(self.tensors.get(key, empty) for key in self.fields)
        return WeightOperand(self.kind, f"{CHECKPOINT}.{self.kind}", tensors, (), (self.out_features, self.in_features))

    def prepack(self) -> WeightOperand:
        """A new operand in the layout that is fastest on the device where the tensors lie, by the back end in force.

        Without a back end for the device, or with PYLLMQ_BACKEND=reference, the tensors stay as they are.
        """
        layout = layout_for(self.kind, str(self.device))
        shape = (self.out_features, self.in_features)
        return self.checkpoint_operand() if layout is None else layout.prepack(self.tensors, shape)

    def operand(self) -> WeightOperand:
        """`prepack()`, made at the first call and kept."""
        return self._operand

    @cached_property
    def _operand(self) -> WeightOperand:
        return self.prepack()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [N, K], in float32, bfloat16 or float16."""
        return ops.packed_dequantize(self, dtype)

    def to(self, device: torch.device | str) -> Any:
        return type(self)(self.structure, {key: tensor.to(device) for key, tensor in self.tensors.items()})


# ---- the registry ---------------------------------------------------------------------------------------------------


class Format(NamedTuple):
    structure: type[Structure]
    layer: type[Any]
    weight: type[PackedWeight] | None
    """None for a composite."""
    embedding: type[Any] | None
    """None: embeddings cannot have this format."""


_FORMATS: dict[str, Format] = {}


def register_format(
    structure: type[Structure],
    layer: type[Any],
    weight: type[PackedWeight] | None = None,
    embedding: type[Any] | None = None,
) -> None:
    """Make a format known under `structure.kind`. Raises ValueError where another has that name."""
    known = _FORMATS.get(structure.kind)
    if known is not None and known.structure is not structure:
        raise ValueError(f"the format {structure.kind!r} is registered already, as {known.structure.__name__}")
    _FORMATS[structure.kind] = Format(structure, layer, weight, embedding)
    if weight is not None:
        ops.register_gradients(structure.kind, weight.fields, weight.gradients)


def kinds() -> list[str]:
    """Names of all formats."""
    return list(_FORMATS)


def format_of(kind: object) -> Format:
    """Raises FormatError for a kind that nobody registered."""
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise FormatError(f"kind is {kind!r}; this version of pyllmq reads: {', '.join(map(repr, _FORMATS))}")
    return _FORMATS[kind]


def weight_type(kind: str) -> type[PackedWeight]:
    found = format_of(kind).weight
    if found is None:
        raise FormatError(f"a {kind} is made of several packed weights, and is none itself")
    return found


def weight_of(structure: Structure, tensors: Fields) -> Any:
    """The packed weight that these tensors of a checkpoint hold, checked as `PackedWeight.from_tensors` does."""
    return weight_type(structure.kind).from_tensors(tensors, structure.out_features, structure.in_features)


def structure_from_dict(values: Mapping[str, Any]) -> Structure:
    """The structure that `to_dict` described. Raises FormatError for anything else."""
    return format_of(values.get("kind")).structure.from_dict(values)


# ---- checks of tensors ------------------------------------------------------------------------------------------------


def expect(key: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise FormatError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} {shape}")


def expect_all(tensors: Fields, shapes: Shapes) -> None:
    """The keys are those of `shapes`, with these shapes and dtypes; numbers are finite."""
    if set(tensors) != set(shapes):
        raise FormatError(f"the keys are {sorted(tensors)}; the weight asks for {sorted(shapes)}")
    for key, (shape, dtype) in shapes.items():
        expect(key, tensors[key], shape, dtype)
        if dtype.is_floating_point and not bool(torch.isfinite(tensors[key]).all()):
            raise FormatError(
                f"{key} holds values that are not finite: the file is damaged, or was written from broken weights"
            )


def column_dtype(in_features: int) -> torch.dtype:
    """Of column numbers."""
    return torch.uint16 if in_features <= MAX_UINT16_COLUMNS else torch.int32


def finite_fp16(name: str, values: Tensor) -> Tensor:
    half = values.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        largest = float(values.float().abs().max())
        raise FormatError(
            f"{name} holds values up to {largest:g} or not finite; fp16 ends at 65504. Rescale the weight first"
        )
    return half


FP16_LEAST = 2.0**-24
FP16_LOSS = 0.01
"""Most that storing may take from the largest value of a row or codebook, as a share of it."""
NEGLIGIBLE = 2.0**-11
"""Rows and columns below this share of the largest value are smaller than the fp16 rounding of that value."""


def power_of_two(reach: float) -> float:
    """A scale that fp16 holds and that takes nothing from values: up to `reach`, they are at most about 1 once divided by it."""
    return max(FP16_LEAST, math.ldexp(1.0, math.frexp(reach)[1]))


def lost_in_fp16(values: Tensor) -> Tensor:
    """Bool [rows]: rows of `values` [rows, n] that fp16 would distort by more than FP16_LOSS of their largest value."""
    return (values - values.half().float()).abs().amax(-1) > FP16_LOSS * values.abs().amax(-1)


def require_fp16(name: str, values: Tensor, advice: str) -> None:
    """FormatError if fp16 distorts rows of `values` [rows, n]: it ends at 6e-8, below half of which there is 0."""
    if values.dtype == torch.float16 or not values.numel():
        return
    parts = [part.float() for part in values.split(1024)]
    largest = torch.cat([part.abs().amax(-1) for part in parts])
    bad = torch.cat([lost_in_fp16(part) for part in parts]) & (largest > NEGLIGIBLE * largest.max())
    if bool(bad.any()):
        zeros = sum(int(((part != 0) & (part.half() == 0)).sum()) for part in parts) / int((values != 0).sum())
        raise FormatError(
            f"{name} reaches {float(largest.max()):g}, too small for fp16: in {int(bad.sum())} of {len(bad)} rows it is off by "
            f"more than {FP16_LOSS:.0%} of the largest value, and {zeros:.1%} of the values that are "
            f"not 0 would become 0; {advice}"
        )


def expect_row_offsets(key: str, offsets: Tensor, count: int) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets.diff() < 0).any()):
        raise FormatError(f"{key} must rise from 0 to {count}, the number of values")


def expect_ascending_columns(key: str, columns: Tensor, offsets: Tensor, in_features: int) -> None:
    """Columns of the values of all rows: inside, ascending within a row, each at most once."""
    if not columns.numel():
        return
    if int(columns.min()) < 0 or int(columns.max()) >= in_features:
        raise FormatError(f"{key} holds {int(columns.max())}; allowed: 0 to {in_features - 1}")
    starts_row = torch.zeros(columns.numel() + 1, dtype=torch.bool, device=columns.device)
    starts_row[offsets] = True
    if bool(((columns.diff() <= 0) & ~starts_row[1:-1]).any()):
        raise FormatError(f"{key} must ascend within each row, each column at most once")


# ---- parts of tensors -------------------------------------------------------------------------------------------------


def expect_cut(what: str, start: int, stop: int, size: int, unit: int = 1) -> None:
    if not 0 <= start < stop <= size:
        raise FormatError(f"{what} {start} to {stop} were asked for; allowed: 0 <= start < stop <= {size}")
    if start % unit or (stop % unit and stop != size):
        raise FormatError(
            f"{what} {start} to {stop} were asked for; this format is cut at multiples of {unit}, or at {size}"
        )


def row_offsets(counts: Tensor) -> Tensor:
    """Number of values in each row [N] -> int32 [N + 1]: where each row's values start."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def sparse_rows(offsets: Tensor, start: int, stop: int) -> tuple[Tensor, slice]:
    """(row offsets of the rows start..stop-1, the place of their values among those of all rows)."""
    part = offsets[start : stop + 1].long()
    return (part - part[0]).to(offsets.dtype), slice(int(part[0]), int(part[-1]))


def sparse_columns(offsets: Tensor, columns: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row offsets, columns counted from `start`, which values stay) of values in the columns start..stop-1."""
    column = columns.long()
    inside = (column >= start) & (column < stop)
    row = torch.repeat_interleave(offsets.long().diff())
    part = row_offsets(torch.bincount(row[inside], minlength=offsets.numel() - 1))
    return part, (column[inside] - start).to(column_dtype(stop - start)), inside


# ---- outliers: weights kept in fp16 beside codes -----------------------------------------------------------------------

OUTLIER_KEYS = ("outlier_row_offsets", "outlier_columns", "outlier_values")
"""They stand together or not at all."""


def outlier_shapes(out_features: int, in_features: int, count: int) -> Shapes:
    if not 0 <= count <= out_features * in_features:
        raise FormatError(f"{count} outliers in a weight of {out_features * in_features} elements")
    specs = ((out_features + 1,), torch.int32), ((count,), column_dtype(in_features)), ((count,), torch.float16)
    return dict(zip(OUTLIER_KEYS, specs, strict=True)) if count else {}


def packed_outliers(mask: Tensor | None, weight: Tensor | None, like: Tensor) -> dict[str, Tensor]:
    """The outlier tensors of the weights [N, K] that `mask` names, beside codes `like` [N, K]; none where it names none."""
    if mask is None or not bool(mask.any()):
        return {}
    if mask.shape != like.shape or weight is None or weight.shape != like.shape:
        given = None if weight is None else tuple(weight.shape)
        raise FormatError(
            f"outlier_mask {tuple(mask.shape)} and outlier_weight {given} must both be [N, K] = {list(like.shape)}"
        )
    mask = mask.to(like.device)
    row, column = torch.nonzero(mask, as_tuple=True)
    values = weight.to(like.device)[row, column]
    require_fp16("outlier_weight", values[None], "rescale the weight, or keep no outliers")
    parts = row_offsets(mask.sum(1)), column.to(column_dtype(like.shape[1])), finite_fp16("outlier_weight", values)
    return dict(zip(OUTLIER_KEYS, parts, strict=True))


def check_outliers(tensors: Fields, in_features: int) -> None:
    """Raises FormatError for outliers that lie outside of the weight, or not in order."""
    if "outlier_values" in tensors:
        offsets, columns, values = (tensors[key].long() for key in OUTLIER_KEYS)
        expect_row_offsets(OUTLIER_KEYS[0], offsets, values.numel())
        expect_ascending_columns(OUTLIER_KEYS[1], columns, offsets, in_features)


def outliers_of_rows(tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The outlier tensors of the rows start..stop-1; none where no outlier is left."""
    if "outlier_values" not in tensors:
        return {}
    offsets, columns, values = (tensors[key] for key in OUTLIER_KEYS)
    part, place = sparse_rows(offsets, start, stop)
    return dict(zip(OUTLIER_KEYS, (part, columns[place], values[place]), strict=True)) if int(part[-1]) else {}


def outliers_of_columns(tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The outlier tensors of the columns start..stop-1; none where no outlier is left."""
    if "outlier_values" not in tensors:
        return {}
    offsets, columns, values = (tensors[key] for key in OUTLIER_KEYS)
    part, column, inside = sparse_columns(offsets, columns, start, stop)
    return dict(zip(OUTLIER_KEYS, (part, column, values[inside]), strict=True)) if int(part[-1]) else {}


def outlier_places(field: Fields) -> tuple[Tensor, Tensor]:
    """(row, column) of every outlier, in the order of `outlier_values`."""
    row = torch.repeat_interleave(field["outlier_row_offsets"].long().diff())
    return row, field["outlier_columns"].long()

"""What all formats share: what fixes a packed weight's shapes, the checks of its tensors, and the error that they raise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends import prepack
from ..dispatch import WeightOperand

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
MAX_UINT16_COLUMNS = 1 << 16


class FormatError(ValueError):
    """Tensors or a description that are not a valid packed weight; the message says what was found and what is allowed."""


@dataclass(frozen=True)
class Structure:
    """Everything that fixes the shapes of a packed weight: what `config.json` holds for each module."""

    out_features: int
    in_features: int

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise FormatError(f"a weight of shape [{self.out_features}, {self.in_features}]; both must be at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """The inverse of `to_dict`, checked."""
        raise NotImplementedError

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


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One packed matrix in checkpoint form: `tensors` are those that `structure` asks for, checked."""

    structure: Any
    tensors: dict[str, Tensor]
    _cache: dict[str, WeightOperand] = field(default_factory=dict, repr=False)

    layout: ClassVar[str]
    """Name of the layout of these tensors in the order `fields`."""
    fields: ClassVar[tuple[str, ...]]
    column_unit: ClassVar[int] = 1
    """Columns can be cut at multiples of it."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> Any:
        """Checkpoint tensors (without the module's prefix) -> the weight, after checking what kernels rely on."""
        raise NotImplementedError

    def cut_rows(self, start: int, stop: int) -> Any:
        """The rows start..stop-1 as a weight of their own, [stop - start, K], in memory of its own.

        Raises FormatError unless 0 <= start < stop <= N.
        """
        expect_cut("rows", start, stop, self.out_features)
        tensors = {key: tensor.clone() for key, tensor in self._tensors_of_rows(start, stop).items()}
        return self.from_tensors(tensors, stop - start, self.in_features)

    def cut_columns(self, start: int, stop: int) -> Any:
        """The columns start..stop-1 as a weight of their own, [N, stop - start], in memory of its own.

        Raises FormatError unless 0 <= start < stop <= K and both are multiples of `column_unit` (stop may be K).
        """
        expect_cut("columns", start, stop, self.in_features, self.column_unit)
        tensors = {key: tensor.clone() for key, tensor in self._tensors_of_columns(start, stop).items()}
        return self.from_tensors(tensors, self.out_features, stop - start)

    def _tensors_of_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def _tensors_of_columns(self, start: int, stop: int) -> dict[str, Tensor]:
        raise NotImplementedError

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

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def checkpoint_operand(self) -> WeightOperand:
        """The tensors as they are, in the order of `fields`; absent ones are empty."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.device)
        tensors = tuple(self.tensors.get(key, empty) for key in self.fields)
        return WeightOperand(self.layout, tensors, self.out_features, self.in_features)

    def operand(self) -> WeightOperand:
        """The fastest layout for the device where the tensors lie; made at the first call and kept."""
        if "operand" not in self._cache:
            self._cache["operand"] = prepack(self.checkpoint_operand())
        return self._cache["operand"]

    def to(self, device: torch.device | str) -> Any:
        return type(self)(self.structure, {key: tensor.to(device) for key, tensor in self.tensors.items()})


# ---- checks of tensors ------------------------------------------------------------------------------------------------


def expect(key: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise FormatError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} {shape}")


def expect_all(tensors: dict[str, Tensor], shapes: Shapes) -> None:
    """The keys are those of `shapes`, with these shapes and dtypes; numbers are finite."""
    if set(tensors) != set(shapes):
        raise FormatError(f"the keys are {sorted(tensors)}; the weight asks for {sorted(shapes)}")
    for key, (shape, dtype) in shapes.items():
        expect(key, tensors[key], shape, dtype)
        if dtype.is_floating_point and not bool(torch.isfinite(tensors[key]).all()):
            raise FormatError(
                f"{key} holds values that are not finite: the file is damaged, or was written from broken weights"
            )


def for_kernels(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that its dtype asks for: a file of another writer may hold tensors at any offset."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def expect_integers(values: dict[str, Any], names: tuple[str, ...]) -> None:
    """Of a description in config.json."""
    for name in names:
        if isinstance(values[name], bool) or not isinstance(values[name], int):
            raise FormatError(f"{name} is {values[name]!r}; it must be an integer")


def expect_keys(kind: str, values: dict[str, Any], known: tuple[str, ...]) -> None:
    if set(values) != {"kind", *known}:
        raise FormatError(f"a {kind} is described by the keys {sorted(('kind', *known))}, given: {sorted(values)}")


def described(
    structure: type[Any], values: Mapping[str, Any], integers: tuple[str, ...], names: tuple[str, ...] = ()
) -> Any:
    """The structure that a description in config.json says: fields that must be integers, then those that it checks itself."""
    expect_keys(structure.kind, dict(values), (*integers, *names))
    expect_integers(dict(values), integers)
    return structure(*(values[field] for field in (*integers, *names)))


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


def sparse_rows(offsets: Tensor, start: int, stop: int) -> tuple[Tensor, slice]:
    """(row offsets of the rows start..stop-1, the place of their values among those of all rows)."""
    part = offsets[start : stop + 1].long()
    return (part - part[0]).to(offsets.dtype), slice(int(part[0]), int(part[-1]))


def sparse_columns(offsets: Tensor, columns: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row offsets, columns counted from `start`, which values stay) of values in the columns start..stop-1."""
    column = columns.long()
    inside = (column >= start) & (column < stop)
    row = torch.repeat_interleave(offsets.long().diff())
    counts = torch.bincount(row[inside], minlength=offsets.numel() - 1)
    part = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(offsets.dtype)
    return part, (column[inside] - start).to(column_dtype(stop - start)), inside


OUTLIER_KEYS = ("outlier_row_offsets", "outlier_columns", "outlier_values")


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

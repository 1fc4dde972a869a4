"""Format `bitmap`, version 1: any weights kept, in any number, one bit per weight to say which; at high sparsity their columns.

Keys of one Linear [N, K] that keeps `kept` weights (docs/formats.md draws them):

    values        fp16, bf16, fp32 or int8 [kept]   row by row, in column order
    row_offsets   int32 [N+1]                       where each row's values start
    mask          uint8 [N, ceil(K / 8)]            bit k % 8 of byte k / 8: column k is kept; or, where that is smaller,
    columns       uint16 [kept]                     int32 where K > 65536; ascending within a row
    scale         fp32 [N]                          with int8 only: weight = value * scale[row]

A stored value may be zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.linear import PackedLinear, dense_and_bias
from ..layouts import Fields, Shape, Shapes
from ..packing import unstructured_mask
from ..structure import (
    FormatError,
    PackedWeight,
    Structure,
    column_dtype,
    expect_ascending_columns,
    expect_row_offsets,
    register_format,
    row_offsets,
    sparse_columns,
    sparse_rows,
)
from .codes import cut_codes, unpack_codes
from .kept_values import checked_weight, scaled, stored_values, value_dtype, value_name

MOST_KEPT = 2**31 - 1
POSITIONS = ("mask", "columns")


@dataclass(frozen=True)
class BitmapStructure(Structure):
    kept: int
    """Number of stored values."""
    values: str = "float16"
    """Their dtype: "float16", "bfloat16", "float32" or "int8"."""
    positions: str = "mask"
    """"mask" (a bit per weight) or "columns" (a number per kept weight)."""

    kind: ClassVar[str] = "bitmap"

    def __post_init__(self) -> None:
        super().__post_init__()
        value_dtype(self.values)
        most = min(self.out_features * self.in_features, MOST_KEPT)
        if not 1 <= self.kept <= most:
            raise FormatError(
                f"{self.kept} weights kept of [{self.out_features}, {self.in_features}]; allowed: 1 to {most}"
            )
        if self.positions not in POSITIONS:
            raise FormatError(f"positions is {self.positions!r}; allowed: {', '.join(map(repr, POSITIONS))}")

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / (self.out_features * self.in_features)

    def tensors(self) -> Shapes:
        n, k = self.out_features, self.in_features
        shapes: Shapes = {
            "values": ((self.kept,), value_dtype(self.values)),
            "row_offsets": ((n + 1,), torch.int32),
        }
        if self.positions == "mask":
            shapes["mask"] = ((n, -(-k // 8)), torch.uint8)
        else:
            shapes["columns"] = ((self.kept,), column_dtype(k))
        if self.values == "int8":
            shapes["scale"] = ((n,), torch.float32)
        return shapes

    def describe(self) -> str:
        return f"sparsity={self.sparsity:.3f}, values={self.values}, positions={self.positions}"


@dataclass(frozen=True, eq=False)
class BitmapWeight(PackedWeight):
    """One sparse matrix of any pattern in checkpoint form. Make it with `pack` (from a pruned matrix) or `from_tensors`."""

    structure_type = BitmapStructure
    fields = ("values", "row_offsets", "mask", "columns", "scale")

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        mask: Tensor | None = None,
        value_dtype: torch.dtype | None = None,
        positions: str | None = None,
    ) -> BitmapWeight:
        """A pruned matrix -> the packed weight.

        Args:
            weight: float [N, K].
            mask: bool [N, K], what is kept; None keeps everything but zero.
            value_dtype: torch.float16, bfloat16, float32, or int8 (with a scale per row); None is the weight's dtype.
            positions: "mask" or "columns"; None is the smaller of the two (columns below one kept weight in 16).

        Raises FormatError if a shape or dtype does not fit or a value is not finite in `value_dtype`.
        """
        weight, mask = checked_weight(weight, mask)
        n, k = weight.shape
        dtype = value_dtype or weight.dtype
        if not bool(mask.any()):  # safetensors and loaders are spared tensors without elements
            mask = mask.clone()
            mask[0, 0] = True
        kept = int(mask.sum())
        if positions is None:
            positions = "columns" if kept * column_dtype(k).itemsize < n * -(-k // 8) else "mask"
        structure = BitmapStructure(n, k, kept, value_name(dtype), positions)
        values, scale = stored_values(weight * mask, dtype)
        tensors = {"values": values[mask], "row_offsets": row_offsets(mask.sum(1))}
        if positions == "mask":
            tensors["mask"] = ops.pack_codes(mask.to(torch.uint8), 1)
        else:
            tensors["columns"] = torch.nonzero(mask)[:, 1].to(column_dtype(k))
        if scale is not None:
            tensors["scale"] = scale
        return cls(structure, tensors)

    @classmethod
    def structure_of(cls, tensors: Fields, out_features: int, in_features: int) -> BitmapStructure:
        if "values" not in tensors:
            raise FormatError(f"the key 'values' is missing; found: {sorted(tensors)}")
        values = tensors["values"]
        positions = "mask" if "mask" in tensors else "columns"
        return BitmapStructure(out_features, in_features, values.numel(), value_name(values.dtype), positions)

    @staticmethod
    def check(structure: BitmapStructure, tensors: Fields) -> None:
        offsets = tensors["row_offsets"].long()
        expect_row_offsets("row_offsets", offsets, structure.kept)
        if structure.positions == "columns":
            expect_ascending_columns("columns", tensors["columns"].long(), offsets, structure.in_features)
            return
        mask = ops.unpack_codes(tensors["mask"], 1, structure.in_features)
        if not torch.equal(mask.sum(1, dtype=torch.int64), offsets.diff()):
            raise FormatError("mask and row_offsets disagree about how many weights a row keeps; the file is damaged")

    @staticmethod
    def decode(field: Fields, shape: Shape) -> Tensor:
        weight = field["values"].new_zeros(shape, dtype=torch.float32)
        weight[_places(field, shape)] = field["values"].float()
        return scaled(weight, field)

    def tensors_of_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        offsets, place = sparse_rows(self.tensors["row_offsets"], start, stop)
        tensors = {"row_offsets": offsets, "values": self.tensors["values"][place]}
        if "mask" in self.tensors:
            tensors["mask"] = self.tensors["mask"][start:stop]
        else:
            tensors["columns"] = self.tensors["columns"][place]
        if "scale" in self.tensors:
            tensors["scale"] = self.tensors["scale"][start:stop]
        return _with_a_value(tensors, self.in_features)

    def tensors_of_columns(self, start: int, stop: int) -> dict[str, Tensor]:
        columns = self.tensors.get("columns")
        if columns is None:
            columns = torch.nonzero(self.mask())[:, 1]
        offsets, column, inside = sparse_columns(self.tensors["row_offsets"], columns, start, stop)
        tensors = {"row_offsets": offsets, "values": self.tensors["values"][inside]}
        if "mask" in self.tensors:
            tensors["mask"] = cut_codes(self.tensors["mask"], 1, start, stop)
        else:
            tensors["columns"] = column
        if "scale" in self.tensors:
            tensors["scale"] = self.tensors["scale"]
        return _with_a_value(tensors, stop - start)

    def mask(self) -> Tensor:
        """bool [N, K]: the places of the stored values."""
        return _places(self.tensors, (self.out_features, self.in_features))


def _places(field: Fields, shape: Shape) -> Tensor:
    if "mask" in field and field["mask"].numel():
        return unpack_codes(field["mask"], 1, shape[1]).bool()
    places = field["values"].new_zeros(shape, dtype=torch.bool)
    places[torch.repeat_interleave(field["row_offsets"].long().diff()), field["columns"].long()] = True
    return places


def _with_a_value(tensors: dict[str, Tensor], in_features: int) -> dict[str, Tensor]:
    """The tensors of a part; where it keeps nothing, a zero at [0, 0]: loaders are spared tensors without elements."""
    if tensors["values"].numel():
        return tensors
    offsets = torch.ones_like(tensors["row_offsets"])
    offsets[0] = 0
    first = {"values": tensors["values"].new_zeros(1), "row_offsets": offsets}
    if "mask" in tensors:
        first["mask"] = tensors["mask"].clone()
        first["mask"][0, 0] = 1
    else:
        first["columns"] = torch.zeros(1, dtype=column_dtype(in_features), device=offsets.device)
    return tensors | first


class SparseLinear(PackedLinear):
    """y = x W^T + bias with any weights of W kept (format `bitmap`), as values in fp16, bf16, fp32 or int8.

    Make one with `from_dense` (of a pruned layer, or by magnitude), `from_weight` (from a `BitmapWeight`) or by loading a
    checkpoint.
    """

    weight_type = BitmapWeight

    @classmethod
    def from_dense(
        cls,
        linear_or_weight: nn.Linear | Tensor,
        sparsity: float | None = None,
        *,
        value_dtype: torch.dtype | None = None,
    ) -> SparseLinear:
        """Pack a layer or matrix [N, K], already pruned or not.

        Args:
            sparsity: share of the weights of each row to drop, the smallest ones, 0 to 1 exclusive; None keeps the weight's own
                zeros, and only those: somebody else's pruning.
            value_dtype: torch.float16, bfloat16, float32 or int8 (one scale per row); None is the weight's dtype.
        """
        dense, bias = dense_and_bias(linear_or_weight)
        mask = None if sparsity is None else unstructured_mask(dense, sparsity)
        packed = BitmapWeight.pack(dense, mask, value_dtype)
        return cls.from_weight(packed, bias, dense.dtype)

    @property
    def sparsity(self) -> float:
        """Share of the weights that are not stored."""
        return self.structure.sparsity


register_format(BitmapStructure, SparseLinear, BitmapWeight)

"""Format `sparse24`, version 1: of every four neighbouring weights of a row two are kept, with 2-bit positions.

Keys of one Linear [N, K], G = ceil(K / 4) groups in a row (docs/formats.md draws them):

    values      fp16, bf16, fp32 or int8 [N, 2 G]   the two kept weights of each group, in column order
    positions   uint8 [N, ceil(G / 2)]              4 bits per group, even groups low: first position | second position << 2
    scale       fp32 [N]                            with int8 only: weight = value * scale[row]

The first position of a group is smaller than its second. A group with fewer than two weights to keep stores zeros; so do the
places beyond K in the last group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.linear import PackedLinear, dense_and_bias
from ..layouts import Fields, Shape, Shapes
from ..packing import GROUP, KEPT, mask_24
from ..structure import FormatError, PackedWeight, Structure, register_format
from .codes import cut_codes, unpack_codes
from .kept_values import checked_weight, scaled, stored_values, value_dtype, value_name


@dataclass(frozen=True)
class Sparse24Structure(Structure):
    values: str = "float16"
    """dtype of the kept weights: "float16", "bfloat16", "float32" or "int8"."""

    kind: ClassVar[str] = "sparse24"

    def __post_init__(self) -> None:
        super().__post_init__()
        value_dtype(self.values)

    @property
    def groups(self) -> int:
        """In a row."""
        return -(-self.in_features // GROUP)

    def tensors(self) -> Shapes:
        n = self.out_features
        shapes: Shapes = {
            "values": ((n, KEPT * self.groups), value_dtype(self.values)),
            "positions": ((n, -(-self.groups // 2)), torch.uint8),
        }
        if self.values == "int8":
            shapes["scale"] = ((n,), torch.float32)
        return shapes

    def describe(self) -> str:
        return f"values={self.values}"


@dataclass(frozen=True, eq=False)
class Sparse24Weight(PackedWeight):
    """One 2:4 sparse matrix in checkpoint form. Make it with `pack` (from a pruned matrix) or `from_tensors`."""

    structure_type = Sparse24Structure
    fields = ("values", "positions", "scale")
    column_unit = GROUP

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor | None = None, value_dtype: torch.dtype | None = None) -> Sparse24Weight:
        """A pruned matrix -> the packed weight.

        Args:
            weight: float [N, K].
            mask: bool [N, K], what is kept; None keeps everything but zero.
            value_dtype: torch.float16, bfloat16, float32, or int8 (with a scale per row); None is the weight's dtype.

        Raises:
            FormatError: more than two weights of a group are kept, or a value is not finite in `value_dtype`.
        """
        weight, mask = checked_weight(weight, mask)
        n, k = weight.shape
        dtype = value_dtype or weight.dtype
        structure = Sparse24Structure(n, k, value_name(dtype))
        places = kept_places(mask)
        values, scale = stored_values(weight * mask, dtype)
        tensors = {
            "values": groups_of_four(values).gather(2, places).reshape(n, -1),
            "positions": ops.pack_codes(position_codes(places), GROUP),
        }
        if scale is not None:
            tensors["scale"] = scale
        return cls(structure, tensors)

    @classmethod
    def structure_of(cls, tensors: Fields, out_features: int, in_features: int) -> Sparse24Structure:
        if "values" not in tensors:
            raise FormatError(f"the key 'values' is missing; found: {sorted(tensors)}")
        return Sparse24Structure(out_features, in_features, value_name(tensors["values"].dtype))

    @staticmethod
    def check(structure: Sparse24Structure, tensors: Fields) -> None:
        check_positions(tensors["positions"], structure.groups)

    @staticmethod
    def decode(field: Fields, shape: Shape) -> Tensor:
        return scaled(spread_24(field["values"].float(), field["positions"], shape[1]), field)

    def tensors_of_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        return {key: tensor[start:stop] for key, tensor in self.tensors.items()}

    def tensors_of_columns(self, start: int, stop: int) -> dict[str, Tensor]:
        first, last = start // GROUP, -(-stop // GROUP)
        return self.tensors | {
            "values": self.tensors["values"][:, KEPT * first : KEPT * last],
            "positions": cut_codes(self.tensors["positions"], GROUP, first, last),
        }

    def mask(self) -> Tensor:
        """bool [N, K]: the places of the stored weights, two in each whole group."""
        return stored_places(self.tensors["positions"], self.out_features, self.in_features)


def kept_places(mask: Tensor) -> Tensor:
    """mask [N, K] -> int64 [N, G, 2]: the places of the kept weights in each group, ascending, filled up with others."""
    groups = groups_of_four(mask)
    kept = groups.sum(-1)
    if int(kept.max()) > KEPT:
        row, group = (int(i) for i in torch.nonzero(kept > KEPT)[0])
        raise FormatError(
            f"row {row} keeps {int(kept[row, group])} of the weights {GROUP * group}..{GROUP * group + GROUP - 1}; 2:4 keeps at "
            "most 2 of 4. Prune the weight to 2:4 first, or use the format bitmap, which keeps any"
        )
    # Stable: kept places in column order first, then the others.
    order = (~groups).to(torch.uint8).argsort(stable=True, dim=-1)
    return order[..., :KEPT].sort(-1).values


def position_codes(places: Tensor) -> Tensor:
    """int64 [N, G, 2] -> uint8 [N, G]: first position | second position << 2."""
    return (places[..., 0] | places[..., 1] << 2).to(torch.uint8)


def check_positions(positions: Tensor, groups: int) -> None:
    codes = ops.unpack_codes(positions, GROUP, groups)
    if bool(((codes & 3) >= (codes >> 2)).any()):
        raise FormatError("positions holds a group whose first position is not below its second; the file is damaged")


def stored_places(positions: Tensor, out_features: int, in_features: int) -> Tensor:
    """bool [N, K]."""
    kept = positions.new_ones(out_features, KEPT * -(-in_features // GROUP), dtype=torch.bool)
    return spread_24(kept, positions, in_features)


def spread_24(kept: Tensor, positions: Tensor, in_features: int) -> Tensor:
    """Two numbers of each group [N, 2 G] -> [N, K], zero elsewhere; in plain torch."""
    groups = kept.shape[1] // KEPT
    code = unpack_codes(positions, GROUP, groups).long()
    spread = kept.new_zeros(kept.shape[0], groups, GROUP)
    spread.scatter_(2, torch.stack([code & 3, code >> 2], 2), kept.view(-1, groups, KEPT))
    return spread.view(kept.shape[0], -1)[:, :in_features]


def groups_of_four(matrix: Tensor) -> Tensor:
    """[N, K] -> [N, G, 4], filled up with zeros."""
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -k % GROUP)).view(n, -1, GROUP)


class Sparse24Linear(PackedLinear):
    """y = x W^T + bias with two of every four neighbouring weights of W kept (format `sparse24`).

    Make one with `from_dense` (of a layer pruned to 2:4, or by magnitude), `from_weight` (from a `Sparse24Weight`) or by
    loading a checkpoint.
    """

    weight_type = Sparse24Weight

    @classmethod
    def from_dense(
        cls, linear_or_weight: nn.Linear | Tensor, *, value_dtype: torch.dtype | None = None
    ) -> Sparse24Linear:
        """Pack a layer or matrix [N, K]: the two weights of the largest magnitude of each four, so a 2:4 pruned one as it is.

        Args:
            value_dtype: torch.float16, bfloat16, float32 or int8 (one scale per row); None is the weight's dtype.
        """
        dense, bias = dense_and_bias(linear_or_weight)
        packed = Sparse24Weight.pack(dense, mask_24(dense), value_dtype)
        return cls.from_weight(packed, bias, dense.dtype)


register_format(Sparse24Structure, Sparse24Linear, Sparse24Weight)

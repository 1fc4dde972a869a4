"""Format `sparse24`, version 1: of every four neighbouring weights of a row two are kept, with 2-bit positions.

Keys of one Linear [N, K], G = ceil(K / 4) groups in a row (docs/formats.md draws them):

    values      fp16, bf16, fp32 or int8 [N, 2 G]   the two kept weights of each group, in column order
    positions   uint8 [N, ceil(G / 2)]              4 bits per group, even groups low: first position | second position << 2
    scale       fp32 [N]                            with int8 only: weight = value * scale[row]

The first position of a group is smaller than its second. A group with fewer than two weights to keep stores zeros; so do the
places beyond K in the last group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..dispatch import SPARSE24, SPARSE24_FIELDS
from .codes import cut_codes
from .kept_values import checked_weight, stored_values, value_dtype, value_name
from .structure import FormatError, PackedWeight, Shapes, Structure, described, expect_all, for_kernels

GROUP = 4
KEPT = 2


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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sparse24Structure:
        return described(cls, values, ("out_features", "in_features"), ("values",))


@dataclass(frozen=True, eq=False)
class Sparse24Weight(PackedWeight):
    """One 2:4 sparse matrix in checkpoint form. Make it with `pack` (from a pruned matrix) or `from_tensors`."""

    layout: ClassVar[str] = SPARSE24
    fields: ClassVar[tuple[str, ...]] = SPARSE24_FIELDS
    column_unit: ClassVar[int] = GROUP

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
            "values": _groups_of_four(values).gather(2, places).reshape(n, -1),
            "positions": ops.pack_codes(position_codes(places), GROUP),
        }
        if scale is not None:
            tensors["scale"] = scale
        return cls(structure, tensors)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> Sparse24Weight:
        """Checkpoint tensors (without the module's prefix) -> the weight, after checking what kernels rely on.

        Raises FormatError that names the key, what it holds and what is allowed.
        """
        if "values" not in tensors:
            raise FormatError(f"the key 'values' is missing; found: {sorted(tensors)}")
        structure = Sparse24Structure(out_features, in_features, value_name(tensors["values"].dtype))
        expect_all(dict(tensors), structure.tensors())
        check_positions(tensors["positions"], structure.groups)
        return cls(structure, {key: for_kernels(tensors[key]) for key in structure.tensors()})

    def _tensors_of_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        return {key: tensor[start:stop] for key, tensor in self.tensors.items()}

    def _tensors_of_columns(self, start: int, stop: int) -> dict[str, Tensor]:
        first, last = start // GROUP, -(-stop // GROUP)
        return self.tensors | {
            "values": self.tensors["values"][:, KEPT * first : KEPT * last],
            "positions": cut_codes(self.tensors["positions"], GROUP, first, last),
        }

    def mask(self) -> Tensor:
        """bool [N, K]: the places of the stored weights, two in each whole group."""
        return stored_places(self.tensors["positions"], self.out_features, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [N, K]."""
        return ops.sparse24_dequantize(self, dtype)


def kept_places(mask: Tensor) -> Tensor:
    """mask [N, K] -> int64 [N, G, 2]: the places of the kept weights in each group, ascending, filled up with others."""
    groups = _groups_of_four(mask)
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
    codes = ops.unpack_codes(positions, GROUP, -(-in_features // GROUP)).long()
    mask = torch.zeros(*codes.shape, GROUP, dtype=torch.bool, device=codes.device)
    mask.scatter_(2, torch.stack([codes & 3, codes >> 2], 2), True)
    return mask.view(out_features, -1)[:, :in_features]


def _groups_of_four(matrix: Tensor) -> Tensor:
    """[N, K] -> [N, G, 4], filled up with zeros."""
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -k % GROUP)).view(n, -1, GROUP)

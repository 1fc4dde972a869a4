"""Format `sparse24_codebook`, version 1: 2:4 sparse, the kept weights as codes into a codebook per column, fp16 outliers.

Keys of one Linear [N, K] of b bits, G = ceil(K / 4) groups in a row (docs/formats.md draws them):

    codes                 uint8 [N, ceil(2 G b / 8)]   of the two kept weights of each group, in column order
    positions             uint8 [N, ceil(G / 2)]       as in `sparse24`
    codebook              fp16  [K, 2**b]
    outlier_row_offsets   int32  [N+1]                 the three outlier keys stand together or not at all, as in `codebook`
    outlier_columns       uint16 [outliers]            int32 where K > 65536
    outlier_values        fp16   [outliers]            the full weight, kept or not

Every whole group keeps two weights; a place beyond K has the code 0 and counts as zero. A codebook per column, since the
position and the 2-bit code of a kept weight are then one index into the 16 partial products of its group (docs/kernels-sparse.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.linear import PackedLinear, dense_and_bias
from ..layouts import Fields, Shape, Shapes
from ..packing import GROUP, KEPT, column_codes_24, mask_24
from ..structure import (
    FormatError,
    PackedWeight,
    Structure,
    check_outliers,
    finite_fp16,
    outlier_places,
    outlier_shapes,
    outliers_of_columns,
    outliers_of_rows,
    packed_outliers,
    register_format,
    require_fp16,
)
from .codes import cut_codes, expect_codes, unpack_codes
from .kept_values import checked_weight
from .sparse24 import check_positions, groups_of_four, kept_places, position_codes, spread_24, stored_places

BITS = (2, 3, 4)


@dataclass(frozen=True)
class Sparse24CodebookStructure(Structure):
    bits: int
    outliers: int = 0

    kind: ClassVar[str] = "sparse24_codebook"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise FormatError(f"bits is {self.bits}; allowed: {', '.join(map(str, BITS))}")
        outlier_shapes(self.out_features, self.in_features, self.outliers)

    @property
    def groups(self) -> int:
        """In a row."""
        return -(-self.in_features // GROUP)

    def tensors(self) -> Shapes:
        n, k = self.out_features, self.in_features
        return {
            "codes": ((n, -(-KEPT * self.groups * self.bits // 8)), torch.uint8),
            "positions": ((n, -(-self.groups // 2)), torch.uint8),
            "codebook": ((k, 1 << self.bits), torch.float16),
        } | outlier_shapes(n, k, self.outliers)

    def describe(self) -> str:
        return f"bits={self.bits}, outliers={self.outliers}"


@dataclass(frozen=True, eq=False)
class Sparse24CodebookWeight(PackedWeight):
    """One 2:4 sparse, quantized matrix in checkpoint form. Make it with `pack` (from codes) or `from_tensors`."""

    structure_type = Sparse24CodebookStructure
    fields = ("codes", "positions", "codebook", "outlier_row_offsets", "outlier_columns", "outlier_values")
    column_unit = GROUP

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        mask: Tensor,
        codebook: Tensor,
        *,
        outlier_mask: Tensor | None = None,
        outlier_weight: Tensor | None = None,
    ) -> Sparse24CodebookWeight:
        """Codes of any algorithm -> the packed weight.

        Args:
            codes: uint8 [N, K]; only those of kept weights are stored.
            mask: bool [N, K], what is kept: two weights of each group of four columns, in a last group of one column that one.
            codebook: float [K, 2**b], b = 2, 3 or 4; stored as fp16.
            outlier_mask: bool [N, K]; where true the weight is `outlier_weight[r, k]`, kept or not, stored as fp16.
            outlier_weight: float [N, K]; needed with outlier_mask.

        Raises:
            FormatError: shapes or dtypes do not fit, a code does not fit its width, a value is not finite in fp16.
        """
        expect_codes(codes)
        n, k = codes.shape
        if tuple(codebook.shape) not in [(k, 1 << bits) for bits in BITS]:
            raise FormatError(f"codebook is {tuple(codebook.shape)}; it must be [K, 4, 8 or 16] = [{k}, 4, 8 or 16]")
        bits = codebook.shape[1].bit_length() - 1
        _, mask = checked_weight(torch.ones_like(codes, dtype=torch.float16), mask)
        places = kept_places(mask)
        wanted = torch.full((places.shape[1],), KEPT, device=mask.device)
        wanted[-1] = min(KEPT, k - GROUP * (len(wanted) - 1))
        missing = torch.nonzero(groups_of_four(mask).sum(-1) < wanted)
        if len(missing):
            row, group = (int(i) for i in missing[0])
            raise FormatError(
                f"row {row} keeps fewer than two of the weights {GROUP * group}..{GROUP * group + GROUP - 1}; a code cannot "
                "say zero: keep two of each four, the largest ones if need be"
            )
        kept = groups_of_four(codes * mask).gather(2, places)
        try:
            packed = ops.pack_codes(kept.reshape(n, -1), bits)
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"the codes do not fit the codebook's {bits} bits: {error}") from error
        codebook = codebook.to(codes.device)
        tensors = {
            "codes": packed,
            "positions": ops.pack_codes(position_codes(places), GROUP),
            "codebook": finite_fp16("codebook", codebook),
        }
        require_fp16(
            "the codebook",
            codebook,
            "this format has no scale: rescale the weight, or use sparse24 with value_dtype=torch.int8",
        )
        return cls.from_tensors(tensors | packed_outliers(outlier_mask, outlier_weight, codes), n, k)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor, bits: int, *, outlier_fraction: float = 0.0
    ) -> Sparse24CodebookWeight:
        """Pack `weight` [N, K], of which `mask` keeps two of every four neighbours, as `packing.column_codes_24` fits it."""
        if bits not in BITS:
            raise ValueError(f"bits is {bits}; allowed: {', '.join(map(str, BITS))}")
        return cls.pack(**column_codes_24(weight, mask, bits, outlier_fraction)).to(weight.device)

    @classmethod
    def structure_of(cls, tensors: Fields, out_features: int, in_features: int) -> Sparse24CodebookStructure:
        book = tensors.get("codebook")
        if book is None or book.dim() != 2 or book.shape[1] not in [1 << bits for bits in BITS]:
            found = "missing" if book is None else f"{book.dtype} {tuple(book.shape)}"
            raise FormatError(f"codebook is {found}; it must be torch.float16 [{in_features}, 4, 8 or 16]")
        outliers = tensors["outlier_values"].numel() if "outlier_values" in tensors else 0
        return Sparse24CodebookStructure(out_features, in_features, book.shape[1].bit_length() - 1, outliers)

    @staticmethod
    def check(structure: Sparse24CodebookStructure, tensors: Fields) -> None:
        check_positions(tensors["positions"], structure.groups)
        check_outliers(tensors, structure.in_features)

    @staticmethod
    def decode(field: Fields, shape: Shape) -> Tensor:
        codebook = field["codebook"].float()
        bits = codebook.shape[1].bit_length() - 1
        kept = unpack_codes(field["codes"], bits, KEPT * -(-shape[1] // GROUP))
        # A code's place in the row first, its value then: 0 says that nothing is kept there.
        place = spread_24(kept.float() + 1, field["positions"], shape[1]).long()
        column = torch.arange(shape[1], device=place.device)
        weight = torch.where(place > 0, codebook[column, (place - 1).clamp_min(0)], 0.0)
        if field["outlier_values"].numel():
            weight[outlier_places(field)] = field["outlier_values"].float()
        return weight

    def tensors_of_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        by_row = {key: self.tensors[key][start:stop] for key in ("codes", "positions")}
        outliers = outliers_of_rows(self.tensors, start, stop)
        return by_row | {"codebook": self.tensors["codebook"]} | outliers

    def tensors_of_columns(self, start: int, stop: int) -> dict[str, Tensor]:
        first, last = start // GROUP, -(-stop // GROUP)
        return {
            "codes": cut_codes(self.tensors["codes"], self.structure.bits, KEPT * first, KEPT * last),
            "positions": cut_codes(self.tensors["positions"], GROUP, first, last),
            "codebook": self.tensors["codebook"][start:stop],
        } | outliers_of_columns(self.tensors, start, stop)

    def mask(self) -> Tensor:
        """bool [N, K]: what is kept by the 2:4 pattern; outliers may stand elsewhere."""
        return stored_places(self.tensors["positions"], self.out_features, self.in_features)

    def unpack(self) -> Tensor:
        """The codes of the kept weights, uint8 [N, K]; 0 elsewhere."""
        codes = ops.unpack_codes(self.tensors["codes"], self.structure.bits, KEPT * self.structure.groups)
        return spread_24(codes, self.tensors["positions"], self.in_features).contiguous()


class Sparse24CodebookLinear(PackedLinear):
    """y = x W^T + bias with two of every four neighbouring weights of W kept, as codes (format `sparse24_codebook`).

    Make one with `from_dense` (data-free), `from_weight` (from a `Sparse24CodebookWeight`) or by loading a checkpoint.
    """

    weight_type = Sparse24CodebookWeight

    @classmethod
    def from_dense(
        cls, linear_or_weight: nn.Linear | Tensor, bits: int = 4, *, outlier_fraction: float = 0.0
    ) -> Sparse24CodebookLinear:
        """Pack a layer or matrix [N, K] without calibration data: the two largest weights of each four, so a 2:4 pruned one's
        own, and exact 1-D k-means over what each column keeps.

        Args:
            bits: 2, 3 or 4.
            outlier_fraction: share of the kept weights of each column kept in fp16, those farthest out, 0 to 0.5.
        """
        dense, bias = dense_and_bias(linear_or_weight)
        packed = Sparse24CodebookWeight.from_dense(dense, mask_24(dense), bits, outlier_fraction=outlier_fraction)
        return cls.from_weight(packed, bias, dense.dtype)


register_format(Sparse24CodebookStructure, Sparse24CodebookLinear, Sparse24CodebookWeight)

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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..dispatch import SPARSE24_CODEBOOK, SPARSE24_CODEBOOK_FIELDS
from .codes import cut_codes
from .kept_values import checked_weight
from .sparse24 import GROUP, KEPT, check_positions, kept_places, position_codes, stored_places
from .structure import (
    FormatError,
    PackedWeight,
    Shapes,
    Structure,
    column_dtype,
    described,
    expect_all,
    expect_ascending_columns,
    expect_row_offsets,
    finite_fp16,
    for_kernels,
    outliers_of_columns,
    outliers_of_rows,
)

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
        if not 0 <= self.outliers <= self.out_features * self.in_features:
            raise FormatError(f"{self.outliers} outliers in [{self.out_features}, {self.in_features}]")

    @property
    def groups(self) -> int:
        """In a row."""
        return -(-self.in_features // GROUP)

    def tensors(self) -> Shapes:
        n, k = self.out_features, self.in_features
        shapes: Shapes = {
            "codes": ((n, -(-KEPT * self.groups * self.bits // 8)), torch.uint8),
            "positions": ((n, -(-self.groups // 2)), torch.uint8),
            "codebook": ((k, 1 << self.bits), torch.float16),
        }
        if self.outliers:
            shapes["outlier_row_offsets"] = ((n + 1,), torch.int32)
            shapes["outlier_columns"] = ((self.outliers,), column_dtype(k))
            shapes["outlier_values"] = ((self.outliers,), torch.float16)
        return shapes

    def describe(self) -> str:
        return f"bits={self.bits}, outliers={self.outliers}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sparse24CodebookStructure:
        return described(cls, values, ("out_features", "in_features", "bits", "outliers"))


@dataclass(frozen=True, eq=False)
class Sparse24CodebookWeight(PackedWeight):
    """One 2:4 sparse, quantized matrix in checkpoint form. Make it with `pack` (from codes) or `from_tensors`."""

    layout: ClassVar[str] = SPARSE24_CODEBOOK
    fields: ClassVar[tuple[str, ...]] = SPARSE24_CODEBOOK_FIELDS
    column_unit: ClassVar[int] = GROUP

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
        if codes.dtype != torch.uint8 or codes.dim() != 2 or not codes.numel():
            raise FormatError(
                f"codes is {codes.dtype} {tuple(codes.shape)}; it must be a non-empty torch.uint8 matrix [N, K]"
            )
        n, k = codes.shape
        if tuple(codebook.shape) not in [(k, 1 << bits) for bits in BITS]:
            raise FormatError(f"codebook is {tuple(codebook.shape)}; it must be [K, 4, 8 or 16] = [{k}, 4, 8 or 16]")
        bits = codebook.shape[1].bit_length() - 1
        _, mask = checked_weight(torch.ones_like(codes, dtype=torch.float16), mask)
        places = kept_places(mask)
        wanted = torch.full((places.shape[1],), KEPT, device=mask.device)
        wanted[-1] = min(KEPT, k - GROUP * (len(wanted) - 1))
        missing = torch.nonzero(torch.nn.functional.pad(mask, (0, -k % GROUP)).view(n, -1, GROUP).sum(-1) < wanted)
        if len(missing):
            row, group = (int(i) for i in missing[0])
            raise FormatError(
                f"row {row} keeps fewer than two of the weights {GROUP * group}..{GROUP * group + GROUP - 1}; a code cannot "
                "say zero: keep two of each four, the largest ones if need be"
            )
        kept = torch.nn.functional.pad(codes * mask, (0, -k % GROUP)).view(n, -1, GROUP).gather(2, places)
        try:
            packed = ops.pack_codes(kept.reshape(n, -1), bits)
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"the codes do not fit the codebook's {bits} bits: {error}") from error
        tensors = {
            "codes": packed,
            "positions": ops.pack_codes(position_codes(places), GROUP),
            "codebook": finite_fp16("codebook", codebook.to(codes.device)),
        }
        if outlier_mask is not None and bool(outlier_mask.any()):
            if outlier_mask.shape != codes.shape or outlier_weight is None or outlier_weight.shape != codes.shape:
                given = None if outlier_weight is None else tuple(outlier_weight.shape)
                raise FormatError(
                    f"outlier_mask {tuple(outlier_mask.shape)} and outlier_weight {given} must both be [N, K] = [{n}, {k}]"
                )
            row_of, column = torch.nonzero(outlier_mask.to(codes.device), as_tuple=True)
            offsets = torch.zeros(n + 1, dtype=torch.int64, device=codes.device)
            offsets[1:] = torch.bincount(row_of, minlength=n).cumsum(0)
            tensors["outlier_row_offsets"] = offsets.to(torch.int32)
            tensors["outlier_columns"] = column.to(column_dtype(k))
            tensors["outlier_values"] = finite_fp16("outlier_weight", outlier_weight.to(codes.device)[row_of, column])
        return cls.from_tensors(tensors, n, k)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> Sparse24CodebookWeight:
        """Checkpoint tensors (without the module's prefix) -> the weight, after checking what kernels rely on.

        Raises FormatError that names the key, what it holds and what is allowed.
        """
        book = tensors.get("codebook")
        if book is None or book.dim() != 2 or book.shape[1] not in [1 << bits for bits in BITS]:
            found = "missing" if book is None else f"{book.dtype} {tuple(book.shape)}"
            raise FormatError(f"codebook is {found}; it must be torch.float16 [{in_features}, 4, 8 or 16]")
        outliers = tensors["outlier_values"].numel() if "outlier_values" in tensors else 0
        structure = Sparse24CodebookStructure(out_features, in_features, book.shape[1].bit_length() - 1, outliers)
        expect_all(dict(tensors), structure.tensors())
        check_positions(tensors["positions"], structure.groups)
        if outliers:
            offsets = tensors["outlier_row_offsets"].long()
            expect_row_offsets("outlier_row_offsets", offsets, outliers)
            expect_ascending_columns("outlier_columns", tensors["outlier_columns"].long(), offsets, in_features)
        return cls(structure, {key: for_kernels(tensors[key]) for key in structure.tensors()})

    def _tensors_of_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        by_row = {key: self.tensors[key][start:stop] for key in ("codes", "positions")}
        outliers = outliers_of_rows(self.tensors, start, stop)
        return by_row | {"codebook": self.tensors["codebook"]} | outliers

    def _tensors_of_columns(self, start: int, stop: int) -> dict[str, Tensor]:
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
        n, k, groups = self.out_features, self.in_features, self.structure.groups
        codes = ops.unpack_codes(self.tensors["codes"], self.structure.bits, KEPT * groups).view(n, groups, KEPT)
        position = ops.unpack_codes(self.tensors["positions"], GROUP, groups).long()
        spread = codes.new_zeros(n, groups, GROUP)
        spread.scatter_(2, torch.stack([position & 3, position >> 2], 2), codes)
        return spread.view(n, -1)[:, :k].contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [N, K]."""
        return ops.sparse24_codebook_dequantize(self, dtype)

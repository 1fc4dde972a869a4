"""Format `codebook`, version 1: a k-means codebook per input column, 1..8 bits per column, outliers kept in fp16.

Keys of one Linear [N, K], under the module's name (docs/formats.md draws them):

    codes_b{b}            uint8  [N, ceil(K_b*b/8)]   for each width b that occurs: columns of that width in ascending order
    column_bits           uint8  [K]
    codebook              fp16   [segments, sum_k 2**column_bits[k]]   in column order
    segment_rows          int32  [segments]           rows of each segment; a segment has codebooks of its own
    outlier_row_offsets   int32  [N+1]                the three outlier keys stand together or not at all
    outlier_columns       uint16 [outliers]           int32 where K > 65536; ascending within a row
    outlier_values        fp16   [outliers]           the full weight; the code under it stays valid
    row_scale             fp16   [N]                  optional

W[r, k] = row_scale[r] * codebook[segment of r][k][code], except at an outlier, where W[r, k] = its value.
Source of the method: CLAQ (arXiv 2405.17233); the byte layout is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.embedding import PackedEmbedding
from ..layers.linear import PackedLinear, dense_and_bias
from ..layouts import Fields, Shape, Shapes, WeightOperand, readable
from ..operations import CODEBOOK_GRADIENT
from ..packing import column_codes
from ..structure import (
    FP16_LOSS,
    FormatError,
    PackedWeight,
    Structure,
    check_outliers,
    column_dtype,
    expect,
    finite_fp16,
    lost_in_fp16,
    outlier_places,
    outlier_shapes,
    outliers_of_columns,
    outliers_of_rows,
    packed_outliers,
    register_format,
    require_fp16,
    row_offsets,
)
from .codes import cut_codes, expect_codes, unpack_codes

WIDTHS = range(1, 9)
CODES = tuple(f"codes_b{bits}" for bits in WIDTHS)


@dataclass(frozen=True)
class CodebookStructure(Structure):
    columns: tuple[int, ...]
    """Number of columns of width 1, 2, ..., 8."""
    segments: int = 1
    outliers: int = 0
    row_scale: bool = False

    kind: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.columns) != 8 or min(self.columns) < 0 or sum(self.columns) != self.in_features:
            raise FormatError(
                f"columns per width {self.columns} must be 8 counts that sum to in_features = {self.in_features}"
            )
        if not 1 <= self.segments <= self.out_features:
            raise FormatError(f"{self.segments} segments; allowed: 1 to out_features = {self.out_features}")
        outlier_shapes(self.out_features, self.in_features, self.outliers)

    @staticmethod
    def bytes_of(
        rows: int, columns: int, counts: Mapping[float, float], outliers: int | None = None, row_scale: bool = False
    ) -> float:
        """Bytes of a weight [rows, columns] of one segment with so many columns of each width; whole bytes of codes where eight
        divides each count. With outliers (None: without) it has their row offsets. What a column of b bits, or an outlier, adds
        is the difference of two calls."""
        codes = sum(count * (rows * bits / 8 + 2 * 2**bits) for bits, count in counts.items())
        kept = 0 if outliers is None else outliers * (2 + column_dtype(columns).itemsize) + 4 * (rows + 1)
        return columns + 4 + 2 * rows * row_scale + codes + kept

    def tensors(self) -> Shapes:
        n, k = self.out_features, self.in_features
        entries = sum(count << bits for bits, count in self.counts.items())
        shapes: Shapes = {
            "column_bits": ((k,), torch.uint8),
            "codebook": ((self.segments, entries), torch.float16),
            "segment_rows": ((self.segments,), torch.int32),
        }
        shapes |= outlier_shapes(n, k, self.outliers)
        if self.row_scale:
            shapes["row_scale"] = ((n,), torch.float16)
        return shapes | {
            f"codes_b{bits}": ((n, -(-count * bits // 8)), torch.uint8) for bits, count in self.counts.items()
        }

    @property
    def counts(self) -> dict[int, int]:
        """Width -> number of columns, of those that occur."""
        return {bits: count for bits, count in enumerate(self.columns, 1) if count}

    def describe(self) -> str:
        return f"columns_per_width={self.counts}, outliers={self.outliers}"

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"columns": {str(bits): count for bits, count in self.counts.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CodebookStructure:
        widths = values.get("columns")
        if not isinstance(widths, Mapping) or not set(widths) <= set("12345678"):
            raise FormatError(f"columns is {widths!r}; it must map widths '1' to '8' to counts")
        counts = tuple(widths.get(str(bits), 0) for bits in WIDTHS)
        if any(type(count) is not int for count in counts):
            raise FormatError(f"columns is {dict(widths)}; counts must be integers")
        return super().from_dict({**values, "columns": counts})


@dataclass(frozen=True, eq=False)
class CodebookWeight(PackedWeight):
    """One packed matrix in checkpoint form. Make it with `pack` (from codes) or `from_tensors` (from a checkpoint)."""

    structure: CodebookStructure

    structure_type = CodebookStructure
    fields = (
        *("column_bits", "codebook", "segment_rows"),
        *("outlier_row_offsets", "outlier_columns", "outlier_values", "row_scale"),
        *CODES,
    )

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        codebook: Tensor,
        column_bits: Tensor,
        *,
        segment_rows: Tensor | None = None,
        outlier_mask: Tensor | None = None,
        outlier_weight: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> CodebookWeight:
        """Codes and codebooks of any algorithm -> the packed weight.

        Args:
            codes: uint8 [N, K], codes[r, k] < 2**column_bits[k].
            codebook: float [segments, sum_k 2**column_bits[k]] in column order (1-D for one segment); stored as fp16.
            column_bits: integers [K], 1..8.
            segment_rows: integers [segments] that sum to N; None is one segment.
            outlier_mask: bool [N, K]; where true the weight is `outlier_weight[r, k]`, stored as fp16.
            outlier_weight: float [N, K]; needed with outlier_mask.
            row_scale: float [N], multiplies every weight but the outliers; stored as fp16.

        Raises:
            FormatError: shapes or dtypes do not fit, a code does not fit its width, a value is not finite in fp16.
        """
        expect_codes(codes)
        n, k = codes.shape
        if tuple(column_bits.shape) != (k,) or column_bits.is_floating_point():
            raise FormatError(f"column_bits is {column_bits.dtype} {tuple(column_bits.shape)}; it must be {k} integers")
        _expect_widths(column_bits)
        device = codes.device
        column_bits = column_bits.to(device, torch.uint8)
        if segment_rows is None:
            segment_rows = torch.tensor([n], device=device)
        tensors = {
            "column_bits": column_bits,
            "codebook": _codebook_fp16(codebook.to(device), column_bits, len(segment_rows)),
            "segment_rows": segment_rows.to(device, torch.int32),
        }
        if row_scale is not None:
            require_fp16("row_scale", row_scale[:, None], "rescale the weight")
            tensors["row_scale"] = finite_fp16("row_scale", row_scale.to(device))
        tensors |= packed_outliers(outlier_mask, outlier_weight, codes)
        return cls.from_tensors(tensors | pack_widths(codes, column_bits), n, k)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        column_bits: Tensor,
        *,
        outlier_fraction: float = 0.0,
        row_scale: bool = False,
        row_weights: Tensor | None = None,
    ) -> CodebookWeight:
        """Pack `weight` [N, K] with `column_bits` [K] bits per column, as `packing.column_codes` fits it."""
        fitted = column_codes(weight, column_bits, outlier_fraction, row_scale, row_weights)
        return cls.pack(**fitted).to(weight.device)

    @classmethod
    def structure_of(cls, tensors: Fields, out_features: int, in_features: int) -> CodebookStructure:
        for key in ("column_bits", "codebook", "segment_rows"):
            if key not in tensors:
                raise FormatError(f"the key {key!r} is missing; found: {sorted(tensors)}")
        bits = tensors["column_bits"]
        expect("column_bits", bits, (in_features,), torch.uint8)
        _expect_widths(bits)
        return CodebookStructure(
            out_features,
            in_features,
            tuple(torch.bincount(bits.long(), minlength=9)[1:9].tolist()),
            segments=tensors["segment_rows"].numel(),
            outliers=tensors["outlier_values"].numel() if "outlier_values" in tensors else 0,
            row_scale="row_scale" in tensors,
        )

    @staticmethod
    def check(structure: CodebookStructure, tensors: Fields) -> None:
        rows = tensors["segment_rows"]
        if int(rows.min()) < 1 or int(rows.sum()) != structure.out_features:
            raise FormatError(
                f"segment_rows is {rows.tolist()}; each must be positive, and their sum out_features = {structure.out_features}"
            )
        check_outliers(tensors, structure.in_features)

    @staticmethod
    def decode(field: Fields, shape: Shape) -> Tensor:
        weight = _decode_codes(field, slice(None), shape)
        if field["outlier_values"].numel():
            weight[outlier_places(field)] = field["outlier_values"].float()
        return weight

    @classmethod
    def decode_rows(cls, field: Fields, shape: Shape, ids: Tensor) -> Tensor:
        weight = _decode_codes(field, ids, (len(ids), shape[1]))
        if field["outlier_values"].numel():
            row, column = outlier_places(field)
            place, outlier = torch.nonzero(ids[:, None] == row, as_tuple=True)
            weight[place, column[outlier]] = field["outlier_values"].float()[outlier]
        return weight

    @classmethod
    def gradients(cls, weight_gradient: Tensor, operand: WeightOperand) -> dict[str, Tensor]:
        """Of the codebook, the outliers and the row scales; codes stay as they are."""
        field = cls.named(operand)
        outliers = outlier_places(field) if field["outlier_values"].numel() else None
        found = {}
        if field["codebook"].requires_grad:
            found["codebook"] = codebook_gradient(weight_gradient, operand)
        if outliers is not None and field["outlier_values"].requires_grad:
            found["outlier_values"] = weight_gradient[outliers]
        if field["row_scale"].requires_grad:
            # Without its scale a weight is its centroid; outliers have no scale.
            plain = field | {"row_scale": torch.ones_like(field["row_scale"])}
            tensors = tuple(plain[name].detach() for name in cls.fields)
            centroids = ops.packed_dequantize(replace(operand, tensors=tensors))
            if outliers is not None:
                centroids[outliers] = 0
            found["row_scale"] = (weight_gradient * centroids).sum(1)
        return found

    @classmethod
    def concatenate(cls, weights: Sequence[CodebookWeight]) -> CodebookWeight:
        """The weights below one another, as one matrix [sum of N, K]: q, k and v, or gate and up, in a single call.

        Every weight keeps its codebooks, as segments of its own. Where only some have a row scale, the others' is 1.

        Raises FormatError if there is none, or if their in_features, column_bits or devices differ.
        """
        if not weights:
            raise FormatError("no weight was given; concatenate takes at least one")
        first = weights[0]
        for i, weight in enumerate(weights[1:], 1):
            if weight.column_bits.device != first.column_bits.device:
                raise FormatError(
                    f"weight {i} is on {weight.column_bits.device}, weight 0 on {first.column_bits.device}; move them to one"
                )
            if not torch.equal(weight.column_bits, first.column_bits):
                raise FormatError(
                    f"weight {i} has {weight.in_features} columns of widths {weight.structure.columns}, weight 0 "
                    f"{first.in_features} of {first.structure.columns}; rows can share a call only if every column has the same "
                    "width in all of them: compress them together"
                )
        parts = [weight.tensors for weight in weights]
        tensors = {
            key: torch.cat([part[key] for part in parts])
            for key in ("codebook", "segment_rows", *(key for key in first.tensors if key.startswith("codes_b")))
        } | {"column_bits": first.column_bits}
        if any("row_scale" in part for part in parts):
            one = first.column_bits.new_ones(1, dtype=torch.float16)
            tensors["row_scale"] = torch.cat([w.tensors.get("row_scale", one.expand(w.out_features)) for w in weights])
        if any(weight.structure.outliers for weight in weights):
            none = first.column_bits.new_zeros(1, dtype=torch.int32)
            offsets = [w.tensors.get("outlier_row_offsets", none.expand(w.out_features + 1)) for w in weights]
            counts = [of_rows.diff() for of_rows in offsets]
            tensors["outlier_row_offsets"] = row_offsets(torch.cat(counts))
            for key in ("outlier_columns", "outlier_values"):
                tensors[key] = torch.cat([part[key] for part in parts if key in part])
        return cls.from_tensors(tensors, sum(weight.out_features for weight in weights), first.in_features)

    # ---- parts of it ------------------------------------------------------------------------------------------------

    def tensors_of_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        last = self.tensors["segment_rows"].long().cumsum(0)
        rows = last.clamp(start, stop) - (last - self.tensors["segment_rows"].long()).clamp(start, stop)
        tensors = {
            "column_bits": self.column_bits,
            "codebook": self.tensors["codebook"][rows > 0],
            "segment_rows": rows[rows > 0].to(torch.int32),
        }
        by_row = [key for key in self.tensors if key == "row_scale" or key.startswith("codes_b")]
        tensors |= {key: self.tensors[key][start:stop] for key in by_row}
        return tensors | outliers_of_rows(self.tensors, start, stop)

    def tensors_of_columns(self, start: int, stop: int) -> dict[str, Tensor]:
        entry = torch.nn.functional.pad((1 << self.column_bits.long()).cumsum(0), (1, 0))
        tensors = {
            "column_bits": self.column_bits[start:stop],
            "codebook": self.tensors["codebook"][:, int(entry[start]) : int(entry[stop])],
            "segment_rows": self.tensors["segment_rows"],
        }
        if "row_scale" in self.tensors:
            tensors["row_scale"] = self.tensors["row_scale"]
        for bits in self.column_bits[start:stop].unique().tolist():
            of_width = self.column_bits == bits
            first, last = int(of_width[:start].sum()), int(of_width[:stop].sum())
            tensors[f"codes_b{bits}"] = cut_codes(self.tensors[f"codes_b{bits}"], bits, first, last)
        return tensors | outliers_of_columns(self.tensors, start, stop)

    # ---- what it holds ----------------------------------------------------------------------------------------------

    @property
    def column_bits(self) -> Tensor:
        return self.tensors["column_bits"]

    def unpack(self) -> Tensor:
        """The codes, uint8 [N, K], those under outliers too."""
        codes = self.column_bits.new_empty(self.out_features, self.in_features)
        for bits, count in self.structure.counts.items():
            codes[:, self.column_bits == bits] = ops.unpack_codes(self.tensors[f"codes_b{bits}"], bits, count)
        return codes


def _expect_widths(column_bits: Tensor) -> None:
    if int(column_bits.min()) < 1 or int(column_bits.max()) > 8:
        raise FormatError(f"column_bits holds {int(column_bits.min())}..{int(column_bits.max())}; allowed: 1 to 8")


def _decode_codes(field: Fields, rows: slice | Tensor, shape: Shape) -> Tensor:
    """fp32, of the shape [rows, K]: all but the outliers."""
    column_bits, codebook = field["column_bits"].long(), field["codebook"].float()
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    row_segment = torch.repeat_interleave(field["segment_rows"].long())[rows]
    weight = codebook.new_empty(shape)
    for bits in WIDTHS:
        columns = torch.nonzero(column_bits == bits).flatten()
        if columns.numel():
            codes = unpack_codes(field[f"codes_b{bits}"][rows], bits, columns.numel()).long()
            weight[:, columns] = codebook[row_segment[:, None], first_entry[columns] + codes]
    if field["row_scale"].numel():
        weight *= field["row_scale"][rows].float()[:, None]
    return weight


def pack_widths(codes: Tensor, column_bits: Tensor) -> dict[str, Tensor]:
    """Codes uint8 [N, K] -> the `codes_b*` tensors of a checkpoint."""
    found = {}
    for bits in column_bits.unique().tolist():
        try:
            found[f"codes_b{bits}"] = ops.pack_codes(codes[:, column_bits == bits].contiguous(), bits)
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"the codes of the {bits}-bit columns do not fit: {error}") from error
    return found


def _codebook_fp16(codebook: Tensor, column_bits: Tensor, segments: int) -> Tensor:
    """[segments, entries] in fp16. A codebook that fp16 would distort by more than 1 % of its largest entry is refused."""
    entries = int((1 << column_bits.long()).sum())
    if codebook.numel() != segments * entries:
        raise FormatError(
            f"codebook is {tuple(codebook.shape)}; it must be [segments, sum of 2**column_bits] = [{segments}, {entries}]"
        )
    codebook = codebook.reshape(segments, entries).float()
    half = finite_fp16("codebook", codebook)
    width = 1 << column_bits.long()
    first_entry = torch.cumsum(width, 0) - width
    for entries in width.unique().tolist():
        columns = torch.nonzero(width == entries).flatten()
        place = first_entry[columns, None] + torch.arange(entries, device=codebook.device)
        lost = lost_in_fp16(codebook[:, place])
        if bool(lost.any()):
            segment, column = lost.nonzero()[0].tolist()
            reach = float(codebook[segment, place[column]].abs().max())
            raise FormatError(
                f"the codebook of column {int(columns[column])} reaches only to {reach:g}, where fp16 is off by more than "
                f"{FP16_LOSS:.0%}; rescale the weight, or give row_scale"
            )
    return half


# ---- codebook_gradient ----------------------------------------------------------------------------------------------


def codebook_gradient(weight_gradient: Tensor, weight: CodebookWeight | WeightOperand) -> Tensor:
    """dL/dcodebook from dL/dW: for each centroid the sum of row_scale * dL/dW over the weights that use it.

    Args:
        weight_gradient: float32 [N, K].
        weight: in the checkpoint layout (`CodebookWeight.checkpoint_operand()`): other layouts have no codebook to train.

    Returns:
        float32, shaped as the codebook: [segments, sum_k 2**column_bits[k]]. Outliers have no centroid and count nowhere.

    Raises:
        ValueError: weight_gradient is not float32 [N, K]. NoKernelError: another layout.
    """
    operand = weight if isinstance(weight, WeightOperand) else weight.operand()
    if tuple(weight_gradient.shape) != operand.shape or weight_gradient.dtype != torch.float32:
        raise ValueError(
            f"weight_gradient is {weight_gradient.dtype} {tuple(weight_gradient.shape)}; it must be torch.float32 {operand.shape}"
        )
    return torch.ops.pyllmq.codebook_gradient(weight_gradient, operand.tensors, operand.layout)


def _codebook_gradient(weight_gradient: Tensor, weight: list[Tensor], layout: str) -> Tensor:
    operand = ops.operand_of(weight, "codebook", layout, (), weight_gradient.shape)
    kernel = CODEBOOK_GRADIENT.kernel_for(weight_gradient.device, torch.float32, layout)
    field = CodebookWeight.named(operand)
    if field["outlier_values"].numel():
        weight_gradient = weight_gradient.index_put(outlier_places(field), weight_gradient.new_zeros(()))
    return kernel(readable(weight_gradient), operand)


def _no_second_derivative(*_: object) -> None:
    raise ops.second_derivative("codebook_gradient")


ops.define(
    "codebook_gradient(Tensor weight_gradient, Tensor[] weight, str layout) -> Tensor",
    _codebook_gradient,
    lambda gradient, weight, layout: torch.empty_like(
        weight[CodebookWeight.fields.index("codebook")], dtype=torch.float32
    ),
    _no_second_derivative,
    lambda ctx, inputs, output: None,
)


class CodebookLinear(PackedLinear):
    """y = x W^T + bias with W packed as codes and one codebook per input column (format `codebook`).

    Make one with `from_dense` (data-free), `from_weight` (from a `CodebookWeight`) or by loading a checkpoint.
    """

    weight_type = CodebookWeight

    @classmethod
    def from_dense(
        cls,
        linear_or_weight: nn.Linear | Tensor,
        bits: int | None = None,
        *,
        column_bits: Sequence[int] | Tensor | None = None,
        outlier_fraction: float = 0.0,
        row_scale: bool = False,
    ) -> CodebookLinear:
        """Pack a dense layer or matrix [N, K] without calibration data: exact 1-D k-means in every column.

        Args:
            bits: one width for all columns, 1..8; or give
            column_bits: a width for each column, [K].
            outlier_fraction: share of the weights kept in fp16, those farthest from the middle of their column, 0..0.5.
            row_scale: divide each row by its root mean square first and store that as fp16.

        Raises ValueError for anything out of range, weights that are not finite, or weights beyond fp16.
        """
        dense, bias = dense_and_bias(linear_or_weight)
        widths = _widths(dense, bits, column_bits)
        packed = CodebookWeight.from_dense(dense, widths, outlier_fraction=outlier_fraction, row_scale=row_scale)
        return cls.from_weight(packed, bias, dense.dtype)


class CodebookEmbedding(PackedEmbedding):
    """An embedding whose weight [vocabulary, hidden] is codes and one codebook per hidden feature (format `codebook`).

    A codebook serves the whole vocabulary, so it costs nothing: 16 * 2**bits / vocabulary bits a weight. Make one with `from_dense`
    (data-free), `from_weight` or by loading a checkpoint; `swap_embedding` puts it into a model.
    """

    weight_type = CodebookWeight

    @classmethod
    def from_dense(
        cls,
        embedding: nn.Embedding,
        bits: int | None = None,
        *,
        column_bits: Sequence[int] | Tensor | None = None,
        outlier_fraction: float = 0.0,
        row_scale: bool = True,
        row_weights: Tensor | None = None,
    ) -> CodebookEmbedding:
        """Pack a dense embedding: exact 1-D k-means in every column.

        Args:
            bits, column_bits, outlier_fraction, row_scale: as for `CodebookLinear.from_dense`.
            row_weights: float [vocabulary] >= 0, such as how often each token occurs; None weights all alike.

        Raises ValueError as `CodebookLinear.from_dense`, and for an embedding with `max_norm` or sparse gradients.
        """
        dense = embedding.weight.detach()
        packed = CodebookWeight.from_dense(
            dense,
            _widths(dense, bits, column_bits),
            outlier_fraction=outlier_fraction,
            row_scale=row_scale,
            row_weights=row_weights,
        )
        return cls.from_weight(packed, None, dense.dtype).take_over(embedding)


def _widths(dense: Tensor, bits: int | None, column_bits: Sequence[int] | Tensor | None) -> Tensor:
    """[K] on the CPU."""
    if (bits is None) == (column_bits is None):
        raise ValueError(
            f"give either bits or column_bits, not both or neither; given bits={bits}, column_bits={column_bits}"
        )
    return torch.as_tensor([bits] * dense.shape[1] if column_bits is None else column_bits, device="cpu")


register_format(CodebookStructure, CodebookLinear, CodebookWeight, CodebookEmbedding)

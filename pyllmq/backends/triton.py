"""The Triton back end: GPUs that `_cuda` was not built for, other vendors' included. triton is imported at the first call.

Its machine layout ``triton`` is one uint8 blob that starts with a header, and views of it that kernels take one by one: codes
transposed (see triton_kernels/codebook_decode.py), and for each width a table of its columns. Made once by torch operations.
With TRITON_INTERPRET=1 the kernels run on the CPU, slowly, for tests; the interpreter's bfloat16 is wrong. See
docs/kernels-triton.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from ..dispatch import CHECKPOINT, CHECKPOINT_FIELDS, Kernel, Problem, Support, WeightOperand, register
from . import reference

LAYOUT = "triton"
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""Where its tensors must lie. torch calls AMD's GPUs cuda too; triton decides once, at its import, whether it interprets."""

MAX_FUSED_TOKENS = 64
"""Up to this many tokens codes are decoded on the way to the multiplication. Predicted, not measured: beyond it, writing the
decoded matrix once (2 bytes a weight) costs less than decoding it in every block of 32 tokens."""

_MAGIC, _VERSION, _ALIGNMENT = 0x54524C50, 1, 256
_HEADER = ("magic", "version", "rows", "columns", "segments", "outliers", "row_scale", "wide_outlier_columns")
_WIDTHS = range(1, 9)
_OLDEST_CAPABILITY = (8, 0)


def available() -> tuple[bool, str]:
    if find_spec("triton") is None:
        return False, "triton is not installed (pip install 'pyllmq-kernels[triton]')"
    if DEVICE == "cpu":
        return True, "Triton's interpreter on the CPU (TRITON_INTERPRET=1), for tests"
    if not torch.cuda.is_available():
        return False, "torch finds no GPU here"
    if torch.version.hip is None and torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        found, wanted = (".".join(map(str, c)) for c in (torch.cuda.get_device_capability(), _OLDEST_CAPABILITY))
        return False, f"needs compute capability {wanted}, this GPU has {found}"
    return True, f"kernels are compiled at their first call, for {torch.cuda.get_device_name()}"


# ---- the layout -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Group:
    """The columns of one width; a slot is a place among them."""

    codes: Tensor
    """uint8 [ceil(slots * bits / 8), N], the checkpoint's codes transposed."""
    columns: Tensor
    """int32 [slots]: the column of each slot."""
    codebook: Tensor
    """fp16 [segments, slots, 2**bits]."""

    @property
    def slots(self) -> int:
        return self.columns.shape[0]

    @property
    def one_segment(self) -> bool:
        return self.codebook.shape[0] == 1

    @property
    def bits(self) -> int:
        return self.codebook.shape[2].bit_length() - 1


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of an operand by name; absent ones are empty."""

    blob: Tensor
    row_segment: Tensor
    row_scale: Tensor
    outlier_row_offsets: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor
    outlier_replaced: Tensor
    """fp16 [outliers]: the centroid that the code under each outlier says."""
    groups: tuple[Group, ...]
    """One for each width that occurs, narrow to wide."""
    out_features: int
    in_features: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], out_features: int, in_features: int) -> Layout:
        blob, row_segment, row_scale, row_offsets, columns, values, replaced, *rest = tensors
        groups = tuple(Group(*rest[i : i + 3]) for i in range(0, len(rest), 3))
        outliers = (row_offsets, columns, values, replaced)
        return cls(blob, row_segment, row_scale, *outliers, groups, out_features, in_features)

    @property
    def outliers(self) -> int:
        return self.outlier_values.shape[0]

    @property
    def has_row_scale(self) -> bool:
        return self.row_scale.shape[0] > 0


def _sections(header: list[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every tensor in the blob, in order, behind the header."""
    _, _, rows, columns, segments, outliers, row_scale, wide, *counts = header
    sections: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((rows,), torch.int32),
        ((rows * row_scale,), torch.float16),
        ((rows + 1 if outliers else 0,), torch.int32),
        ((outliers,), torch.int32 if wide else torch.uint16),
        ((outliers,), torch.float16),
        ((outliers,), torch.float16),
    ]
    for bits, count in zip(_WIDTHS, counts, strict=True):
        if count:
            sections.append(((-(-count * bits // 8), rows), torch.uint8))
            sections.append(((count,), torch.int32))
            sections.append(((segments, count, 1 << bits), torch.float16))
    return sections


def aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _header_bytes() -> int:
    return aligned(8 * (len(_HEADER) + len(_WIDTHS)))


def operand_from_blob(blob: Tensor, out_features: int, in_features: int) -> WeightOperand:
    """The operand whose tensors are views of `blob`. Reads the header, so it waits for the device: at load, never in a call.

    Raises ValueError if the blob is no such layout, is cut off, or holds a weight of another shape.
    """
    words = len(_HEADER) + len(_WIDTHS)
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() < _header_bytes():
        raise ValueError(
            f"a layout {LAYOUT!r} is a uint8 vector of at least {_header_bytes()} bytes, given: {blob.dtype} {tuple(blob.shape)}"
        )
    header = blob[: 8 * words].view(torch.int64).tolist()
    if header[:2] != [_MAGIC, _VERSION]:
        raise ValueError(f"this blob is no layout {LAYOUT!r} of version {_VERSION}: it begins with {header[:2]}")
    if header[2:4] != [out_features, in_features]:
        raise ValueError(
            f"the layout holds a weight of shape {header[2:4]}, but was given as [{out_features}, {in_features}]"
        )
    return WeightOperand(
        LAYOUT, (blob, *blob_views(blob, _header_bytes(), _sections(header))), out_features, in_features
    )


def blob_views(blob: Tensor, begin: int, sections: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Views of what lies in a blob from `begin` on, aligned; ValueError if it is cut off."""
    views = []
    for shape, dtype in sections:
        nbytes = math.prod(shape) * dtype.itemsize
        if begin + nbytes > blob.numel():
            raise ValueError(f"the layout is cut off: {blob.numel()} bytes, and a tensor ends at {begin + nbytes}")
        views.append(blob[begin : begin + nbytes].view(dtype).view(shape))
        begin += aligned(nbytes)
    return views


def prepack(operand: WeightOperand) -> WeightOperand:
    """Checkpoint layout -> `triton` layout, on the device where the tensors lie. They are read, not kept."""
    field = dict(zip(CHECKPOINT_FIELDS, operand.tensors, strict=True))
    rows, columns = operand.out_features, operand.in_features
    column_bits, segment_rows = field["column_bits"].long(), field["segment_rows"].long()
    counts = torch.bincount(column_bits, minlength=9)[1:9].tolist()
    outliers, wide = field["outlier_values"].numel(), field["outlier_columns"].dtype == torch.int32
    has_row_scale = field["row_scale"].numel() > 0
    header = [_MAGIC, _VERSION, rows, columns, len(segment_rows), outliers, int(has_row_scale), int(wide), *counts]
    nbytes = _header_bytes() + sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in _sections(header))
    blob = torch.zeros(nbytes, dtype=torch.uint8, device=column_bits.device)
    blob[: 8 * len(header)] = torch.tensor(header).view(torch.uint8).to(blob.device)
    packed = operand_from_blob(blob, rows, columns)
    layout = Layout.of(packed.tensors, rows, columns)

    layout.row_segment.copy_(torch.repeat_interleave(segment_rows))
    layout.row_scale.copy_(field["row_scale"])
    first_entry = torch.cumsum(1 << column_bits, 0) - (1 << column_bits)
    for group in layout.groups:
        columns_of = torch.nonzero(column_bits == group.bits).flatten()
        group.codes.copy_(field[f"codes_b{group.bits}"].T)
        group.columns.copy_(columns_of)
        entry = first_entry[columns_of, None] + torch.arange(1 << group.bits, device=blob.device)
        group.codebook.copy_(field["codebook"][:, entry])
    if outliers:
        layout.outlier_row_offsets.copy_(field["outlier_row_offsets"])
        layout.outlier_columns.copy_(field["outlier_columns"])
        layout.outlier_values.copy_(field["outlier_values"])
        layout.outlier_replaced.copy_(_centroids_under_outliers(layout))
    return packed


def _centroids_under_outliers(layout: Layout) -> Tensor:
    row = torch.repeat_interleave(layout.outlier_row_offsets.long().diff())
    column = layout.outlier_columns.int()
    found = torch.empty_like(layout.outlier_values)
    for group in layout.groups:
        here = torch.isin(column, group.columns)
        slot, of_row = torch.searchsorted(group.columns, column[here]), row[here]
        bit, last = slot * group.bits, group.codes.shape[0] - 1
        two_bytes = group.codes[bit // 8, of_row].int() | group.codes[(bit // 8 + 1).clamp_max(last), of_row].int() << 8
        code = two_bytes >> bit % 8 & (1 << group.bits) - 1
        found[here] = group.codebook[layout.row_segment[of_row].long(), slot, code.long()]
    return found


def layout_codes(operand: WeightOperand) -> Tensor:
    """The codes in a `triton` operand, uint8 [N, K]: what a checkpoint is rebuilt from."""
    layout = Layout.of(operand.tensors, operand.out_features, operand.in_features)
    codes = layout.blob.new_empty(operand.out_features, operand.in_features)
    for group in layout.groups:
        codes[:, group.columns.long()] = reference.unpack_codes(group.codes.T, group.bits, group.slots)
    return codes


# ---- kernels --------------------------------------------------------------------------------------------------------


def codebook_linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    out_features: int,
    in_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """Sums in fp32 whatever `precision` says: a GPU gains nothing from coarser tables."""
    from ..triton_kernels.codebook_linear import codebook_linear as run

    if not x.shape[0]:
        return x.new_empty(0, out_features)
    with _on_device_of(x):
        return run(x.contiguous(), Layout.of(tensors, out_features, in_features), bias)


def codebook_dequantize(tensors: Sequence[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    from ..triton_kernels.codebook_dequantize import codebook_dequantize as run

    with _on_device_of(tensors[0]):
        return run(Layout.of(tensors, out_features, in_features), dtype)


def codebook_gradient(
    weight_gradient: Tensor, tensors: Sequence[Tensor], out_features: int, in_features: int
) -> Tensor:
    from ..triton_kernels.codebook_gradient import codebook_gradient as run

    field = dict(zip(CHECKPOINT_FIELDS, tensors, strict=True))
    if field["outlier_values"].numel():
        weight_gradient = weight_gradient.clone()
        weight_gradient[reference.outlier_places(field)] = 0
    with _on_device_of(weight_gradient):
        return run(weight_gradient.contiguous(), field)


def decode_and_matmul(
    x: Tensor,
    tensors: Sequence[Tensor],
    out_features: int,
    in_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """The weight decoded to x's dtype, then torch's matmul. Where that dtype cannot hold a decoded weight it is rounded."""
    weight = codebook_dequantize(tensors, out_features, in_features, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def kmeans_1d_layers(sums: Tensor, masses: Tensor, k_max: int) -> Tensor:
    """The dynamic program, a launch per level; see `reference.Layers`."""
    from ..triton_kernels.kmeans_1d import kmeans_1d_layers as run

    with _on_device_of(sums):
        return run(sums, masses, k_max)


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    from ..triton_kernels.softmax_cdist_l1 import softmax_cdist_l1 as run

    with _on_device_of(student_logits):
        return run(student_logits.contiguous(), teacher_logits.contiguous(), temperature)


def softmax_cdist_l1_backward(
    grad: Tensor,
    logits: Tensor,
    other_logits: Tensor,
    statistics: Tensor,
    other_statistics: Tensor,
    temperature: float,
) -> Tensor:
    from ..triton_kernels.softmax_cdist_l1 import softmax_cdist_l1_backward as run

    grad, logits, other_logits = grad.contiguous(), logits.contiguous(), other_logits.contiguous()
    with _on_device_of(logits):
        return run(grad, logits, other_logits, statistics.contiguous(), other_statistics.contiguous(), temperature)


def _on_device_of(tensor: Tensor):
    """Triton launches on the current device, whatever its arguments say."""
    return torch.cuda.device_of(tensor)


def _reads_layout(problem: Problem) -> Support:
    if problem.layout != LAYOUT:
        wanted = f"reads the layout {LAYOUT!r}, this weight is {problem.layout!r}"
        return False, wanted + ("; CodebookWeight.operand() prepacks it" if problem.layout == CHECKPOINT else "")
    return _on_device(problem)


def _on_device(problem: Problem) -> Support:
    if problem.device != DEVICE:
        return False, f"needs tensors on {DEVICE}, these are on {problem.device}"
    return available()


def _reads_checkpoint(problem: Problem) -> Support:
    if problem.layout != CHECKPOINT:
        return False, f"reads the layout {CHECKPOINT!r}, this weight is prepacked as {problem.layout!r}"
    return _on_device(problem)


def _takes_dtype(problem: Problem) -> Support:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"takes float32, bfloat16 and float16, not {problem.dtype}"
    return _on_device(problem)


def _few_tokens(problem: Problem) -> Support:
    if problem.tokens > MAX_FUSED_TOKENS:
        return False, f"serves up to {MAX_FUSED_TOKENS} tokens, here {problem.tokens}"
    return _reads_layout(problem)


def _finds_optimum(problem: Problem) -> Support:
    if problem.layout == "lloyd":
        return False, "finds the optimum, not what k-means++ and Lloyd's iteration find"
    return _on_device(problem)


def register_kernels() -> None:
    for op, name, supports, run, because in (
        (
            "codebook_linear",
            "triton.fused",
            _few_tokens,
            codebook_linear,
            "decodes on the way to the multiplication (limit predicted, not measured)",
        ),
        (
            "codebook_linear",
            "triton.decode_and_matmul",
            _reads_layout,
            decode_and_matmul,
            "decoding is paid once for all tokens",
        ),
        (
            "codebook_dequantize",
            "triton.dequantize",
            _reads_layout,
            codebook_dequantize,
            "one pass over the codes, on any GPU that Triton knows",
        ),
        (
            "codebook_gradient",
            "triton.codebook_gradient",
            _reads_checkpoint,
            codebook_gradient,
            "sums in registers where a column has at most 16 centroids, else atomics (predicted, not measured)",
        ),
        (
            "pack_codes",
            "triton.pack_codes",
            _on_device,
            reference.pack_codes,
            "plain torch: once, when a weight is made",
        ),
        ("unpack_codes", "triton.unpack_codes", _on_device, reference.unpack_codes, "plain torch: never in a forward"),
        (
            "kmeans_1d",
            "triton.kmeans_1d",
            _finds_optimum,
            partial(reference.kmeans_1d, find_layers=kmeans_1d_layers),
            "a launch per level of the dynamic program; torch sorts and looks codes up",
        ),
        (
            "kmeans_1d_errors",
            "triton.kmeans_1d_errors",
            _finds_optimum,
            partial(reference.kmeans_1d_errors, find_layers=kmeans_1d_layers),
            "a launch per level of the dynamic program; torch sorts",
        ),
        (
            "softmax_cdist_l1",
            "triton.softmax_cdist_l1",
            _takes_dtype,
            softmax_cdist_l1,
            "two instructions a pair, no probabilities in memory (not measured)",
        ),
        (
            "softmax_cdist_l1_backward",
            "triton.softmax_cdist_l1_backward",
            _takes_dtype,
            softmax_cdist_l1_backward,
            "no probabilities in memory (not measured)",
        ),
    ):
        register(Kernel(op, name, supports, run, because))

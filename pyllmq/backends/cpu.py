"""The C++ back end: scalar and AVX2 kernels chosen at run time, on a thread pool of its own.

Its machine layout ``cpu`` is one uint8 blob that starts with a header (magic, version, sizes); it is made once when a layer
is loaded and holds everything but the bias. See docs/kernels-cpu.md.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..dispatch import CHECKPOINT, CHECKPOINT_FIELDS, PRECISIONS, Kernel, Problem, Support, WeightOperand, register
from .reference import outlier_places

LAYOUT = "cpu"
DEVICE = "cpu"

_PRECISION_CODE = {name: code for code, name in enumerate(PRECISIONS)}
_KMEANS_CODE = {"exact": 0, "windowed": 1, "lloyd": 2}
"""KMeans1dMethod in csrc/kmeans/cpu/kmeans_1d.h."""
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> tuple[bool, str]:
    try:
        from .. import _cpu
    except ImportError as error:
        return False, f"pyllmq._cpu could not be imported ({error}); reinstall pyllmq-kernels with a C++20 compiler"
    return True, f"{_cpu.isa()} kernels, {torch.get_num_threads()} threads"


@cache
def _extension() -> ModuleType:
    from .. import _cpu  # an import statement at every call would cost 1 us

    return _cpu


def kernels() -> ModuleType:
    """The extension module, its thread pool as large as torch's (`torch.set_num_threads` is respected at every call)."""
    _cpu = _extension()
    threads = torch.get_num_threads()
    if _cpu.num_threads() != threads:
        _cpu.set_num_threads(threads)
    return _cpu


HUGE_PAGE = 2 << 20
"""Bytes. A layout of at least one such page gets memory of its own, aligned to it and advised to the kernel as huge pages:
4096x4096 at 4 bits from memory takes 246 us on them and 359 on pages of 4 KiB (AVX-512, 2 threads)."""


def empty_layout(size: int) -> Tensor:
    """Uninitialised uint8 memory for a layout, aligned to 64 bytes."""
    whole_pages = size // HUGE_PAGE * HUGE_PAGE
    if whole_pages == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory` alive
    start = -whole.data_ptr() % HUGE_PAGE
    with suppress(OSError):  # a kernel without transparent huge pages: slower, nothing else
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole_pages)  # not the rest: a half-used huge page would waste memory
    return whole[start : start + size]


def copy_layout(operand: WeightOperand) -> WeightOperand:
    """The same weight in memory of its own."""
    (blob,) = operand.tensors
    return WeightOperand(
        operand.layout, (empty_layout(blob.numel()).copy_(blob),), operand.out_features, operand.in_features
    )


def prepack(operand: WeightOperand) -> WeightOperand:
    """Checkpoint layout -> `cpu` layout. The checkpoint tensors are read, not kept."""
    _cpu = kernels()
    field = {name: t.contiguous() for name, t in zip(CHECKPOINT_FIELDS, operand.tensors, strict=True)}
    outliers = field["outlier_values"].numel()
    rows, columns = operand.out_features, operand.in_features
    segment_rows = field["segment_rows"]
    size = _cpu.codebook_layout_bytes(
        rows, columns, field["column_bits"].data_ptr(), segment_rows.data_ptr(), segment_rows.numel(), outliers
    )
    blob = empty_layout(size)
    _cpu.codebook_layout_pack(
        blob.data_ptr(),
        size,
        rows,
        columns,
        field["column_bits"].data_ptr(),
        segment_rows.data_ptr(),
        segment_rows.numel(),
        [t.data_ptr() if t.numel() else 0 for t in (field[f"codes_b{bits}"] for bits in range(1, 9))],
        field["codebook"].data_ptr(),
        field["row_scale"].data_ptr() if field["row_scale"].numel() else 0,
        field["outlier_row_offsets"].data_ptr() if outliers else 0,
        field["outlier_columns"].data_ptr() if outliers else 0,
        field["outlier_columns"].element_size(),
        field["outlier_values"].data_ptr() if outliers else 0,
    )
    return WeightOperand(LAYOUT, (blob,), rows, columns)


_bound: dict[tuple[str, int, int], tuple[Any, weakref.ref[Tensor]]] = {}
"""(class, address, bytes) of a layout -> its operand object, while the tensor lives that holds the layout."""


def bound(kind: str, blob: Tensor, out_features: int, in_features: int) -> Any:
    """The `_cpu.CodebookOperand` or `_cpu.SparseOperand` (`kind` names the class) of a layout, made once for each.

    It reads the memory of `blob`, which must outlive it. Raises ValueError where the blob is no intact layout of that kind,
    or one of another shape: kernels read x and write y by it.
    """
    key = (kind, blob.data_ptr(), blob.numel())
    found = _bound.get(key)
    if found is not None and found[0].is_intact:
        operand = found[0]
    else:
        operand = getattr(_extension(), kind)(*key[1:])
        _bound[key] = operand, weakref.ref(blob, lambda _: _bound.pop(key, None))
    if operand.rows != out_features or operand.columns != in_features:
        raise ValueError(
            f"the layout holds a weight of shape [{operand.rows}, {operand.columns}], but was given as "
            f"[{out_features}, {in_features}]"
        )
    return operand


def run_linear(
    kind: str, x: Tensor, blob: Tensor, out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    """y = x W^T + bias by a layout of any kind."""
    operand = bound(kind, blob, out_features, in_features)
    kernels()
    x = x.contiguous()
    tokens, dtype = x.shape[0], x.dtype
    y = torch.empty(tokens, out_features, dtype=dtype, device=DEVICE)
    bias_pointer, bias_dtype = (0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODE[bias.dtype])
    operand.linear(
        x.data_ptr(), DTYPE_CODE[dtype], tokens, bias_pointer, bias_dtype, y.data_ptr(), _PRECISION_CODE[precision]
    )
    return y


def layout_codes(operand: WeightOperand) -> Tensor:
    """The codes in a `cpu` operand, uint8 [N, K]: what a checkpoint is rebuilt from."""
    kernels()
    codes = torch.empty(operand.out_features, operand.in_features, dtype=torch.uint8)
    bound("CodebookOperand", operand.tensors[0], operand.out_features, operand.in_features).codes(codes.data_ptr())
    return codes


def codebook_linear(
    x: Tensor, tensors: list[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    return run_linear("CodebookOperand", x, tensors[0], out_features, in_features, bias, precision)


def codebook_linear_path(operand: WeightOperand, dtype: torch.dtype, tokens: int, precision: str) -> str:
    """What `codebook_linear` does for this many tokens: "tables" of partial products, or "decode" once and multiply."""
    weight = bound("CodebookOperand", operand.tensors[0], operand.out_features, operand.in_features)
    return weight.path(DTYPE_CODE[dtype], tokens, _PRECISION_CODE[precision])


def codebook_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    kernels()
    operand = bound("CodebookOperand", tensors[0], out_features, in_features)
    weight = torch.empty(out_features, in_features, dtype=dtype, device=DEVICE)
    operand.dequantize(0, out_features, weight.data_ptr(), DTYPE_CODE[dtype])
    return weight


def _checkpoint_arguments(tensors: list[Tensor], out_features: int, in_features: int) -> tuple[Any, ...]:
    """(arguments that `codebook_decode` and `codebook_gradient` share, tensors that must outlive the call)."""
    field = {name: t.detach().contiguous() for name, t in zip(CHECKPOINT_FIELDS, tensors, strict=True)}
    scale = field["row_scale"].float()
    codes = [field[f"codes_b{bits}"] for bits in range(1, 9)]
    arguments = (
        out_features,
        in_features,
        field["column_bits"].data_ptr(),
        field["segment_rows"].data_ptr(),
        field["segment_rows"].numel(),
        [t.data_ptr() if t.numel() else 0 for t in codes],
        scale.data_ptr() if scale.numel() else 0,
    )
    return arguments, (field, scale, codes)


def decode_checkpoint(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    arguments, keep = _checkpoint_arguments(tensors, out_features, in_features)
    field = keep[0]
    codebook = field["codebook"].float()
    weight = torch.empty(out_features, in_features)
    kernels().codebook_decode(*arguments, codebook.data_ptr(), weight.data_ptr())
    if field["outlier_values"].numel():
        weight[outlier_places(field)] = field["outlier_values"].float()
    return weight.to(dtype)


def decode_checkpoint_and_matmul(
    x: Tensor, tensors: list[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    """The weight decoded to fp32, then torch's matmul in fp32, whatever `precision` says."""
    weight = decode_checkpoint(tensors, out_features, in_features, torch.float32)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def codebook_gradient(weight_gradient: Tensor, tensors: list[Tensor], out_features: int, in_features: int) -> Tensor:
    arguments, keep = _checkpoint_arguments(tensors, out_features, in_features)
    field = keep[0]
    if field["outlier_values"].numel():
        weight_gradient = weight_gradient.clone()
        weight_gradient[outlier_places(field)] = 0
    gradient = torch.empty(field["codebook"].shape)
    kernels().codebook_gradient(*arguments, weight_gradient.contiguous().data_ptr(), gradient.data_ptr())
    return gradient


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    _cpu = kernels()
    rows, columns = codes.shape
    codes = codes.contiguous()
    packed = torch.empty(rows, -(-columns * bits // 8), dtype=torch.uint8)
    _cpu.pack_codes(codes.data_ptr(), packed.data_ptr(), rows, columns, bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    _cpu = kernels()
    packed = packed.contiguous()
    codes = torch.empty(packed.shape[0], columns, dtype=torch.uint8)
    _cpu.unpack_codes(packed.data_ptr(), codes.data_ptr(), packed.shape[0], columns, bits)
    return codes


def fit_columns(
    block: Tensor,
    coupling: Tensor,
    pivot: Tensor,
    row_weights: Tensor,
    row_scale: Tensor,
    bits: Tensor,
    kept_counts: Tensor,
    stored: Tensor,
    codes: Tensor,
    kept: Tensor,
    centroids: Tensor,
    method: str,
    descend: bool,
) -> tuple[Tensor, float]:
    """(moves [B, N], decrease of the objective); csrc/fit_columns/cpu/fit_columns.h says what is read and what is written.

    Everything contiguous but `coupling`, whose rows may lie apart. Raises OverflowError with the position of a column that
    the sweep finds beyond fp16.
    """
    moves = torch.empty_like(block)
    pointers = (pivot, row_weights, row_scale, bits, kept_counts, stored, codes, kept, centroids, moves)
    decrease = kernels().fit_columns(
        *block.shape,
        descend,
        _KMEANS_CODE[method],
        block.data_ptr(),
        coupling.data_ptr(),
        coupling.stride(0),
        *(t.data_ptr() for t in pointers),
    )
    return moves, decrease


def _cdist_arguments(
    logits: Tensor, other_logits: Tensor, statistics: Tensor, other_statistics: Tensor, temperature: float
) -> tuple:
    batch, rows, columns = logits.shape
    return (
        logits.data_ptr(),
        DTYPE_CODE[logits.dtype],
        other_logits.data_ptr(),
        DTYPE_CODE[other_logits.dtype],
        batch,
        rows,
        other_logits.shape[1],
        columns,
        1 / temperature,
        statistics.data_ptr(),
        other_statistics.data_ptr(),
    )


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    student_logits, teacher_logits = student_logits.contiguous(), teacher_logits.contiguous()
    statistics, teacher_statistics = (
        torch.empty(*logits.shape[:2], 2, dtype=torch.float32) for logits in (student_logits, teacher_logits)
    )
    batch, rows, _ = student_logits.shape
    distance = torch.empty(batch, rows, teacher_logits.shape[1], dtype=torch.float32)
    kernels().softmax_cdist_l1(
        *_cdist_arguments(student_logits, teacher_logits, statistics, teacher_statistics, temperature),
        distance.data_ptr(),
    )
    return distance, statistics, teacher_statistics


def softmax_cdist_l1_backward(
    grad: Tensor,
    logits: Tensor,
    other_logits: Tensor,
    statistics: Tensor,
    other_statistics: Tensor,
    temperature: float,
) -> Tensor:
    logits, other_logits, grad = logits.contiguous(), other_logits.contiguous(), grad.contiguous()
    statistics, other_statistics = statistics.contiguous(), other_statistics.contiguous()
    logits_grad = torch.empty_like(logits)
    kernels().softmax_cdist_l1_backward(
        *_cdist_arguments(logits, other_logits, statistics, other_statistics, temperature),
        grad.data_ptr(),
        logits_grad.data_ptr(),
    )
    return logits_grad


def kmeans_1d(
    values: Tensor,
    weights: Tensor | None,
    ks: Sequence[int],
    method: str,
    seed: int,
    half_centroids: bool,
    packed: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Values on another device travel here and the results back: 5 bytes a value."""
    problems, n = values.shape
    row_bytes = [-(-n * max(1, (k - 1).bit_length()) // 8) if packed else n for k in ks]
    centroids = [torch.empty(problems, k) for k in ks]
    codes = [torch.empty(problems, nbytes, dtype=torch.uint8) for nbytes in row_bytes]
    pointers = [[t.data_ptr() for t in tensors] for tensors in (centroids, codes)]
    _kmeans_1d(values, weights, ks, method, seed, half_centroids, packed, *pointers, 0)
    return [(c.to(values.device), q.to(values.device)) for c, q in zip(centroids, codes, strict=True)]


def kmeans_1d_errors(values: Tensor, weights: Tensor | None, ks: Sequence[int], method: str) -> Tensor:
    errors = torch.empty(values.shape[0], len(ks), dtype=torch.float64)
    _kmeans_1d(values, weights, ks, method, 0, False, False, [], [], errors.data_ptr())
    return errors.to(values.device)


def _kmeans_1d(values: Tensor, weights: Tensor | None, ks: Sequence[int], method: str, *rest: object) -> None:
    values = values.to(DEVICE)
    weights = None if weights is None else weights.to(DEVICE)
    stride = values.shape[1] if weights is not None and weights.dim() == 2 else 0
    pointer = 0 if weights is None else weights.data_ptr()
    kernels().kmeans_1d(values.data_ptr(), pointer, stride, *values.shape, list(ks), _KMEANS_CODE[method], *rest)


def _on_cpu(problem: Problem) -> Support:
    if problem.device != DEVICE:
        return False, f"needs tensors on the CPU, these are on {problem.device}"
    return available()


def _reads_layout(problem: Problem) -> Support:
    if problem.layout != LAYOUT:
        wanted = f"reads the layout {LAYOUT!r}, this weight is {problem.layout!r}"
        return False, wanted + ("; CodebookWeight.operand() prepacks it" if problem.layout == CHECKPOINT else "")
    return _takes_dtype(problem)


def _takes_dtype(problem: Problem) -> Support:
    if problem.dtype not in DTYPE_CODE:
        return False, f"takes float32, bfloat16 and float16, not {problem.dtype}"
    return _on_cpu(problem)


def _reads_checkpoint(problem: Problem) -> Support:
    if problem.layout != CHECKPOINT:
        return False, f"reads the layout {CHECKPOINT!r}, this weight is prepacked as {problem.layout!r}"
    return _on_cpu(problem)


def _from_another_device(problem: Problem) -> Support:
    return (False, "needs values, not a meta tensor") if problem.device == "meta" else available()


def register_kernels() -> None:
    for op, name, supports, run, because in (
        (
            "codebook_linear",
            "cpu.codebook_linear",
            _reads_layout,
            codebook_linear,
            "tables of partial products or decode-once, by widths, tokens and precision (kPathCost)",
        ),
        (
            "codebook_dequantize",
            "cpu.dequantize",
            _reads_layout,
            codebook_dequantize,
            "decodes at the speed of the stores",
        ),
        (
            "codebook_linear",
            "cpu.decode_checkpoint_and_matmul",
            _reads_checkpoint,
            decode_checkpoint_and_matmul,
            "training: the codebook changes at every step, a layout would be made anew",
        ),
        (
            "codebook_dequantize",
            "cpu.decode_checkpoint",
            _reads_checkpoint,
            decode_checkpoint,
            "threaded, straight from the packed codes",
        ),
        (
            "codebook_gradient",
            "cpu.codebook_gradient",
            _reads_checkpoint,
            codebook_gradient,
            "threaded by columns, straight from the packed codes; sums in fp64",
        ),
        ("pack_codes", "cpu.pack_codes", _on_cpu, pack_codes, "threaded"),
        ("unpack_codes", "cpu.unpack_codes", _on_cpu, unpack_codes, "threaded"),
        (
            "softmax_cdist_l1",
            "cpu.softmax_cdist_l1",
            _takes_dtype,
            softmax_cdist_l1,
            "two instructions a pair, probabilities only in the cache",
        ),
        (
            "softmax_cdist_l1_backward",
            "cpu.softmax_cdist_l1_backward",
            _takes_dtype,
            softmax_cdist_l1_backward,
            "three instructions a pair, probabilities only in the cache",
        ),
        ("kmeans_1d", "cpu.kmeans_1d", _on_cpu, kmeans_1d, "a problem per thread"),
        ("kmeans_1d_errors", "cpu.kmeans_1d_errors", _on_cpu, kmeans_1d_errors, "a problem per thread"),
        (
            "fit_columns",
            "cpu.fit_columns",
            _on_cpu,
            fit_columns,
            "a block of columns without a step of Python: 4 of 5 parts of the time went there at N = 384",
        ),
    ):
        register(Kernel(op, name, supports, run, because))


def register_kernels_for_other_devices() -> None:
    """Behind the rows of the back ends that serve those devices themselves."""
    because = "moving a value (5 bytes there and back) costs less than clustering it by plain torch"
    for op, name, run in (
        ("kmeans_1d", "cpu.kmeans_1d_moved", kmeans_1d),
        ("kmeans_1d_errors", "cpu.kmeans_1d_errors_moved", kmeans_1d_errors),
    ):
        register(Kernel(op, name, _from_another_device, run, because))

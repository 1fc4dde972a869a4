"""The CUDA back end: C++ kernels for compute capability 8.0 and up, built with nvcc, without libtorch.

Its machine layout ``cuda`` is one uint8 blob in device memory, made on the host when a layer is loaded and moved there; it
holds everything but the bias. Nothing here waits for the device, so calls can be captured in CUDA graphs.
See docs/kernels-cuda.md.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..dispatch import CHECKPOINT, CHECKPOINT_FIELDS, Kernel, Problem, Support, WeightOperand, register
from . import reference

LAYOUT = "cuda"

DEVICE = "cuda"
"""The device type that the kernels serve."""

MAX_FUSED_TOKENS = 64
"""Up to this many tokens the codes are decoded anew for every 16 tokens (8 in fp32), beyond that once for all of them.

Predicted from instruction counts, for 4 bits at 4.3 TB/s: 16 tokens cost at most 2.2 times the reading of the codes, so 64
cost 2.2 times the reading of an fp16 matrix; decoding to memory and multiplying from there moves 2.25 times as much.
"""

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_counters: dict[tuple[torch.device, int], Tensor] = {}
"""For each device and stream, the counters with which blocks find out who comes last; every kernel leaves them zero."""


def available() -> tuple[bool, str]:
    """Asks the driver, so it is called when a kernel is chosen, never at import."""
    try:
        from .. import _cuda
    except ImportError as error:
        return False, f"pyllmq._cuda was not built ({error}); install with nvcc on PATH, or PYLLMQ_CUDA=1 to insist"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} is built for CPUs only; install a build of torch for CUDA"
    problem = _cuda.device_problem()
    if problem:
        return False, f"the driver refuses: {problem} (built with CUDA {_version(_cuda.runtime_version())})"
    name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    return True, f"{name}, compute capability {capability}, built with CUDA {_version(_cuda.runtime_version())}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@cache
def _extension() -> ModuleType:
    from .. import _cuda  # an import statement at every call would cost 1 us

    return _cuda


_current = torch.cuda.device
"""Makes a device current for a block: the extension works on the current device."""


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


# ---- the layout -----------------------------------------------------------------------------------------------------


def prepack(operand: WeightOperand) -> WeightOperand:
    """Checkpoint layout -> `cuda` layout on the same device. The checkpoint tensors are read, not kept."""
    _cuda = _extension()
    device = operand.tensors[0].device
    field = {name: t.contiguous().cpu() for name, t in zip(CHECKPOINT_FIELDS, operand.tensors, strict=True)}
    outliers, scaled = field["outlier_values"].numel(), field["row_scale"].numel() > 0
    rows, columns = operand.out_features, operand.in_features
    segment_rows = field["segment_rows"]
    size = _cuda.codebook_layout_bytes(
        rows, columns, field["column_bits"].data_ptr(), segment_rows.data_ptr(), segment_rows.numel(), outliers, scaled
    )
    blob = torch.empty(size, dtype=torch.uint8)
    _cuda.codebook_layout_pack(
        blob.data_ptr(),
        size,
        rows,
        columns,
        field["column_bits"].data_ptr(),
        segment_rows.data_ptr(),
        segment_rows.numel(),
        [t.data_ptr() if t.numel() else 0 for t in (field[f"codes_b{bits}"] for bits in range(1, 9))],
        field["codebook"].data_ptr(),
        field["row_scale"].data_ptr() if scaled else 0,
        field["outlier_row_offsets"].data_ptr() if outliers else 0,
        field["outlier_columns"].data_ptr() if outliers else 0,
        field["outlier_columns"].element_size(),
        field["outlier_values"].data_ptr() if outliers else 0,
    )
    return WeightOperand(LAYOUT, (blob.to(device),), rows, columns)


def layout_codes(operand: WeightOperand) -> Tensor:
    """The codes in a `cuda` operand, uint8 [N, K] on its device: what a checkpoint is rebuilt from."""
    _cuda = _extension()
    device, blob = operand.tensors[0].device, operand.tensors[0].cpu()
    shape = _cuda.codebook_layout_shape(blob.data_ptr(), blob.numel())
    if shape != (operand.out_features, operand.in_features):
        raise ValueError(
            f"the layout holds a weight of shape {list(shape)}, but was given as "
            f"[{operand.out_features}, {operand.in_features}]"
        )
    codes = torch.empty(shape, dtype=torch.uint8)
    _cuda.codebook_layout_codes(blob.data_ptr(), blob.numel(), codes.data_ptr())
    return codes.to(device)


# ---- kernels --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _tables_workspace_sizes(rows: int, columns: int) -> tuple[int, int]:
    return _extension().codebook_linear_tables_workspace(rows, columns)


@lru_cache(maxsize=4096)
def _workspace_sizes(device: torch.device, rows: int, columns: int, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Elements of the fp32 workspace and of the counters; they depend on the device's number of multiprocessors."""
    with _current(device):
        return _extension().codebook_linear_workspace(rows, columns, tokens, _DTYPE_CODE[dtype])


def codebook_linear(
    x: Tensor, tensors: list[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    """Codes decoded in registers, multiplied by tensor cores and summed in fp32, whatever the precision asked."""
    blob, x = tensors[0], x.contiguous()
    tokens, dtype, device = x.shape[0], x.dtype, x.device
    y = torch.empty(tokens, out_features, dtype=dtype, device=device)
    if tokens == 0:
        return y
    partials, counters = _workspace_sizes(device, out_features, in_features, tokens, dtype)
    workspace = torch.empty(partials, dtype=torch.float32, device=device)
    with _current(device):
        stream = _stream(device)
        _extension().codebook_linear(
            blob.data_ptr(),
            blob.numel(),
            out_features,
            in_features,
            x.data_ptr(),
            _DTYPE_CODE[dtype],
            tokens,
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else _DTYPE_CODE[bias.dtype],
            y.data_ptr(),
            workspace.data_ptr(),
            _zero_counters(counters, device, stream).data_ptr(),
            stream,
        )
    return y


def codebook_linear_tables(
    x: Tensor, tensors: list[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    """One token: sums of several columns' products are looked up in tables made from x; all in fp32."""
    blob, x = tensors[0], x.contiguous()
    dtype, device = x.dtype, x.device
    y = torch.empty(1, out_features, dtype=dtype, device=device)
    partials, counters = _tables_workspace_sizes(out_features, in_features)
    workspace = torch.empty(partials, dtype=torch.float32, device=device)
    with _current(device):
        stream = _stream(device)
        _extension().codebook_linear_tables(
            blob.data_ptr(),
            blob.numel(),
            out_features,
            in_features,
            x.data_ptr(),
            _DTYPE_CODE[dtype],
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else _DTYPE_CODE[bias.dtype],
            y.data_ptr(),
            workspace.data_ptr(),
            _zero_counters(counters, device, stream).data_ptr(),
            stream,
        )
    return y


def _zero_counters(count: int, device: torch.device, stream: int) -> Tensor:
    """Kernels of one stream run one after the other, so they share counters. A graph may be replayed beside anything: it gets
    its own."""
    if _capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, stream)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _counters[key]


def codebook_dequantize(tensors: list[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    blob = tensors[0]
    weight = torch.empty(out_features, in_features, dtype=dtype, device=blob.device)
    with _current(blob.device):
        _extension().codebook_dequantize(
            blob.data_ptr(),
            blob.numel(),
            out_features,
            in_features,
            weight.data_ptr(),
            _DTYPE_CODE[dtype],
            _stream(blob.device),
        )
    return weight


def dequantize_matmul(
    x: Tensor, tensors: list[Tensor], out_features: int, in_features: int, bias: Tensor | None, precision: str
) -> Tensor:
    """The dense matrix in x's dtype, which torch's allocator takes back at once, and torch's matmul."""
    weight = codebook_dequantize(tensors, out_features, in_features, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, but {bits}-bit codes must lie in 0..{2**bits - 1}")
    codes = codes.contiguous()
    packed = torch.empty(rows, -(-columns * bits // 8), dtype=torch.uint8, device=codes.device)
    with _current(codes.device):
        _extension().pack_codes(codes.data_ptr(), packed.data_ptr(), rows, columns, bits, _stream(codes.device))
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    packed = packed.contiguous()
    rows = packed.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    with _current(packed.device):
        _extension().unpack_codes(packed.data_ptr(), codes.data_ptr(), rows, columns, bits, _stream(packed.device))
    return codes


def codebook_gradient(weight_gradient: Tensor, tensors: list[Tensor], out_features: int, in_features: int) -> Tensor:
    """Sums in fp32, in one order: the same call gives the same bits. What the kernel looks up is found on the device."""
    field = {name: t.detach().contiguous() for name, t in zip(CHECKPOINT_FIELDS, tensors, strict=True)}
    device, column_bits, scale = weight_gradient.device, field["column_bits"].long(), field["row_scale"]
    if field["outlier_values"].numel():
        weight_gradient = weight_gradient.clone()
        weight_gradient[reference.outlier_places(field)] = 0
    weight_gradient = weight_gradient.contiguous()
    segments, entries = field["codebook"].shape
    segment_starts = torch.nn.functional.pad(field["segment_rows"].long().cumsum(0), (1, 0))
    sorted_columns = torch.argsort(column_bits, stable=True)
    widths = torch.arange(9, device=device)
    width_starts = (column_bits[None] <= widths[:, None]).sum(1)
    first_entry = (1 << column_bits).cumsum(0) - (1 << column_bits)
    codes = [field[f"codes_b{bits}"] for bits in range(1, 9)]
    _cuda = _extension()
    call = _cuda.GradientCall(
        out_features,
        in_features,
        segments,
        entries,
        segment_starts.data_ptr(),
        sorted_columns.data_ptr(),
        width_starts.data_ptr(),
        first_entry.data_ptr(),
        [t.data_ptr() if t.numel() else 0 for t in codes],
        [t.shape[1] if t.numel() else 0 for t in codes],
        scale.data_ptr() if scale.numel() else 0,
        _DTYPE_CODE[scale.dtype] if scale.numel() else 0,
        weight_gradient.data_ptr(),
    )
    gradient = torch.empty(segments, entries, dtype=torch.float32, device=device)
    with _current(device):
        workspace = torch.empty(_cuda.codebook_gradient_workspace(call), dtype=torch.float32, device=device)
        _cuda.codebook_gradient(call, gradient.data_ptr(), workspace.data_ptr(), _stream(device))
    return gradient


def softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    student_logits, teacher_logits = student_logits.contiguous(), teacher_logits.contiguous()
    device, (batch, rows, _) = student_logits.device, student_logits.shape
    statistics, teacher_statistics = (
        torch.empty(*logits.shape[:2], 2, dtype=torch.float32, device=device)
        for logits in (student_logits, teacher_logits)
    )
    distance = torch.empty(batch, rows, teacher_logits.shape[1], dtype=torch.float32, device=device)
    if distance.numel():
        _cuda = _extension()
        call = _cdist_call(student_logits, teacher_logits, statistics, teacher_statistics, temperature)
        with _current(device):
            workspace = torch.empty(_cuda.softmax_cdist_l1_workspace(call), dtype=torch.float32, device=device)
            _cuda.softmax_cdist_l1(call, distance.data_ptr(), workspace.data_ptr(), _stream(device))
    return distance, statistics, teacher_statistics


def softmax_cdist_l1_backward(
    grad: Tensor,
    logits: Tensor,
    other_logits: Tensor,
    statistics: Tensor,
    other_statistics: Tensor,
    temperature: float,
) -> Tensor:
    if not grad.numel():
        return torch.zeros_like(logits)
    logits, other_logits, grad = logits.contiguous(), other_logits.contiguous(), grad.contiguous()
    device = logits.device
    _cuda = _extension()
    call = _cdist_call(logits, other_logits, statistics.contiguous(), other_statistics.contiguous(), temperature)
    logits_grad = torch.empty(logits.shape, dtype=logits.dtype, device=device)
    with _current(device):
        elements = _cuda.softmax_cdist_l1_backward_workspace(call)
        workspace = torch.empty(elements, dtype=torch.float32, device=device)
        _cuda.softmax_cdist_l1_backward(
            call, grad.data_ptr(), logits_grad.data_ptr(), workspace.data_ptr(), _stream(device)
        )
    return logits_grad


def _cdist_call(
    logits: Tensor, other_logits: Tensor, statistics: Tensor, other_statistics: Tensor, temperature: float
) -> Any:
    return _extension().CdistCall(
        logits.data_ptr(),
        _DTYPE_CODE[logits.dtype],
        other_logits.data_ptr(),
        _DTYPE_CODE[other_logits.dtype],
        logits.shape[0],
        logits.shape[1],
        other_logits.shape[1],
        logits.shape[2],
        1 / temperature,
        statistics.data_ptr(),
        other_statistics.data_ptr(),
    )


def kmeans_1d_layers(sums: Tensor, masses: Tensor, k_max: int) -> Tensor:
    """The dynamic program, a block per problem; see `reference.Layers`."""
    problems, n = sums.shape[0], sums.shape[1] - 1
    sums, masses, device = sums.contiguous(), masses.contiguous(), sums.device
    gains = torch.empty(problems, 2, n + 1, dtype=torch.float64, device=device)
    best = torch.empty(problems, k_max + 1, n + 1, dtype=torch.int32, device=device)
    with _current(device):
        _extension().kmeans_1d_layers(
            sums.data_ptr(),
            masses.data_ptr(),
            gains.data_ptr(),
            best.data_ptr(),
            problems,
            n,
            k_max,
            _stream(device),
        )
    return best


# ---- the table ------------------------------------------------------------------------------------------------------


def _on_device(problem: Problem) -> Support:
    if problem.device != DEVICE:
        return False, f"needs tensors on a {DEVICE} device, these are on {problem.device}"
    return available()


def _reads_layout(problem: Problem) -> Support:
    if problem.layout != LAYOUT:
        wanted = f"reads the layout {LAYOUT!r}, this weight is {problem.layout!r}"
        return False, wanted + ("; CodebookWeight.operand() prepacks it" if problem.layout == CHECKPOINT else "")
    return _takes_dtype(problem)


def _reads_checkpoint(problem: Problem) -> Support:
    if problem.layout != CHECKPOINT:
        return False, f"reads the layout {CHECKPOINT!r}, this weight is {problem.layout!r}"
    return _on_device(problem)


def _takes_dtype(problem: Problem) -> Support:
    if problem.dtype not in _DTYPE_CODE:
        return False, f"takes float32, bfloat16 and float16, not {problem.dtype}"
    return _on_device(problem)


def _tables_fit() -> bool:
    return _extension().linear_tables_fit()


def _one_token(problem: Problem) -> Support:
    if problem.tokens != 1:
        return False, f"serves one token, here {problem.tokens}"
    reads, why = _reads_layout(problem)
    if reads and not _tables_fit():
        return False, "needs 129 KiB of shared memory for a block, more than this device has"
    return reads, why


def _few_tokens(problem: Problem) -> Support:
    if problem.tokens > MAX_FUSED_TOKENS:
        return False, f"serves up to {MAX_FUSED_TOKENS} tokens, here {problem.tokens}"
    return _reads_layout(problem)


def _clusters_here(problem: Problem) -> Support:
    if problem.layout == "lloyd":
        return False, "finds the optimum, not what k-means++ and Lloyd's iteration find"
    return _on_device(problem)


def register_kernels() -> None:
    for op, name, supports, run, because in (
        (
            "codebook_linear",
            "cuda.tables",
            _one_token,
            codebook_linear_tables,
            "for one token a lookup replaces 2 or 4 products: at 2 and 4 bits half the integer work of cuda.fused (counted)",
        ),
        (
            "codebook_linear",
            "cuda.fused",
            _few_tokens,
            codebook_linear,
            "reads only the codes, decodes in registers (predicted: best to 64 tokens)",
        ),
        (
            "codebook_linear",
            "cuda.dequantize_matmul",
            _reads_layout,
            dequantize_matmul,
            "decoding is paid once, the product is cuBLAS's (predicted)",
        ),
        (
            "codebook_dequantize",
            "cuda.dequantize",
            _reads_layout,
            codebook_dequantize,
            "decodes at the speed of the stores (predicted)",
        ),
        (
            "codebook_gradient",
            "cuda.codebook_gradient",
            _reads_checkpoint,
            codebook_gradient,
            "reads dL/dW and codes once, no atomics (predicted: at the speed of the loads)",
        ),
        ("pack_codes", "cuda.pack_codes", _on_device, pack_codes, "one thread per byte"),
        ("unpack_codes", "cuda.unpack_codes", _on_device, unpack_codes, "one thread per byte"),
        (
            "kmeans_1d",
            "cuda.kmeans_1d",
            _clusters_here,
            partial(reference.kmeans_1d, find_layers=kmeans_1d_layers),
            "a block per problem; torch sorts and looks codes up",
        ),
        (
            "kmeans_1d_errors",
            "cuda.kmeans_1d_errors",
            _clusters_here,
            partial(reference.kmeans_1d_errors, find_layers=kmeans_1d_layers),
            "a block per problem; torch sorts",
        ),
        (
            "softmax_cdist_l1",
            "cuda.softmax_cdist_l1",
            _takes_dtype,
            softmax_cdist_l1,
            "two instructions a pair, probabilities only in shared memory (predicted)",
        ),
        (
            "softmax_cdist_l1_backward",
            "cuda.softmax_cdist_l1_backward",
            _takes_dtype,
            softmax_cdist_l1_backward,
            "probabilities only in registers (predicted)",
        ),
    ):
        register(Kernel(op, name, supports, run, because))

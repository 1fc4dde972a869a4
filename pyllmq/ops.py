"""Every operation: its torch.library schema, its fake kernel, its gradient and its public function.

The public functions here are also ``pyllmq.functional``. Eager calls without gradients go straight to the back end (a
torch.library call costs 3-17 us more than a direct one, as much as a small layer); under torch.compile, or when a gradient
is wanted, they go through ``torch.ops.pyllmq``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .backends import cpu as _cpu_backend
from .backends import cpu_sparse as _cpu_sparse_backend
from .backends import cuda as _cuda_backend
from .backends import cuda_sparse as _cuda_sparse_backend
from .backends import reference as _reference_backend
from .backends import triton as _triton_backend
from .backends import triton_sparse as _triton_sparse_backend
from .dispatch import CHECKPOINT, CHECKPOINT_FIELDS, DEFAULT_PRECISION, WeightOperand, check_precision, kernel_for

_cpu_backend.register_kernels()
_cpu_sparse_backend.register_kernels()
_cuda_backend.register_kernels()
_cuda_sparse_backend.register_kernels()
_triton_backend.register_kernels()
_triton_sparse_backend.register_kernels()
_cpu_backend.register_kernels_for_other_devices()
_reference_backend.register_kernels()

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TRAINED = tuple(CHECKPOINT_FIELDS.index(name) for name in ("codebook", "outlier_values", "row_scale"))
"""Places in a checkpoint operand of the tensors that can be trained, codes staying as they are."""

_library = torch.library.Library("pyllmq", "DEF")
_FORMATS = ("codebook", "bitmap", "sparse24", "sparse24_codebook")
for _schema in (
    *(
        f"{_format}_linear(Tensor x, Tensor[] weight, str layout, int out_features, Tensor? bias, str precision) -> Tensor"
        for _format in _FORMATS
    ),
    *(
        f"{_format}_dequantize(Tensor[] weight, str layout, int out_features, int in_features, ScalarType dtype) -> Tensor"
        for _format in _FORMATS
    ),
    "codebook_gradient(Tensor weight_gradient, Tensor[] weight, str layout) -> Tensor",
    "pack_codes(Tensor codes, int bits) -> Tensor",
    "unpack_codes(Tensor packed, int bits, int columns) -> Tensor",
    "softmax_cdist_l1(Tensor student_logits, Tensor teacher_logits, float temperature) -> (Tensor, Tensor, Tensor)",
    "softmax_cdist_l1_backward(Tensor grad, Tensor logits, Tensor other_logits, Tensor statistics, Tensor other_statistics, "
    "float temperature) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


class PackedWeight(Protocol):
    """Anything that can say how kernels should read it, such as `formats.codebook.CodebookWeight`."""

    def operand(self) -> WeightOperand: ...


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


# ---- y = x W^T + bias -----------------------------------------------------------------------------------------------


def codebook_linear(
    x: Tensor, weight: PackedWeight | WeightOperand, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION
) -> Tensor:
    """y = x W^T + bias, W a packed codebook weight.

    Args:
        x: [..., K], float32, bfloat16 or float16, on the weight's device; any number of leading dimensions, M = 0 included.
        weight: a `CodebookWeight` or its `operand()`, [N, K].
        bias: [N] or None.
        precision: what the arithmetic may cost in accuracy: "exact" (errors as those of torch in x's dtype), "high" (relative
            error up to 2e-4 beyond the dtype's) or "fast" (up to 2e-2). A back end may be more exact than asked.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: x's last dimension is not K, bias is not [N], or precision is none of the three.
        TypeError: a dtype is not allowed.
        NoKernelError: no kernel serves the device, dtype and layout; the message lists every kernel's reason.

    Source of the format: CLAQ (arXiv 2405.17233), one k-means codebook per input column.
    """
    return _linear("codebook_linear", x, weight, bias, precision)


def bitmap_linear(
    x: Tensor, weight: PackedWeight | WeightOperand, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION
) -> Tensor:
    """y = x W^T + bias, W a sparse weight of any pattern (`BitmapWeight` or its `operand()`).

    Arguments, result and errors as for `codebook_linear`.
    """
    return _linear("bitmap_linear", x, weight, bias, precision)


def sparse24_linear(
    x: Tensor, weight: PackedWeight | WeightOperand, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION
) -> Tensor:
    """y = x W^T + bias, W a 2:4 sparse weight (`Sparse24Weight` or its `operand()`).

    Arguments, result and errors as for `codebook_linear`.
    """
    return _linear("sparse24_linear", x, weight, bias, precision)


def sparse24_codebook_linear(
    x: Tensor, weight: PackedWeight | WeightOperand, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION
) -> Tensor:
    """y = x W^T + bias, W a 2:4 sparse weight of codes (`Sparse24CodebookWeight` or its `operand()`).

    Arguments, result and errors as for `codebook_linear`.
    """
    return _linear("sparse24_codebook_linear", x, weight, bias, precision)


def _linear(op: str, x: Tensor, weight: PackedWeight | WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    operand = weight if isinstance(weight, WeightOperand) else weight.operand()
    _check_activation(x, operand.in_features)
    if bias is not None:
        _check_bias(bias, operand.out_features)
    check_precision(precision)
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad) or _trains(operand.tensors, operand.layout)
    )
    if wants_grad or torch.compiler.is_compiling() or type(x) is not Tensor:
        return getattr(torch.ops.pyllmq, op)(x, operand.tensors, operand.layout, operand.out_features, bias, precision)
    return _run_linear(op, x, operand.tensors, operand.layout, operand.out_features, bias, precision)


def _trains(weight: Sequence[Tensor], layout: str) -> bool:
    return layout == CHECKPOINT and any(weight[place].requires_grad for place in _TRAINED)


def _check_activation(x: Tensor, in_features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features = {in_features}")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed: {_names(ACTIVATION_DTYPES)}. Convert it with x.float()")


def _check_bias(bias: Tensor, out_features: int) -> None:
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [out_features] = [{out_features}]")
    if bias.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"bias is {bias.dtype}; allowed: {_names(ACTIVATION_DTYPES)}")


def _run_linear(
    op: str,
    x: Tensor,
    weight: list[Tensor] | tuple[Tensor, ...],
    layout: str,
    out_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    device = weight[0].device
    if x.device != device or (bias is not None and bias.device != device):
        bias_place = "" if bias is None else f" and bias on {bias.device}"
        raise ValueError(f"x is on {x.device}{bias_place}, the weight on {device}; move them to one device")
    in_features = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, in_features)
    kernel = kernel_for(op, layout, device.type, x.dtype, rows.shape[0])
    y = kernel.run(rows, weight, out_features, in_features, None if bias is None else bias.contiguous(), precision)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _registered_linear(op: str, *arguments: Any) -> Tensor:
    """Of the library: what autograd sees must be no view, or nothing could be added to it in place."""
    y = _run_linear(op, *arguments)
    return torch.ops.aten._unsafe_view(y, list(y.shape))


def _linear_fake(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    out_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _linear_setup(ctx, inputs, output) -> None:
    x, weight, layout, out_features, bias, _ = inputs
    ctx.weight, ctx.layout, ctx.shape = weight, layout, (out_features, x.shape[-1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.trains = _trains(weight, layout)
    ctx.save_for_backward(*([x] if ctx.trains else []))


def _linear_backward(dequantize_op: str, ctx, grad: Tensor):
    """dL/dx = dL/dy W, with W decoded anew; in the checkpoint layout also the codebook, row scales and outliers get theirs."""
    grad_x = grad_bias = None
    grad_weight: list[Tensor | None] = [None] * len(ctx.weight)
    if ctx.needs_input_grad[0]:
        dense = getattr(torch.ops.pyllmq, dequantize_op)(ctx.weight, ctx.layout, *ctx.shape, torch.float32)
        grad_x = (grad.float() @ dense).to(grad.dtype)
    if ctx.trains:
        (x,) = ctx.saved_tensors
        of_weight = grad.float().reshape(-1, ctx.shape[0]).T @ x.float().reshape(-1, ctx.shape[1])
        grad_weight = _packed_gradients(of_weight, ctx.weight, ctx.layout)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.float().reshape(-1, ctx.shape[0]).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, None, None, grad_bias, None


def _packed_gradients(of_weight: Tensor, weight: list[Tensor], layout: str) -> list[Tensor | None]:
    """dL/dW [N, K] -> the gradients of the packed tensors that ask for one."""
    field = dict(zip(CHECKPOINT_FIELDS, weight, strict=True))
    found: dict[str, Tensor] = {}
    if field["codebook"].requires_grad:
        found["codebook"] = torch.ops.pyllmq.codebook_gradient(of_weight, weight, layout)
    outliers = _reference_backend.outlier_places(field) if field["outlier_values"].numel() else None
    if outliers is not None and field["outlier_values"].requires_grad:
        found["outlier_values"] = of_weight[outliers]
    if field["row_scale"].requires_grad:
        # Without its scale a weight is its centroid; outliers have no scale.
        plain = dict(field, row_scale=torch.ones_like(field["row_scale"]))
        centroids = torch.ops.pyllmq.codebook_dequantize(
            [plain[name].detach() for name in CHECKPOINT_FIELDS], layout, *of_weight.shape, torch.float32
        )
        if outliers is not None:
            centroids[outliers] = 0
        found["row_scale"] = (of_weight * centroids).sum(1)
    return [found[name].to(field[name].dtype) if name in found else None for name in CHECKPOINT_FIELDS]


# ---- codebook_gradient ----------------------------------------------------------------------------------------------


def codebook_gradient(weight_gradient: Tensor, weight: PackedWeight | WeightOperand) -> Tensor:
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
    shape = (operand.out_features, operand.in_features)
    if tuple(weight_gradient.shape) != shape or weight_gradient.dtype != torch.float32:
        raise ValueError(
            f"weight_gradient is {weight_gradient.dtype} {tuple(weight_gradient.shape)}; it must be torch.float32 {shape}"
        )
    return torch.ops.pyllmq.codebook_gradient(weight_gradient, operand.tensors, operand.layout)


def _codebook_gradient(weight_gradient: Tensor, weight: list[Tensor], layout: str) -> Tensor:
    kernel = kernel_for("codebook_gradient", layout, weight_gradient.device.type, torch.float32)
    return kernel.run(weight_gradient, weight, *weight_gradient.shape)


def _codebook_gradient_fake(weight_gradient: Tensor, weight: list[Tensor], layout: str) -> Tensor:
    return torch.empty_like(weight[CHECKPOINT_FIELDS.index("codebook")], dtype=torch.float32)


# ---- W ----------------------------------------------------------------------------------------------------------------


def codebook_dequantize(weight: PackedWeight | WeightOperand, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix [N, K] that a packed codebook weight stands for, in float32, bfloat16 or float16."""
    return _dequantize("codebook_dequantize", weight, dtype)


def bitmap_dequantize(weight: PackedWeight | WeightOperand, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix [N, K] that a sparse weight of any pattern stands for, in float32, bfloat16 or float16."""
    return _dequantize("bitmap_dequantize", weight, dtype)


def sparse24_dequantize(weight: PackedWeight | WeightOperand, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix [N, K] that a 2:4 sparse weight stands for, in float32, bfloat16 or float16."""
    return _dequantize("sparse24_dequantize", weight, dtype)


def sparse24_codebook_dequantize(weight: PackedWeight | WeightOperand, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix [N, K] that a 2:4 sparse weight of codes stands for, in float32, bfloat16 or float16."""
    return _dequantize("sparse24_codebook_dequantize", weight, dtype)


def _dequantize(op: str, weight: PackedWeight | WeightOperand, dtype: torch.dtype) -> Tensor:
    operand = weight if isinstance(weight, WeightOperand) else weight.operand()
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: {_names(ACTIVATION_DTYPES)}")
    run = getattr(torch.ops.pyllmq, op)
    return run(operand.tensors, operand.layout, operand.out_features, operand.in_features, dtype)


def _run_dequantize(
    op: str, weight: list[Tensor], layout: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    kernel = kernel_for(op, layout, weight[0].device.type, dtype)
    return kernel.run(weight, out_features, in_features, dtype)


def _dequantize_fake(
    weight: list[Tensor], layout: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return weight[0].new_empty(out_features, in_features, dtype=dtype)


# ---- pack_codes, unpack_codes ---------------------------------------------------------------------------------------


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely: uint8 [rows, columns] with values below 2**bits -> uint8 [rows, ceil(columns*bits/8)].

    Each row is one bit stream, least significant bit first; a code may straddle two bytes; the padding bits at the end of a
    row are zero. Raises ValueError for bits outside 1..8, another shape, or a code that does not fit.
    """
    _check_bits(bits)
    _check_byte_matrix("codes", codes)
    return torch.ops.pyllmq.pack_codes(codes, bits)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [rows, ceil(columns*bits/8)] -> uint8 [rows, columns]."""
    _check_bits(bits)
    _check_byte_matrix("packed", packed)
    if columns < 0 or packed.shape[1] != -(-columns * bits // 8):
        raise ValueError(
            f"packed has {packed.shape[1]} bytes a row; {columns} columns of {bits} bits take {-(-columns * bits // 8)}"
        )
    return torch.ops.pyllmq.unpack_codes(packed, bits, columns)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; allowed: an integer from 1 to 8")


def _check_byte_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8 or tensor.dim() != 2:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be a torch.uint8 matrix")


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    return kernel_for("pack_codes", "", codes.device.type, codes.dtype).run(codes, bits)


def _unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    return kernel_for("unpack_codes", "", packed.device.type, packed.dtype).run(packed, bits, columns)


# ---- softmax_cdist_l1 -----------------------------------------------------------------------------------------------

LOGITS_DTYPES = (*ACTIVATION_DTYPES, torch.float64)


def softmax_cdist_l1(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """D[..., i, j] = sum over v of |softmax(student_logits / T)[..., i, v] - softmax(teacher_logits / T)[..., j, v]|.

    Neither side's probabilities are ever in memory as a whole; only two numbers per row are kept for the backward pass.
    Differentiable once in both sides; where two probabilities are equal the derivative of their distance is 0.

    Args:
        student_logits: [..., B, V], float32, bfloat16, float16, or float64.
        teacher_logits: [..., C, V] on the same device; its dtype may differ, but float64 goes with float64 alone. Leading
            dimensions broadcast.
        temperature: T > 0.

    Returns:
        [..., B, C] in float32 (float64 for float64), values from 0 to 2. A row that holds NaN or +inf, or -inf alone, has no
        softmax: its distances are NaN.

    Raises:
        ValueError, TypeError: with what was given and what is allowed.

    Source: the cost matrix of SinKD (arXiv 2402.17110), `torch.cdist(softmax(student), softmax(teacher), p=1)`.
    """
    _check_logits(student_logits, teacher_logits, temperature)
    leading = torch.broadcast_shapes(student_logits.shape[:-2], teacher_logits.shape[:-2])
    student, teacher = (
        logits if logits.shape[:-2] == leading else logits.expand(*leading, *logits.shape[-2:])
        for logits in (student_logits, teacher_logits)
    )
    wants_grad = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
    if wants_grad or torch.compiler.is_compiling() or type(student) is not Tensor or type(teacher) is not Tensor:
        return torch.ops.pyllmq.softmax_cdist_l1(student, teacher, float(temperature))[0]
    return _softmax_cdist_l1(student, teacher, float(temperature))[0]


def _check_logits(student: Tensor, teacher: Tensor, temperature: float) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(logits.shape)}; it must be [..., rows, vocabulary]")
        if logits.dtype not in LOGITS_DTYPES:
            raise TypeError(f"{name} is {logits.dtype}; allowed: {_names(LOGITS_DTYPES)}")
    if student.shape[-1] != teacher.shape[-1] or not student.shape[-1]:
        raise ValueError(
            f"student_logits have a vocabulary of {student.shape[-1]}, teacher_logits of {teacher.shape[-1]}; they must be equal "
            "and not 0. Where one model pads its vocabulary, cut both to the shorter one"
        )
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        raise TypeError(
            f"student_logits are {student.dtype}, teacher_logits {teacher.dtype}; float64 goes with float64 alone"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student_logits are on {student.device}, teacher_logits on {teacher.device}; move them to one device"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")


def _as_batch(logits: Tensor) -> Tensor:
    """[..., rows, V] -> [batch, rows, V]."""
    return logits.reshape(math.prod(logits.shape[:-2]), *logits.shape[-2:])


def _softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = kernel_for("softmax_cdist_l1", "", student_logits.device.type, student_logits.dtype)
    distance, *statistics = kernel.run(_as_batch(student_logits), _as_batch(teacher_logits), temperature)
    leading = student_logits.shape[:-2]
    student_statistics, teacher_statistics = (each.view(*leading, *each.shape[1:]) for each in statistics)
    return distance.view(*leading, *distance.shape[1:]), student_statistics, teacher_statistics


def _softmax_cdist_l1_fake(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return (
        student_logits.new_empty(*student_logits.shape[:-1], teacher_logits.shape[-2], dtype=dtype),
        student_logits.new_empty(*student_logits.shape[:-1], 2, dtype=dtype),
        teacher_logits.new_empty(*teacher_logits.shape[:-1], 2, dtype=dtype),
    )


def _softmax_cdist_l1_setup(ctx, inputs, output) -> None:
    student, teacher, ctx.temperature = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(student, teacher, *statistics)


def _softmax_cdist_l1_gradients(ctx, grad: Tensor, *_):
    student, teacher, statistics, teacher_statistics = ctx.saved_tensors
    backward = torch.ops.pyllmq.softmax_cdist_l1_backward
    student_grad = teacher_grad = None
    if ctx.needs_input_grad[0]:
        student_grad = backward(grad, student, teacher, statistics, teacher_statistics, ctx.temperature)
    if ctx.needs_input_grad[1]:
        teacher_grad = backward(grad.mT, teacher, student, teacher_statistics, statistics, ctx.temperature)
    return student_grad, teacher_grad, None


def _softmax_cdist_l1_backward(
    grad: Tensor,
    logits: Tensor,
    other_logits: Tensor,
    statistics: Tensor,
    other_statistics: Tensor,
    temperature: float,
) -> Tensor:
    kernel = kernel_for("softmax_cdist_l1_backward", "", logits.device.type, logits.dtype)
    batched = (_as_batch(each) for each in (grad, logits, other_logits, statistics, other_statistics))
    return kernel.run(*batched, temperature).view(logits.shape)


# ---- registration ---------------------------------------------------------------------------------------------------

_OPERATIONS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    *((f"{_format}_linear", partial(_registered_linear, f"{_format}_linear"), _linear_fake) for _format in _FORMATS),
    *(
        (f"{_format}_dequantize", partial(_run_dequantize, f"{_format}_dequantize"), _dequantize_fake)
        for _format in _FORMATS
    ),
    ("codebook_gradient", _codebook_gradient, _codebook_gradient_fake),
    ("pack_codes", _pack_codes, lambda codes, bits: codes.new_empty(codes.shape[0], (codes.shape[1] * bits + 7) // 8)),
    ("unpack_codes", _unpack_codes, lambda packed, bits, columns: packed.new_empty(packed.shape[0], columns)),
    ("softmax_cdist_l1", _softmax_cdist_l1, _softmax_cdist_l1_fake),
    (
        "softmax_cdist_l1_backward",
        _softmax_cdist_l1_backward,
        lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    ),
)
for _name, _run, _fake in _OPERATIONS:
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyllmq::{_name}", _fake, lib=_library)
for _format in _FORMATS:
    torch.library.register_autograd(
        f"pyllmq::{_format}_linear",
        partial(_linear_backward, f"{_format}_dequantize"),
        setup_context=_linear_setup,
        lib=_library,
    )
torch.library.register_autograd(
    "pyllmq::softmax_cdist_l1", _softmax_cdist_l1_gradients, setup_context=_softmax_cdist_l1_setup, lib=_library
)

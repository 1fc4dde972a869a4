"""Every operation: its torch.library schema, its fake kernel, its gradient and its public function.

The public functions here are also ``pyllmq.functional``. Eager calls without gradients go straight to the back end (a
torch.library call costs 3-17 us more than a direct one, as much as a small layer); under torch.compile, or when a gradient
is wanted, they go through ``torch.ops.pyllmq``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .backends import cpu as _cpu_backend
from .backends import cuda as _cuda_backend
from .backends import reference as _reference_backend
from .backends import triton as _triton_backend
from .dispatch import CHECKPOINT, CHECKPOINT_FIELDS, DEFAULT_PRECISION, WeightOperand, check_precision, kernel_for

_cpu_backend.register_kernels()
_cuda_backend.register_kernels()
_triton_backend.register_kernels()
_cpu_backend.register_kernels_for_other_devices()
_reference_backend.register_kernels()

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TRAINED = tuple(CHECKPOINT_FIELDS.index(name) for name in ("codebook", "outlier_values", "row_scale"))
"""Places in a checkpoint operand of the tensors that can be trained, codes staying as they are."""

_library = torch.library.Library("pyllmq", "DEF")
for _schema in (
    "codebook_linear(Tensor x, Tensor[] weight, str layout, int out_features, Tensor? bias, str precision) -> Tensor",
    "codebook_dequantize(Tensor[] weight, str layout, int out_features, int in_features, ScalarType dtype) -> Tensor",
    "codebook_gradient(Tensor weight_gradient, Tensor[] weight, str layout) -> Tensor",
    "pack_codes(Tensor codes, int bits) -> Tensor",
    "unpack_codes(Tensor packed, int bits, int columns) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


class PackedWeight(Protocol):
    """Anything that can say how kernels should read it, such as `formats.codebook.CodebookWeight`."""

    def operand(self) -> WeightOperand: ...


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


# ---- codebook_linear ------------------------------------------------------------------------------------------------


def codebook_linear(
    x: Tensor, weight: PackedWeight | WeightOperand, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION
) -> Tensor:
    """y = x W^T + bias, W a packed codebook weight.

    Args:
        x: [..., K], float32, bfloat16 or float16, on the weight's device; any number of leading dimensions, M = 0 included.
        weight: a `CodebookWeight` or its `operand()`, [N, K].
        bias: [N] or None.
        precision: what the arithmetic may cost in accuracy: "exact" (errors as those of torch in x's dtype), "high" (relative
            error up to 2e-4 beyond the dtype's) or "fast" (up to 2e-3). A back end may be more exact than asked.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: x's last dimension is not K, bias is not [N], or precision is none of the three.
        TypeError: a dtype is not allowed.
        NoKernelError: no kernel serves the device, dtype and layout; the message lists every kernel's reason.

    Source of the format: CLAQ (arXiv 2405.17233), one k-means codebook per input column.
    """
    operand = weight if isinstance(weight, WeightOperand) else weight.operand()
    _check_activation(x, operand.in_features)
    if bias is not None:
        _check_bias(bias, operand.out_features)
    check_precision(precision)
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad) or _trains(operand)
    )
    if wants_grad or torch.compiler.is_compiling() or type(x) is not Tensor:
        return torch.ops.pyllmq.codebook_linear(
            x, operand.tensors, operand.layout, operand.out_features, bias, precision
        )
    return _codebook_linear(x, operand.tensors, operand.layout, operand.out_features, bias, precision)


def _trains(operand: WeightOperand) -> bool:
    return operand.layout == CHECKPOINT and any(operand.tensors[place].requires_grad for place in _TRAINED)


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


def _codebook_linear(
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
    kernel = kernel_for("codebook_linear", layout, device.type, x.dtype, rows.shape[0])
    y = kernel.run(rows, weight, out_features, in_features, None if bias is None else bias.contiguous(), precision)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _codebook_linear_fake(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    out_features: int,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _codebook_linear_setup(ctx, inputs, output) -> None:
    x, weight, layout, out_features, bias, _ = inputs
    ctx.weight, ctx.layout, ctx.shape = weight, layout, (out_features, x.shape[-1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.trains = layout == CHECKPOINT and any(weight[place].requires_grad for place in _TRAINED)
    ctx.save_for_backward(*([x] if ctx.trains else []))


def _codebook_linear_backward(ctx, grad: Tensor):
    """dL/dx = dL/dy W, with W decoded anew; in the checkpoint layout also the codebook, row scales and outliers get theirs."""
    grad_x = grad_bias = None
    grad_weight: list[Tensor | None] = [None] * len(ctx.weight)
    if ctx.needs_input_grad[0]:
        dense = torch.ops.pyllmq.codebook_dequantize(ctx.weight, ctx.layout, *ctx.shape, torch.float32)
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


# ---- codebook_dequantize --------------------------------------------------------------------------------------------


def codebook_dequantize(weight: PackedWeight | WeightOperand, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix [N, K] that a packed codebook weight stands for, in float32, bfloat16 or float16."""
    operand = weight if isinstance(weight, WeightOperand) else weight.operand()
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: {_names(ACTIVATION_DTYPES)}")
    return torch.ops.pyllmq.codebook_dequantize(
        operand.tensors, operand.layout, operand.out_features, operand.in_features, dtype
    )


def _codebook_dequantize(
    weight: list[Tensor], layout: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    kernel = kernel_for("codebook_dequantize", layout, weight[0].device.type, dtype)
    return kernel.run(weight, out_features, in_features, dtype)


def _codebook_dequantize_fake(
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


# ---- registration ---------------------------------------------------------------------------------------------------

for _name, _run, _fake in (
    ("codebook_linear", _codebook_linear, _codebook_linear_fake),
    ("codebook_dequantize", _codebook_dequantize, _codebook_dequantize_fake),
    ("codebook_gradient", _codebook_gradient, _codebook_gradient_fake),
    ("pack_codes", _pack_codes, lambda codes, bits: codes.new_empty(codes.shape[0], (codes.shape[1] * bits + 7) // 8)),
    ("unpack_codes", _unpack_codes, lambda packed, bits, columns: packed.new_empty(packed.shape[0], columns)),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyllmq::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "pyllmq::codebook_linear", _codebook_linear_backward, setup_context=_codebook_linear_setup, lib=_library
)

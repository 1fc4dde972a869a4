"""The operations as torch sees them: schema, fake kernel and gradient of each, and its public function.

The public functions here are also ``pyllmq.functional``. Eager calls without gradients go straight to the back end (a
torch.library call costs 3-17 us more than a direct one, as much as a small layer); under torch.compile, or when a gradient
is wanted, they go through ``torch.ops.pyllmq``. The rows of kernels are registered by backends/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import dispatch
from .dispatch import NoKernelError
from .layouts import CHECKPOINT, WeightOperand, for_kernels, readable
from .operations import (
    ACTIVATION_DTYPES,
    DEFAULT_PRECISION,
    PACK_CODES,
    PACKED_DEQUANTIZE,
    PACKED_LINEAR,
    PACKED_ROWS,
    PRECISIONS,
    ROUTED_EXPERTS,
    SOFTMAX_CDIST_L1,
    SOFTMAX_CDIST_L1_BACKWARD,
    UNPACK_CODES,
    Cdist,
    PackedExperts,
    check_precision,
)

_Gradients = tuple[Tensor | None, ...]

_library = torch.library.Library("pyllmq", "FRAGMENT")


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> Any:
    """An operation of the library `pyllmq`, on every device; with `backward`, a differentiable one.

    Returns it with its gradient, for eager calls: the autograd of torch.library costs 200 us.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyllmq::{name}", fake, lib=_library)
    if backward is None or setup is None:
        return run
    torch.library.register_autograd(f"pyllmq::{name}", backward, setup_context=setup, lib=_library)
    parts = {"forward": staticmethod(run), "backward": staticmethod(backward), "setup_context": staticmethod(setup)}
    return type(run.__name__, (torch.autograd.Function,), parts).apply  # type: ignore[attr-defined]


class _Refusal(torch.autograd.Function):
    """0 in front, an error behind: what an operation's second derivative depends on ends here."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *inputs: Tensor) -> Tensor:
        return torch.zeros((), dtype=inputs[0].dtype, device=inputs[0].device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise second_derivative(ctx.name)


def second_derivative(name: str) -> RuntimeError:
    return RuntimeError(
        f"a second derivative of {name} was asked for (create_graph=True, a Hessian, a gradient penalty); it is differentiable "
        "once. Detach its gradient, or write the operation in plain torch where second derivatives are needed"
    )


def differentiable_once(name: str, gradient: Callable[[], _Gradients], inputs: Sequence[Tensor]) -> _Gradients:
    """The gradients that `gradient` computes, None among them. Their own derivative in any of `inputs` is an error.

    torch's `once_differentiable` is not enough: `autograd.grad(..., allow_unused=True)`, and with it every Hessian of torch,
    does not visit its error and answers 0.
    """
    with torch.no_grad():
        found = gradient()
    if not torch.is_grad_enabled():
        return found
    zero = _Refusal.apply(name, *inputs)
    return tuple(None if each is None else each + zero.to(each.dtype) for each in found)


class PackedWeight(Protocol):
    """Anything that can say how kernels should read it, such as `structure.PackedWeight`."""

    @property
    def kind(self) -> str: ...
    def operand(self) -> WeightOperand: ...


Weight = PackedWeight | WeightOperand

Gradients = Callable[[Tensor, WeightOperand], dict[str, Tensor]]
"""dL/dW fp32 [N, K] and a checkpoint operand -> the gradients of those of its tensors that ask for one, by name."""
_GRADIENTS: dict[str, tuple[Sequence[str], Gradients]] = {}


def register_gradients(kind: str, fields: Sequence[str], gradients: Gradients) -> None:
    """What trains the tensors, named in their order, of checkpoint operands of this kind."""
    _GRADIENTS[kind] = fields, gradients


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


# ---- y = x W^T + bias -----------------------------------------------------------------------------------------------


def packed_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION) -> Tensor:
    """y = x W^T + bias, W a packed weight of any format.

    Args:
        x: [..., K], float32, bfloat16 or float16, on the weight's device; any number of leading dimensions, M = 0 included.
        weight: a packed weight such as `CodebookWeight`, or its `operand()`, [N, K].
        bias: [N] or None.
        precision: what the arithmetic may cost in accuracy: "exact" (errors as those of torch in x's dtype), "high" (relative
            error up to 2e-4 beyond the dtype's) or "fast" (up to 2e-2). A back end may be more exact than asked.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: x's last dimension is not K, bias is not [N], or precision is none of the three.
        TypeError: a dtype is not allowed.
        NoKernelError: no kernel serves the device, dtype and layout; the message lists every kernel's reason.
    """
    operand = weight if type(weight) is WeightOperand else weight.operand()  # type: ignore[union-attr]
    if operand.bound is not None and operand.chosen_at == dispatch.changes and not torch.compiler.is_compiling():
        y = operand.bound.linear_of_tensors(x, bias, precision)
        if y is not None:
            return y
    n, k = operand.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features = {k}")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed: {_names(ACTIVATION_DTYPES)}. Convert it with x.float()")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != n:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [out_features] = [{n}]")
        if bias.dtype not in ACTIVATION_DTYPES:
            raise TypeError(f"bias is {bias.dtype}; allowed: {_names(ACTIVATION_DTYPES)}")
    if precision not in PRECISIONS:
        check_precision(precision)
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad) or _trains(operand)
    )
    if wants_grad or torch.compiler.is_compiling() or type(x) is not Tensor:
        return torch.ops.pyllmq.packed_linear(x, *_arguments_of(operand), bias, precision)
    return _run_linear(x, operand, bias, precision)


def _trains(operand: WeightOperand) -> bool:
    """Are there tensors with gradients? Only those of checkpoints are trained where they stand."""
    return operand.layout.startswith(CHECKPOINT) and any(tensor.requires_grad for tensor in operand.tensors)


def _run_linear(x: Tensor, operand: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    device = operand.tensors[0].device
    if x.device != device or (bias is not None and bias.device != device):
        bias_place = "" if bias is None else f" and bias on {bias.device}"
        raise ValueError(f"x is on {x.device}{bias_place}, the weight on {device}; move them to one device")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    kernel = PACKED_LINEAR.kernel_for(device, x.dtype, operand.layout, rows.shape[0], operand.meta, precision)
    y = kernel(readable(rows), operand, None if bias is None else for_kernels(bias), precision)
    if hasattr(operand.bound, "linear_of_tensors"):
        operand.chosen_at = dispatch.changes
    return y if x.dim() == 2 else y.view(*x.shape[:-1], operand.shape[0])


def _packed_linear(x: Tensor, *arguments: Any) -> Tensor:
    *weight, bias, precision = arguments
    y = _run_linear(x, operand_of(*weight), bias, precision)
    # What autograd sees must be no view, or nothing could be added to it in place.
    return torch.ops.aten._unsafe_view(y, list(y.shape))


def _arguments_of(operand: WeightOperand) -> tuple[Any, ...]:
    """Of an operation of the library, as _WEIGHT names them."""
    return operand.tensors, operand.kind, operand.layout, operand.meta, operand.shape


def operand_of(
    tensors: Sequence[Tensor], kind: str, layout: str, meta: Sequence[int], shape: Sequence[int]
) -> WeightOperand:
    """Its inverse."""
    return WeightOperand(kind, layout, tuple(tensors), tuple(meta), (shape[0], shape[1]))


def _packed_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, bias, _ = inputs
    ctx.operand = operand_of(*weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.trains = _trains(ctx.operand)
    ctx.save_for_backward(*([x] if ctx.trains else []))


def _packed_linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dL/dx = dL/dy W, with W decoded anew; trained checkpoint tensors get theirs from dL/dW."""
    operand = ctx.operand
    grad_x = grad_bias = None
    grad_weight: list[Tensor | None] = [None] * len(operand.tensors)
    trained = [tensor for tensor in operand.tensors if ctx.trains and tensor.requires_grad]
    name = "packed_linear with a trained weight"
    if ctx.needs_input_grad[0]:
        with torch.no_grad():
            dense = torch.ops.pyllmq.packed_dequantize(*_arguments_of(operand), torch.float32)
        grad_x = (grad.float() @ dense).to(grad.dtype)  # its derivative in dL/dy is torch's own
        if trained:
            of_x = grad_x
            (grad_x,) = differentiable_once(name, lambda: (of_x,), trained)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        grad_bias = grad.float().reshape(-1, operand.shape[0]).sum(0).to(ctx.bias_dtype)
    if ctx.trains:
        (x,) = ctx.saved_tensors

        def of_weight() -> Tensor:
            return grad.float().reshape(-1, operand.shape[0]).T @ x.float().reshape(-1, operand.shape[1])

        grad_weight = _gradients_of_tensors(name, of_weight, operand, (grad, x, *trained))
    # torch takes a list of no numbers for one of tensors
    return grad_x, grad_weight, None, None, None if operand.meta else [], None, grad_bias, None


def _gradients_of_tensors(
    name: str, of_weight: Callable[[], Tensor], operand: WeightOperand, inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of a checkpoint operand, in the order of its tensors, from dL/dW."""
    fields, gradients = _GRADIENTS[operand.kind]
    places: list[int] = []

    def of_tensors() -> _Gradients:
        found = gradients(of_weight(), operand)
        places.extend(map(fields.index, found))
        return tuple(each.to(operand.tensors[place].dtype) for each, place in zip(found.values(), places, strict=True))

    of_all: list[Tensor | None] = [None] * len(operand.tensors)
    for found, place in zip(differentiable_once(name, of_tensors, inputs), places, strict=True):
        of_all[place] = found
    return of_all


# ---- W ----------------------------------------------------------------------------------------------------------------


def packed_dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix [N, K] that a packed weight of any format stands for, in float32, bfloat16 or float16."""
    operand = weight if isinstance(weight, WeightOperand) else weight.operand()
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: {_names(ACTIVATION_DTYPES)}")
    return torch.ops.pyllmq.packed_dequantize(*_arguments_of(operand), dtype)


def _packed_dequantize(*arguments: Any) -> Tensor:
    *weight, dtype = arguments
    operand = operand_of(*weight)
    kernel = PACKED_DEQUANTIZE.kernel_for(operand.tensors[0].device, dtype, operand.layout, 0, operand.meta)
    return kernel(operand, dtype)


_WEIGHT = "Tensor[] weight, str kind, str layout, int[] meta, int[] shape"
define(
    f"packed_linear(Tensor x, {_WEIGHT}, Tensor? bias, str precision) -> Tensor",
    _packed_linear,
    lambda x, weight, kind, layout, meta, shape, *_: x.new_empty(*x.shape[:-1], shape[0]),
    _packed_linear_backward,
    _packed_linear_setup,
)
define(
    f"packed_dequantize({_WEIGHT}, ScalarType dtype) -> Tensor",
    _packed_dequantize,
    lambda weight, kind, layout, meta, shape, dtype: weight[0].new_empty(*shape, dtype=dtype),
)


# ---- rows of W --------------------------------------------------------------------------------------------------------

ID_DTYPES = (torch.int64, torch.int32)


def packed_rows(weight: Weight, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows of a packed weight [N, K] that `ids` name: what an embedding looks up.

    Args:
        weight: a packed weight such as `CodebookWeight`, or its `operand()`.
        ids: int64 or int32 of any shape, 0 to N - 1, on the weight's device.
        dtype: float32, bfloat16 or float16.

    Returns:
        [*ids.shape, K].

    Raises:
        IndexError: an id outside of the weight, on a CPU; on a GPU, which nobody waits for, its row is NaN.
        ValueError: ids on another device. TypeError: a dtype is not allowed.
        NoKernelError: no kernel serves the device and layout; the message lists every kernel's reason.
    """
    operand = weight if isinstance(weight, WeightOperand) else weight.operand()
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"ids is {ids.dtype}; allowed: {_names(ID_DTYPES)}")
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: {_names(ACTIVATION_DTYPES)}")
    wants_grad = torch.is_grad_enabled() and _trains(operand)
    if wants_grad or torch.compiler.is_compiling() or type(ids) is not Tensor:
        return torch.ops.pyllmq.packed_rows(*_arguments_of(operand), ids, dtype)
    return _run_rows(operand, ids, dtype)


def _run_rows(operand: WeightOperand, ids: Tensor, dtype: torch.dtype) -> Tensor:
    device = operand.tensors[0].device
    if ids.device != device:
        raise ValueError(f"ids are on {ids.device}, the weight on {device}; move them to one device")
    kernel = PACKED_ROWS.kernel_for(device, dtype, operand.layout, 0, operand.meta)
    return kernel(operand, for_kernels(ids.reshape(-1).long()), dtype).view(*ids.shape, operand.shape[1])


def _packed_rows(*arguments: Any) -> Tensor:
    *weight, ids, dtype = arguments
    y = _run_rows(operand_of(*weight), ids, dtype)
    return torch.ops.aten._unsafe_view(y, list(y.shape))


def _packed_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *weight, ids, _ = inputs
    ctx.operand = operand_of(*weight)
    ctx.save_for_backward(ids)


def _packed_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    operand = ctx.operand
    (ids,) = ctx.saved_tensors
    grad_weight: list[Tensor | None] = [None] * len(operand.tensors)
    if _trains(operand):

        def of_weight() -> Tensor:
            summed = grad.new_zeros(operand.shape, dtype=torch.float32)
            return summed.index_add_(0, ids.reshape(-1), grad.float().reshape(-1, operand.shape[1]))

        trained = [tensor for tensor in operand.tensors if tensor.requires_grad]
        grad_weight = _gradients_of_tensors("packed_rows", of_weight, operand, (grad, *trained))
    return grad_weight, None, None, None if operand.meta else [], None, None, None


define(
    f"packed_rows({_WEIGHT}, Tensor ids, ScalarType dtype) -> Tensor",
    _packed_rows,
    lambda weight, kind, layout, meta, shape, ids, dtype: ids.new_empty(*ids.shape, shape[1], dtype=dtype),
    _packed_rows_backward,
    _packed_rows_setup,
)


# ---- experts ------------------------------------------------------------------------------------------------------------


def routed_experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: PackedExperts) -> Tensor:
    """The weighted sum of each token's experts; of all experts only the chosen ones are read. Without gradients.

    Args:
        hidden_states: [tokens, hidden], float32, bfloat16 or float16, on the experts' device.
        top_k_index: int64 or int32 [tokens, k]: 0 to E - 1, or E for none.
        top_k_weights: [tokens, k], of any float dtype.
        experts: operands, biases and gate of all E.

    Returns:
        [tokens, hidden] in the dtype of hidden_states.

    Raises:
        IndexError: an index outside of 0 to E, on a CPU; where one GPU kernel serves all experts, its token is NaN: nobody waits.
        ValueError: shapes or devices that do not fit. TypeError: a dtype is not allowed.
    """
    up = experts.up[0]
    if hidden_states.dim() != 2 or hidden_states.shape[1] != up.shape[1]:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}; it must be [tokens, hidden] = [tokens, {up.shape[1]}]"
        )
    for name, given in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        if given.dim() != 2 or given.shape != top_k_index.shape or given.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}; it must be [tokens, k], {len(hidden_states)} tokens"
            )
    if hidden_states.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"hidden_states is {hidden_states.dtype}; allowed: {_names(ACTIVATION_DTYPES)}")
    if top_k_index.dtype not in ID_DTYPES:
        raise TypeError(f"top_k_index is {top_k_index.dtype}; allowed: {_names(ID_DTYPES)}")
    device = up.tensors[0].device
    if not hidden_states.device == top_k_index.device == top_k_weights.device == device:
        raise ValueError(
            f"hidden_states are on {hidden_states.device}, top_k_index on {top_k_index.device}, top_k_weights on "
            f"{top_k_weights.device}, the experts on {device}; move them to one device"
        )
    kernel = ROUTED_EXPERTS.kernel_for(device, hidden_states.dtype, experts.layouts)
    index, weights = for_kernels(top_k_index.long()), for_kernels(top_k_weights.detach().float())
    return kernel(for_kernels(hidden_states.detach()), index, weights, experts)


# ---- the same of one format -------------------------------------------------------------------------------------------


def _taken_by(op: str, weight: Weight) -> Weight:
    kind = op.rpartition("_")[0]
    if weight.kind != kind:
        raise NoKernelError(f"{op} takes weights of the format {kind!r}, this is {weight.kind!r}; see packed_linear")
    return weight


def codebook_linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION
) -> Tensor:
    """`packed_linear` of a codebook weight (`CodebookWeight` or its `operand()`).

    Source of the format: CLAQ (arXiv 2405.17233), one k-means codebook per input column.
    """
    return packed_linear(x, _taken_by("codebook_linear", weight), bias, precision)


def bitmap_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION) -> Tensor:
    """`packed_linear` of a sparse weight of any pattern (`BitmapWeight` or its `operand()`)."""
    return packed_linear(x, _taken_by("bitmap_linear", weight), bias, precision)


def sparse24_linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION
) -> Tensor:
    """`packed_linear` of a 2:4 sparse weight (`Sparse24Weight` or its `operand()`)."""
    return packed_linear(x, _taken_by("sparse24_linear", weight), bias, precision)


def sparse24_codebook_linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, precision: str = DEFAULT_PRECISION
) -> Tensor:
    """`packed_linear` of a 2:4 sparse weight of codes (`Sparse24CodebookWeight` or its `operand()`)."""
    return packed_linear(x, _taken_by("sparse24_codebook_linear", weight), bias, precision)


def codebook_dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`packed_dequantize` of a codebook weight."""
    return packed_dequantize(_taken_by("codebook_dequantize", weight), dtype)


def bitmap_dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`packed_dequantize` of a sparse weight of any pattern."""
    return packed_dequantize(_taken_by("bitmap_dequantize", weight), dtype)


def sparse24_dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`packed_dequantize` of a 2:4 sparse weight."""
    return packed_dequantize(_taken_by("sparse24_dequantize", weight), dtype)


def sparse24_codebook_dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """`packed_dequantize` of a 2:4 sparse weight of codes."""
    return packed_dequantize(_taken_by("sparse24_codebook_dequantize", weight), dtype)


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
    return PACK_CODES.kernel_for(codes.device, codes.dtype)(codes, bits)


def _unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    return UNPACK_CODES.kernel_for(packed.device, packed.dtype)(packed, bits, columns)


define(
    "pack_codes(Tensor codes, int bits) -> Tensor",
    _pack_codes,
    lambda codes, bits: codes.new_empty(codes.shape[0], (codes.shape[1] * bits + 7) // 8),
)
define(
    "unpack_codes(Tensor packed, int bits, int columns) -> Tensor",
    _unpack_codes,
    lambda packed, bits, columns: packed.new_empty(packed.shape[0], columns),
)


# ---- softmax_cdist_l1 -----------------------------------------------------------------------------------------------

LOGITS_DTYPES = (*ACTIVATION_DTYPES, torch.float64)


def softmax_cdist_l1(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """D[..., i, j] = sum over v of |softmax(student_logits / T)[..., i, v] - softmax(teacher_logits / T)[..., j, v]|.

    Neither side's probabilities are ever in memory as a whole; only two numbers per row are kept for the backward pass.
    Differentiable once in both sides (a second derivative is an error); where two probabilities are equal the derivative of
    their distance is 0.

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
    return readable(logits.reshape(math.prod(logits.shape[:-2]), *logits.shape[-2:]))


def _softmax_cdist_l1(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = SOFTMAX_CDIST_L1.kernel_for(student_logits.device, student_logits.dtype)
    distance, *statistics = kernel(_as_batch(student_logits), _as_batch(teacher_logits), temperature)
    leading = student_logits.shape[:-2]
    student_statistics, teacher_statistics = (each.view(*leading, *each.shape[1:]) for each in statistics)
    return distance.view(*leading, *distance.shape[1:]), student_statistics, teacher_statistics


def _softmax_cdist_l1_fake(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(student.dtype, torch.float32)
    distance = student.new_empty(*student.shape[:-1], teacher.shape[-2], dtype=dtype)
    of_student, of_teacher = (each.new_empty(*each.shape[:-1], 2, dtype=dtype) for each in (student, teacher))
    return distance, of_student, of_teacher


def _softmax_cdist_l1_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, ctx.temperature = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(student, teacher, *statistics)


def _softmax_cdist_l1_gradients(ctx: Any, grad: Tensor, *_: object) -> _Gradients:
    student, teacher, statistics, teacher_statistics = ctx.saved_tensors
    backward = torch.ops.pyllmq.softmax_cdist_l1_backward

    def gradients() -> _Gradients:
        student_grad = teacher_grad = None
        if ctx.needs_input_grad[0]:
            student_grad = backward(grad, student, teacher, statistics, teacher_statistics, ctx.temperature)
        if ctx.needs_input_grad[1]:
            teacher_grad = backward(grad.mT, teacher, student, teacher_statistics, statistics, ctx.temperature)
        return student_grad, teacher_grad, None

    return differentiable_once("softmax_cdist_l1", gradients, (grad, student, teacher))


def _softmax_cdist_l1_backward(grad: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    *others, temperature = arguments
    kernel = SOFTMAX_CDIST_L1_BACKWARD.kernel_for(logits.device, logits.dtype)
    grad, mine, other, statistics, other_statistics = (_as_batch(each) for each in (grad, logits, *others))
    return kernel(grad, Cdist(mine, other, statistics, other_statistics, temperature)).view(logits.shape)


define(
    "softmax_cdist_l1(Tensor student_logits, Tensor teacher_logits, float temperature) -> (Tensor, Tensor, Tensor)",
    _softmax_cdist_l1,
    _softmax_cdist_l1_fake,
    _softmax_cdist_l1_gradients,
    _softmax_cdist_l1_setup,
)
define(
    "softmax_cdist_l1_backward(Tensor grad, Tensor logits, Tensor other_logits, Tensor statistics, Tensor other_statistics, "
    "float temperature) -> Tensor",
    _softmax_cdist_l1_backward,
    lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)

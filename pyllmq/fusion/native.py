"""Forms bound to the native steps (csrc/decode_step): weights as operands, tensors as addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.cpu import runtime as cpu
from ..layers.linear import PackedLinear
from ..linears import dense_weight
from ..operations import PRECISIONS
from .cache import GrowingLayer
from .steps import NONE, AttentionForm, MlpForm, Norm, Rotary


class NotBoundError(Exception):
    """A weight that the native steps cannot read; the message says which."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What all blocks share at one call, made once: `native` reads memory that `keep` holds."""

    batch: int
    queries: int
    native: Any
    keep: tuple[Tensor, ...]
    keys: int | None
    """How many keys the mask covers; None: no mask, all are seen."""


def make_tokens(x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, rotary: Rotary) -> Tokens:
    """x [batch, queries, hidden]; cos and sin as the model has them, [batch or 1, queries, width]; mask [batch or 1, 1, queries,
    keys], bool (True: seen) or added to the scores."""
    batch, queries, _ = x.shape
    given: dict[str, Any] = {}
    keep: list[Tensor] = []
    if cos is not None and sin is not None and rotary.size:
        for name, table in (("cos", cos), ("sin", sin)):
            keep.append(rotary.table(table).float().expand(batch, queries, -1).contiguous())
            given[name] = keep[-1].data_ptr()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = mask.new_zeros(mask.shape, dtype=torch.float32).masked_fill_(mask.logical_not(), -torch.inf)
        keep.append(mask[:, 0].float().expand(-1, queries, -1).contiguous())
        strides = (0 if mask.shape[0] == 1 else keep[-1].stride(0), keep[-1].stride(1))
        given |= {"mask": keep[-1].data_ptr(), "mask_strides": strides}
    native = cpu.kernels().StepTokens(batch=batch, queries=queries, dtype=cpu.DTYPE_CODE[x.dtype], **given)
    return Tokens(batch, queries, native, tuple(keep), None if mask is None else mask.shape[-1])


@dataclass(frozen=True, eq=False)
class Room:
    """Memory for keys and values that nobody keeps."""

    sizes: tuple[int, ...]
    native: Any
    keep: tuple[Tensor, Tensor]


class Attention:
    """One attention module, or its part of a block."""

    def __init__(self, form: AttentionForm) -> None:
        sinks = [] if form.sinks is None else form.sinks.tolist()
        given = _fields(form) | {"rotary": form.rotary.style, "rotary_size": form.rotary.size, "sinks": sinks}
        self.form, self.step = form, cpu.kernels().AttentionStep(**given)
        self.cache: tuple[Any, Any] = (None, None)

    def __call__(self, x: Tensor, y: Tensor, tokens: Tokens, layer: GrowingLayer, residual: bool) -> None:
        """y = x or nothing, and attention of x; the layer holds the tokens' keys and values afterwards."""
        cache, past = self.place(layer, x)
        pointer = x.data_ptr()
        self.step(pointer, y.data_ptr(), tokens.native, cache, past, pointer if residual else 0)
        layer.committed(tokens.queries)

    def encode(self, x: Tensor, y: Tensor, tokens: Tokens, room: Room | None) -> Room:
        """y = x and attention of the tokens of x to each other. -> the room used: `room` where it fits."""
        form = self.form
        sizes = (tokens.batch, form.kv_heads, tokens.queries, form.head_size, form.value_size)
        if room is None or room.sizes != sizes:
            keys, values = (torch.empty(*sizes[:3], size, dtype=torch.float32, device=cpu.DEVICE) for size in sizes[3:])
            room = Room(sizes, _cache(keys, values), (keys, values))
        pointer = x.data_ptr()
        self.step(pointer, y.data_ptr(), tokens.native, room.native, 0, pointer)
        return room

    def place(self, layer: GrowingLayer, x: Tensor) -> tuple[Any, int]:
        """The memory of a layer with room for the tokens of x [batch, queries, hidden], and how many it holds."""
        if layer.grown[0].length == 0:
            layer.begin(x, self.form.kv_heads, self.form.head_size, self.form.value_size)
        layer.reserve(x.shape[1])
        keys, values = layer.grown
        buffer: Any = keys.buffer
        # Another cache may come to lie at the address of one that is gone.
        place = (keys.pointer(), values.pointer(), keys.start, buffer.shape, buffer.dtype)
        if self.cache[0] != place:
            self.cache = (place, _cache(*(grown.memory() for grown in layer.grown)))
        return self.cache[1], keys.length


def _cache(keys: Tensor, values: Tensor) -> Any:
    batch, heads, capacity, size = keys.shape
    return cpu.kernels().KeyValueCache(
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        dtype=cpu.DTYPE_CODE[keys.dtype],
        batch=batch,
        kv_heads=heads,
        capacity=capacity,
        head_size=size,
        value_size=values.shape[3],
        key_strides=keys.stride()[:3],
        value_strides=values.stride()[:3],
    )


class Mlp:
    """One MLP module, or its part of a block."""

    def __init__(self, form: MlpForm) -> None:
        self.form, self.step = form, cpu.kernels().MlpStep(**_fields(form))

    def __call__(self, x: Tensor, y: Tensor, tokens: Tokens, residual: bool) -> None:
        """y = MLP of x, added to y or not."""
        pointer = y.data_ptr()
        self.step(x.data_ptr(), pointer, tokens.native, pointer if residual else 0)


def _fields(form: AttentionForm | MlpForm) -> dict[str, Any]:
    """Of a form, by the names that its step has for them."""
    output, linears = form.output, (*form.linears, form.output.linear)
    operands = [_operand(linear) for linear in linears]
    given = {name: bound_norm(value) if isinstance(value, Norm) else value for name, value in vars(form).items()}
    del given["linears"]
    return given | {
        "inputs": tuple(operands[:-1]),
        "input_bias": _biases(form.linears, operands[:-1]),
        "output": operands[-1],
        "output_bias": _biases([output.linear], operands[-1:]),
        "output_norm": bound_norm(output.norm),
        "multiplier": output.multiplier,
        "norm_last": output.norm_last,
        "precision": _precision(linears),
    }


def _operand(linear: nn.Module) -> Any:
    if isinstance(linear, PackedLinear):
        operand = linear.operand()
        if operand.layout.startswith("cpu."):
            return cpu.bound(operand)
        raise NotBoundError(f"a weight is laid out as {operand.layout!r}, not for the CPU's kernels")
    weight = dense_weight(linear)
    if weight.is_contiguous() and weight.dtype in cpu.DTYPE_CODE and weight.is_cpu:
        return cpu.kernels().DenseOperand(weight.data_ptr(), cpu.DTYPE_CODE[weight.dtype], *weight.shape)
    raise NotBoundError(
        f"a {type(linear).__name__} is dense, {weight.dtype} on {weight.device}, strides {weight.stride()}"
    )


def _biases(linears: Sequence[nn.Module], operands: Sequence[Any]) -> list[float]:
    biases: list[Any] = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return []
    rows = zip(biases, operands, strict=True)
    parts = [torch.zeros(operand.rows) if bias is None else bias.detach().float() for bias, operand in rows]
    return torch.cat(parts).tolist()


def bound_norm(norm: Norm) -> Any:
    if norm.kind == NONE:
        return None
    numbers = [[] if t is None else t.flatten().tolist() for t in (norm.weight, norm.bias)]
    return cpu.kernels().Norm(norm.kind, norm.eps, *numbers)


def _precision(linears: Sequence[nn.Module]) -> int:
    """The most exact that one of the layers asks for; dense weights have nothing to ask."""
    codes = [PRECISIONS.index(linear.precision) for linear in linears if isinstance(linear, PackedLinear)]
    return min(codes, default=0)

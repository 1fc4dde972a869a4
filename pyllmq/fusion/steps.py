"""What a fused step does, said completely: the attention module or the MLP module of a block for a few tokens.

The forms are what `grammar` finds in a record and what the native steps are made from. `attention` and `mlp` run a form in plain
torch: slow, for comparing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NONE, RMS, LAYER = "none", "rms", "layer"
HALVES, INTERLEAVED = "halves", "interleaved"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


@dataclass(frozen=True, eq=False)
class Norm:
    """Over the last dimension. rms: x / sqrt(mean(x^2) + eps) * weight + bias; layer: the same of x - mean(x)."""

    kind: str = NONE
    eps: float = 0.0
    weight: Tensor | None = None  # fp32, [size], or [heads, size] where each head has its own
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == NONE:
            return x
        x = x - x.mean(-1, keepdim=True) if self.kind == LAYER else x
        y = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Rows:
    """Row first + i * stride of the output of Linear number `linear` starts item i: a head, or one unit of an MLP."""

    linear: int
    first: int
    stride: int

    def of(self, outputs: list[Tensor], count: int, size: int) -> Tensor:
        """[batch, tokens, count, size]"""
        starts = self.first + self.stride * torch.arange(count)
        return outputs[self.linear][..., (starts[:, None] + torch.arange(size)).flatten()].unflatten(-1, (count, size))


@dataclass(frozen=True)
class Rotary:
    """Pairs (d, d + size / 2) or (2 d, 2 d + 1) of the first `size` elements turn by one angle each; the rest stays.

    step: the model's table of cosines holds that of pair i at [..., step * i].
    """

    style: str = NONE
    size: int = 0
    step: int = 1

    def table(self, t: Tensor) -> Tensor:
        """[batch, tokens, size / 2] of the model's cosines or sines [batch, tokens, size or size / 2]."""
        return t[..., :: self.step][..., : self.size // 2]

    def __call__(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """x [batch, tokens, heads, head size]; cos and sin as the model has them."""
        if self.style == NONE or cos is None or sin is None:
            return x
        c, s = (self.table(t).to(x.dtype).unsqueeze(2) for t in (cos, sin))
        turned, rest = x[..., : self.size], x[..., self.size :]
        if self.style == HALVES:
            p, q = turned.chunk(2, -1)
            return torch.cat([p * c - q * s, q * c + p * s, rest], -1)
        p, q = turned[..., ::2], turned[..., 1::2]
        return torch.cat([torch.stack([p * c - q * s, q * c + p * s], -1).flatten(-2), rest], -1)


@dataclass(frozen=True, eq=False)
class Output:
    """y = residual + multiplier * norm(linear(x))"""

    linear: nn.Module
    norm: Norm = Norm()
    multiplier: float = 1.0

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = self.multiplier * self.norm(self.linear(x))
        return y if residual is None else residual + y


@dataclass(frozen=True, eq=False)
class AttentionForm:
    """q, k, v = rows of linears(norm(x)); norms of q and k; rotary positions; attention to the cache; output."""

    linears: tuple[nn.Module, ...]
    q_rows: Rows
    k_rows: Rows
    v_rows: Rows
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    output: Output
    norm: Norm = Norm()
    q_norm: Norm = Norm()
    k_norm: Norm = Norm()
    norms_span_heads: bool = False
    norms_after_rotary: bool = False
    rotary: Rotary = Rotary()
    soft_cap: float = 0.0
    sinks: Tensor | None = None  # fp32 [heads]


@dataclass(frozen=True, eq=False)
class MlpForm:
    """y = residual + output(activation(gate rows) * up rows), of linears(norm(x)); without up rows plain."""

    linears: tuple[nn.Module, ...]
    units: int
    gate_rows: Rows
    up_rows: Rows | None
    activation: str
    output: Output
    norm: Norm = Norm()


def attention(
    form: AttentionForm,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, keys, values), the last two with those of x behind the given ones.

    x [batch, tokens, hidden]; keys and values [batch, kv heads, past, size]; mask fp, added to the scores, broadcast to
    [batch, 1, tokens, past + tokens], None: all are seen.
    """
    h = form.norm(x)
    outputs = [linear(h) for linear in form.linears]
    q = _head_positions(form, form.q_rows.of(outputs, form.heads, form.head_size), form.q_norm, cos, sin)
    k = _head_positions(form, form.k_rows.of(outputs, form.kv_heads, form.head_size), form.k_norm, cos, sin)
    v = form.v_rows.of(outputs, form.kv_heads, form.value_size)
    keys = torch.cat([keys, k.transpose(1, 2).to(keys.dtype)], 2)
    values = torch.cat([values, v.transpose(1, 2).to(values.dtype)], 2)
    group = form.heads // form.kv_heads
    scores = form.scale * q.transpose(1, 2) @ keys.to(q.dtype).repeat_interleave(group, 1).mT
    if form.soft_cap:
        scores = form.soft_cap * (scores / form.soft_cap).tanh()
    if mask is not None:
        scores = scores + mask
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    seen = weights @ values.to(q.dtype).repeat_interleave(group, 1)
    return form.output(seen.transpose(1, 2).flatten(2), residual), keys, values


def _head_positions(form: AttentionForm, x: Tensor, norm: Norm, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    x = form.rotary(x, cos, sin) if form.norms_after_rotary else x
    x = norm(x.flatten(2)).view_as(x) if form.norms_span_heads else norm(x)
    return x if form.norms_after_rotary else form.rotary(x, cos, sin)


def mlp(form: MlpForm, x: Tensor, residual: Tensor | None = None) -> Tensor:
    h = form.norm(x)
    outputs = [linear(h) for linear in form.linears]
    a = ACTIVATIONS[form.activation](form.gate_rows.of(outputs, form.units, 1))
    if form.up_rows is not None:
        a = a * form.up_rows.of(outputs, form.units, 1)
    return form.output(a.flatten(2), residual)

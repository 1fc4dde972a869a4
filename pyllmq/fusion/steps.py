"""What a fused step does, said completely: the attention module or the MLP module of a block.

The forms are what `grammar` finds in a record and what the native steps are made from: fields have the names of the steps'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

NONE, RMS, LAYER = "none", "rms", "layer"
HALVES, INTERLEAVED = "halves", "interleaved"


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


class Rows(NamedTuple):
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
    """y = residual + multiplier * norm(linear(x)), or with `norm_last` norm(residual + multiplier * linear(x))"""

    linear: nn.Module
    norm: Norm = Norm()
    multiplier: float = 1.0
    norm_last: bool = False


@dataclass(frozen=True, eq=False)
class AttentionForm:
    """q, k, v = rows of linears(norm(x)); norms of q and k; rotary positions; attention to the cache, or not causal to the
    call's own tokens; output."""

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
    causal: bool = True


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

"""What the native steps are compared with: their forms (pyllmq/fusion/steps.py) in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllmq.fusion.steps import AttentionForm, MlpForm, Norm
from pyllmq.operations import ACTIVATIONS


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
    return _output(form, seen.transpose(1, 2).flatten(2), residual), keys, values


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
    return _output(form, a.flatten(2), residual)


def _output(form: AttentionForm | MlpForm, x: Tensor, residual: Tensor | None) -> Tensor:
    output = form.output
    y = output.linear(x)
    y = output.multiplier * (y if output.norm_last else output.norm(y))
    y = y if residual is None else residual + y
    return output.norm(y) if output.norm_last else y

"""Which Linears of a block form an MLP, or an attention: found by gradients, so no architecture is named.

A Linear reads a channel where a channel of its input depends on the same channel of other Linears' outputs, and on nothing else; it
reads heads where channels depend on all outputs of a part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model_state import hooked
from ..statistics.blocks import Stage

PROBED = 8
"""Channels by which a Linear is told."""
NOISE = 0.3
"""What stands for the outputs of Linears while heads and channels are told apart: of a size at which no softmax is saturated."""


@dataclass(frozen=True)
class Attention:
    """Heads, in groups that share keys and values: all of one group go or stay."""

    reader: str
    """The Linear behind the heads."""
    inputs: list[Tensor]
    """For each group its inputs of the reader, int64."""
    outputs: dict[str, list[Tensor]]
    """Linear -> for each group its outputs, int64: queries, keys, values."""
    head: int
    """Inputs of the reader in a head."""


def parts_of(stage: Stage, forward: Callable[[int], Any]) -> tuple[dict[str, tuple[str, ...]], list[Attention]]:
    """(the Linear that reads -> those that write, for each MLP of a block; its attentions)."""
    inputs, outputs = _graph(stage, forward)
    mlps: dict[str, tuple[str, ...]] = {}
    attentions = []
    for reader, x in inputs.items():
        if not x.requires_grad:
            continue
        width = x.shape[-1]
        writers: dict[str, None] = {}
        for channel in range(0, width, max(1, width // PROBED)):
            reached = _reached(x, channel, outputs)
            alone = all(outputs[n].shape[-1] == width and rows.tolist() == [channel] for n, rows in reached.items())
            if not alone:
                break
            writers |= dict.fromkeys(reached)
        else:
            if writers:
                mlps[reader] = tuple(writers)
            continue
        attention = _heads(reader, x, outputs)
        if attention is not None:
            attentions.append(attention)
    return mlps, attentions


def _graph(stage: Stage, forward: Callable[[int], Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Linear -> its input, and its output; gradients of the former end at the nearest of the latter."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def see(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0]
            # Noise, so that gradients come through heads and channels that are always 0.
            noise = torch.randn(output.shape, generator=generator).to(output)
            outputs[name] = (noise * NOISE).requires_grad_()
            return outputs[name]

        return hook

    with hooked(module.register_forward_hook(see(name)) for name, module in stage.linears.items()), torch.enable_grad():
        forward(0)
    return inputs, outputs


def _reached(x: Tensor, channels: int | slice, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear -> its outputs, int64, on which these channels of an input depend; Linears of which there are none are left out."""
    weights = torch.randn(x[..., channels].shape, generator=torch.Generator().manual_seed(1)).to(x)
    with torch.enable_grad():
        total = (x[..., channels] * weights).sum()
    gradients = torch.autograd.grad(total, list(outputs.values()), retain_graph=True, allow_unused=True)
    found = {
        name: g.flatten(0, -2).abs().amax(0).nonzero().flatten()
        for name, g in zip(outputs, gradients, strict=True)
        if g is not None
    }
    return {name: rows for name, rows in found.items() if len(rows)}


def _heads(reader: str, x: Tensor, outputs: Mapping[str, Tensor]) -> Attention | None:
    """The heads that a Linear reads; None where what it reads is no row of heads of one size."""
    width = x.shape[-1]
    first = _places(_reached(x, 0, outputs))
    for head in (size for size in range(2, width) if width % size == 0):
        # A further channel of the same head depends on one value more; one of the next head on all queries of that.
        if len(_places(_reached(x, head, outputs)) - first) > 1:
            break
    else:
        return None
    groups: list[tuple[list[int], set[tuple[str, int]]]] = []
    for at in range(0, width, head):
        places = _places(_reached(x, slice(at, at + head), outputs))
        mine = next((group for group in groups if group[1] & places), None)
        if mine is None:
            groups.append((list(range(at, at + head)), places))
        else:
            mine[0].extend(range(at, at + head))
            mine[1].update(places)
    whole = {(name, row) for name, _ in groups[0][1] for row in range(outputs[name].shape[-1])}
    sizes = {(len(channels), len(places)) for channels, places in groups}
    if len(groups) < 2 or len(sizes) != 1 or set().union(*(places for _, places in groups)) != whole:
        return None
    writers = dict.fromkeys(name for name in outputs if any(name == other for other, _ in groups[0][1]))
    rows = {n: [torch.tensor(sorted(row for o, row in places if o == n)) for _, places in groups] for n in writers}
    return Attention(reader, [torch.tensor(channels) for channels, _ in groups], rows, head)


def _places(reached: Mapping[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, row) for name, rows in reached.items() for row in rows.tolist()}

"""Codebook tuning: codes stay, codebooks, row scales, biases and norms are trained until the model agrees with the dense one.

The loss is the Kullback-Leibler divergence from the distributions of the dense model (of tokens, classes or places), and for
encoders the relative squared error of the last hidden states plus 1 - cosine of their mean over the sentence. A codebook entry
moves in units of the gap between its column's centroids, so one learning rate serves columns of all sizes and widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import ops
from ..formats import CodebookWeight
from ..linears import replace_module
from ..nn import CodebookLinear
from .calibration import Batch, as_batches, given_to_model, token_mask
from .model_state import gradients_for, other_forwards, quiet_eval
from .objective import mismatch, relative_error
from .statistics.blocks import BlockLoop, Call, Chain, find_stages

LEARNING_RATE = 0.003
"""All-MiniLM-L6-v2 on development sentences, 1 - cosine before and after: at 3 bits .0338 and .0294 to .0300 (200 steps, 0.001 to
0.003), .0412 with 0.01 of the column's root mean square (40 steps: all entries of a row move alike at first, which is a third of
the error itself); at 2.25 bits .0706 and .0624 with 0.003, .0627 with 0.01."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises; then it falls along a cosine to zero."""
OTHERS = 0.1
"""Learning rate of biases and norms, whose unit is 1, as a share of the codebooks'."""
SCALE = 2.0**12
"""What the loss of a model in fp16 is multiplied by at first: a mean over thousands of tokens has gradients below 6e-8."""


def tune_codebooks(
    model: nn.Module,
    dense: nn.Module,
    text: Iterable[Any],
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    checkpoint: bool = False,
    progress: bool = True,
) -> list[float]:
    """Train what is not codes in the packed layers of `model` to match `dense`, in place, end to end.

    Args:
        model: a compressed model; its `CodebookLinear` layers are replaced by tuned ones of the same structure and size.
        dense: the model it was made from, as it was.
        text: batches as for `compress`; better other text than the calibration's. They are gone through in random order, as
            often as the steps need.
        steps: optimizer steps (Adam), one batch each.
        learning_rate: of the codebooks, relative to the gaps between their columns' centroids.
        seed: of the order of the batches.
        checkpoint: keep only the blocks' inputs for the backward pass and run each block again there: a third more time,
            activations of one block instead of all.

    Returns:
        The loss of every step. If anything fails, the model is as it was.

    Raises:
        ValueError: steps < 1, no packed layer, no batch, or a loss that is not finite.
    """
    batches, layers = _checked(model, text, steps)
    device = next(dense.parameters()).device
    order = _endless_order(len(batches), seed)

    def loss() -> Tensor:
        batch = {key: value.to(device) for key, value in batches[next(order)].items()}
        with torch.no_grad():
            wanted = dense(**given_to_model(batch, dense))
        return mismatch(model, model(**given_to_model(batch, model)), wanted, batch)

    # transformers' own switch for this works in training mode only.
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    stages = find_stages(model, dict(layers), outside=False) if checkpoint else []
    forwards = {stage.block: partial(again, stage.block.forward) for stage in stages if stage.block is not None}
    with (
        tqdm(total=steps, disable=not progress, unit="step") as bar,
        quiet_eval(model, dense),
        other_forwards(forwards),
    ):
        return _train(model, model, layers, loss, steps, learning_rate, bar)


def tune_blocks(
    model: nn.Module,
    dense: nn.Module,
    text: Iterable[Any],
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list[float]]:
    """As `tune_codebooks`, one block at a time: each is trained to give what the dense block gives in the dense model.

    A block's input is what the tuned blocks before it give, so later blocks make up for earlier ones. Only one block is
    trained at a time: it fits where training end to end does not. Blocks that do not take just what the one before gave
    out stay as they are.

    Args:
        steps: optimizer steps for each block.

    Returns:
        name of the block -> the loss of every step, the squared error relative to the dense block's squared output.
        Blocks done before a failure stay tuned.
    """
    batches, layers = _checked(model, text, steps)
    device = next(dense.parameters()).device
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    stages = find_stages(model, dict(layers), outside=False)
    total = steps * sum(bool(stage.linears) for stage in stages)
    found: dict[str, list[float]] = {}
    with quiet_eval(model, dense), tqdm(total=total, disable=not progress, unit="step") as bar, torch.no_grad():
        loop, dense_loop = (BlockLoop(of, batches[0], batches) for of in (model, dense))
        chains = loop.find_chains(stages)
        dense_loop.find_chains(find_stages(dense, {name: dense.get_submodule(name) for name in layers}, outside=False))
        for chain in chains:
            if chain.stages[0].block is None:
                continue
            dense_chain = Chain([replace(s, block=dense.get_submodule(s.name)) for s in chain.stages], chain.alike)
            recorded, dense_recorded = loop.record(chain), dense_loop.record(dense_chain)
            hidden, wanted = ([calls[0].hidden for calls in of] for of in (recorded, dense_recorded))
            for i, (stage, dense_stage) in enumerate(zip(chain.stages, dense_chain.stages, strict=True)):
                block, dense_block = stage.block, dense_stage.block
                assert block is not None and dense_block is not None
                calls = [of_batch[i] for of_batch in recorded]
                wanted = [of[i].run(dense_block, h) for of, h in zip(dense_recorded, wanted, strict=True)]
                if stage.linears:
                    order = _endless_order(len(batches), seed)
                    loss = partial(_block_error, stage.name, block, calls, hidden, wanted, batches, order)
                    inside = {name: layers[name] for name in stage.linears}
                    found[stage.name] = _train(model, block, inside, loss, steps, learning_rate, bar)
                hidden = [call.run(block, h) for call, h in zip(calls, hidden, strict=True)]
            loop.finish(chain, hidden)
            dense_loop.finish(dense_chain, wanted)
    return found


def _block_error(
    name: str,
    block: nn.Module,
    calls: Sequence[Call],
    hidden: Sequence[Tensor],
    wanted: Sequence[Tensor],
    batches: Sequence[Batch],
    order: Iterator[int],
) -> Tensor:
    at = next(order)
    mask = token_mask(batches[at], name, wanted[at].shape[:2]) if wanted[at].dim() == 3 else None
    return relative_error(calls[at].run(block, hidden[at]), wanted[at], mask)


def _checked(model: nn.Module, text: Iterable[Any], steps: int) -> tuple[list[Batch], dict[str, CodebookLinear]]:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; it must be an integer >= 1")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CodebookLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no packed layer to tune; compress it first (pyllmq.compress)")
    return as_batches(text, model), layers


def _train(
    model: nn.Module,
    scope: nn.Module,
    layers: dict[str, CodebookLinear],
    next_loss: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    bar: Any,
) -> list[float]:
    """Train `layers` of `model`, and the norms and biases in `scope`; all as before if anything fails."""
    trained = {name: _TrainedLinear(layer) for name, layer in layers.items()}
    others = _norms_and_biases(scope)
    before = [p.detach().clone() for p in others]
    losses: list[float] = []
    after: dict[str, CodebookLinear] = layers
    try:
        for name, module in trained.items():
            replace_module(model, name, module)
        moves = [p for module in trained.values() for p in module.moves()]
        biases = [module.bias for module in trained.values() if module.bias is not None]
        # bf16 and fp16 have no room for steps this small, and Adam's epsilon is 0 in fp16.
        exact = [nn.Parameter(p.detach().float().clone()) for p in others]
        groups: list[dict[str, Any]] = [{"params": moves}, {"params": [*exact, *biases], "scale": OTHERS}]
        optimizer = torch.optim.Adam(groups, lr=learning_rate, betas=(0.9, 0.95))
        used = {p.dtype for p in others} | {module.dense_dtype for module in trained.values()}
        scaler = torch.amp.GradScaler(moves[0].device.type, init_scale=SCALE, enabled=torch.float16 in used)
        with gradients_for(model, [*moves, *others, *biases]):
            for step in range(steps):
                rate = learning_rate * _schedule(step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("scale", 1.0)
                loss = next_loss()
                if not bool(torch.isfinite(loss)):
                    raise ValueError(
                        f"the tuning loss is {loss.item()} at step {step}; lower learning_rate (given: {learning_rate:g})"
                    )
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                for own, p in zip(exact, others, strict=True):
                    own.grad, p.grad = None if p.grad is None else p.grad.float(), None
                scaler.step(optimizer)
                scaler.update()
                with torch.no_grad():
                    for own, p in zip(exact, others, strict=True):
                        p.copy_(own)
                losses.append(loss.item())
                bar.set_postfix_str(f"loss {losses[-1]:.5f}", refresh=False)
                bar.update()
        after = {name: module.packed() for name, module in trained.items()}
    finally:
        if after is layers:
            with torch.no_grad():
                for parameter, old in zip(others, before, strict=True):
                    parameter.copy_(old)
        for name, layer in after.items():
            replace_module(model, name, layer)
    return losses


class _TrainedLinear(nn.Module):
    """A packed layer whose codebook and row scale are parameters; the codes stay packed as in a checkpoint."""

    def __init__(self, layer: CodebookLinear) -> None:
        super().__init__()
        self.weight_packed, self.dense_dtype, self.precision = layer.packed_weight(), layer.dense_dtype, layer.precision
        self.operand = self.weight_packed.checkpoint_operand()
        self.field = CodebookWeight.named(self.operand)
        self.start = self.field["codebook"].float()
        self.unit = _column_gap(self.start, self.weight_packed.column_bits)
        self.move = nn.Parameter(torch.zeros_like(self.start))
        scale = self.field["row_scale"].float()
        self.row_scale = scale
        self.row_move = nn.Parameter(torch.zeros_like(scale)) if scale.numel() else None
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())

    def moves(self) -> list[nn.Parameter]:
        return [self.move] if self.row_move is None else [self.move, self.row_move]

    def _trained(self) -> dict[str, Tensor]:
        found = {"codebook": self.start + self.unit * self.move}
        if self.row_move is not None:
            found["row_scale"] = self.row_scale * (1 + self.row_move)
        return found

    def forward(self, x: Tensor) -> Tensor:
        field = self.field | self._trained()
        operand = replace(self.operand, tensors=tuple(field[name] for name in CodebookWeight.fields))
        return ops.packed_linear(x, operand, self.bias)

    @torch.no_grad()
    def packed(self) -> CodebookLinear:
        tensors = dict(self.weight_packed.tensors)
        for name, value in self._trained().items():
            tensors[name] = value.half()
        weight = CodebookWeight.from_tensors(tensors, self.weight_packed.out_features, self.weight_packed.in_features)
        layer = CodebookLinear.from_weight(weight, self.bias, self.dense_dtype)
        layer.precision = self.precision
        return layer


def _column_gap(codebook: Tensor, column_bits: Tensor) -> Tensor:
    """float32 [segments, entries]: for each entry the mean distance between neighbours among its column's centroids."""
    sizes = 1 << column_bits.long()
    column = torch.repeat_interleave(sizes).expand(len(codebook), -1)
    low = torch.empty(len(codebook), len(sizes), device=codebook.device)
    high = low.scatter_reduce(1, column, codebook, "amax", include_self=False)
    low = low.scatter_reduce(1, column, codebook, "amin", include_self=False)
    return ((high - low) / (sizes - 1)).gather(1, column)


def _norms_and_biases(scope: nn.Module) -> list[nn.Parameter]:
    """1-D parameters beside the packed layers (their own biases move with them): norm weights, biases."""
    own = {id(p) for m in scope.modules() if isinstance(m, CodebookLinear) for p in m.parameters()}
    return [p for p in scope.parameters() if p.dim() == 1 and id(p) not in own and p.is_floating_point()]


def _endless_order(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _schedule(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

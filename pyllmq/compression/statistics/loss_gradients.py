"""Which outputs and which tokens of each Linear matter to the model's loss: one backward pass of the dense model.

Source: GuidedQuant (arXiv 2505.07004) and SqueezeLLM (2306.07629): to second order the loss grows by sum_t (g_t . e x_t)^2, with
g_t the loss's gradient at the Linear's output for token t and e the error of its weight. Its mean over tokens weighs the
rows (omega_r = mean_t g_tr^2), its mean over rows the tokens (H = sum_t s_t x_t x_t^T, s_t = mean_r g_tr^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...memory import return_freed
from ...weights import OUTSIDE
from ..calibration import Batch, given_to_model, token_mask
from ..model_state import gradients_for, hooked
from ..objective import NoLossError, checked_answer, losses
from ..ranks import ALONE, Ranks
from .blocks import BlockLoop, Call, Chain, Stage

LIMIT = 10.0
"""Row and token weights stay within this factor of their mean: single tokens and rows must not stand for the text."""


@dataclass(frozen=True, eq=False)
class LossGradients:
    """How much the rows and tokens of each Linear weigh in the loss."""

    row_weights: dict[str, Tensor] = field(default_factory=dict)
    """name -> float32 [N], mean 1."""
    token_weights: dict[str, list[Tensor]] = field(default_factory=dict)
    """name -> for each batch float32, shaped as the Linear's input without its last dimension; mean 1 over all batches."""
    scales: dict[str, float] = field(default_factory=dict)
    """name -> the squared gradient, summed over all tokens, mean of the rows: what compares one Linear with another."""

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        rows = {f"rows {name}": weights for name, weights in self.row_weights.items()}
        tokens = {f"tokens {name} {i:06d}": w for name, all_ in self.token_weights.items() for i, w in enumerate(all_)}
        scales = {f"scale {name}": torch.tensor(scale, dtype=torch.float64) for name, scale in self.scales.items()}
        return rows | tokens | scales

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LossGradients:
        """The inverse of `tensors`."""
        found = cls()
        for key in sorted(tensors):
            kind, name, *_ = key.split(" ")
            if kind == "rows":
                found.row_weights[name] = tensors[key]
            elif kind == "scale":
                found.scales[name] = float(tensors[key])
            else:
                found.token_weights.setdefault(name, []).append(tensors[key])
        return found

    def shared(self, ranks: Ranks) -> LossGradients:
        """With the token weights of this process's batches alone."""
        tokens = {name: ranks.share(all_) for name, all_ in self.token_weights.items()}
        return LossGradients(self.row_weights, tokens, self.scales)

    def limited_to(self, which: str) -> LossGradients:
        """Those of "rows", "tokens" or "rows+tokens" alone."""
        rows, tokens = self.row_weights if "rows" in which else {}, self.token_weights if "tokens" in which else {}
        return LossGradients(rows, tokens, self.scales)


def output_gradients(model: nn.Module, linears: Mapping[str, nn.Module], batches: Sequence[Batch]) -> LossGradients:
    """Row and token weights of each Linear for the model's own loss (`objective`).

    Raises NoLossError for a model that has none, or a gradient of it that is not finite.
    """
    watched = _Watched(linears, batches)
    with gradients_for(model), watched.hooks():
        for watched.index, batch in enumerate(batches):
            answer = checked_answer(model, model(**given_to_model(batch, model)), batch)
            found = losses(answer, _generator(watched.index))
            for left, loss in enumerate(found, 1 - len(found)):
                loss.backward(retain_graph=left < 0)
    return watched.result()


def output_gradients_by_block(
    loop: BlockLoop, chains: Sequence[Chain], linears: Mapping[str, nn.Module], stored: Any, ranks: Ranks = ALONE
) -> LossGradients:
    """The same with one block in memory at a time: forward through all blocks, then back through them.

    What a block is given beside its hidden states may come from chains before it: a decoder's view of its encoder.

    Args:
        stored: keeps the inputs of a block by its name between the two ways: write, read, remove.

    Raises:
        NoLossError: a model that has no loss, or a gradient of it that is not finite.
    """
    watched = _Watched(linears, loop.batches)
    ways: list[_Way] = []
    with gradients_for(loop.model):
        for chain in chains:
            if chain.stages[0].block is not None:
                ways.append(_Way(chain, loop.record(chain), stored))
                ways[-1].forward(loop)
        with watched.hooks():
            with ExitStack() as done, loop.weights.loaded(OUTSIDE):
                done.callback(loop.outputs.clear)
                for watched.index, batch in enumerate(loop.batches):
                    answer = checked_answer(loop.model, loop.run_model(watched.index), batch)
                    found = losses(answer, _generator(ranks.rank + watched.index * ranks.size))
                    for left, loss in enumerate(found, 1 - len(found)):
                        _take_back([loss], None, ways, watched.index, loss=left + len(found) - 1, keep=left < 0)
                    return_freed()
            while ways:
                ways.pop().back(loop, watched, ways)
    return watched.result(ranks)


def _generator(batch: int) -> torch.Generator:
    """One for each batch of all processes, so that it does not matter which of them runs it."""
    return torch.Generator().manual_seed(batch)


@dataclass(eq=False)
class _Way:
    """Through the blocks of a chain and back."""

    chain: Chain
    recorded: list[list[Call]]
    """With the graphs of what the blocks are given, which lead to the `ends` of the chains before."""
    stored: Any
    ends: list[Tensor] = field(default_factory=list)
    """What the last block gives out, for each batch."""
    gradients: list[dict[int, Tensor]] = field(default_factory=list)
    """For each batch: number of the loss -> its gradient at the end, then at what the block in hand gives out."""

    def forward(self, loop: BlockLoop) -> None:
        hidden = [calls[0].hidden.detach() for calls in self.recorded]
        with torch.no_grad():
            for i, stage in enumerate(self.chain.stages):
                self.stored.write(stage.name, hidden)
                with loop.weights.loaded(stage.name):
                    for index, calls in enumerate(self.recorded):
                        hidden[index] = calls[i].run(_block(stage), hidden[index])
        self.ends = [tensor.detach().requires_grad_() for tensor in hidden]
        self.gradients = [{} for _ in hidden]
        loop.finish(self.chain, self.ends)

    def back(self, loop: BlockLoop, watched: _Watched, before: Sequence[_Way]) -> None:
        self.ends.clear()
        beside: list[dict[int, dict[int, tuple[Tensor, Tensor]]]] = [{} for _ in self.recorded]
        """For each batch: number of the loss -> identity of a tensor that blocks were given -> that, and its gradient."""
        for i, stage in reversed(list(enumerate(self.chain.stages))):
            inputs = self.stored.read(stage.name)
            self.stored.remove(stage.name)
            with loop.weights.loaded(stage.name):
                for watched.index, found in enumerate(self.gradients):
                    call, leaf = self.recorded[watched.index][i], inputs[watched.index].requires_grad_()
                    given = [
                        t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor) and t.requires_grad
                    ]
                    output = call.run(_block(stage), leaf) if found else leaf
                    for loss, gradient in found.items():
                        last = loss == max(found)
                        found[loss], *others = torch.autograd.grad(
                            output, [leaf, *given], gradient, retain_graph=not last, allow_unused=True
                        )
                        sums = beside[watched.index].setdefault(loss, {})
                        for tensor, other in zip(given, others, strict=True):
                            if other is not None:
                                known = sums.get(id(tensor))
                                sums[id(tensor)] = tensor, other if known is None else known[1] + other
                    return_freed()
        for index, calls in enumerate(self.recorded):
            for loss, gradient in self.gradients[index].items():
                pairs = [*beside[index][loss].values(), *[(calls[0].hidden, gradient)] * calls[0].hidden.requires_grad]
                if pairs:
                    tensors, gradients = zip(*pairs, strict=True)
                    _take_back(tensors, gradients, before, index, loss, keep=loss < max(self.gradients[index]))


def _take_back(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    ways: Sequence[_Way],
    index: int,
    loss: int,
    keep: bool,
) -> None:
    """Add to the gradients at the ends of `ways` those that these tensors of batch `index` have for a loss."""
    if not ways:  # there are Linears alone to be watched
        torch.autograd.backward(tensors, gradients, retain_graph=keep)
        return
    ends = [way.ends[index] for way in ways]
    found = torch.autograd.grad(tensors, ends, gradients, retain_graph=keep, allow_unused=True)
    for way, gradient in zip(ways, found, strict=True):
        if gradient is not None:
            known = way.gradients[index].get(loss)
            way.gradients[index][loss] = gradient if known is None else known + gradient


def _block(stage: Stage) -> nn.Module:
    assert stage.block is not None
    return stage.block


class _Watched:
    """Squared gradients at the outputs of Linears, gathered while the batch `index` is run back."""

    def __init__(self, linears: Mapping[str, nn.Module], batches: Sequence[Batch]) -> None:
        self.linears, self.batches, self.index = linears, batches, 0
        self.squares: dict[str, Tensor] = {}
        self.tokens: dict[str, dict[int, Tensor]] = {name: {} for name in linears}
        """Name -> batch -> mean squares of its tokens. No token of a batch may have been sent to an expert."""

    def hooks(self) -> ExitStack:
        return hooked(module.register_forward_hook(self._hook(name)) for name, module in self.linears.items())

    def _hook(self, name: str) -> Callable[..., None]:
        def took_gradient(gradient: Tensor) -> None:
            square = gradient.detach().float().square()
            batch = self.batches[self.index]
            # The loss sees no padding of text. Silence it does see, but the statistics leave it out.
            if "input_ids" not in batch and square.dim() == 3:
                mask = token_mask(batch, name, square.shape[:2])
                square = square if mask is None else square * mask[..., None]
            rows = square.reshape(-1, square.shape[-1]).sum(0)
            self.squares[name] = self.squares[name] + rows if name in self.squares else rows
            of_tokens = square.mean(-1)
            known = self.tokens[name]
            if self.index not in known:
                known[self.index] = of_tokens
            elif known[self.index].shape == of_tokens.shape:
                known[self.index] = known[self.index] + of_tokens

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(took_gradient)

        return hook

    def result(self, ranks: Ranks = ALONE) -> LossGradients:
        """Of all processes. Raises NoLossError for a gradient that is not finite."""
        tokens = {name: [known[i] for i in sorted(known)] for name, known in self.tokens.items()}
        complete = {name: known for name, known in tokens.items() if len(known) == len(self.batches)}
        shares = ranks.gather((self.squares, complete))
        found = LossGradients()
        for name in self.linears:
            if parts := [squares[name] for squares, _ in shares if name in squares]:
                total = torch.stack(parts).sum(0)
                if not bool(torch.isfinite(total).all()):
                    raise NoLossError(
                        f"the gradient of the loss at {name} is not finite; look for overflows of its dtype"
                    )
                found.row_weights[name], found.scales[name] = _limited(total), float(total.mean())
            if all(name in known for _, known in shares):
                all_tokens = ranks.interleaved([known[name] for _, known in shares])
                limited = _limited(torch.cat([of_batch.flatten() for of_batch in all_tokens]))
                parts = limited.split([of_batch.numel() for of_batch in all_tokens])
                found.token_weights[name] = [part.view_as(like) for part, like in zip(parts, all_tokens, strict=True)]
        return found


def _limited(values: Tensor) -> Tensor:
    mean = float(values.mean())
    if not mean > 0:
        return torch.ones_like(values)
    limited = (values / mean).clamp(1 / LIMIT, LIMIT)
    return limited / limited.mean()

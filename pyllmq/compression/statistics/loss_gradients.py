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
from ..calibration import Batch
from ..model_state import gradients_for, hooked
from ..ranks import ALONE, Ranks
from .blocks import BlockLoop, Chain, Stage

PROBES = 3
"""Random directions in which the gradient of an encoder's embedding is taken; each costs a backward pass."""
LIMIT = 10.0
"""Row and token weights stay within this factor of their mean: single tokens and rows must not stand for the text."""


class NoLossError(ValueError):
    """A model, or a way through it, of which no gradient can be taken."""


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
    """Row and token weights of each Linear for the model's own loss: of the next tokens, or of the sentence embedding."""
    watched = _Watched(linears)
    generator = torch.Generator().manual_seed(0)
    with gradients_for(model), watched.hooks():
        for watched.index, batch in enumerate(batches):
            losses = _losses(model(**batch), batch, generator)
            for left, loss in enumerate(losses, 1 - len(losses)):
                loss.backward(retain_graph=left < 0)
    return watched.result(len(batches))


def output_gradients_by_block(
    loop: BlockLoop,
    chains: Sequence[Chain],
    linears: Mapping[str, nn.Module],
    stored: Any,
    rows: Sequence[int],
    ranks: Ranks = ALONE,
) -> LossGradients:
    """The same with one block in memory at a time: forward through all blocks, then back through them.

    Args:
        stored: keeps the inputs of a block by its name between the two ways: write, read, remove.
        rows: the number of texts in each batch of all processes.

    Raises:
        NoLossError: a model whose blocks are no single chain, or that has no loss.
    """
    if len([chain for chain in chains if chain.stages[0].block is not None]) != 1:
        raise NoLossError(
            f"{type(loop.model).__name__} has no single row of blocks through which the gradient could be taken block by block; "
            "holding the whole model in memory (--in-memory) avoids that"
        )
    stages, batches = chains[0].stages, loop.batches
    recorded = loop.record(chains[0])
    hidden = [calls[0].hidden for calls in recorded]
    for i, stage in enumerate(stages):
        stored.write(stage.name, hidden)
        with loop.weights.loaded(stage.name):
            for index in range(len(batches)):
                hidden[index] = recorded[index][i].run(_block(stage), hidden[index])

    watched = _Watched(linears)
    generator = torch.Generator().manual_seed(0)
    gradients: list[list[Tensor]] = []
    with gradients_for(loop.model), watched.hooks():
        loop.finish(chains[0], hidden)
        drawn = 0
        with ExitStack() as done, loop.weights.loaded(OUTSIDE):
            done.callback(loop.outputs.clear)
            for watched.index, batch in enumerate(batches):
                leaf = hidden[watched.index] = hidden[watched.index].detach().requires_grad_()
                place = ranks.rank + watched.index * ranks.size
                losses = _losses(loop.run_model(watched.index), batch, generator, rows[drawn:place])
                drawn = place + 1
                found: list[Tensor] = []
                for left, loss in enumerate(losses, 1 - len(losses)):
                    found += torch.autograd.grad(loss, leaf, retain_graph=left < 0)
                gradients.append(found)
                return_freed()
        hidden.clear()
        for i, stage in reversed(list(enumerate(stages))):
            inputs = stored.read(stage.name)
            stored.remove(stage.name)
            with loop.weights.loaded(stage.name):
                for watched.index, found in enumerate(gradients):
                    leaf = inputs[watched.index].requires_grad_()
                    output = recorded[watched.index][i].run(_block(stage), leaf)
                    for probe, gradient in enumerate(found):
                        left = len(found) - 1 - probe
                        (found[probe],) = torch.autograd.grad(output, leaf, gradient, retain_graph=left > 0)
                    return_freed()
    return watched.result(len(batches), ranks)


def _block(stage: Stage) -> nn.Module:
    assert stage.block is not None
    return stage.block


class _Watched:
    """Squared gradients at the outputs of Linears, gathered while the batch `index` is run back."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self.linears, self.index = linears, 0
        self.squares: dict[str, Tensor] = {}
        self.tokens: dict[str, dict[int, Tensor]] = {name: {} for name in linears}
        """Name -> batch -> mean squares of its tokens. No token of a batch may have been sent to an expert."""

    def hooks(self) -> ExitStack:
        return hooked(module.register_forward_hook(self._hook(name)) for name, module in self.linears.items())

    def _hook(self, name: str) -> Callable[..., None]:
        def took_gradient(gradient: Tensor) -> None:
            square = gradient.detach().float().square()
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

    def result(self, batches: int, ranks: Ranks = ALONE) -> LossGradients:
        """Of all processes, each of which has run `batches` batches."""
        tokens = {name: [known[i] for i in sorted(known)] for name, known in self.tokens.items()}
        complete = {name: known for name, known in tokens.items() if len(known) == batches}
        shares = ranks.gather((self.squares, complete))
        found = LossGradients()
        for name in self.linears:
            if parts := [squares[name] for squares, _ in shares if name in squares]:
                total = torch.stack(parts).sum(0)
                found.row_weights[name], found.scales[name] = _limited(total), float(total.mean())
            if all(name in known for _, known in shares):
                all_tokens = ranks.interleaved([known[name] for _, known in shares])
                limited = _limited(torch.cat([of_batch.flatten() for of_batch in all_tokens]))
                parts = limited.split([of_batch.numel() for of_batch in all_tokens])
                found.token_weights[name] = [part.view_as(like) for part, like in zip(parts, all_tokens, strict=True)]
        return found


def _losses(output: Any, batch: Batch, generator: torch.Generator, before: Sequence[int] = ()) -> list[Tensor]:
    """`before`: texts of the batches that come before this one in other processes; they have random numbers of their own."""
    logits = getattr(output, "logits", None)
    ids = batch.get("input_ids")
    if isinstance(logits, Tensor) and logits.dim() == 3 and ids is not None and logits.shape[:2] == ids.shape:
        targets = ids.clone()
        if (mask := batch.get("attention_mask")) is not None:
            targets[mask == 0] = -100
        flat = logits[:, :-1].float().flatten(0, 1)
        return [nn.functional.cross_entropy(flat, targets[:, 1:].flatten(), reduction="sum")]
    hidden = getattr(output, "last_hidden_state", output)
    if not isinstance(hidden, Tensor) or not hidden.requires_grad:
        raise NoLossError(
            f"the model gives a {type(output).__name__} with neither logits [B, L, vocabulary] nor last_hidden_state, so there is "
            "no loss to take a gradient of"
        )
    if hidden.dim() == 3:
        mask = batch.get("attention_mask")
        weight = torch.ones(hidden.shape[:2]) if mask is None or mask.shape != hidden.shape[:2] else mask
        weight = weight.to(hidden)[..., None]
        hidden = nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
    for texts in before:
        for _ in range(PROBES):
            torch.randn(texts, *hidden.shape[1:], generator=generator)
    # E (v . de)^2 over random v is |de|^2: the gradient of projections stands for the error of the whole embedding.
    return [(hidden * torch.randn(hidden.shape, generator=generator).to(hidden)).sum() for _ in range(PROBES)]


def _limited(values: Tensor) -> Tensor:
    mean = float(values.mean())
    if not mean > 0:
        return torch.ones_like(values)
    limited = (values / mean).clamp(1 / LIMIT, LIMIT)
    return limited / limited.mean()

"""Which outputs and which tokens of each Linear matter to the model's loss: one backward pass of the dense model.

Source: GuidedQuant (arXiv 2505.07004) and SqueezeLLM (2306.07629): to second order the loss grows by sum_t (g_t . e x_t)^2, with
g_t the loss's gradient at the Linear's output for token t and e the error of its weight. Its mean over tokens weighs the
rows (omega_r = mean_t g_tr^2), its mean over rows the tokens (H = sum_t s_t x_t x_t^T, s_t = mean_r g_tr^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Batch

PROBES = 3
"""Random directions in which the gradient of an encoder's embedding is taken; each costs a backward pass."""
LIMIT = 10.0
"""Row and token weights stay within this factor of their mean: single tokens and rows must not stand for the text."""


@dataclass(frozen=True, eq=False)
class Guidance:
    row_weights: dict[str, Tensor] = field(default_factory=dict)
    """name -> float32 [N], mean 1."""
    token_weights: dict[str, list[Tensor]] = field(default_factory=dict)
    """name -> for each batch float32, shaped as the Linear's input without its last dimension; mean 1 over all batches."""

    def limited_to(self, guidance: str) -> Guidance:
        """What `ColumnCodebookConfig.guidance` asks for."""
        return Guidance(
            self.row_weights if "rows" in guidance else {}, self.token_weights if "tokens" in guidance else {}
        )


def output_gradients(model: nn.Module, linears: Mapping[str, nn.Module], batches: Sequence[Batch]) -> Guidance:
    """Row and token weights of each Linear for the model's own loss: of the next tokens, or of the sentence embedding."""
    squares: dict[str, Tensor] = {}
    tokens: dict[str, list[Tensor]] = {name: [] for name in linears}
    index = 0

    def watch(name: str) -> Callable[..., None]:
        def took_gradient(gradient: Tensor) -> None:
            square = gradient.detach().float().square()
            rows = square.reshape(-1, square.shape[-1]).sum(0)
            squares[name] = squares[name] + rows if name in squares else rows
            of_tokens = square.mean(-1)
            known = tokens[name]
            if len(known) == index:
                known.append(of_tokens)
            elif known[index].shape == of_tokens.shape:
                known[index] = known[index] + of_tokens

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(took_gradient)

        return hook

    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    handles = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            for index, batch in enumerate(batches):  # noqa: B007  (read by the hooks)
                losses = _losses(model(**batch), batch, generator)
                for left, loss in enumerate(losses, 1 - len(losses)):
                    loss.backward(retain_graph=left < 0)
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
    rows = {name: _limited(total) for name, total in squares.items()}
    complete = {name: known for name, known in tokens.items() if len(known) == len(batches)}
    return Guidance(rows, {name: _limited_list(known) for name, known in complete.items()})


def _losses(output: Any, batch: Batch, generator: torch.Generator) -> list[Tensor]:
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
        raise ValueError(
            f"the model gives a {type(output).__name__}: neither logits [B, L, vocabulary] nor last_hidden_state, so there is no "
            "loss to be guided by; take guidance='none'"
        )
    if hidden.dim() == 3:
        mask = batch.get("attention_mask")
        weight = torch.ones(hidden.shape[:2]) if mask is None or mask.shape != hidden.shape[:2] else mask
        weight = weight.to(hidden)[..., None]
        hidden = nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
    # E (v . de)^2 over random v is |de|^2: the gradient of projections stands for the error of the whole embedding.
    return [(hidden * torch.randn(hidden.shape, generator=generator).to(hidden)).sum() for _ in range(PROBES)]


def _limited(values: Tensor) -> Tensor:
    mean = float(values.mean())
    if not mean > 0:
        return torch.ones_like(values)
    limited = (values / mean).clamp(1 / LIMIT, LIMIT)
    return limited / limited.mean()


def _limited_list(values: list[Tensor]) -> list[Tensor]:
    sizes = [v.numel() for v in values]
    limited = _limited(torch.cat([v.flatten() for v in values]))
    return [part.view(v.shape) for part, v in zip(limited.split(sizes), values, strict=True)]

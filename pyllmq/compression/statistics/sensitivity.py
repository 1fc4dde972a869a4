"""How much the loss of a model minds changes of each weight matrix: the trace of its Hessian over the number of weights.

The loss is the cross entropy where the model gives logits (with the next token, a label, or the model's own distribution), else
half the squared change of its output.

    hutchinson   E z^T H z over random signs z: one backward pass through a backward pass for each draw
    fisher       E |g|^2, g the gradient with labels drawn from the model's own prediction (random signs of the output, where
                 there are no logits): the trace of the Gauss-Newton matrix, H without the curvature of the network, from
                 first derivatives alone

Source: Hutchinson 1989; Shao et al. 2023 (arXiv 2310.09499), eq. 5 and 6, for the use of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..calibration import Batch, given_to_model
from ..model_state import gradients_for
from ..objective import NoLossError, checked_answer, drawn


def trace_per_weight(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    method: str,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """name -> estimated trace of the Hessian with respect to that weight matrix, divided by its number of weights.

    Args:
        linears: name -> module with a `weight`, all in `model`.
        batches: of the calibration; one backward pass for each and each draw.
        method: "fisher" or "hutchinson".
        draws: random vectors for each batch.

    Raises:
        ValueError: an unknown method, a model whose output has neither logits nor hidden states, or sensitivities that are not
            finite.
    """
    if method not in ("fisher", "hutchinson"):
        raise ValueError(f"method is {method!r}; allowed: 'fisher', 'hutchinson'")
    weights = [cast(Tensor, module.weight) for module in linears.values()]
    sums = [0.0] * len(weights)
    estimate = _gauss_newton if method == "fisher" else _hutchinson
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    with gradients_for(model, weights):
        for batch in batches:
            for _ in range(draws):
                for i, value in enumerate(estimate(model, weights, batch, generator)):
                    sums[i] += value
    if bad := [name for name, value in zip(linears, sums, strict=True) if not math.isfinite(value)]:
        raise ValueError(
            f"{method!r} sensitivities of {len(bad)} of {len(linears)} Linears, such as {bad[0]}, are not finite in "
            f"{weights[0].dtype}; load the model in float32 or bfloat16, or use allocation='uniform' or 'owl'"
        )
    runs = len(batches) * draws
    return {name: sums[i] / (runs * weights[i].numel()) for i, name in enumerate(linears)}


def _gauss_newton(model: nn.Module, weights: list[Tensor], batch: Batch, generator: torch.Generator) -> Iterator[float]:
    outputs = _outputs(model, batch)
    count = _count(outputs)
    if not count:  # a text of one token has no next one
        return iter(0.0 for _ in weights)
    # Labels drawn from the prediction have a gradient of mean 0 at each token, so the square of the sum over tokens has the mean
    # of the sum of squares.
    parts = [
        (rows * _signs(rows, generator)).sum()
        if targets is None
        else nn.functional.cross_entropy(rows.float(), drawn(rows, generator), reduction="sum")
        for rows, targets in outputs
    ]
    gradients = torch.autograd.grad(torch.stack(parts).sum(), weights, allow_unused=True)
    return (0.0 if g is None else float(g.double().square().sum()) / count for g in gradients)


def _hutchinson(model: nn.Module, weights: list[Tensor], batch: Batch, generator: torch.Generator) -> Iterator[float]:
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = _outputs(model, batch)
        count = _count(outputs)
        if not count:
            return iter(0.0 for _ in weights)
        parts = [
            0.5 * (rows - rows.detach()).square().sum()
            if targets is None
            else nn.functional.cross_entropy(rows.float(), targets, reduction="sum")
            for rows, targets in outputs
        ]
        gradients = torch.autograd.grad(torch.stack(parts).sum(), weights, create_graph=True, allow_unused=True)
        signs = [_signs(w, generator) for w in weights]
        used = [i for i, g in enumerate(gradients) if g is not None]
        # z over all matrices at once: the terms between two matrices have mean 0.
        product = torch.stack([(gradients[i] * signs[i]).sum() for i in used]).sum()
        seconds: Any = [None] * len(weights)
        for i, s in zip(used, torch.autograd.grad(product, [weights[i] for i in used], allow_unused=True), strict=True):
            seconds[i] = s
    return (0.0 if s is None else float((s.double() * z).sum()) / count for s, z in zip(seconds, signs, strict=True))


def _outputs(model: nn.Module, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
    """(logits [T, C], targets [T] or own distribution [T, C]) of real tokens, or (states [T, D], None).

    Raises ValueError for an output that is neither, or not finite.
    """
    found = model(**given_to_model(batch, model))
    try:
        answer = checked_answer(model, found, batch)
    except NoLossError as error:
        raise ValueError(
            f"{error}; sensitivities cannot be measured on it, use allocation='uniform' or 'owl'"
        ) from error
    for output in (*answer.logits, *answer.states):
        if bad := int((~torch.isfinite(output)).sum()):
            raise ValueError(
                f"{type(model).__name__} gives {bad} of {output.numel()} values that are not finite on the calibration data; look "
                "at its norms and at overflows of its dtype"
            )
    outputs: list[tuple[Tensor, Tensor | None]] = [(states, None) for states in answer.states]
    for rows, targets in zip(answer.logits, answer.targets, strict=True):
        if targets is None:
            outputs.append((rows, rows.detach().float().softmax(-1)))
        else:
            outputs.append((rows[targets >= 0], targets[targets >= 0]))
    return outputs


def _count(outputs: Sequence[tuple[Tensor, Tensor | None]]) -> int:
    """Of tokens, or texts."""
    return max(len(rows) for rows, _ in outputs)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1

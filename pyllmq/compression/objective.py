"""What a model's output says of a batch, and how far another output is from it: the loss of guidance, sensitivities and tuning.

    logits       a distribution for each token (language models, encoder-decoders, token classifiers), for each text, image or
                 sound (classifiers), or over the tokens (question answering). The loss is the cross entropy with the batch's
                 labels, of causal models with the next tokens, else with the model's own distribution
    embeddings   hidden states of tokens and their mean, or the pair of CLIP and its kin. The loss is the change of them

Padding is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from ..loading import is_causal
from .calibration import Batch, token_mask

PROBES = 3
"""Random draws for the gradient of a loss with one row for a text or image; each costs a backward pass."""
IGNORED = -100
"""A target that does not count, as in transformers."""


class NoLossError(ValueError):
    """A model, or a way through it, of which no gradient can be taken."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What an output says: `logits`, or where there are none `states` and `vectors`."""

    logits: tuple[Tensor, ...] = ()
    """[T, C] each."""
    targets: tuple[Tensor | None, ...] = ()
    """Beside each of them int64 [T], -100 for none; None: the model's own distribution is the target."""
    states: tuple[Tensor, ...] = ()
    """[T, D] each, of real tokens, or [B, D]."""
    vectors: tuple[Tensor, ...] = ()
    """[B, D] each: embeddings."""
    by_token: bool = False
    """The logits are those of tokens: of a batch there are many."""


def answer_of(model: Any, output: Any, batch: Batch) -> Answer:
    """Raises NoLossError for an output that is none of these."""
    config = getattr(model, "config", None)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    begin, end = getattr(output, "start_logits", None), getattr(output, "end_logits", None)
    if isinstance(begin, Tensor) and isinstance(end, Tensor):
        mask = token_mask(batch, "", begin.shape)
        if mask is not None:
            begin, end = (x.masked_fill(mask == 0, torch.finfo(x.dtype).min / 2) for x in (begin, end))
        return Answer((begin, end), (batch.get("start_positions"), batch.get("end_positions")))
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        one_number = logits.shape[-1] == 1 or getattr(config, "problem_type", None) == "regression"
        if logits.dim() == 3 and not one_number:
            return _of_tokens(model, logits, batch)
        if logits.dim() == 2 and not one_number:
            return _of_texts(config, logits, batch)
        return _raw([logits])
    pair = [getattr(output, name, None) for name in ("text_embeds", "image_embeds")]
    if any(isinstance(vector, Tensor) for vector in pair):
        vectors = tuple(normalize(vector, dim=-1) for vector in pair if isinstance(vector, Tensor))
        return Answer(states=vectors, vectors=vectors)
    hidden = getattr(output, "last_hidden_state", output)
    if isinstance(hidden, Tensor) and hidden.dim() == 3:
        mask = _output_mask(model, batch, hidden.shape[:2])
        weight = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
        weight = weight.to(hidden)[..., None]
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
        return Answer(states=(_real(hidden, mask),), vectors=(normalize(mean, dim=-1),))
    if isinstance(hidden, Tensor):
        return _raw([hidden])
    # transformers' outputs give all that they hold; of a plain dict nobody knows what is meant.
    held = output.to_tuple() if hasattr(output, "to_tuple") else ()
    return _raw([value for value in held if isinstance(value, Tensor) and value.is_floating_point() and value.dim()])


def _of_tokens(model: Any, logits: Tensor, batch: Batch) -> Answer:
    mask = _output_mask(model, batch, logits.shape[:2])
    targets = batch.get("labels")
    ids = batch.get("input_ids")
    if is_causal(model) and ids is not None and ids.shape == logits.shape[:2]:
        targets = ids if targets is None else targets
        if mask is not None:
            targets = targets.masked_fill(mask == 0, IGNORED)
        targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], 1)
    if targets is not None:
        targets = _real(targets[..., None], mask)[:, 0] if targets.shape == logits.shape[:2] else None
    return Answer((_real(logits, mask),), (targets,), by_token=True)


def _of_texts(config: Any, logits: Tensor, batch: Batch) -> Answer:
    targets = batch.get("labels")
    if getattr(config, "problem_type", None) == "multi_label_classification":  # so many answers of yes or no
        off = None if targets is None or targets.shape != logits.shape else (targets < 0.5).long().flatten()
        return Answer((torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, 1),), (off,))
    return Answer((logits,), (targets if targets is not None and targets.shape == logits.shape[:1] else None,))


def _raw(outputs: list[Tensor]) -> Answer:
    flat = tuple(output.flatten(1) if output.dim() > 2 else output for output in outputs)
    return Answer(states=flat, vectors=flat)


def _output_mask(model: Any, batch: Batch, shape: torch.Size) -> Tensor | None:
    pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return token_mask(batch, "decoder" if pair else "", shape)


def _real(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[B, L, D] -> [T, D]."""
    return tokens.flatten(0, 1) if mask is None else tokens[mask.bool()]


def checked_answer(model: Any, output: Any, batch: Batch) -> Answer:
    """An answer of which a gradient can be taken. Raises NoLossError."""
    answer = answer_of(model, output, batch)
    if not any(tensor.requires_grad for tensor in (*answer.logits, *answer.states)):
        kind = type(output).__name__
        raise NoLossError(
            f"{type(model).__name__} gives a {kind} with neither logits nor last_hidden_state nor embeddings that depend on its "
            "Linears, so there is no loss to take a gradient of"
        )
    return answer


def losses(answer: Answer, generator: torch.Generator) -> list[Tensor]:
    """Scalars whose squared gradients, averaged, say what the loss minds: summed over tokens and texts.

    Where the model itself is the target, labels are drawn from its distribution: their gradient has the mean 0, and its square
    is the curvature. Where there are only embeddings, their random projections: E (v . de)^2 over random v is |de|^2.
    """
    if not answer.logits:
        return [
            torch.stack([(vector * _normal(vector, generator)).sum() for vector in answer.vectors]).sum()
            for _ in range(PROBES)
        ]
    given = all(target is not None for target in answer.targets)
    return [
        torch.stack(
            [
                cross_entropy(rows, drawn(rows, generator) if target is None else target, reduction="sum")
                for rows, target in zip((x.float() for x in answer.logits), answer.targets, strict=True)
            ]
        ).sum()
        for _ in range(1 if given or answer.by_token else PROBES)
    ]


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A class for each row by the distribution that it says, int64 [T]."""
    if not len(logits):
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    shares = logits.detach().float().softmax(-1).to(generator.device)
    return torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def mismatch(model: Any, given: Any, wanted: Any, batch: Batch) -> Tensor:
    """How far an output is from the one wanted: the Kullback-Leibler divergence of distributions, a mean over tokens or texts; of
    embeddings the relative squared error of the states plus 1 - cosine of their mean."""
    found, target = answer_of(model, given, batch), answer_of(model, wanted, batch)
    if target.logits:
        return torch.stack([_divergence(*rows) for rows in zip(found.logits, target.logits, strict=True)]).sum()
    if not target.states:
        raise NoLossError(f"{type(model).__name__} gives a {type(wanted).__name__}, which nothing can be compared by")
    parts = [relative_error(*pair) for pair in zip(found.states, target.states, strict=True)]
    for a, b in zip(found.vectors, target.vectors, strict=True):
        if a.shape[-1] > 1:
            parts.append((1 - cosine_similarity(a.float(), b.float(), dim=-1)).mean())
    return torch.stack(parts).sum()


def _divergence(given: Tensor, wanted: Tensor) -> Tensor:
    target, found = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
    return (target.exp() * (target - found)).sum(-1).mean()


def relative_error(found: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error relative to the squared target, over the tokens of a mask without the last dimension."""
    target = target.float()
    error, size = (found.float() - target).square().sum(-1), target.square().sum(-1)
    if mask is not None:
        error, size = error * mask, size * mask
    return error.sum() / size.sum()

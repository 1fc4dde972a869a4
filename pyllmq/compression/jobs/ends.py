"""The ends of a model, packed beside whatever a method does to its blocks: input embeddings, output heads, and what is both.

Each has a width of its own. With calibration the rows of an embedding are weighted by how often their tokens occur, a head by
what its inputs are, a tied weight by both at once; without, it is k-means with a row scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...formats import CodebookStructure
from ...layers.embedding import LooksUp
from ...linears import (
    DEFAULT_EXCLUDE,
    input_embeddings,
    linear_modules,
    matches,
    output_layers,
    sharing_weight,
)
from ..methods.column_codebook import ColumnCodebookConfig, compress_linears
from ..methods.kmeans import KMeans, KMeansConfig
from ..methods.method import CompressedLinear
from ..model_state import seeing_inputs
from ..statistics.inputs import InputStatistics, input_statistics
from ..statistics.run import CalibrationRun

PRIOR = 1.0
"""What is added to the count of every token, in units of the mean count: most of a vocabulary is in no calibration text."""


@dataclass(frozen=True, eq=False)
class End:
    """A weight [vocabulary, hidden] that is packed: of an embedding, a head, or both."""

    name: str
    module: nn.Module
    bits: int
    heads: Mapping[str, nn.Module]
    """Name -> Linears that multiply with it."""
    embeddings: Mapping[str, nn.Embedding]
    """Name -> embeddings that look up in it."""

    @property
    def weight(self) -> Tensor:
        assert isinstance(self.module.weight, Tensor)
        return self.module.weight.detach()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        rows, columns = self.module.weight.shape  # type: ignore[misc]
        return round(CodebookStructure.bytes_of(rows, columns, {self.bits: columns}, row_scale=True))


def find_ends(model: nn.Module, embeddings: int | None, head: int | None, chosen: Iterable[str] = ()) -> list[End]:
    """What `--embeddings` and `--head` mean in a model.

    Args:
        embeddings, head: widths of 1 to 8 bits, None: stays dense. A tied weight takes the one that is given.
        chosen: Linears that a method compresses anyway.

    Raises ValueError for another width, two widths for one tied weight, an end that the model does not have or cannot be packed.
    """
    for word, bits in (("embeddings", embeddings), ("head", head)):
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8):
            raise ValueError(f"{word} is {bits!r}; allowed: an integer from 1 to 8, the width of its codes")
    found: dict[str, End] = {}
    tied: set[str] = set()
    inputs = input_embeddings(model)
    for name, module in inputs.items():
        sharing = sharing_weight(model, module)
        heads = {other: each for other, each in sharing.items() if isinstance(each, nn.Linear)}
        tied |= set(heads)
        if embeddings and head and heads and embeddings != head:
            raise ValueError(
                f"embeddings is {embeddings} and head is {head}, but {next(iter(heads))} shares its weight with {name}; give one "
                "of them"
            )
        bits = embeddings or (head if heads else None)
        if bits is None:
            continue
        looking = {other: each for other, each in sharing.items() if isinstance(each, nn.Embedding)}
        if strange := [other for other in sharing if other not in heads and other not in looking]:
            raise ValueError(
                f"{name} shares its weight with {strange[0]}, which cannot run on a packed one; leave it dense"
            )
        for each in looking.values():
            LooksUp().take_over(each)
        found[name] = End(name, module, bits, heads, looking)
    if embeddings and not found:
        raise ValueError(f"embeddings is {embeddings}, but {type(model).__name__} has no embedding of token ids")
    if head:
        outputs = output_layers(model)
        taken = {*tied, *chosen}
        for name, linear in linear_modules(model):
            is_head = isinstance(linear, nn.Linear) and (name in outputs or matches(name, DEFAULT_EXCLUDE))
            if is_head and name not in taken:
                found[name] = End(name, linear, head, {name: linear}, {})
        if not any(end.heads for end in found.values()):
            raise ValueError(f"head is {head}, but {type(model).__name__} has no output head that is dense")
    return list(found.values())


def pack_end(name: str, weight: Tensor, bits: int) -> CompressedLinear:
    """By the weight alone."""
    return KMeans(KMeansConfig(bits, row_scale=True)).compress_weight(name, weight)


def compress_ends(
    ends: Sequence[End], run: CalibrationRun, forward: Callable[[int], Any]
) -> dict[str, CompressedLinear]:
    """Name -> what becomes of each, by statistics of the model as it is now. `forward(index)` runs a batch."""
    counts = _token_counts([end for end in ends if end.embeddings], run, forward)
    with_head = [end for end in ends if end.heads]
    groups = [dict([next(iter(end.heads.items()))]) for end in with_head]
    found = input_statistics(run, groups, set(), forward) if groups else []
    inputs = {end.name: statistics for end, statistics in zip(with_head, found, strict=True)}
    done: dict[str, CompressedLinear] = {}
    for end in ends:
        hessian, row_weights = torch.zeros(()), None
        if end.heads:
            hessian = inputs[end.name].take_hessian().cpu()
            hessian /= hessian.diagonal().mean().clamp_min(1e-30)
        if end.embeddings:
            # An embedding's error is that of the weight itself: its Hessian is the identity.
            hessian = hessian + torch.eye(end.weight.shape[1])
            known = counts[end.name]
            row_weights = known / known.mean().clamp_min(1e-30) + PRIOR
        config = ColumnCodebookConfig(bits=max(1.1, end.bits), widths=(end.bits,), outliers=False, propagation=0.0)
        weights = {end.name: end.weight}
        by_rows = None if row_weights is None else {end.name: row_weights}
        done |= compress_linears(weights, InputStatistics(hessian), end.nbytes, config, by_rows, run.ranks)
    return done


def _token_counts(ends: Sequence[End], run: CalibrationRun, forward: Callable[[int], Any]) -> dict[str, Tensor]:
    """Name -> how often each row was looked up, float [vocabulary]; padding left out."""
    counts = {end.name: torch.zeros(len(end.weight), dtype=torch.float64) for end in ends}
    current = 0

    def see(name: str, ids: Tensor) -> None:
        mask = run.batches[current].get("attention_mask")
        real = ids if mask is None or mask.shape != ids.shape else ids[mask.bool()]
        counts[name] += torch.bincount(real.flatten().cpu(), minlength=len(counts[name]))

    with seeing_inputs(((end.name, module) for end in ends for module in set(end.embeddings.values())), see):
        for current in range(len(run.batches) if ends else 0):
            forward(current)
    return {name: run.ranks.sum_(found).float() for name, found in counts.items()}

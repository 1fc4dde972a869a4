"""Which layers a model can best do without: those that change their input least, judged by what the output loses without them.

The shortlist is by ShortGPT's block influence (arXiv 2403.03853, section 3.1), 1 - cosine of what a layer is given and gives; the
choice from it by the loss of the whole model, one layer after the other (SLEB, 2402.09025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..calibration import token_mask
from ..model_state import seeing_inputs
from ..objective import mismatch
from ..statistics.blocks import BlockLoop, Chain, Stage
from .sizes import fields_of_layers

SHORTLIST = 4
"""Layers that the loss is taken without, for each one that goes."""
JUDGED_BYTES = 1 << 29
"""Of the dense model's outputs to judge by: 8 texts of 512 tokens in a vocabulary of 32000 in float32."""


def choose_layers(
    loop: BlockLoop, chains: Sequence[Chain], keep: float, only: Callable[[str], bool]
) -> dict[str, list[int]]:
    """List of layers -> the members that stay, the share `keep` of them, at least one.

    Raises ValueError if there is no list of layers, or fewer of them than asked for can go by any config.
    """
    lists: dict[str, list[str]] = {}
    for chain in chains:
        for stage in chain.stages:
            if stage.block is not None and only(stage.name):
                lists.setdefault(stage.name.rpartition(".")[0], []).append(stage.name)
    whole = {name: len(loop.model.get_submodule(name)) for name in lists}  # type: ignore[arg-type]
    lists = {name: blocks for name, blocks in lists.items() if len(blocks) == whole[name] > 1}
    if not lists:
        raise ValueError(
            f"no layers were found in {type(loop.model).__name__}: no list of blocks that run one after the other"
        )
    influence = block_influence(loop, chains)
    judge: Callable[[set[str]], float] | None = None
    chosen, gone = {}, set[str]()
    for name, blocks in lists.items():
        kept = list(range(len(blocks)))
        for _ in range(len(blocks) - max(1, round(keep * len(blocks)))):
            by_influence = sorted(kept, key=lambda i: influence[blocks[i]])
            able = (
                i for i in by_influence if fields_of_layers(loop.model, name, [k for k in kept if k != i]) is not None
            )
            shortlist = [i for i, _ in zip(able, range(SHORTLIST), strict=False)]
            if not shortlist:
                raise ValueError(
                    f"no setting of {type(loop.model.config).__name__} says that {name} has fewer than {len(kept)} of its "
                    f"{len(blocks)} layers, so transformers could not load the result; keep more, or leave 'layers' out of parts"
                )
            judge = judge or _judge(loop, chains)
            losses = {i: judge({*gone, blocks[i]}) for i in shortlist}
            worst = min(losses, key=lambda i: losses[i])
            kept.remove(worst)
            gone.add(blocks[worst])
        chosen[name] = kept
    return chosen


def block_influence(loop: BlockLoop, chains: Sequence[Chain]) -> dict[str, float]:
    """Block -> 1 - cosine of the hidden states that it is given and gives, a mean over the real tokens."""
    found = {}

    def visit(stage: Stage, forward: Callable[[int], Any]) -> None:
        assert stage.block is not None
        total = count = 0.0
        given: list[Tensor] = []
        for index, batch in enumerate(loop.batches):
            with seeing_inputs([(stage.name, stage.block)], lambda _, x: given.append(x)):
                output = forward(index)
            cosines = cosine_similarity(given.pop().float(), output.float(), dim=-1)
            mask = token_mask(batch, stage.name, cosines.shape)
            weight = torch.ones_like(cosines) if mask is None else mask.to(cosines)
            total, count = total + float(((1 - cosines) * weight).sum()), count + float(weight.sum())
        found[stage.name] = total / max(count, 1.0)

    _walk(replace(loop, outputs={}), chains, visit)
    return found


def _walk(loop: BlockLoop, chains: Sequence[Chain], visit: Callable[[Stage, Callable[[int], Any]], None]) -> None:
    for chain in chains:
        if chain.stages[0].block is not None:
            loop.walk(chain, visit, hand_on=True)


def outputs_without(loop: BlockLoop, chains: Sequence[Chain], gone: set[str], batches: int) -> Iterator[Any]:
    """The model's output for each of the first `batches`, were these blocks not there. Goes block by block."""
    own = replace(loop, outputs={}, batches=loop.batches[:batches])

    with own.without(gone):
        _walk(own, chains, lambda stage, forward: None)
        with own.weights.loaded(""):
            for index in range(len(own.batches)):
                yield own.run_model(index)


def _judge(loop: BlockLoop, chains: Sequence[Chain]) -> Callable[[set[str]], float]:
    """How far the output is from the dense model's without some blocks."""
    dense: list[Any] = []
    held = 0
    for output in outputs_without(loop, chains, set(), len(loop.batches)):
        dense.append(output)
        first = next((value for value in _values(output) if isinstance(value, Tensor)), torch.empty(0))
        held += first.numel() * first.element_size()
        if held > JUDGED_BYTES:
            break

    def judge(gone: set[str]) -> float:
        found = outputs_without(loop, chains, gone, len(dense))
        pairs = zip(found, dense, loop.batches, strict=False)
        return sum(float(mismatch(loop.model, given, wanted, batch)) for given, wanted, batch in pairs) / len(dense)

    return judge


def _values(output: Any) -> Sequence[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    return output if isinstance(output, tuple | list) else [output]

"""Tensor parallel inference: every process of a torch.distributed group holds a part of each Linear, packed or dense.

Two kinds of parts, named as in the plans of transformers (`base_model_tp_plan`):

    colwise   rows of W: q, k, v, gate, up. The input is whole, the output is this rank's part of the features.
    rowwise   columns of W: o, down. The input is such a part; the outputs of all ranks are summed, with the bias of rank 0 only.

Of stacked experts, every process holds some, whole; the others' tokens are sent to none of them, and the outputs are summed.

A part is cut out of the plain checkpoint tensors and gets a machine layout of its own, columns sorted by width within it. Parts of
one block are cut at the same places, attention between heads; sizes need not divide by the number of ranks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .experts import RoutedExperts, is_stack
from .formats import PackedWeight
from .layers.linear import PackedComposite, PackedLinear
from .linears import as_linear, dense_weight, is_transposed_linear, replace_module, stacked_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, COLUMNS = "rows", "columns"
STYLES = {
    "colwise": (ROWS, False),
    "colwise_gather_output": (ROWS, True),
    "colwise_rep": (ROWS, True),
    "rowwise": (COLUMNS, False),
    "rowwise_split_input": (COLUMNS, True),
    "rowwise_rep": (COLUMNS, True),
}
"""Style -> (what is cut, whether the activations outside are whole: gathered after it, or split before it)."""

WHOLE_BYTES = 8
"""Preferred multiple of cuts: eight codes of any width are whole bytes, and rows of eight outputs fill a vector register."""


@dataclass(frozen=True)
class Split:
    """How one Linear is shared out: rank r holds the rows or columns `ranges[r]`."""

    by: str
    ranges: tuple[tuple[int, int], ...]
    whole_outside: bool = False
    """By rows: the outputs are gathered; by columns: the input comes whole, and each rank takes its part of it."""

    def __str__(self) -> str:
        outside = {ROWS: ", outputs gathered", COLUMNS: ", input split"}[self.by] if self.whole_outside else ""
        return f"{self.by} {' '.join(f'{start}:{stop}' for start, stop in self.ranges)}{outside}"


@dataclass(frozen=True)
class Plan:
    """Who holds what. Linears that neither dict names were not planned and are whole on every rank."""

    ranks: int
    splits: dict[str, Split]
    whole: dict[str, str]
    """Linear that was planned, or stacked experts, whole on every rank all the same -> why."""
    experts: dict[str, tuple[tuple[int, int], ...]]
    """Stack of experts -> of each rank those that it holds, from the first to one past the last."""
    key_value_groups: dict[str, int]
    """Attention module -> query heads per key/value head on one rank, where ranks share key/value heads."""

    def __str__(self) -> str:
        rows = [(name, str(split)) for name, split in self.splits.items()]
        held = ((name, (f"{start}:{stop}" for start, stop in ranges)) for name, ranges in self.experts.items())
        rows += [(name, f"experts {' '.join(parts)}") for name, parts in held]
        rows += [(name, f"whole: {why}") for name, why in self.whole.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


# ---- planning -------------------------------------------------------------------------------------------------------


def plan(model: nn.Module, ranks: int, styles: Mapping[str, str] | None = None) -> Plan:
    """Share out the Linears of `model` among `ranks` processes. Needs no weights: a model on the meta device will do.

    Args:
        styles: module name, `*` for a number -> one of `STYLES`; None takes the plan that transformers has for the architecture.
            Linears of one block stand in the order in which the model registers them: the outputs of all `colwise` ones go
            into the next `rowwise` one. Entries for other modules and parameters mean nothing here: norms are whole on every rank,
            stacked experts are shared out whole.

    Raises ValueError if there is no plan, a style is unknown, a name fits no Linear, or `colwise` outputs go nowhere.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; at least one process is needed")
    planned = _planned(model, styles)
    whole = {name: f"the plan says {style!r}" for name, style in planned.items() if style not in STYLES}
    splits: dict[str, Split] = {}
    shared: dict[str, int] = {}
    for by, whole_outside, block in _blocks(model, {name: s for name, s in planned.items() if s in STYLES}):
        try:
            found = _alone(block, by, ranks) if whole_outside else _block(model, block, ranks, shared)
            splits |= dict(zip(block, found, strict=True))
        except _Whole as why:
            whole |= dict.fromkeys(block, str(why))
    experts: dict[str, tuple[tuple[int, int], ...]] = {}
    for name, count in _stacks(model):
        if count < ranks:
            whole[name] = f"{count} experts are fewer than {ranks} ranks"
        else:
            places = [count * rank // ranks for rank in range(ranks + 1)]
            experts[name] = tuple(zip(places, places[1:], strict=False))
    return Plan(ranks, splits, whole | _unknown_stacks(model, ranks, experts), experts, shared)


def _stacks(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(name, number of experts) of stacks, packed or dense; not of those that transformers' own loading has cut."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            yield name, module.experts
        elif is_stack(module) and not hasattr(module.down_proj, "placements"):
            yield name, len(module.down_proj)


def _unknown_stacks(model: nn.Module, ranks: int, known: Collection[str]) -> dict[str, str]:
    """3-D parameters, often most of the model -> why they are whole."""
    return {
        name: f"a 3-D tensor (stacked experts?) of {parameter.numel():,} values, and only Linears are cut: each of the {ranks} "
        "ranks holds all of it"
        for name, parameter in stacked_parameters(model)
        if not hasattr(parameter, "placements") and name.rpartition(".")[0] not in known
    }


class _Whole(Exception):
    """Why each rank has to hold all of some Linears."""


def _planned(model: nn.Module, styles: Mapping[str, str] | None) -> dict[str, str]:
    """Linear -> style, in the model's order."""
    given = styles is not None
    styles = styles if given else getattr(model, "tp_plan", None)
    if styles is None or not (given or styles):
        raise ValueError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}; give styles, such as "
            '{"encoder.layer.*.intermediate.dense": "colwise", "encoder.layer.*.output.dense": "rowwise"}'
        )
    names = [name for name, _ in _linears(model)]
    of_name = {name: next((pattern for pattern in styles if fits(pattern, name)), None) for name in names}
    planned = {name: styles[pattern] for name, pattern in of_name.items() if pattern is not None}
    if given:
        wrong = next(((name, style) for name, style in planned.items() if style not in STYLES), None)
        if wrong is not None:
            raise ValueError(f"the style of {wrong[0]} is {wrong[1]!r}; allowed: {', '.join(map(repr, STYLES))}")
        if unused := [pattern for pattern in styles if pattern not in of_name.values()]:
            raise ValueError(
                f"the styles name {', '.join(map(repr, unused))}, which fit no Linear of {type(model).__name__}"
            )
    return planned


def _blocks(model: nn.Module, planned: Mapping[str, str]) -> Iterator[tuple[str, bool, dict[str, nn.Module]]]:
    """(what is cut, whether activations outside are whole, Linears cut together, the one that takes their parts last)."""
    producers: dict[str, nn.Module] = {}
    for name, style in planned.items():
        by, whole_outside = STYLES[style]
        module = model.get_submodule(name)
        if whole_outside:
            yield by, True, {name: module}
        elif by == ROWS:
            producers[name] = module
        else:
            yield by, False, producers | {name: module}
            producers = {}
    if producers:
        raise ValueError(
            f"{', '.join(producers)} are 'colwise', but no 'rowwise' Linear comes after them to take their parts; give that one a "
            "style too, or make these 'colwise_gather_output'"
        )


def planned_linears(model: nn.Module, styles: Mapping[str, str]) -> dict[str, str]:
    """The entries of `styles` that name Linears of the model and say how to cut them."""
    names = [name for name, _ in _linears(model)]
    known = {pattern: style for pattern, style in styles.items() if style in STYLES}
    return {pattern: style for pattern, style in known.items() if any(fits(pattern, name) for name in names)}


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | PackedLinear | PackedComposite) or is_transposed_linear(module):
            yield name, module


def fits(pattern: str, name: str) -> bool:
    """Does an entry of a plan, `*` for a number, name this module?"""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _size(name: str, module: nn.Module, by: str) -> int:
    if isinstance(module, PackedComposite):
        raise _Whole(f"{name} is made of several packed weights ({module.structure.kind}), which are not cut")
    if isinstance(module, PackedLinear):
        return module.out_features if by == ROWS else module.in_features
    n, k = dense_weight(module).shape
    return n if by == ROWS else k


def _column_unit(module: nn.Module) -> int:
    return module.weight_type.column_unit if isinstance(module, PackedLinear) else 1


def _even(size: int, ranks: int, unit: int) -> tuple[tuple[int, int], ...]:
    """`size` in parts that differ by one unit at most."""
    if size >= WHOLE_BYTES * ranks:
        unit = WHOLE_BYTES
    units = -(-size // unit)
    if units < ranks:
        raise _Whole(f"{size} features in units of {unit} are fewer than {ranks} ranks")
    places = [min(unit * (units * rank // ranks), size) for rank in range(ranks + 1)]
    return tuple(zip(places, places[1:], strict=False))


def _alone(block: Mapping[str, nn.Module], by: str, ranks: int) -> list[Split]:
    """Shares of a Linear whose activations outside are whole: it may be cut anywhere."""
    ((name, module),) = block.items()
    ranges = _even(_size(name, module, by), ranks, _column_unit(module) if by == COLUMNS else 1)
    return [Split(by, ranges, whole_outside=True)]


def _block(model: nn.Module, block: Mapping[str, nn.Module], ranks: int, shared: dict[str, int]) -> list[Split]:
    """Shares of Linears whose outputs go into the last of them; notes in `shared` what becomes of shared key/value heads."""
    *producers, (last, consumer) = block.items()
    if not producers:
        raise _Whole("no 'colwise' Linear comes before it")
    rows, size = [_size(name, module, ROWS) for name, module in producers], _size(last, consumer, COLUMNS)
    parent = os.path.commonprefix([f"{name}." for name in block]).rpartition(".")[0]
    if re.search("attn|attention", parent, re.IGNORECASE):
        ranges = _heads(model, parent, rows, size, _column_unit(consumer), ranks, shared)
    elif any(n != size for n in rows):
        raise _Whole(f"{rows} outputs do not match {size} inputs")
    else:
        ranges = [_even(size, ranks, _column_unit(consumer))] * len(block)
    return [*(Split(ROWS, of_rows) for of_rows in ranges[:-1]), Split(COLUMNS, ranges[-1])]


def _heads(
    model: nn.Module, name: str, rows: Sequence[int], size: int, unit: int, ranks: int, shared: dict[str, int]
) -> list[tuple[tuple[int, int], ...]]:
    """Whole heads for each rank: a key/value head with its query heads, or query heads that share one with other ranks."""
    module = model.get_submodule(name)
    config = getattr(module, "config", None) or model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    if any(n % groups for n in (*rows, size)) or heads % groups:
        raise _Whole(f"{list(rows)} outputs and {size} inputs are not {groups} groups of heads")
    if groups >= ranks:
        places = [groups * rank // ranks for rank in range(ranks + 1)]
        starts = list(zip(places, places[1:], strict=False))
        cut = [tuple((n // groups * a, n // groups * b) for a, b in starts) for n in (*rows, size)]
    else:
        sharing = ranks // groups
        if ranks % groups or heads // groups % sharing or not hasattr(module, "num_key_value_groups"):
            raise _Whole(f"{heads} query and {groups} key/value heads cannot be shared out among {ranks} ranks")
        cut = [
            tuple((n // ranks * r, n // ranks * (r + 1)) for r in range(ranks))
            if n == size
            else tuple((n // groups * (r // sharing), n // groups * (r // sharing + 1)) for r in range(ranks))
            for n in (*rows, size)
        ]
    if any(start % unit for start, _ in cut[-1]):
        raise _Whole(
            f"heads of {size // heads} columns cannot be cut at multiples of {unit}, as the format of the weight asks"
        )
    if groups < ranks:
        shared[name] = heads // groups // sharing
    return cut


# ---- cutting --------------------------------------------------------------------------------------------------------


def cut(weight: PackedWeight, split: Split, rank: int) -> PackedWeight:
    """A rank's part of a packed weight."""
    start, stop = split.ranges[rank]
    return weight.cut_rows(start, stop) if split.by == ROWS else weight.cut_columns(start, stop)


def bias_of_part(bias: Tensor, split: Split, rank: int) -> Tensor:
    """Outputs of parts by columns are summed: rank 0 brings the bias, the others zeros."""
    if split.by == ROWS:
        start, stop = split.ranges[rank]
        return bias[start:stop].clone()
    return bias.clone() if rank == 0 else torch.zeros_like(bias)


def _packed_part(layer: PackedLinear, split: Split, rank: int) -> PackedLinear:
    bias = None if layer.bias is None else bias_of_part(layer.bias.detach(), split, rank)
    part = type(layer).from_weight(cut(layer.packed_weight(), split, rank), bias, layer.dense_dtype)
    part.precision = layer.precision
    return part


def _dense_part(linear: nn.Linear, split: Split, rank: int, tied: bool) -> nn.Linear:
    start, stop = split.ranges[rank]
    weight = linear.weight.detach()
    weight = weight[start:stop] if split.by == ROWS else weight[:, start:stop]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    # A tied weight is in memory anyway, as the embedding: rows of it are a view.
    part.weight = nn.Parameter(weight if tied and split.by == ROWS else weight.clone(), requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(bias_of_part(linear.bias.detach(), split, rank))
    return part


# ---- running --------------------------------------------------------------------------------------------------------


def parallelize(
    model: PreTrainedModel, group: dist.ProcessGroup | None = None, styles: Mapping[str, str] | None = None
) -> Plan:
    """Keep only this rank's part of a model that is in memory, and connect it with those of the other ranks. In place.

    Every process calls it on the same model. `parallel.from_pretrained` reads only the part from a folder; use it where the whole
    model is too much for one process. The model is for inference: its parameters are frozen.

    Args:
        group: of processes; None is the default group of `torch.distributed`.
        styles: see `plan`.

    Returns the plan, which prints as a table.
    """
    ranks, rank = ranks_of(group)
    if getattr(model, "tensor_parallel_plan", None) is not None:
        raise ValueError("this model is one rank's part already; load the whole model and split that")
    found = plan(model, ranks, styles)
    take_part(model, found, rank, group)
    return found


def ranks_of(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(number of processes, number of this one)."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialized: start the processes with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    return dist.get_world_size(group), dist.get_rank(group)


def take_part(
    model: nn.Module, found: Plan, rank: int, group: dist.ProcessGroup | None, done: Collection[str] = ()
) -> None:
    """Cut the Linears of the plan, but for those that are `done`, and let all parts exchange their activations. In place.

    The model remembers its plan, which is why it cannot be saved.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, split in found.splits.items():
        module = model.get_submodule(name)
        if name not in done:
            if isinstance(module, PackedLinear):
                part: nn.Module = _packed_part(module, split, rank)
            else:
                part = _dense_part(as_linear(module), split, rank, tied=id(module.weight) in embeddings)
            replace_module(model, name, part)
            module = part
        if split.by == COLUMNS:
            if split.whole_outside:
                module.register_forward_pre_hook(partial(_take_part, split.ranges[rank]))
            module.register_forward_hook(partial(_sum, group))
        elif split.whole_outside:
            module.register_forward_hook(partial(_gather, group, split.ranges))
        else:
            module.register_forward_pre_hook(_expect_no_gradient)
    for name, of_ranks in found.experts.items():
        stack = model.get_submodule(name)
        if not isinstance(stack, RoutedExperts):
            stack = RoutedExperts(stack)
            replace_module(model, name, stack)
        stack.keep(*of_ranks[rank])
        stack.register_forward_pre_hook(partial(_take_experts, of_ranks[-1][1]))
        stack.register_forward_hook(partial(_sum, group))
    for name, groups in found.key_value_groups.items():
        attention: Any = model.get_submodule(name)
        attention.num_key_value_groups = groups
    model.requires_grad_(False)
    model.tensor_parallel_plan = found  # type: ignore[assignment]
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.description.part_of_ranks = found.ranks


def _expect_no_gradient(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        raise RuntimeError(
            "a tensor-parallel model is for inference: gradients would lack the other ranks' parts. Run it in "
            "torch.inference_mode, or train in one process"
        )


def _take_part(place: tuple[int, int], module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0][..., place[0] : place[1]], *inputs[1:])


def _take_experts(count: int, stack: RoutedExperts, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of `count` experts, those of other ranks become none; an index that is not allowed stays one."""
    x, index, weights = inputs
    elsewhere = (index >= 0) & (index < stack.first) | (index >= stack.first + stack.experts) & (index <= count)
    return x, (index - stack.first).masked_fill(elsewhere, stack.experts), weights


def _sum(group: dist.ProcessGroup | None, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    _expect_no_gradient(module, inputs)
    dist.all_reduce(output, group=group)
    return output


def _gather(
    group: dist.ProcessGroup | None,
    ranges: tuple[tuple[int, int], ...],
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    """Parts of different widths are padded to the widest: gloo gathers equal shapes only."""
    _expect_no_gradient(module, inputs)
    widths = [stop - start for start, stop in ranges]
    part = nn.functional.pad(output, (0, max(widths) - output.shape[-1])).contiguous()
    parts = [torch.empty_like(part) for _ in widths]
    dist.all_gather(parts, part, group=group)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)

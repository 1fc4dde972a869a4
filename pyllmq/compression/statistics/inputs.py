"""What calibration knows of the inputs of a block's Linears: which of them share one, its Hessian and mean, its norms."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...experts import ExpertLinear, RoutedExperts
from ...linears import dense_weight
from ...memory import return_freed
from ..calibration import token_mask
from ..model_state import hooked, seeing_inputs
from .asymmetric import AsymmetricTarget, Enough, watch
from .blocks import Stage
from .run import CalibrationRun

TOKENS = 1024
"""That are added to a Hessian at a time: with 512 it is read and written so often that it costs an eighth more."""

EXPERT_HESSIANS = 256 << 20
"""Bytes of experts' Hessians that are summed in one pass through the block."""

PRIOR_TOKENS = 1.0
"""What the pooled inputs of a layer's experts count in those of one expert, in tokens for each input. Of an expert with n tokens
and K inputs: H = (sum of its x x^T + PRIOR_TOKENS K pooled H) / (n + PRIOR_TOKENS K)."""

_Tokens = tuple[Tensor, Tensor | None, Tensor | None]
"""Real tokens of an input [T, K], what each counts [T] or None, and the mask [B, L] by which they were taken."""

Group = dict[str, nn.Module]
"""Name -> Linears that share an input."""


@dataclass(eq=False)
class InputStatistics:
    """What calibration knows of the common input x of some Linears."""

    hessian: Tensor
    """float [K, K]: mean of x x^T over the tokens, on any scale."""
    mean: Tensor | None = None
    """float [K]: mean of x, where the Hessian is the plain mean of x x^T: their difference is the covariance. None: biases stay."""
    targets: Mapping[str, AsymmetricTarget] = field(default_factory=dict)
    """name -> the error of the model before it that its output should make up for; Linears that are not named: nothing."""
    reached: bool = True
    """False: no calibration token reached these Linears; the Hessian is that of the layer's experts, elsewhere the identity."""
    of_other_rank: bool = False
    """Another process compresses these Linears and alone has their Hessian: it is empty here."""

    def take_hessian(self) -> Tensor:
        """The Hessian, to be written on. Raises RuntimeError the second time."""
        if not self.hessian.numel():
            raise RuntimeError("the Hessian of these statistics was taken; make them anew")
        hessian, self.hessian = self.hessian, torch.empty(0)
        return hessian

    def leave_to_other_rank(self) -> None:
        self.hessian, self.of_other_rank = torch.empty(0), True


Experts = list[tuple[Group, InputStatistics]]
"""Groups of which none is another's input, such as experts of one layer."""


def visit_groups(
    run: CalibrationRun,
    stage: Stage,
    forward: Callable[[int], Any],
    visit: Callable[[Group, InputStatistics], None],
    visit_experts: Callable[[Experts], None] | None = None,
) -> None:
    """Call `visit(group, inputs)` for the Linears of a stage, group by group of one input, in the order in which they run.

    `forward(index)` runs the stage on a batch. What `visit` changes, later groups see, if the run is sequential.
    `visit_experts`, if given, is called for experts in its place, with as many as there are processes: one for each.
    """
    if not stage.linears:
        return
    waiting: Experts = []

    def rest() -> None:
        """While Linears are compressed, nothing runs."""
        run.loop.weights.rest(stage.name)
        return_freed()

    def visit_waiting() -> None:
        if waiting:
            assert visit_experts is not None
            rest()
            visit_experts(waiting[:])
            waiting.clear()

    def take(group: Group, inputs: InputStatistics) -> None:
        if visit_experts is None or _pool_of(group) is None:
            visit_waiting()
            rest()
            visit(group, inputs)
            return
        if len(waiting) != run.ranks.rank:
            inputs.leave_to_other_rank()
        waiting.append((group, inputs))
        if len(waiting) == run.ranks.size:
            visit_waiting()

    forward = _padding_to_no_expert(run, stage, forward)
    groups, repeated = group_by_input(run, stage, forward)
    pools: dict[Any, _Sums] = {}
    for some in _at_a_time(groups) if run.sequential else [groups]:
        if waiting and _pool_of(waiting[0][0]) != _pool_of(some[0]):
            visit_waiting()  # what follows them sees them packed
        for key in dict.fromkeys(map(_pool_of, some)):
            if key is not None and key not in pools:
                pools[key] = _pooled(run, stage, key, forward)
        for group, inputs in zip(some, input_statistics(run, some, repeated, forward, pools), strict=True):
            take(group, inputs)
    reached = {name for group in groups for name in group}
    for name, module in stage.linears.items():
        if name not in reached:
            weight = dense_weight(module)
            pool = pools.get(_pool_of({name: module}))
            if pool is None:
                inputs = InputStatistics(torch.eye(weight.shape[1], device=weight.device), reached=False)
            else:
                inputs = _means(run, pool.copy(), {name: module}, {})
                inputs.reached = False
            take({name: module}, inputs)
    visit_waiting()


def _padding_to_no_expert(run: CalibrationRun, stage: Stage, forward: Callable[[int], Any]) -> Callable[[int], Any]:
    """`forward` in which no expert is given padding: of their inputs, tokens of all texts in a row, no mask could tell it."""
    stacks = dict.fromkeys(module.stack for module in stage.linears.values() if isinstance(module, ExpertLinear))

    def without(index: int) -> Any:
        mask = run.batches[index].get("attention_mask")
        if mask is None or mask.dim() != 2 or bool(mask.all()):
            return forward(index)
        padding = mask.flatten() == 0

        def send(stack: RoutedExperts, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, chosen, weights = given
            if len(chosen) != len(padding):
                return given
            return x, chosen.masked_fill(padding[:, None], stack.experts), weights

        with hooked(stack.register_forward_pre_hook(send) for stack in stacks):
            return forward(index)

    return without if stacks else forward


def _pool_of(group: Group) -> Any:
    """What is the same for all experts whose inputs are alike: their stack and the parameter in it. None: no expert."""
    module = next(iter(group.values()))
    return (module.stack, module.parameter) if isinstance(module, ExpertLinear) else None


def _at_a_time(groups: list[Group]) -> Iterator[list[Group]]:
    """Groups whose statistics are taken in one pass: each alone, but experts, of which none is the other's input, in numbers."""
    left = list(groups)
    while left:
        key, size = _pool_of(left[0]), 4 * dense_weight(next(iter(left[0].values()))).shape[1] ** 2
        alike = [group for group in left if key is not None and _pool_of(group) == key] or left[:1]
        for first in range(0, len(alike), most := max(1, EXPERT_HESSIANS // size)):
            yield alike[first : first + most]
        left = [group for group in left if not any(group is other for other in alike)]


def group_by_input(run: CalibrationRun, stage: Stage, forward: Callable[[int], Any]) -> tuple[list[Group], set[str]]:
    """The stage's Linears in the order in which they run, those that are given the very same tensor in one group.

    And the names of those that run more than once.
    """
    groups: dict[tuple[int, torch.Size, int], tuple[Tensor, Group]] = {}
    seen: set[str] = set()
    of_batch: Counter[str] = Counter()
    repeated: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        of_batch[name] += 1
        if of_batch[name] > 1:
            repeated.add(name)
        if name in seen:
            return
        seen.add(name)
        # The dict keeps every input alive, so that no address is used twice.
        _, members = groups.setdefault((x.data_ptr(), x.shape, x._version), (x, {}))
        members[name] = stage.linears[name]

    with seeing_inputs(stage.linears.items(), see):
        for index in range(len(run.batches)):
            of_batch.clear()
            forward(index)
            if len(seen) == len(stage.linears):
                break
    # Other processes may have reached experts that this one's text did not.
    found: list[Group] = []
    taken: set[str] = set()
    for names in itertools.chain(*run.ranks.gather([list(members) for _, members in groups.values()])):
        new = [name for name in names if name not in taken]
        taken.update(new)
        if new:
            found.append({name: stage.linears[name] for name in new})
    return found, repeated


class _Sums:
    """Of x x^T and of x over the tokens of an input, fp32 [K, K] and [K], and how many they are."""

    def __init__(self, linear: nn.Module) -> None:
        self.total = torch.zeros_like(dense_weight(linear)[0], dtype=torch.float32)
        self.products = self.total.new_zeros(len(self.total), len(self.total))
        self.count = 0.0

    def add(self, tokens: Tensor, weights: Tensor | None) -> None:
        for x, share in _by_tokens(tokens, weights):
            weighted = x if share is None else x * share
            # Added in the product: a second [K, K] is 0.5 GB at K = 11008.
            self.products.addmm_(weighted.T, x)
            self.total.add_(weighted.sum(0))
        self.count += len(tokens) if weights is None else float(weights.sum())

    def of_all_ranks(self, run: CalibrationRun, name: str) -> None:
        run.ranks.sum_(self.products)
        run.ranks.sum_(self.total)
        self.count = float(run.ranks.sum_(torch.tensor([self.count], dtype=torch.float64)))
        _expect_finite(name, self.products.diagonal())

    def shrink_to(self, pool: _Sums) -> None:
        prior = PRIOR_TOKENS * len(self.total)
        self.products.add_(pool.products, alpha=prior / pool.count)
        self.total.add_(pool.total, alpha=prior / pool.count)
        self.count += prior

    def copy(self) -> _Sums:
        """To be written on."""
        copied = copy.copy(self)
        copied.products, copied.total = self.products.clone(), self.total.clone()
        return copied


def _pooled(run: CalibrationRun, stage: Stage, key: Any, forward: Callable[[int], Any]) -> _Sums:
    """Over the inputs of all experts of a layer: a token counts once for each expert that it is sent to."""
    members = {name: module for name, module in stage.linears.items() if _pool_of({name: module}) == key}
    sums = _Sums(next(iter(members.values())))
    current = 0

    def see(name: str, given: Tensor) -> None:
        mask = _mask_of(run, name, current, given)
        tokens = _real_tokens(given, mask)
        sums.add(tokens, _weights_of(run, name, current, given, mask, len(tokens)))

    with seeing_inputs(members.items(), see):
        for current in range(len(run.batches)):  # noqa: B007  (read by the hooks)
            forward(current)
    sums.of_all_ranks(run, next(iter(members)))
    return sums


def input_statistics(
    run: CalibrationRun,
    groups: list[Group],
    repeated: set[str],
    forward: Callable[[int], Any],
    pools: Mapping[Any, _Sums] | None = None,
) -> list[InputStatistics]:
    """H, fp32 [K, K], a sum of x x^T over the calibration tokens, and their mean, for the common input of each group; beside the
    dense block also the error of each output so far. Those of experts are shrunk to their pool.

    The forward pass stops as soon as every requested statistic is complete (for q, k, v: before attention). `repeated` name
    Linears that run more than once.
    """
    once = repeated.isdisjoint(name for group in groups for name in group)
    leaders = {next(iter(group)): i for i, group in enumerate(groups)}
    sums = [_Sums(groups[i][name]) for name, i in leaders.items()]
    errors = _OutputErrors(run, groups, once)
    seen: dict[int, _Tokens] = {}
    current = 0
    return_freed()

    def end_where_known() -> None:
        if once and len(seen) == len(groups) and errors.known():
            raise Enough

    def see(name: str, given: Tensor) -> None:
        i = leaders[name]
        mask = _mask_of(run, name, current, given)
        tokens = _real_tokens(given, mask)
        s = _weights_of(run, name, current, given, mask, len(tokens))
        sums[i].add(tokens, s)
        seen[i] = tokens, s, mask
        end_where_known()

    first_of_groups = ((name, groups[i][name]) for name, i in leaders.items())
    with seeing_inputs(first_of_groups, see), errors.watched(end_where_known):
        for current in range(len(run.batches)):
            seen.clear()
            with suppress(Enough):
                forward(current)
            errors.add(current, seen)
    found = []
    for group, of_group in zip(groups, sums, strict=True):
        name = next(iter(group))
        of_group.of_all_ranks(run, name)
        pool, reached = (pools or {}).get(_pool_of(group)), of_group.count > 0
        if pool is None and not reached:
            raise ValueError(f"the calibration data reaches {name} with no token; is the attention_mask all zero?")
        targets = errors.of(group, of_group.count) if run.covariance else {}
        if pool is not None and reached:
            of_group.shrink_to(pool)
        elif pool is not None:  # its tokens go to other experts now that what is before the router is packed
            of_group = pool.copy()
        found.append(replace(_means(run, of_group, group, targets), reached=reached))
    return found


def _means(run: CalibrationRun, sums: _Sums, group: Group, targets: Mapping[str, AsymmetricTarget]) -> InputStatistics:
    if not run.covariance:
        return InputStatistics(sums.products.mul_(2.0 / sums.count))
    biased = all(isinstance(module.bias, Tensor) for module in group.values())
    mean = sums.total.div_(sums.count) if biased else None
    return InputStatistics(sums.products.div_(sums.count), mean, targets)


class _OutputErrors:
    """Collects, for the Linears of some groups, what the dense block has at their places beyond what the block has."""

    def __init__(self, run: CalibrationRun, groups: list[Group], once: bool) -> None:
        self.run, self.dense, self.once = run, run.loop.dense_block, once
        # An expert is sent other tokens than in the dense model: nothing to compare.
        watched = [(i, name, module) for i, group in enumerate(groups) for name, module in group.items() if self.dense]
        self.members = [(i, name) for i, name, module in watched if not isinstance(module, ExpertLinear)]
        self.had: dict[str, Tensor] = {}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        """name -> those of e x^T and of e."""
        for i, name in self.members:
            weight = dense_weight(groups[i][name])
            mean = torch.zeros(len(weight), device=weight.device)
            self.sums[name] = torch.zeros_like(weight, dtype=torch.float32), mean

    def watched(self, then: Callable[[], None]) -> AbstractContextManager[Any]:
        places = {name: self.dense.places_in_block[name] for _, name in self.members} if self.dense else {}
        return watch(places, self.had, then=then)

    def known(self) -> bool:
        return len(self.had) == len(self.members)

    def add(self, current: int, seen: Mapping[int, _Tokens]) -> None:
        """`seen`: for each group its real tokens in the batch of index `current`."""
        if self.dense is None or not self.members:
            return
        wanted = self.dense.look([name for _, name in self.members], current, self.once)
        for i, name in self.members:
            # 2-D: of experts in a list.
            if i not in seen or name not in self.had or name not in wanted or wanted[name].dim() != 3:
                continue
            tokens, s, mask = seen[i]
            missing = _real_tokens(wanted.pop(name) - self.had.pop(name), mask)
            if len(missing) == len(tokens):
                products, mean = self.sums[name]
                for (x, share), e in zip(_by_tokens(tokens, s), missing.split(TOKENS), strict=True):
                    e = e.float() if share is None else e * share
                    products.addmm_(e.T, x)
                    mean.add_(e.sum(0))
        self.had.clear()

    def of(self, group: Group, count: float) -> dict[str, AsymmetricTarget]:
        """The means over `count` tokens."""
        found = {name: self.sums[name] for name in group if name in self.sums}
        return {
            name: AsymmetricTarget(*(self.run.ranks.sum_(total).div_(count) for total in sums))
            for name, sums in found.items()
        }


def input_norms(
    run: CalibrationRun, linears: Mapping[str, nn.Module], forward: Callable[[int], Any]
) -> dict[str, Tensor]:
    """name -> |X_j| over the calibration tokens, float32 [K]; 0 for a Linear that never runs."""
    sums = {name: torch.zeros_like(dense_weight(module)[0], dtype=torch.float32) for name, module in linears.items()}
    current = 0

    def see(name: str, given: Tensor) -> None:
        for x in _real_tokens(given, _mask_of(run, name, current, given)).split(TOKENS):
            sums[name] += x.float().square().sum(0)

    with seeing_inputs(linears.items(), see):
        for current in range(len(run.batches)):  # noqa: B007  (read by the hooks)
            forward(current)
    for name, total in sums.items():
        _expect_finite(name, run.ranks.sum_(total))
    return {name: total.sqrt() for name, total in sums.items()}


def _expect_finite(name: str, squares: Tensor) -> None:
    """Sums of squares of the inputs of a Linear, [K]."""
    if bad := int((~torch.isfinite(squares)).sum()):
        raise ValueError(
            f"{bad} of the {len(squares)} inputs of {name} are not finite in the calibration data; look at the layers before it "
            "(a broken weight, an overflow of the dtype) and at the padding"
        )


def _mask_of(run: CalibrationRun, name: str, current: int, given: Tensor) -> Tensor | None:
    """Of the tokens [B, L] of a Linear's input [B, L, K]."""
    if given.dim() != 3:
        return None
    batch = run.batches[current]
    if run.silence and "input_ids" not in batch:
        batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    return token_mask(batch, name, given.shape[:2], run.loop.crosses(given))


def _real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The input or output of a Linear without padding, [tokens, K]."""
    x = x.detach()
    x = x if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def _by_tokens(x: Tensor, shares: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(float32 [T, K], weights [T, 1]) of some tokens at a time: 2048 of them are 0.09 GB at K = 11008."""
    parts = x.split(TOKENS)
    if shares is None:
        return ((part.float(), None) for part in parts)
    return ((part.float(), s) for part, s in zip(parts, shares.reshape(-1, 1).split(TOKENS), strict=True))


def _weights_of(
    run: CalibrationRun, name: str, current: int, given: Tensor, mask: Tensor | None, count: int
) -> Tensor | None:
    """What the `count` real tokens of an input count in the statistics; None: all alike."""
    if name not in run.gradients.token_weights:
        return None
    weights = run.gradients.token_weights[name][current]
    if weights.shape != given.shape[:-1]:  # a router sends an expert other tokens now that layers before it are packed
        return None
    weights = weights if mask is None or mask.shape != weights.shape else weights[mask.bool()]
    return weights if weights.numel() == count else None

"""The block loop: every block of a model in turn, on the inputs that the blocks before it give out.

Only the block in hand runs. What the model does around its blocks (embeddings, masks, rotary angles) is recorded with the blocks
stubbed out, so nothing but one block and the hidden states of the calibration data need be in memory: `Weights` says where
the rest is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...weights import OUTSIDE, Weights
from ..calibration import Batch, given_to_model
from ..model_state import other_forwards
from .asymmetric import DenseBlock, Enough

WORTH_COLLECTING = 1 << 26
"""Weights of a block that are freed at once where cycles hold them: a dense copy has the block's, and experts are seen in a stack
that they are children of. With 128 experts three blocks held 3.5 blocks in fp32. A collection takes some tenths of a second in a
process that has imported transformers, so small blocks wait for Python's."""


@dataclass
class Stage:
    """A block that is run on its own, or (block is None) Linears that only a run of the whole model reaches."""

    name: str
    block: nn.Module | None
    linears: dict[str, nn.Module] = field(default_factory=dict)
    ends: Sequence[Any] = ()
    """Embeddings and heads that are packed when all else is (jobs/ends.py)."""


def find_stages(model: nn.Module, chosen: Mapping[str, nn.Module], outside: bool) -> list[Stage]:
    """One stage per block of a list in which Linears are chosen, then one for those outside all blocks if `outside`."""
    lists: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists.append(name)
    stages, taken = [], set()
    for list_name in lists:
        members = []
        for i in range(len(model.get_submodule(list_name))):  # type: ignore[arg-type]
            name = f"{list_name}.{i}".lstrip(".")
            inside = {n: module for n, module in chosen.items() if n.startswith(name + ".") or n == name}
            members.append(Stage(name, model.get_submodule(name), inside))
            taken |= set(inside)
        if any(stage.linears for stage in members):
            stages += members
    rest = {name: module for name, module in chosen.items() if name not in taken}
    if rest and (outside or not any(stage.linears for stage in stages)):
        stages.append(Stage(OUTSIDE, None, rest))
    return stages


# ---- calls of blocks -------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """The arguments of one call of a block, with the hidden states apart."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """None if no argument can be told to be the hidden states."""
        # A cache would grow with every repeated run of the block; calibration never needs one.
        kwargs = {k: None if type(v).__name__.endswith("Cache") else v for k, v in kwargs.items()}
        args = tuple(None if type(v).__name__.endswith("Cache") else v for v in args)
        if args and isinstance(args[0], Tensor):
            return cls(args[0], args[1:], kwargs)
        hidden = kwargs.pop("hidden_states", None)
        return cls(hidden, args, kwargs) if isinstance(hidden, Tensor) else None

    def without_hidden(self) -> Call:
        return replace(self, hidden=self.hidden.new_empty(0))

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple | list) else output


@dataclass
class Seen:
    """What the first batch's run told of one block."""

    calls: list[Call | None]
    chained: bool
    """It was given just what the block before gave out."""
    others: tuple[Any, ...] | None
    """What it gave out beside the hidden states; None: nothing but them."""
    output: Tensor | None = None
    """The hidden states that it gave out, where the next block was not chained to it."""

    @property
    def gives_tensors(self) -> bool:
        return any(isinstance(value, Tensor) for value in self.others or ())

    def reply(self, hidden: Tensor) -> Any:
        """What a stub gives out in the block's place."""
        if self.others is None:
            return hidden
        return (hidden, *(None if isinstance(value, Tensor) else value for value in self.others))


@dataclass
class Chain:
    """Blocks of which each takes just what the one before gave out, or one stage of the whole model."""

    stages: list[Stage]
    alike: bool = False
    """The other arguments of its blocks do not depend on what blocks give out: stubs are enough to record them."""


@dataclass
class BlockLoop:
    """One walk through the blocks of a model.

    Args:
        first: the batch that shows in what order blocks run; the same in every process of a job.
        batches: those whose hidden states are carried along.
    """

    model: nn.Module
    first: Batch
    batches: Sequence[Batch]
    weights: Weights = field(default_factory=Weights)
    seen: dict[str, Seen] = field(default_factory=dict)
    """By block, once `find_chains` has run."""
    outputs: dict[str, list[Tensor] | None] = field(default_factory=dict)
    """By block of the chains that are done: what the last of a chain gives out for each batch, None for the others."""
    dense_block: DenseBlock | None = None
    """The block that is visited as it was before compression, in an asymmetric walk."""
    running: Call | None = None
    """That of the block which ran last."""

    def crosses(self, x: Tensor) -> bool:
        """Is this one of the tensors that the block was given beside its hidden states: what the encoder gave out?"""
        given = () if self.running is None else (*self.running.args, *self.running.kwargs.values())
        return any(isinstance(t, Tensor) and t.data_ptr() == x.data_ptr() and t.shape == x.shape for t in given)

    # ---- which blocks follow on which ----

    def find_chains(self, stages: Sequence[Stage], check: Callable[[Stage], None] = lambda stage: None) -> list[Chain]:
        """Cut the stages into chains, in the order in which the model runs them; `check` is given each with its weights there.

        A block that runs several times in one forward (shared layers), or whose hidden states cannot be told from its other
        arguments, or that never runs, becomes a stage of the whole model: one recorded call would not tell its whole story.
        Those come last, in one chain.
        """
        staged = {stage.name: stage for stage in stages if stage.block is not None}
        ran = self._observe(staged, check)
        for name in staged.keys() - set(ran):
            with self.weights.loaded(name):
                check(staged[name])
        chains: list[Chain] = []
        rest: list[Stage] = []
        before = False
        for name in [*ran, *(name for name in staged if name not in self.seen)]:
            seen = self.seen.get(name)
            if seen is None or len(seen.calls) != 1 or seen.calls[0] is None:
                self.seen.pop(name, None)
                if staged[name].linears:
                    rest.append(Stage(OUTSIDE, None, staged[name].linears))
                before = False
            elif before and seen.chained:
                chains[-1].stages.append(staged[name])
            else:
                chains.append(Chain([staged[name]]))
                before = True
        self.weights.settle(self.seen)
        with self.weights.loaded(OUTSIDE):
            for stage in stages:
                if stage.block is None:
                    check(stage)
            for chain in chains:
                chain.alike = self._is_alike(chain)
        rest += [stage for stage in stages if stage.block is None]
        if rest:
            chains.append(Chain(rest))
        for seen in self.seen.values():
            seen.calls, seen.output = [], None
        # What comes after the last Linear only runs.
        while chains and not any(stage.linears or stage.ends for stage in chains[-1].stages):
            chains.pop()
        while chains and not (chains[-1].stages[-1].linears or chains[-1].stages[-1].ends):
            chains[-1].stages.pop()
        return chains

    def _observe(self, staged: Mapping[str, Stage], check: Callable[[Stage], None]) -> list[str]:
        """Run the model on the first batch, each block with its weights; fills `seen`, gives the order of the blocks."""
        given: tuple[Tensor, int] | None = None
        before = ""

        def begin(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.weights.load(name)
                call = Call.of(args, dict(kwargs))
                chained = given is not None and call is not None and _gives(*given, call.hidden)
                if given is not None and not chained:
                    self.seen[before].output = given[0]
                if name not in self.seen:
                    check(staged[name])
                    self.seen[name] = Seen([], chained, None)
                self.seen[name].calls.append(None if call is None else call.without_hidden())

            return hook

        def end(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                nonlocal given, before
                before = name
                if isinstance(output, tuple | list) and output:
                    self.seen[name].others, output = tuple(output[1:]), output[0]
                given = (output, output._version) if isinstance(output, Tensor) else None
                self.weights.drop(name)

            return hook

        with ExitStack() as hooks, self.weights.loaded(OUTSIDE):
            for name, stage in staged.items():
                assert stage.block is not None
                hooks.callback(stage.block.register_forward_pre_hook(begin(name), with_kwargs=True).remove)
                hooks.callback(stage.block.register_forward_hook(end(name)).remove)
                hooks.callback(self.weights.drop, name)
            self.model(**given_to_model(self.first, self.model))
        return list(self.seen)

    def _is_alike(self, chain: Chain) -> bool:
        """Do stubs lead to the arguments that the blocks were really given?"""
        if any(self.seen[stage.name].gives_tensors for stage in chain.stages):
            return False

        def reply(name: str, hidden: Tensor) -> Tensor:
            output = self.seen[name].output
            return hidden.clone() if output is None else output

        try:
            recorded = self._record_stubbed(chain, self.first, reply)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            return False
        return all(
            _same((call.args, call.kwargs), (seen.args, seen.kwargs))
            for call, seen in ((recorded[s.name], self.seen[s.name].calls[0]) for s in chain.stages)
            if seen is not None
        )

    # ---- running the model around its blocks ----

    def _stubs(
        self, stub: Callable[[str, Call], Tensor | None], with_graph: bool = True
    ) -> AbstractContextManager[None]:
        """Blocks give out what `stub` says; where that is None, they run, with their weights loaded for as long."""

        def stand_in(name: str, block: nn.Module) -> Callable[..., Any]:
            forward = block.forward

            def run(*args: Any, **kwargs: Any) -> Any:
                call = Call.of(args, dict(kwargs))
                if call is None:
                    raise ValueError(f"a calibration batch gives {name} no hidden states, as the first batch did")
                hidden = stub(name, call)
                if hidden is not None:
                    return self.seen[name].reply(hidden)
                with self.weights.loaded(name), torch.set_grad_enabled(with_graph and torch.is_grad_enabled()):
                    return forward(*args, **kwargs)

            return run

        blocks = {name: self.model.get_submodule(name) for name in self.seen}
        return other_forwards({block: stand_in(name, block) for name, block in blocks.items()})

    def without(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Meanwhile these blocks give out the hidden states that they are given. Once `find_chains` has run."""

        def stand_in(name: str) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                call = Call.of(args, dict(kwargs))
                assert call is not None
                return self.seen[name].reply(call.hidden)

            return run

        return other_forwards({self.model.get_submodule(name): stand_in(name) for name in names})

    def _record_stubbed(
        self, chain: Chain, batch: Batch, reply: Callable[[str, Tensor], Tensor | None]
    ) -> dict[str, Call]:
        """The calls of the chain's blocks in a run of `batch`; all but the first without hidden states."""
        recorded: dict[str, Call] = {}
        wanted = {stage.name for stage in chain.stages}

        def stub(name: str, call: Call) -> Tensor | None:
            if name in wanted:
                if name in recorded:
                    raise ValueError(
                        f"a calibration batch runs {name} twice, the first batch once; batches must take the same way "
                        "through the model"
                    )
                recorded[name] = call.without_hidden() if recorded else call
                if len(recorded) == len(wanted):
                    raise Enough
            return reply(name, call.hidden)

        with self._stubs(stub, with_graph=False):
            try:
                self.model(**given_to_model(batch, self.model))
            except Enough:
                return recorded
        raise ValueError(
            f"a calibration batch runs {len(recorded)} of {len(wanted)} blocks that the first batch ran once each; batches must "
            "take the same way through the model"
        )

    def run_model(self, index: int) -> Any:
        """The model's output for a batch; blocks of chains that are done give out what they gave then."""

        with self._stubs(lambda name, call: self._done(name, index, call.hidden)):
            return self.model(**given_to_model(self.batches[index], self.model))

    def _done(self, name: str, index: int, hidden: Tensor) -> Tensor | None:
        if name not in self.outputs:
            return None
        outputs = self.outputs[name]
        return hidden if outputs is None else outputs[index]

    def record(self, chain: Chain) -> list[list[Call]]:
        """For every batch the calls of the chain's blocks; only the first has its hidden states."""
        found = []
        with self.weights.loaded(OUTSIDE):
            for index, batch in enumerate(self.batches):

                def reply(name: str, hidden: Tensor, index: int = index) -> Tensor | None:
                    done = self._done(name, index, hidden)
                    # Fresh, so that a model that changes it in place does not change what was recorded.
                    return hidden.clone() if done is None and chain.alike else done

                calls = self._record_stubbed(chain, batch, reply)
                found.append([calls[stage.name] for stage in chain.stages])
        return found

    # ---- the walk ----

    def walk(
        self,
        chain: Chain,
        visit: Callable[[Stage, Callable[[int], Any]], None],
        *,
        hand_on: bool,
        done: Callable[[Stage, list[Tensor], list[Tensor]], None] = lambda stage, hidden, dense: None,
        begin: int = 0,
        hidden: list[Tensor] | None = None,
        dense: list[Tensor] | None = None,
        asymmetric: bool = False,
    ) -> None:
        """Visit the stages of a chain, each with its weights there and a function that runs it on the batch of an index.

        Args:
            visit: called once for each stage; what runs afterwards sees what it changed.
            hand_on: what the last block gives out is wanted too.
            done: called after each block with what it gives out, and with what its dense copy gives out, its weights still there.
            begin: the first stage to visit.
            hidden: its inputs, for each batch; None: those of the first stage.
            dense: its dense block's inputs; None: the same, as at the first stage of a chain.
            asymmetric: during each visit `dense_block` is the block as it was, on what the dense blocks before it gave out:
                a second copy of the hidden states.
        """
        self.running = None
        if chain.stages[0].block is None:
            with self.weights.loaded(OUTSIDE):
                for stage in chain.stages:
                    visit(stage, self.run_model)
                done(chain.stages[-1], [], [])
            return
        recorded = self.record(chain)
        if hidden is None:
            hidden = [calls[0].hidden for calls in recorded]
        for calls in recorded:
            calls[0] = calls[0].without_hidden()
        if asymmetric and dense is None:
            dense = list(hidden)
        for i in range(begin, len(chain.stages)):
            stage = chain.stages[i]
            with self.weights.loaded(stage.name):
                assert stage.block is not None
                run, dense_run = (partial(self._run, recorded, i, of) for of in (hidden, dense or []))
                run, run_dense = partial(run, stage.block), partial(dense_run, stage.block)
                if dense is not None and stage.linears:
                    self.dense_block = DenseBlock(stage.block, stage.linears, dense_run)
                    run_dense = self.dense_block.run
                visit(stage, run)
                self.dense_block = None
                if hand_on or i + 1 < len(chain.stages):
                    # In place, so that two sets of hidden states are never there at once.
                    for index in range(len(hidden)):
                        hidden[index] = run(index)
                        if dense is not None:
                            dense[index] = run_dense(index)
                done(stage, hidden, dense or [])
            del run, run_dense
            if sum(p.numel() for p in stage.block.parameters()) >= WORTH_COLLECTING:
                gc.collect()
        self.finish(chain, hidden if hand_on else None)

    def _run(self, recorded: list[list[Call]], at: int, hidden: list[Tensor], block: nn.Module, index: int) -> Tensor:
        self.running = recorded[index][at]
        return self.running.run(block, hidden[index])

    def finish(self, chain: Chain, outputs: list[Tensor] | None) -> None:
        """From now on the blocks of the chain are not run: the last gives out `outputs`."""
        self.outputs |= {stage.name: None for stage in chain.stages}
        self.outputs[chain.stages[-1].name] = outputs


def _gives(output: Tensor, version: int, wanted: Tensor) -> bool:
    if output.shape != wanted.shape or output._version != version:
        return False
    return bool((output.float() - wanted.float()).norm() <= 1e-3 * wanted.float().norm())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)

"""One compression: a method, given the Linears of a model group by group, and what became of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ...experts import ExpertLinear, take_apart
from ...formats import PackedWeight, layer_type
from ...layers.embedding import embedding_type, put_embedding
from ...linears import (
    DEFAULT_EXCLUDE,
    LeftDense,
    dense_weight,
    left_dense,
    linear_modules,
    matches,
    replace_module,
    select_linears,
    tied_weights,
)
from ...packing import count_not_finite
from ...weights import OUTSIDE
from ..methods import CompressedLinear, Method
from ..ranks import ALONE, Ranks
from ..report import CompressionReport, LayerReport, summary
from ..statistics.blocks import BlockLoop, Stage, find_stages
from ..statistics.inputs import Experts, Group, InputStatistics, visit_groups
from ..statistics.run import CalibrationRun
from .ends import End, compress_ends, find_ends

if TYPE_CHECKING:
    from ...integrations.checkpoint import StreamedModel

SILENT_SHARE = 0.01
"""Linear-like parameters left dense without being asked for are reported loudly above this share."""


@dataclass
class Task:
    """Which Linears of a model a method is to compress, and what stays dense."""

    model: nn.Module
    method: Method[Any]
    linears: dict[str, nn.Module]
    stages: list[Stage]
    report: CompressionReport
    ends: list[End]
    """Embeddings and heads that are packed besides."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        method: Method[Any],
        include: Sequence[str] | None,
        exclude: Sequence[str],
        embeddings: int | None = None,
        head: int | None = None,
    ) -> Task:
        """Raises ValueError if there is nothing to compress, or one of the Linears may not be; warns of much that stays dense."""
        if method.reshapes:
            raise ValueError(
                f"{type(method.config).__name__} makes a smaller dense model and packs nothing; take "
                f"pyllmq.prune_{method.name}, or pyllmq compress --method {method.name}"
            )
        take_apart(model)
        exclude = not_included(include, exclude)
        chosen = select_linears(model, include, exclude)
        tied = tied_weights(model, chosen)
        stages = find_stages(model, chosen, outside=include is not None)
        planned = {name: module for name, module in chosen.items() if name not in tied}
        if not method.outside_blocks:
            for name, owner in tied.items():
                raise ValueError(
                    f"{name} shares its weight with {owner}; compressing it would untie them. Add {name!r} to exclude"
                )
            planned = {name: module for stage in stages for name, module in stage.linears.items()}
        if not planned:
            raise ValueError(
                f"nothing to compress: {len(list(linear_modules(model)))} Linears, {len(chosen)} after include and exclude, none "
                "of them in a repeated block; name them in include to compress them all the same"
            )
        ends = find_ends(model, embeddings, head, planned)
        if ends:
            stages.append(Stage(OUTSIDE, None, ends=ends))
        heads = {name for end in ends for name in end.heads}
        dense, total = left_dense(model, chosen if method.outside_blocks else planned, include, exclude)
        dense = [item for item in dense if item.name not in heads]
        report = CompressionReport(method.name, method.config.to_dict(), left_dense=dense)
        unasked = [item for item in dense if not item.asked]
        share = sum(item.parameters for item in unasked) / max(total, 1)
        if method.outside_blocks:
            dense += [
                stays_dense(name, chosen[name], f"shares its weight with {tied[name]}")
                for name in tied
                if name not in heads
            ]
        elif share > SILENT_SHARE:
            warn(
                report,
                f"{100 * share:.1f} % of the Linear-like parameters stay dense without being asked for: {summary(unasked)}. "
                "Name them in exclude if that is wanted; Linears outside the blocks can be named in include",
            )
        return cls(model, method, planned, stages, report, ends)

    @property
    def names(self) -> list[str]:
        """Of all modules that get packed tensors."""
        return [*self.linears, *(end.name for end in self.ends)]

    def run(self, loop: BlockLoop, ranks: Ranks = ALONE) -> CalibrationRun:
        needs = self.method.needs
        return CalibrationRun(loop, ranks, sequential=needs.sequential, covariance=needs.covariance)

    def note_dense(self) -> None:
        """Into the report, at the end: what the method left as it was."""
        packed = {layer.name for layer in self.report.layers}
        left = [(name, module) for name, module in self.linears.items() if name not in packed]
        self.report.left_dense += [stays_dense(name, module, "would gain nothing") for name, module in left]

    def nothing_packed(self) -> ValueError:
        first = next(((item.name, item.why) for item in self.report.left_dense if item.name in self.linears), None)
        return ValueError(f"none of {len(self.linears)} Linears {self.method.nothing_packed} ({first})")


def open_task(
    source: Any,
    method: Method[Any],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    embeddings: int | None,
    head: int | None,
) -> tuple[StreamedModel, Task]:
    """A folder, or a `StreamedModel` of one, each block a unit of its own; and what is to be done to it."""
    from ...integrations.checkpoint import StreamedModel

    streamed = source if isinstance(source, StreamedModel) else StreamedModel(source)
    if method.needs.calibration:
        streamed.expect_runnable()
    task = Task.of(streamed.model, method, include, exclude, embeddings, head)
    streamed.split(stage.name for stage in task.stages if stage.block is not None)
    return streamed, task


def not_included(include: Sequence[str] | None, exclude: Sequence[str]) -> tuple[str, ...]:
    """The patterns of `exclude` without those heads, dense by default, that `include` asks for by name."""
    asked = [head for head in DEFAULT_EXCLUDE if any(matches(pattern, [head]) for pattern in include or ())]
    return tuple(pattern for pattern in exclude if pattern not in asked)


def stays_dense(name: str, module: nn.Module, why: str) -> LeftDense:
    return LeftDense(name, dense_weight(module).numel(), why, False)


@dataclass
class Job:
    """A task on its way through the blocks."""

    task: Task
    run: CalibrationRun
    bar: tqdm
    replaced: dict[str, nn.Module] = field(default_factory=dict)
    """name -> the dense Linear in whose place a packed layer is."""

    def compress_stage(self, stage: Stage, forward: Callable[[int], Any]) -> None:
        """Group the Linears of a stage by their input, take the statistics of each input, compress them."""
        visit_groups(self.run, stage, forward, self.compress_group, self.compress_experts)
        if stage.ends:
            done = compress_ends(stage.ends, self.run, forward)
            for end in stage.ends:
                self.replace_end(end, done[end.name])

    def compress_group(self, group: Group, inputs: InputStatistics) -> None:
        """Put packed layers in the place of Linears that share an input."""
        self._expect_reached(group, inputs)
        self._put(group, self.task.method.compress_group(weights_of(group), inputs, self.run))

    def compress_experts(self, experts: Experts) -> None:
        """Put packed layers in the place of Linears of which each process has the statistics of some."""
        for group, inputs in experts:
            self._expect_reached(group, inputs)
        found = self.task.method.compress_experts([(weights_of(group), inputs) for group, inputs in experts], self.run)
        for group, _ in experts:
            self._put(group, found)

    def _expect_reached(self, group: Group, inputs: InputStatistics) -> None:
        if not inputs.reached:
            for name, module in group.items():
                instead = (
                    "the inputs of its layer's other experts"
                    if isinstance(module, ExpertLinear)
                    else "its weights alone"
                )
                warn(self.task.report, f"{self._why_never_run(name, module)}; it is compressed by {instead}")

    def _put(self, group: Group, found: Mapping[str, CompressedLinear]) -> None:
        for name, module in group.items():
            if name in found:
                self.replace(name, module, found[name])
            else:
                self.bar.update()

    def _why_never_run(self, name: str, module: nn.Module) -> str:
        said = f"{name} was never run by the calibration data"
        if isinstance(module, ExpertLinear) or matches(name, ["experts"]):
            return f"{said}: no token was routed to this expert, give more text"
        if isinstance(self.task.model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            return f"{said}: torch's attention reads its weight instead"
        return said

    def replace(self, name: str, module: nn.Module, done: CompressedLinear) -> None:
        dense = dense_weight(module)
        bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
        if bias is not None and done.bias_change is not None:
            bias = bias + done.bias_change.to(bias)
        self.replaced[name] = module
        layer = layer_type(done.weight.kind).from_weight(done.weight.to(dense.device), bias, dense.dtype)
        replace_module(self.task.model, name, layer)
        self.task.report.layers.append(layer_report(name, dense, done))
        self.bar.set_postfix_str(f"{name} error {done.error:.5f}", refresh=False)
        self.bar.update()

    def replace_end(self, end: End, done: CompressedLinear) -> None:
        """An embedding with all that shares its weight, or a head."""
        if not end.embeddings:
            self.replace(end.name, end.module, done)
            return
        dense = end.weight
        assert isinstance(done.weight, PackedWeight)
        packed = embedding_type(done.weight.kind).from_weight(done.weight.to(dense.device), None, dense.dtype)
        self.replaced |= put_embedding(self.task.model, end.name, packed)
        self.task.report.layers.append(layer_report(end.name, dense, done))
        self.bar.update()

    def put_back(self) -> None:
        """The dense Linears take their places again."""
        for name, module in self.replaced.items():
            replace_module(self.task.model, name, module)
        self.replaced.clear()


def weights_of(group: Group) -> dict[str, Tensor]:
    return {name: dense_weight(module) for name, module in group.items()}


def layer_report(name: str, dense: Tensor, done: CompressedLinear) -> LayerReport:
    return LayerReport(
        name=name,
        out_features=done.weight.out_features,
        in_features=done.weight.in_features,
        bits_per_weight=done.weight.bits_per_weight,
        paper_bits=done.paper_bits,
        nbytes=done.weight.nbytes,
        dense_nbytes=dense.numel() * dense.element_size(),
        error=done.error,
        seconds=done.seconds,
        pruned=done.pruned,
    )


def warn(report: CompressionReport, message: str) -> None:
    report.warnings.append(message)
    warnings.warn(message, stacklevel=4)


def check_finite(linears: Mapping[str, nn.Module]) -> None:
    for name, module in linears.items():
        if bad := count_not_finite(dense_weight(module)):
            raise ValueError(
                f"{name}.weight holds {bad} values that are not finite; repair the model before compressing it"
            )

"""Structured pruning: layers, channels of MLPs and heads of attention go, and what reads them is solved again by least squares.

Layers go first (layers.py), then channels and heads block after block (parts.py finds them); sizes.py says what is left in the
config. What goes is chosen as in optimal brain surgery (ZipLM, arXiv 2302.04089;
SlimGPT, 2412.18110): with H the covariance of the input, dropping channel j costs

    |W_:j|^2 / (H^-1)_jj

once the other channels make up for it; for the channels of a head, W_:g (H^-1)_gg^-1 W_:g^T in its place. They do so at once, so
the next choice sees it; at the end the reading Linear is the least
squares solution on the channels that stay, and its bias takes up the mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ...config import Between, MethodConfig
from ...layers.linear import packed_modules
from ...linears import dense_weight, follow_weight, is_transposed_linear, linear_modules, matches, select_linears
from ..calibration import as_batches, within_positions
from ..model_state import quiet_eval
from ..objective import NoLossError
from ..solver.hessian import centre_
from ..solver.price import buy
from ..statistics.blocks import BlockLoop, Chain, Stage, find_stages
from ..statistics.inputs import InputStatistics, input_statistics
from ..statistics.loss_gradients import LossGradients, output_gradients
from ..statistics.run import CalibrationRun
from .layers import choose_layers
from .method import Method, Needs
from .parts import Attention, parts_of
from .sizes import drop_layers, fields_of_layers, heads_that_fit, parameter_count, say_sizes

PARTS = ("mlp", "heads", "layers")
NARROWEST = 0.5
"""At one price no MLP gets narrower than this share of the width that all would have alike."""


@dataclass(frozen=True)
class StructuredConfig(MethodConfig):
    """Fewer layers, MLP channels or attention heads, the latter the same in every block; the result is a dense model."""

    keep: Annotated[float, Between(0.1, 1)] = 0.75
    """Share of the MLP channels, of the heads and of the layers that stays, 0.1 to 1."""
    parts: tuple[str, ...] = ("mlp",)
    """What gets smaller: "mlp" (its channels), "heads" (with the keys and values that several of them share), "layers" (whole)."""
    only: tuple[str, ...] = ()
    """Where: name patterns of layers and Linears, such as "decoder"; empty: everywhere."""
    allocation: Literal["uniform", "price"] = "uniform"
    """How wide each MLP gets: "uniform", all alike; "price", one price for all on the scale of the model's loss: the blocks then
    differ, and the result needs pyllmq to be loaded."""
    multiple: Annotated[int, Between(1)] = 32
    """The width of an MLP is a multiple of it."""
    damping: Annotated[float, Between(0, 1)] = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "only", tuple(self.only))
        if not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"parts is {self.parts!r}; allowed: {', '.join(map(repr, PARTS))}, or several of them")
        super().__post_init__()


@dataclass(frozen=True)
class ChannelReport:
    """One MLP, or one attention."""

    reader: str
    """The Linear that reads the channels, or the heads."""
    writers: tuple[str, ...]
    before: int
    after: int
    error: float
    """Squared error of the reader's output relative to the squared output, both without their means where it has a bias."""
    part: str = "mlp"
    """"mlp": `before` and `after` count channels; "heads": query heads."""


@dataclass
class StructuredReport:
    """What `prune_structured` did."""

    parameters_before: int
    parameters_after: int = 0
    groups: list[ChannelReport] = field(default_factory=list)
    layers: dict[str, list[int]] = field(default_factory=dict)
    """List of layers -> those that stayed, by their numbers before."""

    def __str__(self) -> str:
        words = {"mlp": "channels", "heads": "heads"}
        rows = [f"{name}: layers {', '.join(map(str, kept))} stay" for name, kept in self.layers.items()]
        rows += [f"{g.reader}: {g.before} {words[g.part]} -> {g.after}, error {g.error:.5f}" for g in self.groups]
        total = f"{self.parameters_before / 1e6:.2f} M parameters -> {self.parameters_after / 1e6:.2f} M"
        return "\n".join([*rows, total])

    @property
    def loads_with(self) -> str:
        """What can load the result."""
        alike = len({group.after for group in self.groups if group.part == "mlp"}) < 2
        return "transformers" if alike else "pyllmq.from_pretrained"


class Structured(Method[StructuredConfig]):
    config_type = StructuredConfig
    reshapes, packs_after = True, True

    @property
    def needs(self) -> Needs:
        return Needs(covariance=True)

    def without_effect(self) -> dict[str, str]:
        return (
            {} if "mlp" in self.config.parts else {"allocation": "it shares out the channels of MLPs, which all stay"}
        )

    def reshape(
        self, model: nn.Module, tokenizer: Any, text: str, batches: Sequence[Any]
    ) -> tuple[Any, StructuredReport]:
        return tokenizer, prune_structured(model, self.config, batches)


def prune_structured(model: Any, config: StructuredConfig, calibration: Any) -> StructuredReport:
    """Take layers out of a dense transformers model, channels out of its MLPs, or heads out of its attention, in place.

    Args:
        calibration: batches, as for `pyllmq.compress`.

    Raises:
        ValueError: a packed model, a part that was not found, or is of several widths, or whose new size the config cannot say. The
            model is then as it was.
    """
    if packed := packed_modules(model):
        raise ValueError(f"{packed[0][0]} is packed already; prune the dense model, then compress that")
    batches = as_batches(calibration, model)
    put_back = _snapshot(model)
    try:
        with quiet_eval(model), torch.no_grad(), within_positions(model, batches):
            loop, work = BlockLoop(model, batches[0], batches), StructuredPass(model, config)
            chains = loop.find_chains(find_stages(model, work.linears, outside=False))
            work.choose_layers(loop, chains)
            if work.priced:
                work.choose_widths(loop, chains, lambda: output_gradients(model, work.linears, batches))
            with loop.without(work.gone):
                for i, chain in enumerate(chains if work.narrows else ()):
                    loop.walk(chain, work.visitor(loop), hand_on=i + 1 < len(chains), done=lambda *_: work.cut())
            work.finish()
    except BaseException:
        put_back()
        raise
    return work.report


def _snapshot(model: Any) -> Callable[[], None]:
    """What brings the model back to what it is now."""
    tables = ("_modules", "_parameters")
    modules = [(m, vars(m).copy(), {name: vars(m)[name].copy() for name in tables}) for m in model.modules()]
    tensors = [(parameter, parameter.data) for parameter in model.parameters()]
    owners = (getattr(module, name, None) for module, *_ in modules for name in ("config", "generation_config"))
    configs = [(owner, vars(owner).copy()) for owner in owners if owner is not None]

    def put_back() -> None:
        for module, values, held in modules:
            vars(module).update({**values, **held})
        for owner, values in configs:
            vars(owner).update(values)
        for parameter, data in tensors:
            parameter.data = data

    return put_back


class StructuredPass:
    """One structured pass over a model whose weights are in memory, or come block by block."""

    def __init__(self, model: Any, config: StructuredConfig) -> None:
        self.model, self.config = model, config
        self.linears = select_linears(model)
        self.report = StructuredReport(parameter_count(model))
        self.heads: dict[tuple[int, int], tuple[int, dict[str, int]]] = {}
        """(groups, inputs of one) of an attention -> how many groups stay, and the fields that say so."""
        self.widths: dict[str, int] = {}
        """Reader -> how many channels of its MLP stay; those that are not named: what all have alike."""
        self._layer_fields: dict[str, Any] = {}
        self._cuts: list[Callable[[], None]] = []

    @property
    def narrows(self) -> bool:
        return bool(set(self.config.parts) - {"layers"})

    @property
    def priced(self) -> bool:
        return "mlp" in self.config.parts and self.config.allocation == "price" and self.config.keep < 1

    @property
    def gone(self) -> set[str]:
        """Names of the layers that do not stay; until `finish` they are there."""
        lists = self.report.layers.items()
        return {
            f"{layers}.{i}"
            for layers, kept in lists
            for i in range(len(self.model.get_submodule(layers)))
            if i not in kept
        }

    def _chosen(self, name: str) -> bool:
        return not self.config.only or matches(name, self.config.only)

    def choose_layers(self, loop: BlockLoop, chains: Sequence[Chain]) -> None:
        if "layers" in self.config.parts:
            self.take_layers(choose_layers(loop, chains, self.config.keep, self._chosen))

    def take_layers(self, kept: Mapping[str, Sequence[int]]) -> None:
        """List of layers -> the members that stay, as chosen here or in an earlier run."""
        for layers, members in kept.items():
            self.report.layers[layers] = list(members)
            self._layer_fields |= fields_of_layers(self.model, layers, members) or {}

    def choose_widths(self, loop: BlockLoop, chains: Sequence[Chain], gradients: Callable[[], LossGradients]) -> None:
        """The widths at which the MLPs lose the least together, for as many numbers as if all were alike.

        What one loses at each width is known of the dense model: its reader's squared error, weighed by the gradient of the loss.
        A model without a loss leaves all alike, with a warning.
        """
        try:
            weights = gradients()
        except NoLossError as error:
            warnings.warn(f"all MLPs get one width, as with allocation='uniform': {error}", stacklevel=3)
            return
        run, budget = CalibrationRun(loop, silence=True, covariance=True), 0.0
        widths: dict[str, list[int]] = {}
        options: dict[str, tuple[Tensor, Tensor]] = {}

        def see(stage: Stage, forward: Callable[[int], Any]) -> None:
            nonlocal budget
            if stage.name in self.gone or not any(self._chosen(name) for name in stage.linears):
                return
            for reader, writers in parts_of(stage, forward)[0].items():
                if not self._chosen(reader) or reader not in weights.scales:
                    continue
                inputs = input_statistics(run, [{reader: stage.linears[reader]}], set(), forward)[0]
                known = _Reader.of(stage.linears[reader], inputs, self.config.damping)
                n, width = known.weight.shape
                alike, unit = _uniform_width(width, self.config), self.config.multiple
                numbers = n + sum(dense_weight(stage.linears[name]).shape[1] for name in writers)
                least = max(1, round(NARROWEST * alike / unit)) * unit
                widths[reader] = found = [*range(least, width, unit), width]
                rows = weights.row_weights[reader].cpu().double().sqrt()[:, None]
                _, costs = removals(rows * known.weight, torch.linalg.inv(known.damped), width - least)
                lost = torch.tensor([0.0, *costs], dtype=torch.float64).cumsum(0)
                options[reader] = (
                    torch.tensor(found, dtype=torch.float64) * numbers,
                    torch.stack([lost[width - kept] for kept in found]) * weights.scales[reader],
                )
                budget += alike * numbers

        with loop.without(self.gone):
            for i, chain in enumerate(chains):
                loop.walk(chain, see, hand_on=i + 1 < len(chains))
        loop.outputs.clear()
        bought = buy(options, budget) if options else None
        self.widths = {reader: widths[reader][at] for reader, at in (bought or {}).items()}

    def names_of_layers(self) -> dict[str, str]:
        """Name of a layer that stays -> the name that it will have."""
        lists = self.report.layers.items()
        return {f"{layers}.{old}": f"{layers}.{new}" for layers, kept in lists for new, old in enumerate(kept)}

    def visitor(self, loop: BlockLoop) -> Callable[[Stage, Callable[[int], Any]], None]:
        """What narrows a stage, for `BlockLoop.walk`; `cut` has to be called when it ran for the last time."""
        run, parts = CalibrationRun(loop, silence=True, covariance=True), self.config.parts

        def visit(stage: Stage, forward: Callable[[int], Any]) -> None:
            if stage.name in self.gone or not any(self._chosen(name) for name in stage.linears):
                return
            mlps, attentions = parts_of(stage, forward)

            def inputs_of(reader: str) -> InputStatistics:
                return input_statistics(run, [{reader: stage.linears[reader]}], set(), forward)[0]

            # Attention runs before the MLP, whose inputs see what became of it.
            for attention in (a for a in attentions if "heads" in parts and self._chosen(a.reader)):
                size = len(attention.inputs), len(attention.inputs[0])
                if size not in self.heads:
                    self.heads[size] = heads_that_fit(self.model, self.linears, attention, self.config.keep)
                count, inputs = self.heads[size][0], inputs_of(attention.reader)
                done, cut = _thin(stage.linears, attention, count, inputs, self.config)
                self.report.groups.append(done)
                self._cuts.append(cut)
            for reader, writers in mlps.items() if "mlp" in parts else ():
                if self._chosen(reader):
                    width = self.widths.get(reader)
                    done = _narrow(stage.linears, reader, writers, inputs_of(reader), self.config, width)
                    self.report.groups.append(done)

        return visit

    def cut(self) -> None:
        """Take out the heads that are 0 by now: attention ran with the number of heads that its module knows."""
        for cut in self._cuts:
            cut()
        self._cuts.clear()

    def finish(self) -> None:
        """Let the config say what is left. Raises ValueError if it cannot, or a part was not found."""
        from ...integrations.transformers import describe_packed, expect_own_names

        sizes: dict[str, set[tuple[int, int]]] = {}
        for group in self.report.groups:
            sizes.setdefault(group.part, set()).add((group.before, group.after))
        if missing := [part for part in self.config.parts if part != "layers" and part not in sizes]:
            what = {
                "mlp": "no MLP was found in {}: no Linear of a block reads channels that others write one by one",
                "heads": "no heads were found in {}: no Linear of a block reads several of one size, each with outputs of its own",
            }
            raise ValueError(what[missing[0]].format(type(self.model).__name__))
        if any(len(kept) < len(self.model.get_submodule(layers)) for layers, kept in self.report.layers.items()):
            for layers, kept in self.report.layers.items():
                drop_layers(self.model, layers, kept)
        else:
            self._layer_fields = {}
        heads = next((fields for _, fields in self.heads.values()), {})
        narrowed: dict[str, nn.Module] = {}
        if self.report.loads_with != "transformers" and self.priced:
            own = {id(self.linears[n]) for g in self.report.groups if g.part == "mlp" for n in (g.reader, *g.writers)}
            narrowed = {name: module for name, module in linear_modules(self.model) if id(module) in own}
            del sizes["mlp"]
        say_sizes(self.model, sizes, {**heads, **self._layer_fields}, narrowed)
        self.report.parameters_after = parameter_count(self.model, narrowed)
        if narrowed:
            shapes = {name: (int(n), int(k)) for name, m in narrowed.items() for n, k in (dense_weight(m).shape,)}
            names = expect_own_names(self.model, shapes)
            describe_packed(self.model, {}, {names[name]: shape for name, shape in shapes.items()})


# ---- an MLP, or an attention -----------------------------------------------------------------------------------------


def removals(weight: Tensor, inverse: Tensor, count: int) -> tuple[list[int], list[float]]:
    """(the `count` inputs of a Linear that go first, one after the other; what each costs).

    Args:
        weight: float64 [N, K]. Written on.
        inverse: float64 [K, K], of the damped covariance. Written on.
    """
    gone: list[int] = []
    costs = []
    for _ in range(count):
        cost = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-300)
        cost[gone] = torch.inf
        j = int(cost.argmin())
        gone.append(j)
        costs.append(float(cost[j]))
        row = inverse[j] / inverse[j, j]
        weight.addr_(weight[:, j].clone(), row, alpha=-1)
        inverse.addr_(inverse[:, j].clone(), row, alpha=-1)
        weight[:, j], inverse[j], inverse[:, j] = 0, 0, 0
    return gone, costs


def kept_channels(weight: Tensor, inverse: Tensor, count: int) -> Tensor:
    """The `count` inputs of a Linear that stay, int64 rising; arguments as for `removals`."""
    stays = torch.ones(weight.shape[1], dtype=torch.bool)
    stays[removals(weight, inverse, weight.shape[1] - count)[0]] = False
    return stays.nonzero().flatten()


def kept_groups(weight: Tensor, inverse: Tensor, groups: Sequence[Tensor], count: int) -> list[int]:
    """The `count` groups of inputs of a Linear that stay, as `kept_channels`; rising."""
    left = list(range(len(groups)))

    def solved(g: int) -> Tensor:
        """[N, size] such that its product with weight's columns is what removing the group costs, row by row."""
        own = inverse[groups[g]][:, groups[g]]
        return torch.linalg.solve(own, weight[:, groups[g]].t()).t()

    while len(left) > count:
        worst = min(left, key=lambda g: float((solved(g) * weight[:, groups[g]]).sum()))
        left.remove(worst)
        at = groups[worst]
        rows = torch.linalg.solve(inverse[at][:, at], inverse[at])
        weight -= weight[:, at] @ rows
        inverse -= inverse[:, at] @ rows
        weight[:, at], inverse[at], inverse[:, at] = 0, 0, 0
    return left


@dataclass(frozen=True, eq=False)
class _Reader:
    """What is known of the Linear that reads, in float64."""

    weight: Tensor
    covariance: Tensor
    damped: Tensor
    mean: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, inputs: InputStatistics, damping: float) -> _Reader:
        weight, covariance = dense_weight(module).cpu().double(), inputs.take_hessian().cpu().double()
        mean = None if inputs.mean is None else inputs.mean.cpu().double()
        if mean is not None:
            centre_(covariance, mean)
        ridge = max(damping, 1e-9) * float(covariance.diagonal().mean())
        return cls(
            weight, covariance, covariance + (ridge or 1.0) * torch.eye(len(covariance), dtype=torch.float64), mean
        )

    def solve(self, module: nn.Module, kept: Tensor) -> tuple[Tensor, float]:
        """(the weight on these inputs alone, [N, kept], relative squared error); the bias takes up the mean."""
        found = torch.linalg.solve(self.damped[kept][:, kept], self.damped[kept] @ self.weight.t()).t()
        lost = self.weight.clone()
        lost[:, kept] -= found
        output = float(((self.weight @ self.covariance) * self.weight).sum())
        if self.mean is not None:
            bias = module.bias
            assert isinstance(bias, Tensor)
            bias.data = bias.data + (lost @ self.mean).to(bias.data)
        return found, float(((lost @ self.covariance) * lost).sum()) / max(output, 1e-300)


def _uniform_width(width: int, config: StructuredConfig) -> int:
    """What an MLP of this width gets where all are narrowed alike."""
    return min(width, max(1, round(config.keep * width / config.multiple)) * config.multiple)


def _narrow(
    linears: Mapping[str, nn.Module],
    reader: str,
    writers: Sequence[str],
    inputs: InputStatistics,
    config: StructuredConfig,
    count: int | None,
) -> ChannelReport:
    """Cut an MLP to its best channels, `count` or as many as the config says, and solve the reader for them."""
    module = linears[reader]
    known = _Reader.of(module, inputs, config.damping)
    width = len(known.covariance)
    count = _uniform_width(width, config) if count is None else count
    if count >= width:
        return ChannelReport(reader, tuple(writers), width, width, 0.0)
    kept = kept_channels(known.weight.clone(), torch.linalg.inv(known.damped), count)
    found, error = known.solve(module, kept)
    _put(module, found)
    for name in writers:
        _cut_outputs(linears[name], kept)
    for name in (reader, *writers):
        follow_weight(linears[name])
    return ChannelReport(reader, tuple(writers), width, count, error)


def _thin(
    linears: Mapping[str, nn.Module],
    attention: Attention,
    count: int,
    inputs: InputStatistics,
    config: StructuredConfig,
) -> tuple[ChannelReport, Callable[[], None]]:
    """Solve the reader for the best `count` groups of heads; the others are 0 until the function given back cuts them out.

    Until all blocks are done attention goes on with the number of heads that its module knows.
    """
    module, writers = linears[attention.reader], tuple(attention.outputs)
    known = _Reader.of(module, inputs, config.damping)
    heads = len(known.covariance) // attention.head
    if count >= len(attention.inputs):
        return ChannelReport(attention.reader, writers, heads, heads, 0.0, "heads"), lambda: None
    kept = kept_groups(known.weight.clone(), torch.linalg.inv(known.damped), attention.inputs, count)
    columns = torch.cat([attention.inputs[g] for g in kept]).sort().values
    found, error = known.solve(module, columns)
    whole = torch.zeros_like(known.weight)
    whole[:, columns] = found
    _put(module, whole)

    def cut() -> None:
        _put(module, found)
        for name, rows in attention.outputs.items():
            _cut_outputs(linears[name], torch.cat([rows[g] for g in kept]).sort().values)
        for name in (attention.reader, *writers):
            follow_weight(linears[name])

    after = len(columns) // attention.head
    return ChannelReport(attention.reader, writers, heads, after, error, "heads"), cut


def _cut_outputs(module: nn.Module, kept: Tensor) -> None:
    weight = dense_weight(module)
    _put(module, weight[kept.to(weight.device)])
    if isinstance(module.bias, Tensor):
        module.bias.data = module.bias.data[kept.to(module.bias.device)]


def _put(module: nn.Module, weight: Tensor) -> None:
    """`weight` [N, K]."""
    assert isinstance(module.weight, Tensor)
    own = weight.t() if is_transposed_linear(module) else weight
    module.weight.data = own.to(module.weight.data).contiguous()

"""Structured pruning: whole channels of MLPs and heads of attention go, and what reads them is solved again by least squares.

They are found by gradients, so no architecture is named: a Linear reads a channel where a channel of its input depends on the
same channel of other Linears' outputs, and on nothing else; it reads heads where channels depend on all outputs of a part of
them. What goes is chosen as in optimal brain surgery (ZipLM, arXiv 2302.04089;
SlimGPT, 2412.18110): with H the covariance of the input, dropping channel j costs

    |W_:j|^2 / (H^-1)_jj

once the other channels make up for it; for the channels of a head, W_:g (H^-1)_gg^-1 W_:g^T in its place. They do so at once, so
the next choice sees it; at the end the reading Linear is the least
squares solution on the channels that stay, and its bias takes up the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...config import Between, MethodConfig
from ...layers.linear import packed_modules
from ...linears import dense_weight, is_transposed_linear, select_linears
from ..calibration import as_batches, within_positions
from ..model_state import hooked, quiet_eval
from ..solver.hessian import centre_
from ..statistics.blocks import BlockLoop, Stage, find_stages
from ..statistics.inputs import InputStatistics, input_statistics
from ..statistics.run import CalibrationRun
from .method import Method, Needs

PROBED = 8
"""Channels by which a Linear is told."""
NOISE = 0.3
"""What stands for the outputs of Linears while heads and channels are told apart: of a size at which no softmax is saturated."""
HEADS = (("num_attention_heads",), ("num_heads",), ("n_head",), ("encoder_attention_heads", "decoder_attention_heads"))
"""Settings that say how many heads there are, and those of the keys and values; a setting `head_dim` may have to say the rest."""
KEY_HEADS = ("num_key_value_heads",)
WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "ffn_hidden_size",
)
"""Settings that say how wide an MLP is; which of them a model follows is tried."""


@dataclass(frozen=True)
class StructuredConfig(MethodConfig):
    """Fewer MLP channels or attention heads, the same in every block; the result is a dense model."""

    keep: Annotated[float, Between(0.1, 1)] = 0.75
    """Share of the MLP channels, and of the heads, that stays, 0.1 to 1."""
    parts: tuple[str, ...] = ("mlp",)
    """What gets smaller: "mlp" (its channels), "heads" (with the keys and values that several of them share)."""
    multiple: Annotated[int, Between(1)] = 32
    """The width of an MLP is a multiple of it."""
    damping: Annotated[float, Between(0, 1)] = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts or set(self.parts) - {"mlp", "heads"}:
            raise ValueError(f"parts is {self.parts!r}; allowed: 'mlp', 'heads', or both")
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

    def __str__(self) -> str:
        words = {"mlp": "channels", "heads": "heads"}
        rows = [f"{g.reader}: {g.before} {words[g.part]} -> {g.after}, error {g.error:.5f}" for g in self.groups]
        total = f"{self.parameters_before / 1e6:.2f} M parameters -> {self.parameters_after / 1e6:.2f} M"
        return "\n".join([*rows, total])


class Structured(Method[StructuredConfig]):
    config_type = StructuredConfig
    reshapes, packs_after = True, True

    @property
    def needs(self) -> Needs:
        return Needs(whole_model="all blocks get one width, which stands in config.json")

    def reshape(
        self, model: nn.Module, tokenizer: Any, text: str, batches: Sequence[Any]
    ) -> tuple[Any, StructuredReport]:
        return tokenizer, prune_structured(model, self.config, batches)


def prune_structured(model: Any, config: StructuredConfig, calibration: Any) -> StructuredReport:
    """Take channels out of the MLPs of a dense transformers model, or heads out of its attention, in place, block after block.

    Args:
        calibration: batches, as for `pyllmq.compress`.

    Raises:
        ValueError: a packed model, a part that was not found, or is of several widths, or whose new size the config cannot say. The
            model is then as it was.
    """
    if packed := packed_modules(model):
        raise ValueError(f"{packed[0][0]} is packed already; prune the dense model, then compress that")
    batches = as_batches(calibration, model)
    before = {name: (parameter, parameter.data) for name, parameter in model.named_parameters()}
    report = StructuredReport(sum(parameter.numel() for parameter in model.parameters()))
    linears = select_linears(model)
    try:
        with quiet_eval(model), torch.no_grad(), within_positions(model, batches):
            loop = BlockLoop(model, batches[0], batches)
            run = CalibrationRun(loop, covariance=True)
            chains = loop.find_chains(find_stages(model, linears, outside=False))
            cuts: list[Callable[[], None]] = []
            fitting: dict[tuple[int, int], tuple[int, dict[str, int]]] = {}

            def visit(stage: Stage, forward: Callable[[int], Any]) -> None:
                mlps, attentions = _parts_of(stage, forward)
                # Attention runs before the MLP, whose inputs see what became of it.
                for attention in attentions if "heads" in config.parts else ():
                    reader = attention.reader
                    ((inputs),) = input_statistics(run, [{reader: stage.linears[reader]}], set(), forward)
                    size = len(attention.inputs), len(attention.inputs[0])
                    if size not in fitting:
                        fitting[size] = _heads_that_fit(model, linears, attention, config.keep)
                    done, cut = _thin(stage.linears, attention, fitting[size][0], inputs, config)
                    report.groups.append(done)
                    cuts.append(cut)
                for reader, writers in mlps.items() if "mlp" in config.parts else ():
                    ((inputs),) = input_statistics(run, [{reader: stage.linears[reader]}], set(), forward)
                    report.groups.append(_narrow(stage.linears, reader, writers, inputs, config))

            for i, chain in enumerate(chains):
                loop.walk(chain, visit, hand_on=i + 1 < len(chains))
        found = {group.part for group in report.groups}
        if missing := [part for part in config.parts if part not in found]:
            what = {
                "mlp": "no MLP was found in {}: no Linear of a block reads channels that others write one by one",
                "heads": "no heads were found in {}: no Linear of a block reads several of one size, each with outputs of its own",
            }
            raise ValueError(what[missing[0]].format(type(model).__name__))
        for cut in cuts:
            cut()
        _say_sizes(model, report.groups, next((fields for _, fields in fitting.values()), {}))
    except BaseException:
        for parameter, data in before.values():
            parameter.data = data
        _follow_weights(linears)
        raise
    report.parameters_after = sum(parameter.numel() for parameter in model.parameters())
    return report


# ---- which Linears form an MLP, or an attention -----------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Heads, in groups that share keys and values: all of one group go or stay."""

    reader: str
    """The Linear behind the heads."""
    inputs: list[Tensor]
    """For each group its inputs of the reader, int64."""
    outputs: dict[str, list[Tensor]]
    """Linear -> for each group its outputs, int64: queries, keys, values."""
    head: int
    """Inputs of the reader in a head."""


def _parts_of(stage: Stage, forward: Callable[[int], Any]) -> tuple[dict[str, tuple[str, ...]], list[Attention]]:
    """(the Linear that reads -> those that write, for each MLP of a block; its attentions)."""
    inputs, outputs = _graph(stage, forward)
    mlps: dict[str, tuple[str, ...]] = {}
    attentions = []
    for reader, x in inputs.items():
        if not x.requires_grad:
            continue
        width = x.shape[-1]
        writers: dict[str, None] = {}
        for channel in range(0, width, max(1, width // PROBED)):
            reached = _reached(x, channel, outputs)
            alone = all(outputs[n].shape[-1] == width and rows.tolist() == [channel] for n, rows in reached.items())
            if not alone:
                break
            writers |= dict.fromkeys(reached)
        else:
            if writers:
                mlps[reader] = tuple(writers)
            continue
        attention = _heads(reader, x, outputs)
        if attention is not None:
            attentions.append(attention)
    return mlps, attentions


def _graph(stage: Stage, forward: Callable[[int], Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Linear -> its input, and its output; gradients of the former end at the nearest of the latter."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def see(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0]
            # Noise, so that gradients come through heads and channels that are always 0.
            noise = torch.randn(output.shape, generator=generator).to(output)
            outputs[name] = (noise * NOISE).requires_grad_()
            return outputs[name]

        return hook

    with hooked(module.register_forward_hook(see(name)) for name, module in stage.linears.items()), torch.enable_grad():
        forward(0)
    return inputs, outputs


def _reached(x: Tensor, channels: int | slice, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear -> its outputs, int64, on which these channels of an input depend; Linears of which there are none are left out."""
    weights = torch.randn(x[..., channels].shape, generator=torch.Generator().manual_seed(1)).to(x)
    with torch.enable_grad():
        total = (x[..., channels] * weights).sum()
    gradients = torch.autograd.grad(total, list(outputs.values()), retain_graph=True, allow_unused=True)
    found = {
        name: g.flatten(0, -2).abs().amax(0).nonzero().flatten()
        for name, g in zip(outputs, gradients, strict=True)
        if g is not None
    }
    return {name: rows for name, rows in found.items() if len(rows)}


def _heads(reader: str, x: Tensor, outputs: Mapping[str, Tensor]) -> Attention | None:
    """The heads that a Linear reads; None where what it reads is no row of heads of one size."""
    width = x.shape[-1]
    first = _places(_reached(x, 0, outputs))
    for head in (size for size in range(2, width) if width % size == 0):
        # A further channel of the same head depends on one value more; one of the next head on all queries of that.
        if len(_places(_reached(x, head, outputs)) - first) > 1:
            break
    else:
        return None
    groups: list[tuple[list[int], set[tuple[str, int]]]] = []
    for at in range(0, width, head):
        places = _places(_reached(x, slice(at, at + head), outputs))
        mine = next((group for group in groups if group[1] & places), None)
        if mine is None:
            groups.append((list(range(at, at + head)), places))
        else:
            mine[0].extend(range(at, at + head))
            mine[1].update(places)
    whole = {(name, row) for name, _ in groups[0][1] for row in range(outputs[name].shape[-1])}
    sizes = {(len(channels), len(places)) for channels, places in groups}
    if len(groups) < 2 or len(sizes) != 1 or set().union(*(places for _, places in groups)) != whole:
        return None
    writers = dict.fromkeys(name for name in outputs if any(name == other for other, _ in groups[0][1]))
    rows = {n: [torch.tensor(sorted(row for o, row in places if o == n)) for _, places in groups] for n in writers}
    return Attention(reader, [torch.tensor(channels) for channels, _ in groups], rows, head)


def _places(reached: Mapping[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, row) for name, rows in reached.items() for row in rows.tolist()}


# ---- one of them --------------------------------------------------------------------------------------------------------


def kept_channels(weight: Tensor, inverse: Tensor, count: int) -> Tensor:
    """The `count` inputs of a Linear that stay, int64 rising, by removing one after the other.

    Args:
        weight: float64 [N, K]. Written on.
        inverse: float64 [K, K], of the damped covariance. Written on.
    """
    gone = torch.zeros(weight.shape[1], dtype=torch.bool)
    for _ in range(weight.shape[1] - count):
        cost = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-300)
        cost[gone] = torch.inf
        j = int(cost.argmin())
        gone[j] = True
        row = inverse[j] / inverse[j, j]
        weight.addr_(weight[:, j].clone(), row, alpha=-1)
        inverse.addr_(inverse[:, j].clone(), row, alpha=-1)
        weight[:, j], inverse[j], inverse[:, j] = 0, 0, 0
    return (~gone).nonzero().flatten()


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


def _narrow(
    linears: Mapping[str, nn.Module],
    reader: str,
    writers: Sequence[str],
    inputs: InputStatistics,
    config: StructuredConfig,
) -> ChannelReport:
    """Cut an MLP to its best channels, and solve the reader for them."""
    module = linears[reader]
    known = _Reader.of(module, inputs, config.damping)
    width = len(known.covariance)
    count = max(1, round(config.keep * width / config.multiple)) * config.multiple
    if count >= width:
        return ChannelReport(reader, tuple(writers), width, width, 0.0)
    kept = kept_channels(known.weight.clone(), torch.linalg.inv(known.damped), count)
    found, error = known.solve(module, kept)
    _put(module, found)
    for name in writers:
        _cut_outputs(linears[name], kept)
    _follow_weights({name: linears[name] for name in (reader, *writers)})
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
        _follow_weights({name: linears[name] for name in (attention.reader, *writers)})

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


def _follow_weights(linears: Mapping[str, nn.Module]) -> None:
    for module in linears.values():
        n, k = dense_weight(module).shape
        if is_transposed_linear(module):
            module.nf, module.nx = n, k  # type: ignore[assignment]
        else:
            module.out_features, module.in_features = n, k  # type: ignore[assignment]


# ---- the config ---------------------------------------------------------------------------------------------------------


def _heads_that_fit(
    model: Any, linears: Mapping[str, nn.Module], attention: Attention, keep: float
) -> tuple[int, dict[str, int]]:
    """(of the numbers of groups that a config can say that nearest to the share `keep`, its settings).

    Raises ValueError if it can say none.
    """
    total, group = len(attention.inputs), len(attention.inputs[0])
    if keep == 1:
        return total, {}
    own = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    others = {name: tensor.shape for name, tensor in model.named_parameters() if name not in own}
    for count in sorted(range(1, total), key=lambda n: (abs(n - keep * total), -n)):
        wanted = dict(others)
        for name in (attention.reader, *attention.outputs):
            n, k = dense_weight(linears[name]).shape
            cut = (n, k * count // total) if name == attention.reader else (n * count // total, k)
            wanted[f"{name}.weight"] = torch.Size(cut[::-1] if is_transposed_linear(linears[name]) else cut)
        for fields in _head_fields(model.config, attention.head, count, count * group // attention.head):
            built = _built_shapes(model, fields)
            if all(built.get(name) == shape for name, shape in wanted.items()):
                nearer = abs(count - keep * total) < total - keep * total
                return (count, fields) if nearer else (total, {})
    raise ValueError(
        f"no setting of {type(model.config).__name__} says that {attention.reader} reads about {keep * total:.3g} of its {total} "
        f"groups of heads of {attention.head} channels, so transformers could not load the result (BERT, GPT-2 and Whisper take "
        "the size of a head from the hidden size, T5 has a position bias for each); leave 'heads' out of parts"
    )


def _head_fields(config: Any, head: int, count: int, queries: int) -> list[dict[str, int]]:
    """Settings that may say that `count` groups with `queries` heads in all are left."""
    found = []
    for names in HEADS:
        if all(hasattr(config, name) for name in names):
            fields = dict.fromkeys(names, queries)
            fields |= {name: count for name in KEY_HEADS if getattr(config, name, None) is not None}
            found += [fields, fields | {"head_dim": head}]
    return found


def _mlp_fields(config: Any, before: int, after: int) -> list[dict[str, int]]:
    # n_inner of GPT-2 is None, for four times the hidden size.
    named = [name for name in WIDTHS if hasattr(config, name) and getattr(config, name) in (before, None)]
    return [dict.fromkeys(named, after), *({name: after} for name in named)]


def _built_shapes(model: Any, fields: Mapping[str, int]) -> dict[str, torch.Size]:
    """Of the parameters of the model that transformers builds from a config with these fields; nothing if it takes none."""
    from huggingface_hub.errors import StrictDataclassError

    config = copy.deepcopy(model.config)
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        config = type(config).from_dict(config.to_dict())  # as it would be loaded
        with torch.device("meta"):
            built = type(model)(config)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, ZeroDivisionError):
        return {}
    return {name: tensor.shape for name, tensor in built.named_parameters()}


def _say_sizes(model: Any, groups: Sequence[ChannelReport], heads: Mapping[str, int]) -> None:
    """Set those fields of the config by which transformers builds a model of these shapes; they are found by trying."""
    for part, what in (("mlp", "MLPs"), ("heads", "attentions")):
        sizes = {(group.before, group.after) for group in groups if group.part == part}
        if len(sizes) > 1:
            listed = ", ".join(str(before) for before, _ in sorted(sizes))
            raise ValueError(
                f"the {what} of {type(model).__name__} are {listed} wide; a config says one width, so they stay as they are"
            )
    ways: list[dict[str, int]] = [{}]
    said = [f"that there are {heads}"] if heads else []
    for before, after in {(g.before, g.after) for g in groups if g.part == "mlp" and g.before != g.after}:
        ways = _mlp_fields(model.config, before, after)
        said.append(f"that the MLPs are {after} wide")
    if not said:
        return
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    for way in ways:
        fields = {**way, **heads}
        if _built_shapes(model, fields) == shapes:
            _follow_config(model, fields)
            return
    tried = dict.fromkeys(name for way in ways for name in way)
    raise ValueError(
        f"no setting of {type(model.config).__name__} says {' and '.join(said)} (tried: {', '.join(tried) or 'none'}), "
        "so transformers could not load the result; nothing was changed"
    )


def _follow_config(model: Any, fields: Mapping[str, int]) -> None:
    """Set these fields, and the numbers that modules keep of them (heads, groups) as transformers sets them."""
    own = {id(each): each for module in model.modules() if (each := getattr(module, "config", None)) is not None}
    for config in own.values():
        for name, value in fields.items():
            if config is model.config or hasattr(config, name):  # T5's encoder has a copy
                setattr(config, name, value)
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
    for module, new in zip(model.modules(), built.modules(), strict=True):
        for name, value in vars(new).items():
            if type(value) is int and type(vars(module).get(name)) is int:
                setattr(module, name, value)

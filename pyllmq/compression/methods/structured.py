"""Structured pruning: whole channels of the MLPs go, and what reads them is solved again by least squares.

Channels are found by gradients, so no architecture is named: a Linear reads one where a channel of its input depends on the same
channel of other Linears' outputs, and on nothing else. What goes is chosen as in optimal brain surgery (ZipLM, arXiv 2302.04089;
SlimGPT, 2412.18110): with H the covariance of the input, dropping channel j costs

    |W_:j|^2 / (H^-1)_jj

once the other channels make up for it. They do so at once, so the next choice sees it; at the end the reading Linear is the least
squares solution on the channels that stay, and its bias takes up the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...config import Between, MethodConfig
from ...layers.linear import packed_modules
from ...linears import dense_weight, is_transposed_linear, select_linears
from ..calibration import as_batches, batches_of_text, within_positions
from ..model_state import hooked, quiet_eval
from ..statistics.blocks import BlockLoop, Stage, find_stages
from ..statistics.inputs import InputStatistics, input_statistics
from ..statistics.run import CalibrationRun
from .method import Method, Needs

PROBED = 8
"""Channels by which a Linear is told."""
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
    """Fewer MLP channels, the same in every block; the result is a dense model."""

    keep: Annotated[float, Between(0.1, 1)] = 0.75
    """Share of the MLP channels that stays, 0.1 to 1."""
    multiple: Annotated[int, Between(1)] = 32
    """The width is a multiple of it."""
    damping: Annotated[float, Between(0, 1)] = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal."""


@dataclass(frozen=True)
class ChannelReport:
    """One MLP."""

    reader: str
    """The Linear that reads the channels."""
    writers: tuple[str, ...]
    before: int
    after: int
    error: float
    """Squared error of the reader's output relative to the squared output, both without their means where it has a bias."""


@dataclass
class StructuredReport:
    """What `prune_structured` did."""

    parameters_before: int
    parameters_after: int = 0
    groups: list[ChannelReport] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"{g.reader}: {g.before} channels -> {g.after}, error {g.error:.5f}" for g in self.groups]
        total = f"{self.parameters_before / 1e6:.2f} M parameters -> {self.parameters_after / 1e6:.2f} M"
        return "\n".join([*rows, total])


class Structured(Method[StructuredConfig]):
    config_type = StructuredConfig
    reshapes = True

    @property
    def needs(self) -> Needs:
        return Needs(whole_model="all blocks get one width, which stands in config.json")

    def reshape(
        self, model: nn.Module, tokenizer: Any, text: str, samples: int, seqlen: int
    ) -> tuple[Any, StructuredReport]:
        batches = batches_of_text(model, tokenizer, text, samples, seqlen)
        return tokenizer, prune_structured(model, self.config, batches)


def prune_structured(model: Any, config: StructuredConfig, calibration: Any) -> StructuredReport:
    """Make the MLPs of a dense transformers model narrower, in place, block after block.

    Args:
        calibration: batches, as for `pyllmq.compress`.

    Raises:
        ValueError: a packed model, no MLP found, MLPs of several widths, a model whose config cannot say the new width. The model
            is then as it was.
    """
    if packed := packed_modules(model):
        raise ValueError(f"{packed[0][0]} is packed already; prune the dense model, then compress that")
    batches = as_batches(calibration)
    before = {name: (parameter, parameter.data) for name, parameter in model.named_parameters()}
    report = StructuredReport(sum(parameter.numel() for parameter in model.parameters()))
    linears = select_linears(model)
    try:
        with quiet_eval(model), torch.no_grad(), within_positions(model, batches):
            loop = BlockLoop(model, batches[0], batches)
            run = CalibrationRun(loop, covariance=True)
            chains = loop.find_chains(find_stages(model, linears, outside=False))

            def visit(stage: Stage, forward: Callable[[int], Any]) -> None:
                for reader, writers in _mlps(stage, forward):
                    ((inputs),) = input_statistics(run, [{reader: stage.linears[reader]}], set(), forward)
                    report.groups.append(_narrow(stage.linears, reader, writers, inputs, config))

            for i, chain in enumerate(chains):
                loop.walk(chain, visit, hand_on=i + 1 < len(chains))
        if not report.groups:
            raise ValueError(
                f"no MLP was found in {type(model).__name__}: no Linear of a block reads channels that others write one by one"
            )
        _say_width(model, report.groups)
    except BaseException:
        for parameter, data in before.values():
            parameter.data = data
        _follow_weights(linears)
        raise
    report.parameters_after = sum(parameter.numel() for parameter in model.parameters())
    return report


# ---- which Linears form an MLP ----------------------------------------------------------------------------------------


def _mlps(stage: Stage, forward: Callable[[int], Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(the Linear that reads, those that write) for each MLP of a block."""
    found: dict[str, tuple[str, ...]] = {}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0]
            # A leaf, so that gradients end at the nearest Linears.
            outputs[name] = output.detach().requires_grad_()
            return outputs[name]

        return hook

    with hooked(module.register_forward_hook(see(name)) for name, module in stage.linears.items()), torch.enable_grad():
        forward(0)
    for reader, x in inputs.items():
        if not x.requires_grad:
            continue
        width = x.shape[-1]
        writers: dict[str, None] = {}
        for channel in range(0, width, max(1, width // PROBED)):
            with torch.enable_grad():
                total = x[..., channel].sum()
            gradients = torch.autograd.grad(total, list(outputs.values()), retain_graph=True, allow_unused=True)
            reached = {
                name: g.flatten(0, -2).abs().amax(0)
                for name, g in zip(outputs, gradients, strict=True)
                if g is not None
            }
            reached = {name: g for name, g in reached.items() if bool((g > 0).any())}
            alone = all(g.numel() == width and g.nonzero().flatten().tolist() == [channel] for g in reached.values())
            if not alone:
                break
            writers |= dict.fromkeys(reached)  # of a ReLU that is never open nothing is seen
        else:
            if writers:
                found[reader] = tuple(writers)
    yield from found.items()


# ---- one MLP ----------------------------------------------------------------------------------------------------------


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


def _narrow(
    linears: Mapping[str, nn.Module],
    reader: str,
    writers: Sequence[str],
    inputs: InputStatistics,
    config: StructuredConfig,
) -> ChannelReport:
    """Cut an MLP to its best channels, and solve the reader for them."""
    module = linears[reader]
    weight, covariance = dense_weight(module).cpu().double(), inputs.take_hessian().cpu().double()
    mean = None if inputs.mean is None else inputs.mean.cpu().double()
    if mean is not None:
        covariance.addr_(mean, mean, alpha=-1)
    width = len(covariance)
    count = max(1, round(config.keep * width / config.multiple)) * config.multiple
    if count >= width:
        return ChannelReport(reader, tuple(writers), width, width, 0.0)
    ridge = max(config.damping, 1e-9) * float(covariance.diagonal().mean())
    damped = covariance + (ridge or 1.0) * torch.eye(width, dtype=torch.float64)
    kept = kept_channels(weight.clone(), torch.linalg.inv(damped), count)
    found = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.t()).t()
    lost = weight.clone()
    lost[:, kept] -= found
    output = float(((weight @ covariance) * weight).sum())
    error = float(((lost @ covariance) * lost).sum()) / max(output, 1e-300)
    if mean is not None:
        bias = module.bias
        assert isinstance(bias, Tensor)
        bias.data = bias.data + (lost @ mean).to(bias.data)
    _put(module, found)
    for name in writers:
        writer = linears[name]
        _put(writer, dense_weight(writer)[kept.to(dense_weight(writer).device)])
        if isinstance(writer.bias, Tensor):
            writer.bias.data = writer.bias.data[kept.to(writer.bias.device)]
    _follow_weights({name: linears[name] for name in (reader, *writers)})
    return ChannelReport(reader, tuple(writers), width, count, error)


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


def _say_width(model: Any, groups: Sequence[ChannelReport]) -> None:
    """Set those fields of the config by which transformers builds a model of these shapes; they are found by trying."""
    widths = {(group.before, group.after) for group in groups}
    if len(widths) > 1:
        said = ", ".join(str(before) for before, _ in sorted(widths))
        raise ValueError(
            f"the MLPs of {type(model).__name__} are {said} wide; a config says one width, so they stay as they are"
        )
    ((before, after),) = widths
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    # n_inner of GPT-2 is None, for four times the hidden size.
    named = [name for name in WIDTHS if hasattr(model.config, name) and getattr(model.config, name) in (before, None)]
    if after == before:
        return
    for fields in (named, *([name] for name in named)):
        config = copy.deepcopy(model.config)
        for name in fields:
            setattr(config, name, after)
        with torch.device("meta"):
            built = {name: tensor.shape for name, tensor in type(model)(config).named_parameters()}
        if built == shapes:
            for name in fields:
                setattr(model.config, name, after)
            return
    raise ValueError(
        f"no setting of {type(model.config).__name__} says that the MLPs are {after} wide (tried: {', '.join(named) or 'none'}), "
        "so transformers could not load the result; nothing was changed"
    )

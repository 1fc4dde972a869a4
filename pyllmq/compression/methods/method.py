"""What a compression method is: its settings, what it needs to know, and what it does with the Linears that share an input."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from ...config import MethodConfig, Option, options_of
from ...formats import LowRankWeight, PackedWeight
from ...packing import count_not_finite
from ..ranks import ALONE, Ranks
from ..solver.hessian import output_error
from ..statistics.blocks import Chain
from ..statistics.inputs import InputStatistics
from ..statistics.run import CalibrationRun

Settings = TypeVar("Settings", bound=MethodConfig)


@dataclass(frozen=True)
class Needs:
    """What a method asks of the job that runs it."""

    calibration: bool = True
    """Text that the model runs on. Without: `pack` tells what becomes of a weight, and a folder is compressed file by file."""
    sequential: bool = True
    """The Linears of a block are calibrated one group after the other, each on the outputs of those before."""
    covariance: bool = False
    """Hessians that are the plain mean of x x^T, with the mean of x; else they are 2/n sum x x^T."""
    dense_block: bool = False
    """Asymmetric calibration: what each dense block gives on the dense model's activations, beside the compressed one."""
    loss_gradients: str = "none"
    """Weights of "rows", "tokens" or "rows+tokens" by the gradient of the model's loss. Where it has none: all alike."""
    dense_model: bool = False
    """The dense model is kept until the end, for `finish`."""
    whole_model: str = ""
    """Why all weights have to be in memory at once; empty: block by block will do."""


@dataclass(frozen=True, eq=False)
class CompressedLinear:
    weight: PackedWeight | LowRankWeight
    error: float
    """tr(E H E^T) / tr(W H W^T) with the Hessian given, undamped; without calibration H is the identity."""
    seconds: float
    """Wall time: this Linear's sweep and packing, and its share of the factorisation."""
    paper_bits: float
    """Bits per weight as the method's paper counts them. `weight.bits_per_weight` counts everything that is stored."""
    bias_change: Tensor | None = None
    """float [N] to add to the bias, where the method moves the mean error there."""
    pruned: float = 0.0
    """Share of the weights."""


class StaysDenseError(Exception):
    """Raised by `pack`: this weight would gain nothing; the message says why."""


class Method(Generic[Settings]):
    """A compression method in one job. Subclass it, name the `config_type`, and `register` it under its word.

    Of the methods below, one that needs calibration defines `compress_group`, another one `pack`; the others have defaults.
    """

    config_type: ClassVar[type[MethodConfig]]
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What the command line takes for settings that have no default."""
    true_bits: ClassVar[bool] = False
    """`config.bits` counts everything stored, so that the command line can choose it by `--size`."""
    outside_blocks: ClassVar[bool] = False
    """Linears outside the repeated blocks are packed too, and those with a tied weight stay dense."""
    reshapes: ClassVar[bool] = False
    """It makes a smaller dense model and packs nothing: `reshape` is all that it defines."""
    packs_after: ClassVar[bool] = False
    """The command packs what it leaves, with --bits or --pattern."""
    nothing_packed: ClassVar[str] = "can be packed"
    """Ends the sentence "none of 14 Linears", where all stay dense."""

    def __init__(self, config: Settings) -> None:
        self.config = config
        self.plan: dict[str, Any] = {}
        """What `make_plan` found: kept by the job, which a resumed one reads."""
        self.carried: dict[str, Any] = {}
        """What a group hands on to those after it, in the form of JSON: kept with every finished block."""

    @classmethod
    def options(cls) -> list[Option]:
        """Of the command line: the fields of the config."""
        return options_of(cls.config_type, defaults=cls.defaults)

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> MethodConfig:
        """The config that options of the command line ask for, by field."""
        return cls.config_type(**{**cls.defaults, **given})

    def without_effect(self) -> dict[str, str]:
        """Fields that change nothing beside the other settings -> why; the command line refuses them."""
        return {}

    @property
    def name(self) -> str:
        """In reports: the word by which it is registered."""
        return next(word for word, registered in METHODS.items() if registered.method is type(self))

    @property
    def needs(self) -> Needs:
        return Needs()

    def summary(self) -> str:
        """What is aimed at, in a few words, such as "3 bits"."""
        return self.name

    def planned_bytes(self) -> int | None:
        """Bytes of all packed weights by the plan; None: the method does not aim at a size."""
        return None

    def make_plan(
        self, linears: Mapping[str, nn.Module], chains: Sequence[Chain] = (), run: CalibrationRun | None = None
    ) -> dict[str, Any]:
        """What is decided before the first block, in the form of JSON.

        Args:
            linears: name -> those that will be compressed.
            chains, run: of the calibration; without a run, in a dry run, what can be said without looking at data.
        """
        return {}

    def compress_group(
        self, weights: Mapping[str, Tensor], inputs: InputStatistics, run: CalibrationRun
    ) -> dict[str, CompressedLinear]:
        """Compress Linears that share one input, shared out among `run.ranks`; those that are not in the result stay dense.

        Args:
            weights: name -> [N_i, K], in the dtype of the model; not to be changed.
            inputs: statistics of the input, the method's to use up.
        """
        mine = run.ranks.mine(weights)
        return run.ranks.merge(
            {name: self.compress_weight(name, weight, inputs.hessian) for name, weight in mine.items()}, list(weights)
        )

    def compress_experts(
        self, experts: Sequence[tuple[Mapping[str, Tensor], InputStatistics]], run: CalibrationRun
    ) -> dict[str, CompressedLinear]:
        """`compress_group` for Linears of which none is another's input, each in the process that has its statistics."""
        alone = replace(run, ranks=ALONE)
        return each_in_its_rank(experts, run.ranks, lambda weights, inputs: self.compress_group(weights, inputs, alone))

    def reshape(self, model: nn.Module, tokenizer: Any, text: str, batches: Sequence[Any]) -> tuple[Any, Any]:
        """Make the model smaller, in place; gives the tokenizer that goes with it, and a report.

        Args:
            text: what --calibration names, of a method without calibration.
            batches: of one that `needs` it.
        """
        raise NotImplementedError(f"{type(self).__name__} packs layers")

    def pack(self, weight: Tensor) -> PackedWeight:
        """Pack a weight [N, K] by itself. Raises StaysDenseError where that gains nothing."""
        raise NotImplementedError(f"{type(self).__name__} needs calibration data, so it must define compress_group")

    def paper_bits(self, packed: PackedWeight, pruned: float) -> float:
        """Of a weight that `pack` packed."""
        return packed.bits_per_weight

    def compress_weight(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> CompressedLinear:
        """What `pack` makes of a weight, with its error; that of the weights themselves without a Hessian."""
        started = time.perf_counter()
        if bad := count_not_finite(weight):
            raise ValueError(f"{name}.weight: {bad} values are not finite; repair the model before packing it")
        try:
            packed = self.pack(weight)
        except ValueError as refusal:
            raise ValueError(f"{name}.weight: {refusal}") from refusal
        found = packed.dequantize()
        # Codebooks have a value at 0 by chance.
        pruned = float((found == 0).double().mean()) if packed.structure.kind != "codebook" else 0.0
        if hessian is None:
            dense = weight.float()
            output = float(dense.double().square().sum())
            error = float((found - dense).double().square().sum()) / max(output, 1e-300)
        else:
            error = output_error(weight, found, hessian)
        seconds = time.perf_counter() - started
        return CompressedLinear(packed, error, seconds, self.paper_bits(packed, pruned), pruned=pruned)

    def finish(self, model: nn.Module, dense: nn.Module, text: Sequence[Any], progress: bool) -> list[float]:
        """Called with the compressed and the dense model, where `needs.dense_model`; gives the losses of its steps."""
        return []


def each_in_its_rank(
    experts: Sequence[tuple[Mapping[str, Tensor], InputStatistics]],
    ranks: Ranks,
    compress: Callable[[Mapping[str, Tensor], InputStatistics], Mapping[str, CompressedLinear]],
) -> dict[str, CompressedLinear]:
    """What `compress` makes of all, in all processes, in the order given. An error in one is raised in all."""
    mine: dict[str, CompressedLinear] = {}
    failure: Exception | None = None
    try:
        for weights, inputs in experts:
            if not inputs.of_other_rank:
                mine |= compress(weights, inputs)
    except Exception as error:
        failure = error
    found: dict[str, CompressedLinear] = {}
    for part, failed in ranks.gather((mine, failure)):
        if failed is not None:
            raise failed
        found |= part
    return {name: found[name] for weights, _ in experts for name in weights if name in found}


# ---- the registry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registered:
    """A word of the command line: a method, and the settings that the word fixes."""

    method: type[Method[Any]]
    fixed: Mapping[str, Any]

    def options(self) -> list[Option]:
        return [option for option in self.method.options() if option.field not in self.fixed]

    def config(self, given: Mapping[str, Any]) -> MethodConfig:
        """Of the options that were given, by field. Raises ValueError for one that has no effect beside the others."""
        config = self.method.from_options({**self.fixed, **given})
        for field, why in self.method(config).without_effect().items():
            if field in given:
                word = next(option.word for option in self.options() if option.field == field)
                raise ValueError(f"{word} has no effect with these settings: {why}; leave it out")
        return config


METHODS: dict[str, Registered] = {}
"""By the word that follows `--method`."""


def register(word: str, method: type[Method[Any]], /, **fixed: Any) -> None:
    """Make a method known to `compress` and to the command line. Raises ValueError if the word is another method's."""
    if word in METHODS and METHODS[word].method is not method:
        raise ValueError(
            f"the method {word!r} is {METHODS[word].method.__name__}; register {method.__name__} by another word"
        )
    METHODS[word] = Registered(method, fixed)


def method_of(config: Any) -> Method[Any]:
    """The method to which a config belongs, for one job. Raises ValueError if no method is registered for it."""
    for registered in METHODS.values():
        if type(config) is registered.method.config_type:
            return registered.method(config)
    known = dict.fromkeys(registered.method.config_type.__name__ for registered in METHODS.values())
    raise ValueError(
        f"config is {config!r}, for which no method is registered; allowed: {', '.join(known)}, or a config of your own whose "
        "method was given to pyllmq.compression.methods.register"
    )

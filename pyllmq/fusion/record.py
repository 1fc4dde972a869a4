"""What a model does for a few tokens, recorded on a shadow of it: every module call and every operation, with values.

The shadow is a copy in fp32 whose Linears return random numbers and whose large tensors have no memory of their own: recording
reads no weights and takes as long for 70 B parameters as for none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..integrations.transformers_internals import MARKER, attention_marker
from ..layers.linear import PackedLinear
from ..linears import dense_weight, is_transposed_linear
from .attention_functions import recording_cache

SEQUENCES, PROMPT, TOKENS = 2, 5, 2
_LARGE = 1 << 16
"""Elements. Above it a parameter of the shadow is one random row, seen everywhere."""


class NotRecordedError(Exception):
    """The model does not run on token ids alone; the message says why."""


@dataclass(eq=False)
class Call:
    """A call of a module, or with module None of the attention function or of the cache."""

    name: str
    module: nn.Module | None
    arguments: dict[str, Any]
    """By name; of the attention function also `query`, `key`, `value`, `module`."""
    start: int
    """Operations and calls are numbered as they come."""
    stop: int = 0
    output: Any = None

    @property
    def x(self) -> Tensor:
        """The first tensor that goes in."""
        return next(a for a in self.arguments.values() if isinstance(a, Tensor))

    @property
    def y(self) -> Tensor:
        """The first tensor that comes out."""
        return next(t for t in tree_leaves(self.output) if isinstance(t, Tensor))


@dataclass(eq=False)
class Record:
    calls: list[Call] = field(default_factory=list)
    operations: list[tuple[int, str]] = field(default_factory=list)
    parents: dict[int, list[int]] = field(default_factory=dict)
    """Memory of a tensor -> memory of the tensors that it was computed from."""
    born: dict[int, int] = field(default_factory=dict)
    clock: int = 0
    keep: list[Any] = field(default_factory=list)
    """Everything seen: no address is used twice."""

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def inside(self, call: Call) -> list[Call]:
        return [c for c in self.calls if call.start < c.start and c.stop < call.stop]

    def operations_of(self, call: Call, without: list[Call]) -> set[str]:
        """Names of the operations in `call`, but for those in the calls `without`."""
        return {
            name
            for time, name in self.operations
            if call.start < time < call.stop and not any(c.start < time < c.stop for c in without)
        }

    def comes_from(self, tensor: Tensor, sources: list[Tensor], since: int) -> bool:
        """Was it computed from `sources`, parameters and constants alone, of all tensors that were there at time `since`?"""
        allowed, seen, open_ = {_memory(t) for t in sources}, set(), [_memory(tensor)]
        while open_:
            memory = open_.pop()
            if memory in seen or memory in allowed:
                continue
            if memory in self.born and self.born[memory] < since:
                return False
            seen.add(memory)
            open_ += self.parents.get(memory, [])
        return True


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Operations(TorchDispatchMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        record, now = self.record, self.record.tick()
        record.operations.append((now, func.name().split("::")[1].split(".")[0]))
        sources = [_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        record.keep.append((args, kwargs, out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                memory = _memory(tensor)
                record.born.setdefault(memory, now)
                record.parents.setdefault(memory, []).extend(s for s in sources if s != memory)
        return out


class _AnyLinear(nn.Module):
    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(0))  # some models ask for its dtype

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(*x.shape[:-1], self.out_features, dtype=x.dtype)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | PackedLinear) or is_transposed_linear(module)


def _out_features(linear: nn.Module) -> int:
    return linear.out_features if isinstance(linear, nn.Linear | PackedLinear) else dense_weight(linear).shape[0]


def _shadow(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        if is_linear(module):
            memo[id(module)] = _AnyLinear(_out_features(module))
    for parameter in model.parameters():
        if parameter.numel() > _LARGE:
            row = torch.randn(parameter.shape[-1:]).expand(parameter.shape)
            memo[id(parameter)] = nn.Parameter(row, requires_grad=False)
    quantizer = getattr(model, "hf_quantizer", None)
    memo[id(quantizer)] = quantizer
    shadow = nn.Module.float(copy.deepcopy(model, memo)).eval()  # a PreTrainedModel's own float() refuses packed ones
    for module in shadow.modules():
        module.__dict__.pop("forward", None)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(module, hooks).clear()
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = MARKER
            config._experts_implementation = "eager"  # the grouped product takes no weights without memory
    return shadow


@contextmanager
def _calls(shadow: nn.Module, model: nn.Module, record: Record) -> Iterator[None]:
    """Every call of a module of the shadow, noted under the module of the model that it stands for."""
    open_: list[Call] = []

    def enter(name: str, real: nn.Module, names: list[str], args: Any, kwargs: Any) -> None:
        open_.append(Call(name, real, dict(zip(names, args, strict=False)) | kwargs, record.tick()))
        record.calls.append(open_[-1])

    def leave(output: Any) -> None:
        call = open_.pop()
        call.output, call.stop = output, record.tick()

    handles = []
    for (name, stand_in), real in zip(shadow.named_modules(), model.modules(), strict=True):
        names = list(inspect.signature(real.forward).parameters)
        handles += [
            stand_in.register_forward_pre_hook(
                lambda _, args, kwargs, name=name, real=real, names=names: enter(name, real, names, args, kwargs),
                with_kwargs=True,
            ),
            stand_in.register_forward_hook(lambda _, args, output: leave(output)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encodes(model: nn.Module) -> bool:
    """Is none of its attention causal? Models of BERT's kind take a cache, too, and as encoders do not fill it."""
    return {module.is_causal for module in model.modules() if hasattr(module, "is_causal")} == {False}


def record_model(model: nn.Module) -> Record:
    """A few tokens through the model, in its cache a few more before them."""
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids":
        raise NotRecordedError(f"its input is {main}, not input_ids")
    record = Record()

    def note(name: str, arguments: dict[str, Any], output: Any = None) -> None:
        now = record.tick()
        record.calls.append(Call(name, None, arguments, now, now, output))

    ids = torch.ones(SEQUENCES, PROMPT + TOKENS, dtype=torch.long)
    with torch.no_grad(), attention_marker(note):
        try:
            shadow = _shadow(model)
            inputs: dict[str, Any] = {"input_ids": ids}
            takes = inspect.signature(shadow.forward).parameters
            if getattr(shadow.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = ids
            elif "past_key_values" in takes and not _encodes(shadow):
                cache = recording_cache(shadow.config, note)
                shadow(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True)
                inputs = {"input_ids": ids[:, PROMPT:], "past_key_values": cache, "use_cache": True}
                record.calls.clear()
            elif "attention_mask" in takes:
                inputs["attention_mask"] = torch.ones_like(ids)
                inputs["attention_mask"][-1, -1] = 0  # padding: without any there would be no mask
            with _calls(shadow, model, record), _Operations(record):
                shadow(**inputs)
        except Exception as error:  # whatever a model of any kind may raise: it stays as it is
            raise NotRecordedError(f"it does not run on token ids alone ({type(error).__name__}: {error})") from error
    return record

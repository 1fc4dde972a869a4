"""A fused module: its `forward` for a few tokens is one or two native steps, for everything else what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..backends import cpu
from ..nn import PackedLinear
from . import native
from .cache import GrowingLayer, growing_layer
from .grammar import Arguments, Fitting
from .steps import Rotary
from .transformers_names import attention_implementation, collects

MOST_QUERIES, MOST_SEQUENCES = 8, 8
"""Of a call that is made as native steps. More tokens are a prompt: there torch's attention and the packed layers' own calls
for many tokens are faster."""

_WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "y": lambda y: y,
    "(y,)": lambda y: (y,),
    "(y, None)": lambda y: (y, None),
}
_SAME_TOKENS = 4
"""Kinds of layers in a model at most, by their rotary positions and masks (two in Gemma 3); each prepares its own at a token."""


class Shared:
    """What the fused modules of one model prepare once for each token."""

    def __init__(self, fuse_again: Callable[[], None]) -> None:
        self.fuse_again = fuse_again
        self.tokens: list[tuple[tuple[Any, ...], native.Tokens]] = []

    def tokens_of(self, x: Tensor, cos: Any, sin: Any, mask: Any, rotary: Rotary) -> native.Tokens:
        for (dtype, shape, *tensors, same_rotary), tokens in self.tokens:
            if (
                tensors[0] is cos
                and tensors[1] is sin
                and tensors[2] is mask
                and dtype is x.dtype
                and shape == x.shape
                and same_rotary is rotary
            ):
                return tokens
        made = native.make_tokens(x, cos, sin, mask, rotary)
        key = (x.dtype, x.shape, cos, sin, mask, rotary)  # holds the tensors: an identity is not used twice
        self.tokens = [(key, made), *self.tokens[: _SAME_TOKENS - 1]]
        return made


class FusedModule:
    """Stands in a module's place as its `forward`. The module itself, its parameters and its inner modules stay as they are."""

    def __init__(self, fitting: Fitting, shared: Shared) -> None:
        self.module = fitting.module
        self.own_forward = fitting.module.forward
        self.arguments: Arguments = fitting.arguments
        self.wrap = _WRAPS[fitting.wraps]
        self.shared = shared
        self.implementation = attention_implementation(fitting.asks)
        self.config = getattr(fitting.asks, "config", None)
        self.inner = [m for m in fitting.module.modules() if m is not fitting.module]
        self.places = [
            (parent._modules, name, child)
            for parent in fitting.module.modules()
            for name, child in parent._modules.items()
        ]
        self.packed = [m for m in self.inner if isinstance(m, PackedLinear)]
        self.bind(fitting)

    def bind(self, fitting: Fitting) -> None:
        """Make the native steps for the weights as they are now."""
        self.attention = None if fitting.attention is None else native.Attention(fitting.attention)
        self.mlp = None if fitting.mlp is None else native.Mlp(fitting.mlp)
        self.rotary = Rotary() if fitting.attention is None else fitting.attention.rotary
        self.residual = fitting.attention is not None and fitting.mlp is not None
        self.weights = list(self._weights())

    def install(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        if self.module.__dict__.get("forward") == self.forward:
            del self.module.forward
        else:  # somebody wrapped it, and goes on calling it
            self.forward = self.own_forward  # type: ignore[method-assign]

    def __reduce__(self) -> Any:
        """Copies and pickles of a model are not fused."""
        return _NotFused, (self.module,)

    # ---- a call -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs if not args else dict(zip(self.arguments.order, args, strict=False)) | kwargs
        y = None if torch.compiler.is_compiling() else self.served(**given)
        return self.own_forward(*args, **kwargs) if y is None else y

    def served(self, **given: Any) -> Any:
        """The module's output, or None where its own forward has to make it."""
        names = self.arguments
        layer: Any = None if names.cache is None else growing_layer(given.get(names.cache), names.cache_layer)
        x: Any = given.get(names.x)
        if not _is_few(x) or not self._is_usual(given):
            return None
        cos = sin = mask = None
        if self.attention is not None:
            mask = given.get(names.mask or "")
            if names.positions is not None:
                cos, sin = given[names.positions]
            if layer is None or not _reaches(layer, x, mask) or not _positions_fit(x, cos):
                return None
        if not self._is_current():
            self.shared.fuse_again()
            return self.module(**given)
        tokens = self.shared.tokens_of(x, cos, sin, mask, self.rotary)
        cpu.kernels()  # as many threads as torch has
        x = x.contiguous()
        y = torch.empty_like(x)
        if self.attention is not None:
            self.attention(x, y, tokens, layer, self.residual)
        if self.mlp is not None:
            self.mlp(y if self.residual else x, y, tokens, self.residual)
        return self.wrap(y)

    def _is_usual(self, given: dict[str, Any]) -> bool:
        """Nobody watches what happens inside, asks for gradients or for anything that was not recorded."""
        if torch.is_grad_enabled() or self.module.training:
            return False
        if (
            torch.is_autocast_enabled("cpu")
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
        ):
            return False
        if self.config is not None and self.config._attn_implementation != self.implementation:
            return False
        names = self.arguments
        for name, value in given.items():
            if name in names.used or name in names.without_effect:
                continue
            recorded = names.flags.get(name)
            if value is not recorded and (value or recorded):
                return False
        return all(modules.get(name) is child for modules, name, child in self.places) and not self.watched()

    def watched(self) -> str:
        """The kind of the first inner module whose call somebody sees or replaces; a step makes no such call."""
        for inner in self.inner:
            state = inner.__dict__
            if (
                "forward" in state
                or state["_forward_pre_hooks"]
                or (state["_forward_hooks"] and collects(state["_forward_hooks"]))
            ):
                return type(inner).__name__
        return ""

    def _weights(self) -> Iterator[tuple[Any, ...]]:
        for layer in self.packed:
            yield layer, layer.operand(), layer.precision
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module._parameters, name, parameter, parameter.data_ptr(), _version(parameter)

    def _is_current(self) -> bool:
        """Are the weights those that the steps were made for?"""
        for seen in self.weights:
            if len(seen) == 3:
                layer, operand, precision = seen
                if layer.operand() is not operand or layer.precision != precision:
                    return False
            else:
                parameters, name, parameter, pointer, version = seen
                if (
                    parameters.get(name) is not parameter
                    or parameter.data_ptr() != pointer
                    or _version(parameter) != version
                ):
                    return False
        return True


class _NotFused:
    """What a copy of a fused module has as `forward`: that of its class."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _reaches(layer: GrowingLayer, x: Tensor, mask: Any) -> bool:
    """Can a step attend to this layer, for these tokens, as the mask says?"""
    keys, values = layer.grown
    batch, queries, _ = x.shape
    held = keys.view()
    if (
        held is None
        or keys.length == 0
        or held.shape[0] != batch
        or held.dtype not in native.DTYPE_CODES
        or not held.is_cpu
    ):
        return False
    if values.length != keys.length:
        return False
    if mask is None:
        return queries == 1
    shape = mask.shape if isinstance(mask, Tensor) else ()
    return len(shape) == 4 and shape[0] in (1, batch) and shape[1:] == (1, queries, keys.length + queries)


def _positions_fit(x: Tensor, cos: Any) -> bool:
    return cos is None or (cos.dim() == 3 and cos.shape[0] in (1, x.shape[0]) and cos.shape[1] == x.shape[1])


def _is_few(x: Any) -> bool:
    return (
        type(x) is Tensor
        and x.dim() == 3
        and 0 < x.shape[1] <= MOST_QUERIES
        and 0 < x.shape[0] <= MOST_SEQUENCES
        and x.dtype in native.DTYPE_CODES
        and x.is_cpu
    )

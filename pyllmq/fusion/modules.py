"""A fused module: its `forward` is one or two native steps, for everything else what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.cpu import runtime as cpu
from ..integrations.transformers_internals import IMPLEMENTATION, collects, implementation_of
from ..layers.linear import PackedLinear
from . import native
from .ahead import Ahead, Given, undisturbed
from .attention_functions import attention_implementation
from .cache import GrowingLayer, growing_layer
from .grammar import Arguments, Fitting
from .steps import Rotary

MOST_QUERIES, MOST_SEQUENCES = 8, 8
"""Of a call whose blocks run ahead. More tokens are a prompt."""
PIECE = 512
"""Tokens that a step takes at once: its memory grows with them, and from there on no longer its speed."""

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
        self.rotaries: dict[Rotary, Rotary] = {}
        self.ahead: Ahead | None = None
        self.last: tuple[FusedModule, Given, Tensor] | None = None
        """The whole block that ran last, what it was given and what it made."""
        self.tokens: list[tuple[Any, ...]] = []
        self.room: native.Room | None = None
        """For the keys and values of a call that keeps none."""

    def tokens_of(self, x: Tensor, shape: torch.Size, cos: Any, sin: Any, mask: Any, rotary: Rotary) -> native.Tokens:
        """`rotary` is one of `rotaries`."""
        for a, b, c, d, e, f, made in self.tokens:
            if a is cos and b is sin and c is mask and d is rotary and e == shape and f is x.dtype:
                return made
        made = native.make_tokens(x, cos, sin, mask, rotary)
        # The entry holds the tensors: no other tensor can have their identity.
        self.tokens = [(cos, sin, mask, rotary, shape, x.dtype, made), *self.tokens[: _SAME_TOKENS - 1]]
        return made


class Fused:
    """Stands in a module's place as its `forward`. The module itself, its parameters and its inner modules stay as they are."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own_forward = module.forward

    def install(self) -> None:
        self.module.forward = self

    def remove(self) -> None:
        if self.module.__dict__.get("forward") is self:
            del self.module.forward

    def __reduce__(self) -> Any:
        """Copies and pickles of a model are not fused."""
        return NotFused, (self.module,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class FusedModule(Fused):
    """An attention module, an MLP module, or a block of both."""

    def __init__(self, fitting: Fitting, shared: Shared) -> None:
        super().__init__(fitting.module)
        self.arguments: Arguments = fitting.arguments
        self.wrap = _WRAPS[fitting.wraps]
        self.shared = shared
        self.implementation = attention_implementation(fitting.asks)
        self.config = {} if fitting.asks is None else vars(fitting.asks.config)
        self.known = fitting.arguments.known
        modules = list(fitting.module.modules())
        self.inner = modules[1:]
        self.calls = [(m.__dict__, m._forward_pre_hooks, m._forward_hooks) for m in self.inner]
        self.places = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self.packed = [(m, m.operand(), m.precision) for m in self.inner if isinstance(m, PackedLinear)]
        self.attention = None if fitting.attention is None else native.Attention(fitting.attention)
        self.mlp = None if fitting.mlp is None else native.Mlp(fitting.mlp)
        rotary = Rotary() if fitting.attention is None else fitting.attention.rotary
        self.rotary = shared.rotaries.setdefault(rotary, rotary)
        self.residual = fitting.attention is not None and fitting.mlp is not None
        self.encodes = fitting.attention is not None and fitting.arguments.cache is None
        self.in_sequence = self.residual and not fitting.parallel
        self.reads_prompts = True
        """May a call without a mask be of several tokens, each of which sees those before it?"""
        self.weights = self._weights()
        self.guard = self._guard()
        self.behind: FusedModule | None = None
        """The block that was called with this one's output and else the same, when it ran last."""
        self.runs: dict[tuple[FusedModule, ...], Any] = {}

    # ---- a call -----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.own_forward(*args, **kwargs)
        given = kwargs if not args else dict(zip(self.arguments.order, args, strict=False)) | kwargs
        y = self.served(**given)
        return self.own_forward(*args, **kwargs) if y is None else y

    def served(self, **given: Any) -> Any:
        """The module's output, or None where its own forward has to make it."""
        ahead = self.shared.ahead
        made = None if ahead is None else ahead.take(self, given)
        if ahead is not None and made is not None:
            self.shared.last = (self, ahead.given, made)
            return self.wrap(made)
        names = self.arguments
        layer: Any = None if names.cache is None else growing_layer(given.get(names.cache), names.cache_layer)
        x: Any = given.get(names.x)
        if type(x) is not Tensor or x.dtype not in cpu.DTYPE_CODE or not x.is_cpu:
            return None
        shape = x.shape
        if len(shape) != 3 or not self._takes(*shape[:2], layer):
            return None
        cos = sin = mask = None
        if self.attention is not None:
            mask = given.get(names.mask or "")
            if names.positions is not None:
                cos, sin = given.get(names.positions) or (None, None)
                if not isinstance(cos, Tensor):
                    return None
            reaches = _covers(shape, mask, cos) if self.encodes else layer and self.reaches(layer, shape, mask, cos)
            if not reaches:
                return None
        held = self.guard.holds()
        if not self._is_usual(given, held):
            return None
        if not held:
            if not self._is_current():
                self.shared.fuse_again()
                return None
            if not any(before or behind for _, before, behind in self.calls):  # else no guard would hold
                self.guard = self._guard()  # what changed says the same, such as a precision that is set to what it was
        cpu.kernels()  # as many threads as torch has
        x = x.contiguous()
        y = torch.empty_like(x)
        if shape[0] * shape[1] > PIECE:
            self._run_in_pieces(x, y, cos, sin, mask, layer)
            return self.wrap(y)
        tokens = self.shared.tokens_of(x, shape, cos, sin, mask, self.rotary)
        if self.residual and not self.encodes and shape[0] <= MOST_SEQUENCES and shape[1] <= MOST_QUERIES:
            return self.wrap(self._with_those_behind(given, x, tokens, layer))
        self._run(x, y, tokens, layer)
        return self.wrap(y)

    def _takes(self, sequences: int, queries: int, layer: GrowingLayer | None) -> bool:
        """So many tokens. A window slides between pieces, which the mask of all of them does not know."""
        if sequences * queries <= PIECE or self.attention is None:
            return sequences * queries > 0
        return sequences == 1 and type(layer) is GrowingLayer

    def reaches(self, layer: GrowingLayer, shape: torch.Size, mask: Any, cos: Any) -> bool:
        """Can a step attend to this layer, for x of this shape, where mask and positions are these?"""
        keys, values = layer.grown
        batch, queries, _ = shape
        buffer, past = keys.buffer, keys.length
        if values.length != past or not _positions_fit(shape, cos):
            return False
        if past and (
            buffer is None or buffer.shape[0] != batch or buffer.dtype not in cpu.DTYPE_CODE or not buffer.is_cpu
        ):
            return False
        if mask is None:
            return queries == 1 or (past == 0 and self.reads_prompts)
        return _mask_fits(shape, mask, past)

    def _run_in_pieces(self, x: Tensor, y: Tensor, cos: Any, sin: Any, mask: Any, layer: Any) -> None:
        x, y = x.view(1, -1, x.shape[2]), y.view(1, -1, y.shape[2])
        past = 0 if layer is None else layer.grown[0].length
        for begin in range(0, x.shape[1], PIECE):
            end = min(begin + PIECE, x.shape[1])
            c, s = (None if t is None else t[:, begin:end] for t in (cos, sin))
            seen = mask
            if mask is not None:
                seen = (mask if mask.shape[2] == 1 else mask[:, :, begin:end])[..., : past + end]
            piece = x[:, begin:end]
            self._run(piece, y[:, begin:end], native.make_tokens(piece, c, s, seen, self.rotary), layer)

    def _run(self, x: Tensor, y: Tensor, tokens: native.Tokens, layer: Any) -> None:
        if self.attention is not None and self.encodes:
            self.shared.room = self.attention.encode(x, y, tokens, self.shared.room)
        elif self.attention is not None:
            self.attention(x, y, tokens, layer, self.residual)
        if self.mlp is not None:
            self.mlp(y if self.in_sequence else x, y, tokens, self.residual)

    # ---- blocks in a row --------------------------------------------------------------------------------------------

    def _with_those_behind(self, given: dict[str, Any], x: Tensor, tokens: native.Tokens, layer: Any) -> Tensor:
        names = self.arguments
        assert names.cache is not None
        seen = Given(given, names.x, names.cache)
        last, ahead, self.shared.ahead = self.shared.last, self.shared.ahead, None
        if ahead is not None and ahead.at < len(ahead.blocks):  # the model left some out: it may again
            ahead.blocks[ahead.at - 1].behind = None
        if last is not None and last[0] is not self:
            follows = given[names.x] is last[2] and last[1].again(given) and self.runs_like(last[0])
            last[0].behind = self if follows else None
        blocks, layers = [self], [layer]
        cos = None if names.positions is None else given[names.positions][0]
        mask = given.get(names.mask or "")
        while (block := blocks[-1].behind) is not None and block not in blocks:
            its = growing_layer(given[names.cache], block.arguments.cache_layer)
            if its is None or its in layers or not self.reaches(its, x.shape, mask, cos):
                break
            if not block.is_undisturbed():  # it would not take what was made ahead
                break
            blocks.append(block)
            layers.append(its)
        if len(blocks) == 1:
            y = torch.empty_like(x)
            self._run(x, y, tokens, layer)
        else:
            self.shared.ahead = Ahead(blocks, layers, seen, x, tokens)
            y = self.shared.ahead.outputs[0]
        self.shared.last = (self, seen, y)
        return y

    def runs_like(self, other: FusedModule) -> bool:
        """Do both find x, cache, mask and positions under the same names, and prepare tokens alike?"""
        mine, its = self.arguments, other.arguments
        same = (mine.x, mine.cache, mine.mask, mine.positions) == (its.x, its.cache, its.mask, its.positions)
        return same and self.rotary is other.rotary and self.known == other.known and mine.flags == its.flags

    def run_of(self, blocks: Sequence[FusedModule]) -> Any:
        """The native run of blocks that begin with this one."""
        key = tuple(blocks)
        if key not in self.runs:
            steps = [(b.attention.step, b.mlp.step, b.in_sequence) for b in blocks if b.attention and b.mlp]
            self.runs = {key: cpu.kernels().BlockRun(steps)}
        return self.runs[key]

    # ---- is it a call that was recorded? ----------------------------------------------------------------------------

    def is_undisturbed(self) -> bool:
        """Nothing that a step was made for has changed, and nobody watches; what this block is given was checked."""
        return undisturbed() and self.guard.holds()

    def _is_usual(self, given: dict[str, Any], held: bool) -> bool:
        """Nobody watches what happens inside, asks for gradients or for what was not recorded. `held`: does the guard hold?"""
        for name in given:
            if name not in self.known:
                value, recorded = given[name], self.arguments.flags.get(name)
                if value is not recorded and (isinstance(value, Tensor) or value or recorded):
                    return False
        if not undisturbed():
            return False
        if held:
            return True
        if self.module.training or implementation_of(self.config) != self.implementation:
            return False
        return all(modules.get(name) is child for modules, name, child in self.places) and not self.watched()

    def watched(self) -> str:
        """The kind of the first inner module whose call somebody sees or replaces: a step makes no such call."""
        for place, (state, before, behind) in enumerate(self.calls):
            if before or "forward" in state or (behind and collects(behind)):
                return type(self.inner[place]).__name__
        return ""

    def _weights(self) -> list[tuple[dict[str, Any], str, Tensor, int, int | None]]:
        """Of each tensor: where it stands, and what changes with it. Operands change where packed tensors do."""
        owned = [
            (m._parameters, n, p) for m in self.module.modules() for n, p in m._parameters.items() if p is not None
        ]
        return [(*place, place[2].data_ptr(), version_of(place[2])) for place in owned]

    def _guard(self) -> Any:
        """Holds while all is as it is now: `_is_usual` and `_is_current` look closer where it does not."""
        slots: list[tuple[dict[str, Any], str, Any]] = [(self.module.__dict__, "training", False)]
        if self.attention is not None:
            slots.append((self.config, IMPLEMENTATION, self.config.get(IMPLEMENTATION, ...)))
        slots += self.places
        slots += [(state, "forward", ...) for state, _, _ in self.calls]
        slots += [slot for layer, _, _ in self.packed for slot in layer.operand_state()]
        slots += [(parameters, name, parameter) for parameters, name, parameter, _, _ in self.weights]
        hooks = [hooks for _, *both in self.calls for hooks in both]
        tensors = [(parameter, pointer, version) for _, _, parameter, pointer, version in self.weights]
        return cpu.kernels().StateGuard(slots, hooks, tensors)

    def _is_current(self) -> bool:
        """Are the weights those that the steps were made for?"""
        for layer, operand, precision in self.packed:
            if layer.operand() is not operand or layer.precision != precision:
                return False
        for parameters, name, parameter, pointer, version in self.weights:
            if (
                parameters.get(name) is not parameter
                or parameter.data_ptr() != pointer
                or version_of(parameter) != version
            ):
                return False
        return True


class NotFused:
    """What a copy of a fused module has as `forward`, until it is fused itself: that of its class."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def version_of(parameter: Tensor) -> int | None:
    return None if parameter.is_inference() else parameter._version


def _covers(shape: torch.Size, mask: Any, cos: Any) -> bool:
    """Can an encoder's step attend to its own tokens, for x of this shape, where mask and positions are these?"""
    return _positions_fit(shape, cos) and (mask is None or _mask_fits(shape, mask, 0))


def _positions_fit(shape: torch.Size, cos: Any) -> bool:
    return cos is None or (cos.dim() == 3 and cos.shape[0] in (1, shape[0]) and cos.shape[1] == shape[1])


def _mask_fits(shape: torch.Size, mask: Any, past: int) -> bool:
    sizes = mask.shape if isinstance(mask, Tensor) else ()
    batch, queries, _ = shape
    if len(sizes) != 4 or sizes[0] not in (1, batch) or sizes[1] != 1 or sizes[3] != past + queries:
        return False
    return sizes[2] == queries or (sizes[2] == 1 and past == 0)

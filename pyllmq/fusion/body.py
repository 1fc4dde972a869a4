"""The model around its blocks: for one token everything from the embedding to the last norm is one native run.

Between the token's id and its first block transformers checks arguments, makes a mask and rotary positions, and calls each block
as a module: 2 of 30 ms a token of a model of 1.1 B parameters. What of it has no effect, or the same at each token, is left out
where the call shows that: one sequence without padding, a growing cache, positions by a table.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..backends.cpu import runtime as cpu
from . import native
from .ahead import undisturbed
from .cache import GrowingLayer, growing_layer
from .grammar import Fitting, factor_of, is_same, norm_of
from .modules import Fused, FusedModule, version_of
from .record import PROMPT, Call, Record
from .steps import Norm

TABLE = 256
"""Positions of which cosines and sines are made at once."""
_GIVEN = ("input_ids", "attention_mask", "position_ids", "past_key_values")
_WITHOUT_EFFECT = ("use_cache", "return_dict")
"""Unless they are False."""
_CHANGE_THE_MASK = ("sliding_window", "attention_chunk_size")
_LOOKS_AT_LENGTHS = ("dynamic", "longrope")
"""Rotary positions that depend on the longest one."""
_ONE_TOKEN = torch.Size((1, 1, 0))


@dataclass(frozen=True, eq=False)
class BodyFitting:
    """A module that is norm(blocks(factor * embedding(ids)))."""

    module: nn.Module
    embedding: nn.Module
    factor: float
    rotary: nn.Module | None
    layers: nn.ModuleList
    norm_module: nn.Module
    norm: Norm
    output: type


def fit_body(record: Record, fitting: Sequence[Fitting]) -> BodyFitting | None:
    """The module around all of `fitting`, which must be its blocks, where nothing else happens in it."""
    if not fitting or any(f.attention is None or f.mlp is None or f.arguments.cache is None for f in fitting):
        return None
    parent, _, _ = fitting[0].name.rpartition(".")
    name, _, _ = parent.rpartition(".")
    of_name: dict[str, list[Call]] = {}
    for call in record.calls:
        of_name.setdefault(call.name, []).append(call)
    blocks = [of_name[f.name][0] for f in fitting]
    around = [c for c in of_name.get(name, []) if c.start < blocks[0].start]
    if len(around) != 1 or not isinstance(around[0].module, nn.Module):
        return None
    body, module = around[0], around[0].module
    if not set(_GIVEN) <= set(inspect.signature(module.forward).parameters):
        return None
    layers = getattr(module, parent.rpartition(".")[2], None)
    if not isinstance(layers, nn.ModuleList) or [id(m) for m in layers] != [id(f.module) for f in fitting]:
        return None
    config: Any = getattr(module, "config", None)
    if config is None or any(getattr(config, change, None) for change in _CHANGE_THE_MASK):
        return None
    beside = [
        c for c in record.inside(body) if c.module is not None and not any(b.start <= c.start <= b.stop for b in blocks)
    ]
    outer = [c for c in beside if not any(o.start < c.start < o.stop for o in beside)]
    embeds = [c for c in outer if isinstance(c.output, Tensor) and not c.x.is_floating_point()]
    norms = [c for c in outer if c not in embeds and isinstance(c.output, Tensor) and c.start > blocks[-1].start]
    rotaries = [c for c in outer if c not in embeds and c not in norms]
    if len(embeds) != 1 or len(norms) != 1 or len(rotaries) > 1:
        return None
    positions = {
        id(b.arguments[f.arguments.positions]) for b, f in zip(blocks, fitting, strict=True) if f.arguments.positions
    }
    if positions - {id(c.output) for c in rotaries}:
        return None
    follow = all(is_same(b.x, a.y) for a, b in zip(blocks, blocks[1:], strict=False))
    if not (follow and is_same(norms[0].x, blocks[-1].y) and is_same(body.y, norms[0].y)):
        return None
    factor, norm = factor_of(blocks[0].x, embeds[0].y), norm_of(norms[0])
    if factor is None or norm is None or not record.comes_from(blocks[0].x, [embeds[0].y], body.start):
        return None
    rotary = rotaries[0].module if rotaries else None
    kind = getattr(rotary, "rope_type", "default")
    if not isinstance(kind, str) or any(name in kind for name in _LOOKS_AT_LENGTHS):
        return None
    if {key for key, value in dict(body.output).items() if value is not None} != {
        "last_hidden_state",
        "past_key_values",
    }:
        return None
    assert embeds[0].module is not None and norms[0].module is not None
    return BodyFitting(module, embeds[0].module, factor, rotary, layers, norms[0].module, norm, type(body.output))


class FusedBody(Fused):
    def __init__(self, fitting: BodyFitting, blocks: Sequence[FusedModule]) -> None:
        super().__init__(fitting.module)
        self.fitting, self.blocks = fitting, blocks
        self.order = tuple(inspect.signature(fitting.module.forward).parameters)
        self.factor: float | Tensor = fitting.factor
        self.norm = native.bound_norm(fitting.norm)
        self.run = blocks[0].run_of(blocks)
        self.rotary = next((b.rotary for b in blocks if b.rotary.size), None)
        self.table: tuple[int, torch.dtype | None, Any] = (0, None, None)
        self.guard = self._guard()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.own_forward(*args, **kwargs)
        y = self.served(**(dict(zip(self.order, args, strict=False)) | kwargs))
        return self.own_forward(*args, **kwargs) if y is None else y

    def served(self, **given: Any) -> Any:
        """The module's output, or None where its own forward has to make it."""
        ids, mask, positions, cache = (given.get(name) for name in _GIVEN)
        if type(ids) is not Tensor or ids.shape != (1, 1) or type(positions) is not Tensor or positions.shape != (1, 1):
            return None
        for name, value in given.items():
            if name in _WITHOUT_EFFECT:
                if value is False:
                    return None
            elif name not in _GIVEN and (isinstance(value, Tensor) or value):
                return None
        if not (ids.is_cpu and undisturbed() and self.guard.holds()) or self._wants_more():
            return None
        pairs: list[Any] = [(block, growing_layer(cache, block.arguments.cache_layer)) for block in self.blocks]
        past = 0 if pairs[0][1] is None else pairs[0][1].get_seq_length()
        if past == 0 or not (mask is None or _hides_nothing(mask, past + 1)):
            return None
        for block, layer in pairs:
            if type(layer) is not GrowingLayer or layer.get_seq_length() != past:
                return None
            if not (block.reaches(layer, _ONE_TOKEN, None, None) and block.is_undisturbed()):
                return None
        x = self.embedded(ids)
        kernels = cpu.kernels()  # as many threads as torch has
        row, tables = self._tables_at(int(positions), x)
        cos, sin = (None if t is None else t[row] for t in tables)
        tokens = kernels.StepTokens(
            batch=1, queries=1, dtype=cpu.DTYPE_CODE[x.dtype], cos=_address(cos), sin=_address(sin)
        )
        places = [block.attention.place(layer, x) for block, layer in pairs]
        caches, pasts = zip(*places, strict=True)
        y = x.new_empty(len(pairs) + 1, *x.shape)
        self.run(x.data_ptr(), y.data_ptr(), 0, tokens, caches, pasts, self.norm)
        for _, layer in pairs:
            layer.committed(1)
        return self.fitting.output(last_hidden_state=y[-1], past_key_values=cache)

    def embedded(self, ids: Tensor) -> Tensor:
        x = self.fitting.embedding(ids)
        return (x if self.fitting.factor == 1 else x * self.factor).contiguous()

    def _tables_at(self, position: int, x: Tensor) -> tuple[int, tuple[Tensor | None, Tensor | None]]:
        """(row of this position; cosines and sines [TABLE, rotary size / 2])."""
        if self.rotary is None or self.fitting.rotary is None:
            return 0, (None, None)
        start, row = position - position % TABLE, position % TABLE
        if self.table[:2] != (start, x.dtype):
            made = self.fitting.rotary(x, torch.arange(start, start + TABLE)[None])
            self.table = (start, x.dtype, tuple(self.rotary.table(t)[0].float().contiguous() for t in made))
        return row, self.table[2]

    def _wants_more(self) -> bool:
        """Does the configuration ask for outputs that a run does not make?"""
        config: Any = self.fitting.module.config
        return bool(config.output_attentions or config.output_hidden_states or not config.return_dict)

    def _guard(self) -> Any:
        """Holds while nobody watches or changes what a run leaves out; the blocks have guards of their own."""
        given = self.fitting
        inside = [m for m in (given.layers, given.norm_module, given.rotary) if m is not None]
        blocks = [block.module for block in self.blocks]
        slots: list[tuple[dict[str, Any], str, Any]] = [(given.module.__dict__, "training", False)]
        slots += [(m.__dict__, "forward", ...) for m in inside]
        slots += [(m.__dict__, "forward", block) for m, block in zip(blocks, self.blocks, strict=True)]
        slots += [(m._modules, name, child) for m in (given.module, given.layers) for name, child in m._modules.items()]
        for name, value in vars(given.module.config).items():
            if name in (*_CHANGE_THE_MASK, "num_hidden_layers"):
                slots.append((vars(given.module.config), name, value))
        tensors = [
            (m, n, t) for m in inside for d in (m._parameters, m._buffers) for n, t in d.items() if t is not None
        ]
        slots += [(m._parameters if n in m._parameters else m._buffers, n, t) for m, n, t in tensors]
        hooks = [h for m in (*inside, *blocks) for h in (m._forward_pre_hooks, m._forward_hooks)]
        return cpu.kernels().StateGuard(slots, hooks, [(t, t.data_ptr(), version_of(t)) for _, _, t in tensors])


def fuse_body(fitting: BodyFitting, blocks: Sequence[FusedModule]) -> FusedBody | None:
    """Installed where its output for a token is that of the module, whose blocks are fused."""
    body = FusedBody(fitting, blocks)
    ids = torch.ones(1, 1, dtype=torch.long)
    dtype = body.embedded(ids).dtype
    config: Any = fitting.module.config
    caches = []
    shapes = [block.attention.form for block in blocks if block.attention is not None]
    past = [
        [torch.randn(1, f.kv_heads, PROMPT, size).to(dtype) for size in (f.head_size, f.value_size)] for f in shapes
    ]
    for _ in range(2):
        cache = DynamicCache(config=config)
        for block, (keys, values) in zip(blocks, past, strict=True):
            cache.update(keys, values, block.arguments.cache_layer)
        caches.append(cache)
    given: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": torch.full((1, 1), PROMPT),
        "use_cache": True,
    }
    firsts: list[Tensor] = []
    hook = blocks[0].module.register_forward_pre_hook(
        lambda _, args, kwargs: firsts.extend(
            x for x in (*args, kwargs.get(blocks[0].arguments.x)) if isinstance(x, Tensor)
        ),
        with_kwargs=True,
    )
    try:
        theirs = body.own_forward(**given, past_key_values=caches[0])
    finally:
        hook.remove()
    # Some multiply by a number, others by a tensor of the embedding's dtype.
    for factor in (fitting.factor, torch.tensor(fitting.factor, dtype=dtype)):
        body.factor = factor
        if torch.equal(body.embedded(ids), firsts[0]):
            break
    else:
        return None
    ours = body.served(**given, past_key_values=caches[1])
    if ours is None or ours.keys() != theirs.keys():
        return None
    a, b = ours.last_hidden_state.float(), theirs.last_hidden_state.float()
    if not (a - b).norm() <= (4 * torch.finfo(dtype).eps + 1e-5) * b.norm():
        return None
    body.install()
    return body


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _hides_nothing(mask: Any, keys: int) -> bool:
    """A mask of so many tokens of one sequence, none of which is padding."""
    return isinstance(mask, Tensor) and mask.shape == (1, keys) and mask.is_cpu and bool(mask.numpy().all())

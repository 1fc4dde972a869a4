"""Layers of transformers' dynamic cache that grow by blocks: a token is written in place, where `DynamicLayer` copies all of them.

They take the place of the layers of a `DynamicCache`, contents and all, when a fused module first sees it. Keys and values are
views of longer memory: `crop` and further tokens overwrite what an older view of the cut part shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

BLOCK = 64
"""Tokens. Memory grows by a quarter of what is there, at least by a block: each token is copied four times at most."""


class _Grown:
    """[batch, heads, tokens, size], tokens `start` to `start + length` of a longer buffer."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.placeholder: Tensor | None = None
        """What transformers puts in place of keys before the first token."""
        self.start = self.length = 0
        self.owned = False
        """May tokens be written behind the last one? Not into a tensor that somebody else gave."""

    def view(self) -> Tensor | None:
        return self.placeholder if self.buffer is None else self.buffer.narrow(2, self.start, self.length)

    def memory(self) -> Tensor:
        """From the first token on, with the room behind the last one."""
        assert self.buffer is not None
        return self.buffer.narrow(2, self.start, self.buffer.shape[2] - self.start)

    def pointer(self) -> int:
        """Where `memory` starts."""
        buffer = self.buffer
        assert buffer is not None
        return buffer.data_ptr() + self.start * buffer.stride(2) * buffer.element_size()

    def put(self, tensor: Tensor | None) -> None:
        """What the layer holds from now on: a part of the buffer, or another tensor."""
        if tensor is None or tensor.dim() != 4:
            self.buffer, self.placeholder, self.start, self.length, self.owned = None, tensor, 0, 0, False
        elif self.buffer is not None and _is_part(tensor, self.buffer):
            offset = tensor.storage_offset() - self.buffer.storage_offset()
            self.start, self.length = offset // self.buffer.stride(2), tensor.shape[2]
        else:
            self.buffer, self.start, self.length, self.owned = tensor, 0, tensor.shape[2], False

    def reserve(self, tokens: int, like: Tensor | None = None) -> None:
        """Make room for so many tokens more; the first ones are shaped [batch, heads, *, size] as `like`."""
        buffer = self.buffer
        if buffer is not None and self.owned and self.start + self.length + tokens <= buffer.shape[2]:
            may_write = torch.is_inference_mode_enabled() or not buffer.is_inference()
            if may_write:
                return
        shaped = like if buffer is None else buffer
        assert shaped is not None
        needed = self.length + tokens
        capacity = -(-(needed + max(BLOCK, needed // 4)) // BLOCK) * BLOCK
        fresh = shaped.new_empty(*shaped.shape[:2], capacity, shaped.shape[3])
        if buffer is not None:
            fresh.narrow(2, 0, self.length).copy_(buffer.narrow(2, self.start, self.length))
        self.buffer, self.start, self.owned = fresh, 0, True

    def append(self, tensor: Tensor) -> None:
        self.reserve(tensor.shape[2], tensor)
        assert self.buffer is not None
        self.buffer.narrow(2, self.start + self.length, tensor.shape[2]).copy_(tensor)
        self.length += tensor.shape[2]

    def select(self, indices: Tensor) -> None:
        """Sequences of the batch, in another order, fewer or some of them twice; the room behind them stays."""
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(0, indices.to(self.buffer.device))
            self.owned = True


def _is_part(tensor: Tensor, buffer: Tensor) -> bool:
    offset = tensor.storage_offset() - buffer.storage_offset()
    return (
        tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        and tensor.stride() == buffer.stride()
        and tensor.shape[:2] == buffer.shape[:2]
        and tensor.shape[3] == buffer.shape[3]
        and offset % buffer.stride(2) == 0
        and 0 <= offset // buffer.stride(2) <= buffer.shape[2] - tensor.shape[2]
    )


class GrowingLayer(DynamicLayer):
    """As `DynamicLayer`, in memory that grows by blocks."""

    def __init__(self, **kwargs: Any) -> None:
        self.grown = (_Grown(), _Grown())
        super().__init__(**kwargs)

    keys = property(lambda self: self.grown[0].view(), lambda self, tensor: self.grown[0].put(tensor))
    values = property(lambda self: self.grown[1].view(), lambda self, tensor: self.grown[1].put(tensor))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.grows_with(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.grown
        keys.append(key_states)
        values.append(value_states)
        return keys.view(), values.view()  # type: ignore[return-value]

    def grows_with(self, *states: Tensor) -> bool:
        """Can these be written behind what is there? Not where gradients flow, or another dtype would be cast in silence."""
        held = [t for t in (*states, self.keys, self.values) if t is not None and t.dim() == 4]
        same = all(t.dtype == held[0].dtype and t.shape[:2] == held[0].shape[:2] for t in held)
        return same and not (torch.is_grad_enabled() and any(t.requires_grad for t in held))

    def begin(self, x: Tensor, heads: int, head_size: int, value_size: int) -> None:
        """Make a layer that holds no token one of such keys and values, for the sequences of x and in its dtype."""
        keys, values = (x.new_empty(x.shape[0], heads, 0, size) for size in (head_size, value_size))
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens more, behind at least one or behind `begin`."""
        for grown in self.grown:
            grown.reserve(tokens)

    def extent(self) -> tuple[int, ...]:
        """Changes with what the layer holds; of tokens that were reserved only where they have another place."""
        keys, values = self.grown
        return id(keys.buffer), keys.start, keys.length, id(values.buffer), values.start, values.length

    def committed(self, tokens: int) -> None:
        """So many tokens were written behind the last one, into memory that `reserve` made."""
        for grown in self.grown:
            grown.length += tokens

    def get_seq_length(self) -> int:
        return self.grown[0].length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for grown in self.grown:
            grown.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            self.reorder_cache(torch.arange(self.grown[0].memory().shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.get_seq_length() > 0:
            self.reorder_cache(torch.arange(self.grown[0].memory().shape[0])[indices.cpu()])


class GrowingSlidingWindowLayer(GrowingLayer, DynamicSlidingWindowLayer):
    """As `DynamicSlidingWindowLayer`, in memory that grows by blocks; what left the window is overwritten at the next growth."""

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        self.grown = (_Grown(), _Grown())
        DynamicSlidingWindowLayer.__init__(self, sliding_window, **kwargs)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.grows_with(key_states, value_states):
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        full = GrowingLayer.update(self, key_states, value_states)
        self._slide(key_states.shape[-2])
        return full

    def committed(self, tokens: int) -> None:
        super().committed(tokens)
        self._slide(tokens)

    def _slide(self, tokens: int) -> None:
        self.cumulative_length += tokens
        if not self.record_past and self.sliding_window > 1:
            for grown in self.grown:
                left = max(grown.length - self.sliding_window + 1, 0)
                grown.start, grown.length = grown.start + left, grown.length - left

    def get_seq_length(self) -> int:
        return self.cumulative_length


_GROWING: dict[type, type[GrowingLayer]] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingWindowLayer,
}


def growing_layer(cache: Any, index: int) -> GrowingLayer | None:
    """Layer `index` of a cache that a step can write to, if it is one; a dynamic layer becomes one with all it holds.

    None for caches of other kinds (static, quantized, offloaded, a subclass) and before the layer's first token.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    if index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) in _GROWING:
        grown = object.__new__(_GROWING[type(layer)])
        grown.grown = (_Grown(), _Grown())
        for name, value in vars(layer).items():  # keys and values through their setters
            setattr(grown, name, value)
        cache.layers[index] = layer = grown
    return layer if isinstance(layer, GrowingLayer) else None


def filled_cache(index: int, keys: Tensor, values: Tensor) -> DynamicCache:
    """A cache that holds these at layer `index`."""
    cache = DynamicCache()
    cache.update(keys, values, index)
    return cache

"""Everything that fusing knows of transformers' inside, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .steps import AttentionForm

MARKER = "pyllmq_marker"
"""Name of the attention function that notes what it is given."""

Note = Callable[..., None]


@contextmanager
def attention_marker(note: Note) -> Iterator[None]:
    """`note` hears of every call of the attention function, which returns random numbers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attend(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        out = torch.randn(query.shape[0], query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
        given = {"module": module, "query": query, "key": key, "value": value, "attention_mask": attention_mask}
        note("attention", given | options, out)
        return out, None

    AttentionInterface.register(MARKER, attend)
    AttentionMaskInterface.register(MARKER, sdpa_mask)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[MARKER]
        del AttentionMaskInterface._global_mapping[MARKER]


def recording_cache(config: Any, note: Note) -> Any:
    """A cache as `generate` makes it; `note` hears of every update."""
    from transformers import DynamicCache

    class RecordingCache(DynamicCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            note("cache", {"cache": self, "key": key_states, "value": value_states, "layer": layer_idx})
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    return RecordingCache(config=config)


def attention_implementation(module: nn.Module | None) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def implementation_of(state: dict[str, Any]) -> str | None:
    """The same of a configuration's `__dict__`: asking the configuration itself goes through 4 us of Python."""
    return state.get("_attn_implementation_internal")


def as_implemented(form: AttentionForm, implementation: str | None) -> AttentionForm | None:
    """What an attention function makes of the form, None if that is not known."""
    if implementation == "eager":
        return form
    # transformers' function for torch's attention leaves out what torch has no argument for.
    return replace(form, soft_cap=0.0, sinks=None) if implementation == "sdpa" else None


def mask_as_implemented(mask: torch.Tensor, implementation: str | None, dtype: torch.dtype) -> torch.Tensor:
    if implementation == "sdpa" or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask.logical_not(), torch.finfo(dtype).min)


def collects(hooks: Any) -> bool:
    """Does one of these forward hooks want something at this call? Those that collect attentions stay for ever once they were
    asked for, and sleep."""
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get()
    return any(collected or getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks.values())

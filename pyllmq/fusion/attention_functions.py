"""What transformers' attention functions make of what a module hands to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .steps import AttentionForm


def recording_cache(config: Any, note: Callable[..., None]) -> Any:
    """A cache as `generate` makes it; `note` hears of every update."""
    from transformers import DynamicCache

    class RecordingCache(DynamicCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            note("cache", {"cache": self, "key": key_states, "value": value_states, "layer": layer_idx})
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    return RecordingCache(config=config)


def attention_implementation(module: nn.Module | None) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


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

"""What a job changes in a model while it runs it: modes, gradients, hooks, forwards; all as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .half_products import widened_products


@contextmanager
def quiet_eval(*models: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout), no key-value cache, and products at the speed of fp32 at least."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    caching: list[Any] = [
        model.config for model in models if getattr(getattr(model, "config", None), "use_cache", None)
    ]
    for model in models:
        model.eval()
    for config in caching:
        config.use_cache = False
    try:
        with widened_products(*models):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for config in caching:
            config.use_cache = True


@contextmanager
def gradients_for(model: nn.Module, wanted: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Gradients are taken, of these parameters alone."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    try:
        for parameter in wanted:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        # By name: a streamed model has others each time that it loads them.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def hooked(handles: Iterable[RemovableHandle]) -> ExitStack:
    """While it is open, hooks are in place that were registered just now."""
    hooks = ExitStack()
    for handle in handles:
        hooks.enter_context(handle)
    return hooks


def seeing_inputs(modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, torch.Tensor], None]) -> ExitStack:
    """While it is open, `see(name, x)` is called with the input of each of these modules before it runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: see(name, args[0] if args else kwargs["input"])

    return hooked(module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules)


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules run these functions instead of their own."""
    # accelerate's hooks stand in the same place: an instance attribute `forward`.
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own

"""All modules of a model: fused, given back, reported."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.cpu import runtime as cpu
from ..dispatch import plain_defaults
from ..layers.linear import PackedLinear
from . import FUSED
from .attention_functions import as_implemented, attention_implementation, mask_as_implemented
from .body import fit_body, fuse_body
from .cache import filled_cache
from .grammar import Fitting, fit
from .modules import Fused, FusedModule, NotFused, Shared
from .native import NotBoundError
from .record import PROMPT, NotRecordedError, record_model

_reports: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()

_AGREES = {"exact": 1e-4, "high": 2e-3, "fast": 6e-2}
"""Relative error of a step's part of the output, beside four units in the last place of the output. A wrong form is off by 1."""


@plain_defaults()
def fuse(model: nn.Module) -> dict[str, str]:
    unfuse(model)
    # It may be called within generate, which goes on with its own random numbers.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        _reports[model] = _fused_or_why_not(model)
    return report(model)


def _fused_or_why_not(model: nn.Module) -> dict[str, str]:
    usable, why = cpu.available()
    if not usable:
        return {"": why}
    elsewhere = {t.device.type for t in (*model.parameters(), *model.buffers())} - {cpu.DEVICE}
    if elsewhere:
        return {"": f"it is on {', '.join(sorted(elsewhere))}; steps run on the CPU"}
    try:
        record = record_model(model)
        fitting, reasons = fit(record)
    except NotRecordedError as error:
        return {"": str(error)}
    found = dict(reasons)
    reference = weakref.ref(model)
    shared = Shared(lambda: _fuse_again(reference))
    with _eval_mode(model):
        for candidate in fitting:
            found[candidate.name] = _fuse_one(candidate, shared)
        body = fit_body(record, fitting)
        blocks = [forward for c in fitting if isinstance(forward := c.module.forward, FusedModule)]
        if body is not None and len(blocks) == len(fitting):
            fuse_body(body, blocks)
    return found


def unfuse(model: nn.Module) -> int:
    fused = list(_fused_modules(model))
    for stand_in in fused:
        stand_in.remove()
    for module_copied in model.modules():
        if isinstance(module_copied.__dict__.get("forward"), NotFused):
            del module_copied.forward
    _reports.pop(model, None)
    return sum(isinstance(stand_in, FusedModule) for stand_in in fused)


def report(model: nn.Module) -> dict[str, str]:
    return dict(_reports.get(model, {}))


def _fused_modules(model: nn.Module) -> Iterator[Fused]:
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Fused):
            yield forward


def _fuse_again(reference: weakref.ref[nn.Module]) -> None:
    model = reference()
    if model is not None:
        fuse(model)


def _fuse_one(candidate: Fitting, shared: Shared) -> str:
    """ "fused", or why not."""
    if "forward" in candidate.module.__dict__:
        return "its forward was replaced"
    if candidate.attention is not None:
        how = attention_implementation(candidate.asks)
        attention = as_implemented(candidate.attention, how)
        if attention is None:
            return f"its attention implementation is {how!r}; fused are 'sdpa' and 'eager'"
        candidate = replace(candidate, attention=attention)
    try:
        fused = FusedModule(candidate, shared)
    except (NotBoundError, ValueError) as error:
        return str(error)
    watched = fused.watched()
    if watched:
        return f"{watched} has a hook or another forward"
    difference, tolerance = _difference(candidate, fused)
    if not difference <= tolerance:
        return f"the step differs from the module by {difference:.1e}, more than {tolerance:.0e}"
    fused.install()
    return FUSED


def _difference(candidate: Fitting, fused: FusedModule) -> tuple[float, float]:
    """Of a step's output from the module's own, on random input, and how much it may be: both relative."""
    packed = [m for m in candidate.module.modules() if isinstance(m, PackedLinear)]
    dtypes = [p.dtype for p in candidate.module.parameters() if p.is_floating_point()]
    dtype = (dtypes or [layer.dense_dtype for layer in packed])[0]
    names = candidate.arguments

    def cast(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(cast(v) for v in value)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    given = {name: cast(value) for name, value in candidate.example.items()}
    x = given[names.x] = torch.randn(given[names.x].shape).to(dtype)
    form = candidate.attention
    if form is not None and names.mask is not None:
        given[names.mask] = mask_as_implemented(given[names.mask], fused.implementation, dtype)

    def compare(given: dict[str, Any], past: int) -> tuple[float, float]:
        caches: list[Any] = [None, None]
        if form is not None and names.cache is not None:
            sizes = [(x.shape[0], form.kv_heads, past, size) for size in (form.head_size, form.value_size)]
            tensors = [torch.randn(size).to(dtype) for size in sizes]
            caches = [filled_cache(names.cache_layer, *tensors) for _ in range(2)]
        theirs, ours = (
            forward(**(given | ({} if cache is None else {names.cache or "": cache})))
            for forward, cache in ((fused.own_forward, caches[0]), (fused.served, caches[1]))
        )
        if ours is None:
            return torch.inf, 0.0
        theirs, ours = (t[0] if isinstance(t, tuple) else t for t in (theirs, ours))
        part = theirs.float() - (x.float() if fused.residual else 0)
        precision = max((_AGREES[layer.precision] for layer in packed), default=_AGREES["exact"])
        tolerance = precision + 4 * torch.finfo(dtype).eps * (theirs.float().norm() / part.norm()).item()
        return ((ours.float() - theirs.float()).norm() / part.norm()).item(), tolerance

    difference, tolerance = compare(given, PROMPT)
    if form is not None and names.cache is not None and names.mask is not None and difference <= tolerance:
        # What a module makes of no mask, its attention function decides.
        of_prompt, most = compare(given | {names.mask: None}, 0)
        fused.reads_prompts = of_prompt <= most
    return difference, tolerance


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

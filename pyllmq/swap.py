"""Putting packed layers in the place of a model's Linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .integrations.transformers import mark_packed
from .linears import DEFAULT_EXCLUDE, as_linear, replace_module, select_linears


def swap_linear(
    model: nn.Module,
    make_layer: Callable[[nn.Linear], nn.Module],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> list[str]:
    """Replace Linears in place by `make_layer(linear)`, for example ``lambda l: CodebookLinear.from_dense(l, bits=3)``.

    All new layers are made before the first is put in: if one fails, the model is as it was. Returns the names swapped.
    """
    made = {}
    for name, module in select_linears(model, include, exclude).items():
        made[name] = make_layer(as_linear(module))
    for name, layer in made.items():
        replace_module(model, name, layer)
    mark_packed(model)
    return list(made)

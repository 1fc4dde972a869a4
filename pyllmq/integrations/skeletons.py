"""Packed modules of a transformers model: what they are called in a file, and empty ones for a folder to fill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..formats import FormatError, Structure, layer_type
from ..layers.linear import packed_modules
from ..linears import as_linear, linear_modules, replace_module


def modules_of_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name in a file -> the Linear-like or packed module that gets those tensors; none may have that name."""
    from .transformers_internals import ANY, keys_of_model

    modules = (*linear_modules(model), *packed_modules(model))
    known = dict.fromkeys((f"{module}{ANY}" for module, _ in modules), True)
    keys = keys_of_model(model, [f"{name}{ANY}" for name in names], known)
    return {key.removesuffix(ANY): found.removesuffix(ANY) for key, found in keys.items()}


def put_skeletons(model: nn.Module, structures: Mapping[str, Structure], part: bool = False) -> dict[str, str]:
    """Replace the Linears that `structures` names by empty packed layers of those sizes; returns name -> module of the model.

    Structures of one rank's `part` are smaller than the model's Linears.
    """
    from .transformers_internals import forget_ties

    linears = dict(linear_modules(model))
    targets = modules_of_names(model, structures)
    modules: dict[str, str] = {}
    for name, structure in structures.items():
        found = targets[name]
        if found not in linears:
            raise FormatError(
                f"config.json packs the module {name}, but {type(model).__name__} has no Linear of that name"
            )
        linear = as_linear(linears[found])
        if not part and (linear.out_features, linear.in_features) != (structure.out_features, structure.in_features):
            raise FormatError(
                f"config.json says that {name} is [{structure.out_features}, {structure.in_features}], but "
                f"{type(model).__name__} has [{linear.out_features}, {linear.in_features}] there"
            )
        if found in modules.values():
            raise FormatError(f"config.json packs the module {found} twice, the second time as {name}")
        layer = layer_type(structure.kind)(structure, linear.bias is not None, linear.weight.dtype)
        replace_module(model, found, layer)
        modules[name] = found
    forget_ties(model, modules.values())
    return modules

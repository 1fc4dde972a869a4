"""Packed modules of a transformers model: what they are called in a file, and empty ones for a folder to fill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..experts import ExpertLinear, put_together, take_apart
from ..folders import Description
from ..formats import FormatError, layer_type
from ..layers.embedding import embedding_type, put_embedding
from ..layers.linear import packed_modules
from ..linears import as_linear, follow_weight, is_transposed_linear, linear_modules, replace_module


def modules_of_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name in a file -> the Linear-like module, embedding or packed module that gets those tensors; none may have that name."""
    from .transformers_internals import ANY, keys_of_model

    modules = (*linear_modules(model), *_embeddings(model).items(), *packed_modules(model))
    known = dict.fromkeys((f"{module}{ANY}" for module, _ in modules), True)
    keys = keys_of_model(model, [f"{name}{ANY}" for name in names], known)
    return {key.removesuffix(ANY): found.removesuffix(ANY) for key, found in keys.items()}


def _embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def resize_linears(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Give Linears the shapes [N, K] that a folder has for them, by their names in its files; their values are lost."""
    linears, targets = dict(linear_modules(model)), modules_of_names(model, shapes)
    for name, (n, k) in shapes.items():
        module = linears.get(targets[name])
        if module is None:
            raise FormatError(
                f"config.json says the shape of {name}, but {type(model).__name__} has no Linear of that name"
            )
        sizes = {"weight": (k, n) if is_transposed_linear(module) else (n, k), "bias": (n,)}
        for key, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(sizes[key], dtype=parameter.dtype, device=parameter.device)
            setattr(module, key, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        follow_weight(module)


def put_skeletons(model: nn.Module, description: Description) -> dict[str, str]:
    """Replace the Linears and embeddings that are described by empty packed layers of those sizes; what shares an embedding's
    weight shares the packed one. Returns name -> module of the model.

    Structures of one rank's part are smaller than the model's Linears, and of some stacks it has some experts only.
    """
    from .transformers_internals import forget_ties, leave_alone, tied_modules

    structures = description.structures
    take_apart(model)
    for stack, held in description.experts_of_part.items():
        model.get_submodule(stack).keep(*held)  # type: ignore[operator]
    resize_linears(model, description.shapes)
    linears, embeddings = dict(linear_modules(model)), _embeddings(model)
    targets = modules_of_names(model, structures)
    modules: dict[str, str] = {}
    for name, structure in structures.items():
        found = targets[name]
        if found not in linears and found not in embeddings:
            raise FormatError(
                f"config.json packs the module {name}, but {type(model).__name__} has no Linear of that name, nor an embedding"
            )
        dense = embeddings[found] if found in embeddings else as_linear(linears[found])
        if not description.part_of_ranks and tuple(dense.weight.shape) != (
            structure.out_features,
            structure.in_features,
        ):
            raise FormatError(
                f"config.json says that {name} is [{structure.out_features}, {structure.in_features}], but "
                f"{type(model).__name__} has {list(dense.weight.shape)} there"
            )
        if found in modules.values():
            raise FormatError(f"config.json packs the module {found} twice, the second time as {name}")
        if isinstance(dense, nn.Embedding):
            packed = embedding_type(structure.kind)(structure, dtype=dense.weight.dtype)
            put_embedding(model, found, packed, tied_modules(model, found))
        else:
            layer = layer_type(structure.kind)(structure, dense.bias is not None, dense.weight.dtype)
            replace_module(model, found, layer)
        modules[name] = found
    put_together(model)
    for module in model.modules():
        if isinstance(module, ExpertLinear):  # a view of the stack, which is what the folder holds
            leave_alone(module)
    forget_ties(model, modules.values())
    return modules

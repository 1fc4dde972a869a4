"""Reading one rank's part of a packed folder: of packed layers no more than one is whole in memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..folders import Description, PackedFolder, opened
from ..structure import Structure, of_module, weight_of
from ..tensor_parallel import Plan, bias_of_part, cut, plan, ranks_of, take_part
from .skeletons import put_skeletons
from .transformers import model_class_and_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_pretrained(
    folder: str | os.PathLike[str],
    group: dist.ProcessGroup | None = None,
    styles: Mapping[str, str] | None = None,
    *,
    auto_class: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """This rank's part of a packed folder, connected with the others: of packed layers no more than one is whole in memory.

    Args:
        folder: as written by `pyllmq.save_pretrained`; the same for every process.
        group, styles: see `pyllmq.parallel.parallelize`.
        auto_class, kwargs: see `pyllmq.from_pretrained`.

    Raises FormatError for a folder that is damaged or not packed, ValueError where there is no plan.
    """
    from .transformers_internals import skeleton

    ranks, rank = ranks_of(group)
    packed = PackedFolder.open(folder)
    model_class, config = model_class_and_config(folder, auto_class, packed, **kwargs)
    with torch.device("meta"):
        whole = skeleton(model_class, deepcopy(config))
    modules = put_skeletons(whole, packed.description)
    found = plan(whole, ranks, styles)
    with ExitStack() as files:
        held = {
            name: ranges[rank] for name, ranges in found.experts.items() if not whole.get_submodule(name)._parameters
        }
        elsewhere = {
            f"{name}.{child}" for name, part in held.items() for child in whole.get_submodule(name).outside(*part)
        }
        tensors, parts = _read_part(files, packed, modules, found, rank, elsewhere)
        config.quantization_config = Description.of(parts, packed.description.shapes)
        config.quantization_config.part_of_ranks = ranks
        config.quantization_config.experts_of_part = held
        model = type(whole).from_pretrained(None, config=config, state_dict=tensors, **kwargs)
    take_part(model, found, rank, group, done=modules.values())
    return model


def _read_part(
    files: ExitStack,
    packed: PackedFolder,
    modules: Mapping[str, str],
    found: Plan,
    rank: int,
    elsewhere: Collection[str],
) -> tuple[dict[str, Any], dict[str, Structure]]:
    """(state dict of this rank, tensors that are not cut still in their file; structures of this rank's packed modules).

    `elsewhere`: modules that are other ranks'.
    """
    contents = {file: files.enter_context(opened(file)) for file in {header.file for header in packed.headers.values()}}
    holder = {key: contents[header.file] for key, header in packed.headers.items()}
    tensors: dict[str, Any] = {key: content.get_slice(key) for key, content in holder.items()}
    parts = dict(packed.structures)
    for name, structure in packed.structures.items():
        if modules[name] in elsewhere:
            del parts[name]
            for key in (*structure.tensors(), "bias"):
                tensors.pop(f"{name}.{key}", None)
        split = found.splits.get(modules[name])
        if split is None:
            continue
        keys = {key: f"{name}.{key}" for key in structure.tensors()}
        stored = {key: holder[full].get_tensor(full) for key, full in keys.items()}
        with of_module(name):
            part = cut(weight_of(structure, stored), split, rank)
        for key in keys.values():
            del tensors[key]
        tensors |= {f"{name}.{key}": tensor for key, tensor in part.tensors.items()}
        parts[name] = part.structure
        bias = f"{name}.bias"
        if bias in holder:
            tensors[bias] = bias_of_part(holder[bias].get_tensor(bias), split, rank)
    return tensors, parts

"""The quantization method `pyllmq` of transformers; importing this module registers it, and needs transformers.

It is imported while transformers' own modules are (`transformers.on_import`): what else it needs of them it imports when called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts import RoutedExperts
from ..folders import METHOD, Description
from ..formats import FormatError
from ..layers.embedding import PackedEmbedding, TiedEmbedding
from ..layers.linear import TiedLinear, packed_modules
from ..structure import of_module
from ..tensor_parallel import fits, parallelize, planned_linears
from .skeletons import put_skeletons

WHOLE = (PackedEmbedding, TiedEmbedding, TiedLinear, RoutedExperts)
"""Modules that transformers' tensor parallelism does not cut."""


@register_quantization_config(METHOD)
class PyllmqConfig(QuantizationConfigMixin):
    """What config.json says of a packed model."""

    def __init__(self, **described: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.description = Description.parse(described)

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls.__new__(cls)
        config.quant_method = METHOD  # type: ignore[assignment]
        config.description = Description.parse(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self.description)


@register_quantizer(METHOD)
class PyllmqQuantizer(HfQuantizer):
    """Swaps Linears for packed layers on the skeleton, checks that every tensor arrived, makes the machine layouts."""

    requires_calibration = True
    quantization_config: PyllmqConfig
    styles: Mapping[str, str] | None = None
    """The plan for transformers' tensor parallelism, where that was asked for."""
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """Of all the model's tensors: transformers compares them with the files' only where there is no quantizer."""
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    """Asked for, of dense parameters that need not be fp32: with a quantizer, transformers leaves renamed ones in the file's."""

    @property
    def description(self) -> Description:
        return self.quantization_config.description

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Packed layers make their machine layout once and keep it in memory."""
        places = device_map if isinstance(device_map, Mapping) else {}
        on_disk = [name for name, device in places.items() if device == "disk"]
        packed = [m for m in self.description.structures if any(f"{m}.".startswith(f"{name}.") for name in on_disk)]
        if packed:
            raise ValueError(
                f"device_map puts {packed[0]} and {len(packed) - 1} more packed layers on disk; only dense modules can be "
                "there. Give them a device, or share the model out among processes (pyllmq.parallel)"
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        from . import transformers_internals as internals

        files = [str(file) for file in checkpoint_files or ()]
        if not self.description.checked.issuperset(files):
            self.description.check(files)
        put_skeletons(model, self.description)
        self.shapes = {key: tuple(tensor.shape) for key, tensor in _tensors(model).items()}
        in_fp32 = internals.kept_in_fp32(model)
        self.dtypes = {
            name: parameter.dtype
            for name, parameter in model.named_parameters()
            if not any(re.search(pattern, name) for pattern in in_fp32)
        }
        self.styles = take_over_linears(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from . import transformers_internals as internals

        for name, module in packed_modules(model):
            absent = [key for key, buffer in module.named_buffers() if not internals.was_loaded(buffer)]
            if absent:
                raise FormatError(
                    f"the folder has no tensors {name}.{{{', '.join(absent)}}}; it is incomplete, save it again"
                )
        for name, tensor in _tensors(model).items():
            if tuple(tensor.shape) != self.shapes.get(name, tuple(tensor.shape)):
                raise FormatError(
                    f"the tensor {name} is {tuple(tensor.shape)}, but config.json asks for {self.shapes[name]}; the folder is "
                    "damaged, or its files are of two models"
                )
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))
        if self.styles is not None:
            parallelize(model, internals.group_of(model), self.styles)
        for name, module in packed_modules(model):
            if not any(buffer.is_meta for buffer in module.buffers()):
                with of_module(name):
                    module.prepare()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        if self.description.part_of_ranks:
            raise ValueError(
                f"this model is one of {self.description.part_of_ranks} ranks' parts and cannot be saved; the folder that it came "
                "from holds the whole model"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def take_over_linears(model: Any) -> dict[str, str] | None:
    """Where transformers' tensor parallelism is on: the plan, of which transformers itself keeps all but the Linears.

    Its sharded parameters are equal slices of dense tensors; `pyllmq.parallel` cuts packed and dense Linears at the same places.
    """
    from . import transformers_internals as internals

    styles = internals.asked_plan(model)
    if styles is None:
        return None
    # A tied head shares the embedding's tensor, which transformers shards: it keeps both.
    tied = {key.removesuffix(".weight") for key in internals.ties(model)}
    ours = {pattern: style for pattern, style in planned_linears(model, styles).items() if pattern not in tied}
    # What transformers would shard, sum or gather around these is whole on every rank.
    whole = [name for name, module in model.named_modules() if isinstance(module, WHOLE)]
    whole += [f"{name}.{key}" for name in whole for key in model.get_submodule(name)._parameters]
    internals.take_from_plan(model, [*ours, *(p for p in styles if any(fits(p, name) for name in whole))], METHOD)
    return ours

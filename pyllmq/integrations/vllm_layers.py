"""vLLM's side of the plugin: its config and linear method classes with packed weights. Importing this module needs vLLM."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from .. import ops
from ..folders import METHOD, Description
from ..formats import Structure, layer_type
from ..layers.linear import PackedLinear
from .vllm_parts import Arrivals, modules_of_prefix, pieces_of_layer


class PyllmqVllmConfig(QuantizationConfig):
    """`quantization_config` of config.json: the structure of every packed module."""

    def __init__(self, structures: Mapping[str, Structure]) -> None:
        super().__init__()
        self.structures = dict(structures)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PyllmqVllmConfig:
        return cls(Description.parse(config).structures)

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.structures = hf_to_vllm_mapper.apply_dict(self.structures)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        names = modules_of_prefix(prefix, self.structures, self.packed_modules_mapping)
        if isinstance(layer, VocabParallelEmbedding) and names:  # a head is one, too
            raise ValueError(
                f"{prefix} is packed; vLLM needs it dense: compress the model without --embeddings and --head, with "
                f"--exclude {prefix}"
            )
        if not isinstance(layer, LinearBase):
            if any(name.startswith(f"{prefix}.") for name in self.structures):
                raise ValueError(
                    f"{prefix} holds packed experts; vLLM needs them dense: compress the model with --exclude experts"
                )
            return None
        if not names:
            return UnquantizedLinearMethod()
        return PackedLinearMethod(names, self.structures)


class PackedLinearMethod(LinearMethodBase):
    """y = x W^T + bias for one layer of vLLM, made of the packed modules `names`."""

    def __init__(self, names: Sequence[str], structures: Mapping[str, Structure]) -> None:
        self.names = list(names)
        self.structures = {name: structures[name] for name in names}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        pieces = pieces_of_layer(layer, self.names, self.structures, output_partition_sizes, input_size_per_partition)
        layer.arrivals = Arrivals(pieces)
        layer.params_dtype = params_dtype
        keys = {key: dtype for s in self.structures.values() for key, (_, dtype) in s.tensors().items()}
        for key, dtype in keys.items():
            # Empty: what arrives has the checkpoint's shape, and the number of outliers differs from rank to rank.
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = functools.partial(self._arrive, layer, key)  # type: ignore[attr-defined]
            layer.register_parameter(key, parameter)

    def _arrive(self, layer: Any, key: str, parameter: Tensor, tensor: Tensor, shard: str | int | None = None) -> None:
        place = 0 if shard is None else shard if isinstance(shard, int) else "qkv".index(shard)
        layer.arrivals.add(self.names[place], key, tensor)

    def process_weights_after_loading(self, layer: Any) -> None:
        placeholders = [key for s in self.structures.values() for key in s.tensors()]
        device = next(getattr(layer, key).device for key in placeholders)
        layer.packed = nn.ModuleList(
            layer_type(weight.kind).from_weight(weight.to(device), dtype=layer.params_dtype)
            for weight in layer.arrivals.weights()
        )
        for key in dict.fromkeys(placeholders):
            delattr(layer, key)
        del layer.arrivals

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        parts: Sequence[PackedLinear] = layer.packed
        if len(parts) == 1:
            return ops.packed_linear(x, parts[0].operand(), bias, parts[0].precision)
        y = torch.cat([part(x) for part in parts], -1)
        return y if bias is None else y + bias

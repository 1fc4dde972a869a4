"""vLLM's side of the plugin: its config and linear method classes with packed weights. Importing this module needs vLLM."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from .. import ops
from ..folders import METHOD, Description
from ..formats import Structure, layer_type
from ..layers.linear import PackedLinear
from ..operations import DEFAULT_PRECISION, PackedExperts
from .vllm_parts import (
    PLAIN_QKV,
    Arrivals,
    ExpertArrivals,
    gate_named,
    modules_of_experts,
    modules_of_prefix,
    pieces_of_layer,
    with_dense,
)


class PyllmqVllmConfig(QuantizationConfig):
    """`quantization_config` of config.json: the structure of every packed module."""

    def __init__(self, structures: Mapping[str, Structure]) -> None:
        super().__init__()
        self.structures = dict(structures)
        """By vLLM's names of the modules."""
        self.stored = {name: name for name in structures}
        """Name of a module in the folder -> vLLM's."""
        self.taken: set[str] = set()
        """vLLM's names of the modules that a layer holds packed."""
        self.on_the_way: dict[tuple[str, str], Tensor] = {}
        """(vLLM's name of a module, key) -> a tensor that the model's loader was given and has not brought yet."""
        self.experts: dict[str, ExpertArrivals | None] = {}
        """vLLM's names of experts' modules -> where their tensors go, past the model's loader; None: another rank's."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PyllmqVllmConfig:
        description = Description.parse(config)
        if description.shapes:
            raise ValueError(
                f"{next(iter(description.shapes))} has a width of its own, and vLLM builds all blocks alike: prune with "
                "--allocation uniform"
            )
        return cls(description.structures)

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
        self.stored = {stored: hf_to_vllm_mapper.map_name(name) for stored, name in self.stored.items()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        names = modules_of_prefix(prefix, self.structures, self.packed_modules_mapping)
        if isinstance(layer, VocabParallelEmbedding) and names:  # a head is one, too
            raise ValueError(
                f"{prefix} is packed; vLLM needs it dense: compress the model without --embeddings and --head, with "
                f"--exclude {prefix}"
            )
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        if not names or (isinstance(layer, QKVParallelLinear) and names == [prefix] and not prefix.endswith(PLAIN_QKV)):
            return UnquantizedLinearMethod()
        self.taken.update(names)
        return PackedLinearMethod(names, self.structures, self.on_the_way)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> PackedExpertsMethod | None:
        of_experts = {name for name in self.structures if name.startswith(f"{prefix}.")}
        parts = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        found = modules_of_experts(prefix, self.structures, [name for name in parts if name is not None])
        if not of_experts:
            return None
        if len(found) != layer.moe_config.num_experts or of_experts != {
            name for ups, down in found for name in (*ups, down)
        }:
            raise ValueError(
                f"{prefix} has {layer.moe_config.num_experts} experts, of which {len(found)} are packed, as far as the names of "
                f"modules tell; compress all of them, or none (--exclude experts)"
            )
        self.taken |= of_experts
        return PackedExpertsMethod(layer.moe_config, found, self.structures, self.experts)

    def noted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for stored, tensor in tensors:
            name, _, key = stored.rpartition(".")
            name = self.stored.get(name, "")
            if name in self.experts:
                if (arrivals := self.experts[name]) is not None:
                    arrivals.add(name, key, tensor)
                continue
            if name in self.taken and key in self.structures[name].tensors():
                self.on_the_way[name, key] = tensor
            yield stored, tensor


def decode_what_no_layer_takes() -> None:
    """Let vLLM's loader hand on as dense weights what its model holds dense or reshapes, whatever a folder holds.

    Whether a layer may be packed is known only by then: some are made without the config (the gate of Qwen2-MoE's shared expert).
    """
    plain = DefaultModelLoader.get_all_weights

    @functools.wraps(plain)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        weights = plain(self, model_config, model)
        configs = [getattr(module, "quant_config", None) for module in model.modules()]
        config = next((found for found in configs if isinstance(found, PyllmqVllmConfig)), None)
        if config is None:
            return weights
        dense = {stored: config.structures[name] for stored, name in config.stored.items() if name not in config.taken}
        return config.noted(with_dense(weights, dense, model_config.dtype))

    DefaultModelLoader.get_all_weights = get_all_weights


class PackedLinearMethod(LinearMethodBase):
    """y = x W^T + bias for one layer of vLLM, made of the packed modules `names`."""

    def __init__(
        self, names: Sequence[str], structures: Mapping[str, Structure], on_the_way: dict[tuple[str, str], Tensor]
    ) -> None:
        self.names, self.on_the_way = list(names), on_the_way
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
        name = self.names[place]
        stored = self.on_the_way.pop((name, key), tensor)
        if stored.shape != tensor.shape or not torch.equal(stored, tensor):
            raise ValueError(
                f"the loader of this vLLM model changes the order of rows of {name}, which a packed weight does not survive; "
                f"compress the model with --exclude {name.rpartition('.')[2]}"
            )
        layer.arrivals.add(name, key, tensor)

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


class PackedExpertsMethod(FusedMoEMethodBase):
    """The routed experts of a vLLM layer, packed; `found` are the modules of each (modules_of_experts).

    Their tensors go past the model's loader, which knows names of dense weights only. Tensor parallelism cuts units, expert
    parallelism shares experts out: a token's choices of other ranks' experts are none here, and vLLM sums the outputs.
    """

    def __init__(
        self,
        moe: Any,
        found: Sequence[tuple[Sequence[str], str]],
        structures: Mapping[str, Structure],
        experts: dict[str, ExpertArrivals | None],
    ) -> None:
        super().__init__(moe)
        self.found, self.structures, self.experts = found, structures, experts

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if layer.apply_router_weight_on_input:
            raise ValueError(
                "packed experts take routing weights on their output; compress the model with --exclude experts"
            )
        swiglu = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
        self.gate = gate_named(layer.activation.value, *swiglu)
        parallel = layer.moe_config.moe_parallel_config
        local = range(num_experts) if layer.expert_map is None else layer.expert_map.tolist()
        arrivals: dict[int, ExpertArrivals] = {}
        for (ups, down), place in zip(self.found, local, strict=True):
            here = None
            if place >= 0:
                ranks = parallel.tp_rank, parallel.tp_size
                here = arrivals[place] = ExpertArrivals.of(ups, down, self.structures, self.gate, *ranks)
            self.experts |= dict.fromkeys((*ups, down), here)
        layer.arrivals = [arrivals[place] for place in range(num_experts)]
        # Tells the device, as weights would.
        layer.register_parameter("placeholder", nn.Parameter(torch.empty(0), requires_grad=False))

    def process_weights_after_loading(self, layer: Any) -> None:
        device = layer.placeholder.device
        weights = [arrivals.weights() for arrivals in layer.arrivals]
        up, down = (tuple(weight.to(device).prepack() for weight in part) for part in zip(*weights, strict=True))
        biases = zip(*(arrivals.bias() for arrivals in layer.arrivals), strict=True)
        up_bias, down_bias = (None if bias[0] is None else torch.stack(bias).to(device) for bias in biases)
        layer.packed = PackedExperts(up, down, self.gate, up_bias, down_bias, DEFAULT_PRECISION)
        del layer.placeholder, layer.arrivals

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Shared experts are vLLM's: only kernels that overlap them are given them."""
        experts, index = len(layer.packed.up), topk_ids.long()
        none = index < 0
        if layer.expert_map is not None:
            index = layer.expert_map.long()[index.clamp_min(0)]
            none = none | (index < 0)
        return ops.routed_experts(x, index.masked_fill(none, experts), topk_weights, layer.packed)

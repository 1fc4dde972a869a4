"""vLLM: packed folders in its server. `register()` is the entry point `vllm.general_plugins`, called in every vLLM process.

vLLM makes one layer of q, k and v (and one of gate and up) and shards it itself. The tensors of a packed module come as they
stand in the checkpoint; as soon as a module's are complete, this rank's rows or columns are cut out. After loading, codebooks of
the same widths become segments of one weight, one call; others stay side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..formats import (
    FORMAT_VERSION,
    CodebookWeight,
    FormatError,
    PackedWeight,
    Structure,
    layer_type,
    structure_from_dict,
    weight_type,
)
from ..layers.linear import PackedLinear
from .transformers import METHOD


def register() -> None:
    """Tell vLLM about the quantization method `pyllmq`; harmless when repeated."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(_classes()[0])


# ---- what one layer holds -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One packed module of the checkpoint and the part of it that one output partition of a vLLM layer needs."""

    name: str
    structure: Structure
    rows: tuple[int, int]
    columns: tuple[int, int]

    def cut(self, weight: PackedWeight) -> PackedWeight:
        if self.rows != (0, self.structure.out_features):
            weight = weight.cut_rows(*self.rows)
        if self.columns != (0, self.structure.in_features):
            weight = weight.cut_columns(*self.columns)
        return weight


@dataclass
class Arrivals:
    """The tensors of a layer's modules as the loader brings them, until a module is complete and its pieces are cut."""

    pieces: Sequence[Piece]
    waiting: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    parts: dict[int, PackedWeight] = field(default_factory=dict)

    def add(self, name: str, key: str, tensor: Tensor) -> None:
        structure = next(piece.structure for piece in self.pieces if piece.name == name)
        tensors = self.waiting.setdefault(name, {})
        tensors[key] = tensor
        if set(tensors) < set(structure.tensors()):
            return
        try:
            weight = weight_type(structure.kind).from_tensors(tensors, structure.out_features, structure.in_features)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
        self.parts |= {i: piece.cut(weight) for i, piece in enumerate(self.pieces) if piece.name == name}
        self.waiting[name] = {}

    def weights(self) -> list[PackedWeight]:
        """The parts in the order of the layer's outputs; neighbours that can share a call are one weight."""
        missing = [piece.name for i, piece in enumerate(self.pieces) if i not in self.parts]
        if missing:
            raise FormatError(
                f"the folder lacks tensors of {', '.join(missing)}; it is incomplete, copy or compress it again"
            )
        parts = [self.parts[i] for i in range(len(self.pieces))]
        books = [part for part in parts if isinstance(part, CodebookWeight)]
        if len(books) == len(parts) and all(torch.equal(book.column_bits, books[0].column_bits) for book in books):
            return [CodebookWeight.concatenate(books)]
        return parts


def pieces_of_layer(
    layer: Any, names: Sequence[str], structures: Mapping[str, Structure], outputs: Sequence[int], inputs: int
) -> list[Piece]:
    """What this rank's layer, with partitions of `outputs` rows and `inputs` columns, takes from its modules.

    `names` is one module for each partition (q, k, v), or one for all of them where the checkpoint holds them as one.
    """
    if len(names) not in (1, len(outputs)):
        raise ValueError(f"{', '.join(names)} cannot fill {len(outputs)} partitions")
    rank, ranks = int(getattr(layer, "tp_rank", 0)), int(getattr(layer, "tp_size", 1))
    replicas = [1, *[getattr(layer, "num_kv_head_replicas", 1)] * (len(outputs) - 1)]
    pieces, first = [], 0
    for i, size in enumerate(outputs):
        name = names[i if len(names) > 1 else 0]
        structure = structures[name]
        start = 0 if len(names) > 1 else first
        # A column-parallel layer has fewer rows than the checkpoint, a replicated or row-parallel one has all of them.
        if (size if len(names) > 1 else sum(outputs)) < structure.out_features:
            start += size * (rank // replicas[i])
            size_of_all = size * ranks // replicas[i]
        else:
            size_of_all = size
        first += size_of_all
        column = 0 if inputs == structure.in_features else inputs * rank
        piece = Piece(name, structure, (start, start + size), (column, column + inputs))
        if piece.rows[1] > structure.out_features or piece.columns[1] > structure.in_features:
            raise ValueError(
                f"{name} is [{structure.out_features}, {structure.in_features}], too small for rows {piece.rows[0]} to "
                f"{piece.rows[1]} and columns {piece.columns[0]} to {piece.columns[1]}, which rank {rank} of {ranks} needs"
            )
        pieces.append(piece)
    return pieces


def modules_of_prefix(
    prefix: str, structures: Mapping[str, Structure], fused: Mapping[str, Sequence[str]]
) -> list[str]:
    """Packed modules of the checkpoint behind the vLLM layer `prefix`; none if it is dense."""
    if prefix in structures:
        return [prefix]
    parent, _, leaf = prefix.rpartition(".")
    names = [f"{parent}.{part}" if parent else part for part in fused.get(leaf, ())]
    packed = [name for name in names if name in structures]
    if packed and len(packed) < len(names):
        dense = [name for name in names if name not in structures]
        raise ValueError(
            f"vLLM runs {', '.join(names)} as one layer, but {', '.join(dense)} {'is' if len(dense) == 1 else 'are'} dense; "
            "compress all of them or none"
        )
    return packed


# ---- vLLM's side ----------------------------------------------------------------------------------------------------


@functools.cache
def _classes() -> tuple[Any, Any]:
    """(config class, linear method class); made when vLLM is there to derive from."""
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    class PyllmqVllmConfig(QuantizationConfig):
        """`quantization_config` of config.json: the structure of every packed module."""

        def __init__(self, structures: Mapping[str, Structure]) -> None:
            super().__init__()
            self.structures = dict(structures)

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> PyllmqVllmConfig:
            version = config.get("format_version")
            if version != FORMAT_VERSION:
                raise FormatError(f"format_version is {version!r}; this pyllmq reads version {FORMAT_VERSION}")
            return cls({name: structure_from_dict(described) for name, described in config["modules"].items()})

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
            if isinstance(layer, ParallelLMHead) and names:
                raise ValueError(f"{prefix} is packed; vLLM needs it dense: compress the model with --exclude {prefix}")
            if not isinstance(layer, LinearBase):
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
            pieces = pieces_of_layer(
                layer, self.names, self.structures, output_partition_sizes, input_size_per_partition
            )
            layer.arrivals = Arrivals(pieces)
            layer.params_dtype = params_dtype
            keys = {key: dtype for s in self.structures.values() for key, (_, dtype) in s.tensors().items()}
            for key, dtype in keys.items():
                # Empty: what arrives has the checkpoint's shape, and the number of outliers differs from rank to rank.
                parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                parameter.weight_loader = functools.partial(self._arrive, layer, key)  # type: ignore[attr-defined]
                layer.register_parameter(key, parameter)

        def _arrive(
            self, layer: Any, key: str, parameter: Tensor, tensor: Tensor, shard: str | int | None = None
        ) -> None:
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

    return PyllmqVllmConfig, PackedLinearMethod

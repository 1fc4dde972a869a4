"""transformers: `quant_method: "pyllmq"` in a config.json, packed layers out of `from_pretrained`, and back.

`register()` is called when transformers' quantizers are first imported (see `on_import`), so importing pyllmq does not import
transformers.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..formats import FORMAT_VERSION, FormatError, Structure, layer_type, structure_from_dict
from ..layers.linear import packed_modules
from ..linears import as_linear, linear_modules, replace_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "pyllmq"
_TRIGGER = "transformers.quantizers"


# ---- registration ---------------------------------------------------------------------------------------------------


def register() -> None:
    """Tell transformers' auto classes about the quantization method `pyllmq`; harmless when repeated."""
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in AUTO_QUANTIZER_MAPPING:
        return

    @register_quantization_config(METHOD)
    class PyllmqConfig(QuantizationConfigMixin):
        """What config.json says of a packed model: the format version and the structure of every packed module."""

        part_of_ranks = 0
        """Of how many processes the modules are one's part; 0: the modules are whole. Never in a file."""

        def __init__(
            self,
            modules: Mapping[str, Any],
            format_version: int = FORMAT_VERSION,
            part_of_ranks: int = 0,
            **unknown: Any,
        ) -> None:
            unknown.pop("quant_method", None)
            if isinstance(part_of_ranks, bool) or not isinstance(part_of_ranks, int):
                raise FormatError(f"part_of_ranks is {part_of_ranks!r}; no folder has it")
            if part_of_ranks:
                self.part_of_ranks = part_of_ranks
            if format_version != FORMAT_VERSION:
                raise FormatError(
                    f"format_version is {format_version!r}; this pyllmq reads version {FORMAT_VERSION}. Update pyllmq-kernels, or "
                    "compress the model again"
                )
            if unknown:
                raise FormatError(
                    f"quantization_config has unknown keys {sorted(unknown)}; allowed: format_version, modules"
                )
            if not isinstance(modules, Mapping) or not modules:
                raise FormatError(
                    "quantization_config must name its packed modules under 'modules'; the folder is damaged"
                )
            for name, described in modules.items():
                if not isinstance(described, Mapping):
                    raise FormatError(f"quantization_config of module {name} is {described!r}; it must be an object")
            self.quant_method = METHOD  # type: ignore[assignment]
            self.format_version = format_version
            self.modules = {name: dict(described) for name, described in modules.items()}
            self.structures()

        def structures(self) -> dict[str, Structure]:
            found = {}
            for name, described in self.modules.items():
                try:
                    found[name] = structure_from_dict(described)
                except FormatError as error:
                    raise FormatError(f"quantization_config of module {name}: {error}") from error
            return found

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
        """Asked for, of the dense parameters: with a quantizer, transformers leaves renamed ones in the file's."""

        def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
            """Packed layers make their machine layout once and keep it in memory."""
            places = device_map if isinstance(device_map, Mapping) else {}
            on_disk = [name for name, device in places.items() if device == "disk"]
            packed = [
                m for m in self.quantization_config.modules if any(f"{m}.".startswith(f"{name}.") for name in on_disk)
            ]
            if packed:
                raise ValueError(
                    f"device_map puts {packed[0]} and {len(packed) - 1} more packed layers on disk; only dense modules can be "
                    "there. Give them a device, or share the model out among processes (pyllmq.parallel)"
                )

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
            structures, part = self.quantization_config.structures(), self.quantization_config.part_of_ranks > 0
            if part and checkpoint_files is not None:
                raise FormatError("config.json describes one rank's part of a model; folders hold whole models")
            check_files(structures, checkpoint_files)
            put_skeletons(model, structures, part)
            self.shapes = {key: tuple(tensor.shape) for key, tensor in _tensors(model).items()}
            self.dtypes = asked_dtypes(model)
            self.styles = take_over_linears(model)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for name, module in packed_modules(model):
                absent = [
                    key for key, buffer in module.named_buffers() if not getattr(buffer, "_is_hf_initialized", False)
                ]
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
                from ..parallel import parallelize

                mesh = model._device_mesh
                parallelize(model, (mesh if mesh.ndim == 1 else mesh["tp"]).get_group(), self.styles)
            for name, module in packed_modules(model):
                try:
                    module.prepare()
                except FormatError as error:
                    raise FormatError(f"{name}: {error}") from error
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            expect_whole(self.quantization_config.part_of_ranks)
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Lets the import of transformers' quantizers run as it would, then registers the method."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec


def on_import() -> None:
    """Register now if transformers' quantizers are imported already, else as soon as they are."""
    if _TRIGGER in sys.modules:
        register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


# ---- loading --------------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def asked_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Of the parameters of a skeleton, but for those that the architecture keeps in fp32 whatever is asked for."""
    kept = [getattr(model, f"_keep_in_fp32_modules{strict}", None) or () for strict in ("", "_strict")]
    patterns = [re.escape(pattern).replace(r"\*", ".*") for patterns in kept for pattern in patterns]
    return {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if not any(re.search(pattern, name) for pattern in patterns)
    }


def put_skeletons(model: nn.Module, structures: Mapping[str, Structure], part: bool = False) -> dict[str, str]:
    """Replace the Linears that `structures` names by empty packed layers of those sizes; returns name -> module of the model.

    Structures of one rank's `part` are smaller than the model's Linears.
    """
    linears = dict(linear_modules(model))
    prefix = getattr(model, "base_model_prefix", "")
    modules: dict[str, str] = {}
    for name, structure in structures.items():
        # A checkpoint of a bare encoder loads into a model with a head, and the other way round.
        candidates = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        found = next((candidate for candidate in candidates if candidate in linears), None)
        if found is None:
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
    return modules


def take_over_linears(model: Any) -> dict[str, str] | None:
    """Where transformers' tensor parallelism is on: the plan, of which transformers itself keeps all but the Linears.

    Its sharded parameters are equal slices of dense tensors; `pyllmq.parallel` cuts packed and dense Linears at the same places.
    """
    asked = getattr(model.config, "distributed_config", None)
    if asked is None or (asked.tp_size or 1) < 2:
        return None
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

    from ..parallel import planned_linears

    does_nothing: Any = TensorParallelLayer()
    ALL_PARALLEL_STYLES.register(METHOD, does_nothing)
    styles = dict(asked.tp_plan) if isinstance(asked.tp_plan, Mapping) else dict(model.tp_plan)
    # A tied head shares the embedding's tensor, which transformers shards: it keeps both.
    tied = {key.removesuffix(".weight") for key in getattr(model, "all_tied_weights_keys", None) or {}}
    tied -= {name for name, _ in packed_modules(model)}
    ours = {pattern: style for pattern, style in planned_linears(model, styles).items() if pattern not in tied}
    theirs = {pattern: METHOD if pattern in ours else style for pattern, style in styles.items()}
    if isinstance(asked.tp_plan, Mapping):
        asked.tp_plan = theirs
    model._tp_plan = theirs
    return ours


def expect_whole(ranks: int) -> None:
    """For saving."""
    if ranks:
        raise ValueError(
            f"this model is one of {ranks} ranks' parts and cannot be saved; the folder that it came from holds the whole model"
        )


def check_files(structures: Mapping[str, Structure], files: Sequence[str] | None) -> None:
    """Compare the headers of the safetensors files with what config.json says, before anything is loaded."""
    from safetensors import SafetensorError, safe_open

    names = {
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I32": "int32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
    }
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            raise FormatError(f"{file} is not a safetensors file; packed models are stored as nothing else")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (safe_open is no dict)
                    part = tensors.get_slice(key)
                    found[key] = (tuple(part.get_shape()), names.get(part.get_dtype(), part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{file} cannot be read ({error}); it is truncated or damaged, copy or compress it again"
            ) from error
    if not files:
        return
    for name, structure in structures.items():
        for key, (shape, dtype) in structure.tensors().items():
            wanted = (shape, str(dtype).removeprefix("torch."))
            full = f"{name}.{key}"
            if full not in found:
                raise FormatError(
                    f"the tensor {full} is missing from {', '.join(map(str, files))}; the folder is incomplete"
                )
            if found[full] != wanted:
                raise FormatError(
                    f"the tensor {full} is {found[full][1]} {found[full][0]}, but config.json asks for {wanted[1]} {wanted[0]}"
                )


def from_pretrained(folder: str | os.PathLike[str], *, auto_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load a packed model from a folder (or hub id), whatever kind of model it is.

    Args:
        folder: as written by `save_pretrained`.
        auto_class: for example `transformers.AutoModelForCausalLM`; None takes the class that config.json names.
        kwargs: passed on to transformers.

    Raises FormatError for a folder that is damaged, incomplete, of an unknown version, or not packed at all. Tensors that only an
    `auto_class` asks for (a new head) are transformers' to fill.
    """
    from ..loading import is_packed, packed_structures

    checked = is_packed(folder) and not {"subfolder", "variant"} & kwargs.keys()
    if checked:
        packed_structures(folder)  # before transformers builds a model of sizes that no file has
    model_class, config = model_class_and_config(folder, auto_class, **kwargs)
    if checked:
        expect_tensors_for(config, Path(folder))
    if auto_class is not None or kwargs.get("output_loading_info"):
        return model_class.from_pretrained(folder, **kwargs)
    model, info = model_class.from_pretrained(folder, **{**kwargs, "output_loading_info": True})
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise FormatError(
            f"{folder} has no tensors for {len(names)} parameters of {type(model).__name__}, such as {names[0]}; the folder is "
            "incomplete, copy or compress it again"
        )
    return model


def expect_tensors_for(config: Any, folder: Path) -> None:
    """transformers would build any number of blocks, for hours, before it looks for their tensors."""
    from safetensors import safe_open

    layers, tensors = getattr(config.get_text_config(), "num_hidden_layers", 0), 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            tensors += len(content.keys())
    if isinstance(layers, int) and layers > tensors:
        raise FormatError(
            f"config.json asks for {layers} layers, {folder} holds {tensors} tensors; the folder is damaged"
        )


def model_class_and_config(folder: str | os.PathLike[str], auto_class: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """The class and the config of a packed folder; arguments and errors as for `from_pretrained`."""
    import transformers

    register()
    config = transformers.AutoConfig.from_pretrained(folder, **_config_arguments(kwargs))
    described = getattr(config, "quantization_config", None)
    method = (
        described.get("quant_method") if isinstance(described, Mapping) else getattr(described, "quant_method", None)
    )
    if method != METHOD:
        raise FormatError(
            f"{folder} is not a pyllmq folder (quant_method is {method!r}); compress it first with `pyllmq compress`, or load it "
            "with transformers"
        )
    if auto_class is None:
        auto_class = class_of(getattr(config, "architectures", None))
    return auto_class, config


def class_of(architectures: Any) -> Any:
    """The transformers class of a model that config.json names; AutoModel where it names none that there is."""
    import transformers

    first = architectures[0] if isinstance(architectures, Sequence) and architectures else None
    found = getattr(transformers, first, None) if isinstance(first, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


def _config_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v
        for k, v in kwargs.items()
        if k in ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
    }


def structures_of(config: Any) -> dict[str, Structure]:
    """Name -> structure of every packed module that a model's config describes."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    described = config.quantization_config
    if isinstance(described, Mapping):
        described = AutoQuantizationConfig.from_dict(dict(described))
    return described.structures()


def packed_description(structures: Mapping[str, Structure]) -> dict[str, Any]:
    """The `quantization_config` of a model with these packed modules."""
    modules = {name: structure.to_dict() for name, structure in structures.items()}
    return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "modules": modules}


# ---- saving ---------------------------------------------------------------------------------------------------------


def mark_packed(model: nn.Module) -> None:
    """Let a transformers model know that it holds packed layers, so that `save_pretrained` writes what loading needs."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        found = getattr(model, "tensor_parallel_plan", None)
        expect_whole(0 if found is None else found.ranks)
        describe_packed(model, {name: module.structure for name, module in packed_modules(model)})


def describe_packed(model: Any, structures: Mapping[str, Structure]) -> None:
    """Put into the model's config what loading needs to know of its packed layers."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    register()
    config = AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](**packed_description(structures))
    model.config.quantization_config = config
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING[METHOD](config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD


def save_pretrained(model: PreTrainedModel, folder: str | os.PathLike[str], *others: Any) -> None:
    """Write a packed model (and `others`, such as its tokenizer) as a folder that is whole or not there.

    Everything is written into a new folder beside the target, which then takes the target's place; if anything fails, an
    earlier folder of that name stays as it was.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give the name of a folder")
    mark_packed(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for item in (model, *others):
            item.save_pretrained(part)
        part.chmod(0o755)
        put_folder(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def put_folder(part: Path, target: Path) -> None:
    """Move the finished folder `part` to `target`; an earlier `target` is removed only after it was replaced."""
    earlier = None
    if target.exists():
        earlier = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "folder"
        os.rename(target, earlier)
    try:
        os.rename(part, target)
    except OSError:
        if earlier is not None:
            os.rename(earlier, target)
        raise
    if earlier is not None:
        shutil.rmtree(earlier.parent, ignore_errors=True)

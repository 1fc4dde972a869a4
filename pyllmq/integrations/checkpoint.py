"""A dense transformers folder of which only the parts in use are in memory.

transformers builds the model on the meta device and says which tensor of the checkpoint becomes which of the model; blocks are
then filled from the safetensors files, one at a time, by the same functions that `from_pretrained` uses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..formats import FormatError
from ..linears import is_transposed_linear
from ..memory import page_out
from ..weights import OUTSIDE, Weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, as its index lists them. Raises ValueError if they are not there."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise FormatError(f"{folder / INDEX} cannot be read ({error!r}); the folder is damaged") from error
        files = [folder / name for name in names]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; weights are read block by block from safetensors files. Copy it again, or hold the whole "
                "model in memory (--in-memory)"
            )
    return files


class StreamedModel(Weights):
    """The model of `folder`, in eval mode, its tensors on the meta device until a unit is loaded.

    Raises ValueError for a folder that is quantized, incomplete, or not in safetensors.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        self.files = checkpoint_files(self.folder)
        for file in self.files:
            with opened(file):  # a damaged header is named here, before transformers meets it
                pass
        self.model = _skeleton(self.folder, self.device)
        self.blocks: tuple[str, ...] = ()
        self._users: dict[str, int] = {}
        self._held: dict[str, list[Tensor]] = {}
        self._conversions: dict[str, Any] = {}
        self._targets = self._read_keys()

    # ---- which tensor is where ----

    def _read_keys(self) -> dict[str, tuple[Path, str]]:
        """Key of the checkpoint -> its file and the key of the model that it goes to."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = cast(list[Any], get_model_conversion_mapping(self.model))
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        found: dict[str, tuple[Path, str]] = {}
        for file in self.files:
            with opened(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118  (safe_open is no dict)
                    prefix = self.model.base_model_prefix
                    target, _ = rename_source_key(key, renamings, converters, prefix, known)
                    if target not in known and key in known:
                        target = key
                    if target in known:
                        found[key] = file, target
        return found

    def keys(self) -> list[str]:
        """Of the checkpoint's tensors those that belong to the model."""
        return list(self._targets)

    def weight_keys(self, linears: Mapping[str, nn.Module]) -> dict[str, str]:
        """Name of each Linear -> key of its weight in the checkpoint. Raises ValueError if that is no tensor of its own there."""
        keys: dict[str, list[str]] = {}
        for key, (_, target) in self._targets.items():
            keys.setdefault(target, []).append(key)
        found = {}
        for name, module in linears.items():
            sources = keys.get(f"{name}.weight", [])
            if len(sources) == 1 and sources[0].endswith("weight"):
                with opened(self._targets[sources[0]][0]) as tensors:
                    if list(tensors.get_slice(sources[0]).get_shape()) == list(cast(Tensor, module.weight).shape):
                        found[name] = sources[0]
                        continue
            raise ValueError(
                f"{name}.weight is no tensor of its own in {self.folder}, transformers makes it from others; take a calibrated "
                "method, or hold the whole model in memory (--in-memory)"
            )
        return found

    def weight_of(self, name: str, module: nn.Module) -> Tensor:
        """The weight [N, K] of one Linear, read from its file. Raises ValueError as `weight_keys` does."""
        (key,) = self.weight_keys({name: module}).values()
        with opened(self._targets[key][0]) as tensors:
            stored = tensors.get_tensor(key)
        return stored.T if is_transposed_linear(module) else stored

    def split(self, blocks: Iterable[str]) -> None:
        """Make units of these blocks; all else is `OUTSIDE`."""
        self.blocks = tuple(blocks)

    def settle(self, blocks: Iterable[str]) -> None:
        wanted = set(blocks)
        self.blocks = tuple(block for block in self.blocks if block in wanted)

    def unit_of(self, key: str) -> str:
        """The unit to which a tensor of the model belongs."""
        parts = key.split(".")
        for end in range(1, len(parts)):
            if (name := ".".join(parts[:end])) in self.blocks:
                return name
        return OUTSIDE

    # ---- loading ----

    def load(self, unit: str) -> None:
        self._users[unit] = self._users.get(unit, 0) + 1
        if self._users[unit] > 1:
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        wanted: dict[Path, list[str]] = {}
        for key, (file, target) in self._targets.items():
            if self.unit_of(target) == unit:
                wanted.setdefault(file, []).append(key)
        tensors: dict[str, Tensor] = {}
        for file, keys in wanted.items():
            with opened(file) as content:
                tensors |= {key: content.get_tensor(key) for key in keys}
        mapping = cast(list[Any], get_model_conversion_mapping(self.model))
        config = LoadStateDictConfig(device_map={"": self.device}, dtype=self.model.dtype, weight_mapping=mapping)
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        self._conversions[unit] = self.model._weight_conversions
        wrong = [*info.mismatched_keys, *info.conversion_errors.values(), *info.error_msgs]
        if wrong:
            raise FormatError(f"{self.folder} does not fit its config.json: {wrong[0]}; the folder is damaged")
        if unit == OUTSIDE:
            # A tied tensor is in the checkpoint once.
            missing = set(self.model.state_dict()) - {target for _, target in self._targets.values()}
            self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        held = [parameter for name, parameter in self.model.named_parameters() if self.unit_of(name) == unit]
        for parameter in held:
            parameter.requires_grad_(False)
        self._held[unit] = held

    def drop(self, unit: str) -> None:
        self._users[unit] = max(0, self._users.get(unit, 0) - 1)
        if self._users[unit]:
            return
        self._held.pop(unit, None)
        for module_name, module in self.model.named_modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    key = f"{module_name}.{name}".lstrip(".")
                    kept = tensor is None or tensor.is_meta or name in module._non_persistent_buffers_set
                    if not kept and self.unit_of(key) == unit:
                        tensors[name] = _on_meta(tensor)

    def rest(self, unit: str) -> None:
        page_out(self._held.get(unit, []))

    # ---- what is written ----

    def checkpoint_tensors(self, unit: str) -> dict[str, Tensor]:
        """The tensors of a loaded unit under their names in a checkpoint, packed layers included."""
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        module = self.model.get_submodule(unit) if unit else self.model
        held = module.state_dict(prefix=f"{unit}." if unit else "")
        held = {key: value for key, value in held.items() if not value.is_meta and self.unit_of(key) == unit}
        if unit == OUTSIDE:
            held = remove_tied_weights_from_state_dict(held, self.model)
        self.model._weight_conversions = self._conversions[unit]
        return {k: v.contiguous() for k, v in revert_weight_conversion(self.model, held).items()}

    def save_settings(self, folder: Path) -> None:
        """config.json and generation_config.json, as `save_pretrained` writes them."""
        model = self.model
        model.config.dtype = model.dtype
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _skeleton(folder: Path, device: torch.device) -> Any:
    from ..loading import read_config
    from .transformers import class_of

    config = read_config(folder)
    if "quantization_config" in config:
        described = config["quantization_config"]
        method = described.get("quant_method") if isinstance(described, Mapping) else described
        raise ValueError(f"{folder} is quantized already ({method}); compress the dense model that it was made from")
    model_class = class_of(config.get("architectures"))
    with quiet_transformers():
        model, info = model_class.from_pretrained(
            folder, dtype="auto", device_map={"": "meta"}, use_safetensors=True, output_loading_info=True
        )
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ValueError(
            f"{folder} has no tensors for {len(names)} parameters of {type(model).__name__}, such as {names[0]}, which "
            "transformers would fill with random numbers; complete the checkpoint first"
        )
    # Rotary angles and the like are in no checkpoint: the model computes them.
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
                module._is_hf_initialized = False
    model.initialize_weights()
    return model


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file. Raises FormatError if it is truncated or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise FormatError(f"{file} cannot be read ({error}); it is truncated or damaged, copy it again") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""A dense transformers folder of which only the parts in use are in memory.

transformers builds the model on the meta device and says which tensor of the checkpoint becomes which of the model; blocks are
then filled from the files, one at a time, by the same functions that `from_pretrained` uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..folders import Folder, Header, checkpoint_files, is_dense, opened, quantization_method, read_config, read_headers
from ..formats import FormatError
from ..linears import is_transposed_linear
from ..memory import page_out
from ..weights import OUTSIDE, MadeFromOthersError, Weights
from . import transformers_internals as internals
from .transformers import dense_class, expect_complete, load_on_meta, quiet_transformers, valid_config


class StreamedModel(Weights):
    """The model of `folder`, in eval mode, its tensors on the meta device until a unit is loaded.

    Args:
        architecture: name of the transformers class; None takes the one that config.json names.

    Raises ValueError for a folder that is quantized, incomplete, without weights, or of an unknown architecture.
    """

    def __init__(self, folder: Folder, device: torch.device | str = "cpu", architecture: str | None = None) -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        self.files = checkpoint_files(self.folder)
        self.headers = read_headers(self.files)  # a damaged one is named here, before transformers meets it
        self.model = _skeleton(self.folder, self.headers, self.device, architecture)
        self.blocks: tuple[str, ...] = ()
        self._renamed: dict[str, str] = {}
        self._users: dict[str, int] = {}
        self._held: dict[str, list[Tensor]] = {}
        known = self.model.state_dict()
        found = internals.keys_of_model(self.model, self.headers, known)
        self._targets = {key: target for key, target in found.items() if target in known}
        """Key of the checkpoint -> the key of the model that it goes to."""
        self._leave_out_copies()
        self.without_place = [key for key in self.headers if key not in self._targets]
        """Keys of the checkpoint that the model has no place for; they are copied as they are."""

    # ---- which tensor is where ----

    def _leave_out_copies(self) -> None:
        """Tied tensors that the files hold once under each name, as pickled ones do, count once."""
        keys = {target: key for key, target in self._targets.items()}
        for target, source in internals.ties(self.model).items():
            if target in keys and source in keys:
                pair = self._read([keys[target], keys[source]])
                if torch.equal(pair[keys[target]], pair[keys[source]]):
                    del self._targets[keys[target]], self.headers[keys[target]]
                    internals.retie(self.model, {target})

    def copied_as_they_are(self) -> str:
        names = self.without_place
        return (
            f"{len(names)} tensors of {self.folder} have no place in {type(self.model).__name__} and are copied as they are: "
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        )

    def copied_bytes(self) -> int:
        """Of the tensors without a place."""
        return sum(t.numel() * t.element_size() for t in self._read(self.without_place).values())

    def expect_runnable(self) -> None:
        """Raises ValueError for parameters that no file holds and the model computes by itself, such as the positions of Marian."""
        known = self.model.state_dict(keep_vars=True)
        held = {id(known[target]) for target in self._targets.values()}
        tied = internals.ties(self.model)
        if lost := [name for name, tensor in known.items() if id(tensor) not in held and name not in tied]:
            raise ValueError(
                f"{self.folder} does not hold {', '.join(lost[:4])}, which {type(self.model).__name__} computes when it is loaded "
                "whole; use pyllmq.compress (in the command: --in-memory), or a method without calibration"
            )

    def weight_keys(self, linears: Mapping[str, nn.Module]) -> dict[str, str]:
        """Linear -> key of its weight in the checkpoint. Raises MadeFromOthersError if that is no tensor of its own."""
        keys: dict[str, list[str]] = {}
        for key, target in self._targets.items():
            keys.setdefault(target, []).append(key)
        found = {}
        for name, module in linears.items():
            sources = keys.get(f"{name}.weight", [])
            shape = tuple(cast(Tensor, module.weight).shape)
            if len(sources) == 1 and sources[0].endswith("weight") and self.headers[sources[0]].shape == shape:
                found[name] = sources[0]
                continue
            raise MadeFromOthersError(
                f"{name}.weight is no tensor of its own in {self.folder}, transformers makes it from others; take a calibrated "
                "method, hold the whole model in memory (--in-memory), or leave it out (--exclude)"
            )
        return found

    def weight_of(self, name: str, module: nn.Module) -> Tensor:
        """The weight [N, K] of one Linear, read from its file. Raises MadeFromOthersError as `weight_keys`."""
        (key,) = self.weight_keys({name: module}).values()
        stored = self._read([key])[key]
        return stored.T if is_transposed_linear(module) else stored

    def split(self, blocks: Iterable[str]) -> None:
        """Make units of these blocks; all else is `OUTSIDE`."""
        self.blocks = tuple(blocks)

    def settle(self, blocks: Iterable[str]) -> None:
        wanted = set(blocks)
        self.blocks = tuple(block for block in self.blocks if block in wanted)

    def rename(self, blocks: Mapping[str, str]) -> None:
        """Block -> the name under which it is written."""
        self._renamed = dict(blocks)

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
        wanted = [key for key, target in self._targets.items() if self.unit_of(target) == unit]
        with quiet_transformers():
            wrong = internals.load_tensors(self.model, self._read(wanted), self.device)
        if wrong:
            raise FormatError(f"{self.folder} does not fit its config.json: {wrong[0]}; the folder is damaged")
        if unit == OUTSIDE:
            # A tied tensor is in the checkpoint once.
            internals.retie(self.model, set(self.model.state_dict()) - set(self._targets.values()))
        held = [parameter for name, parameter in self.model.named_parameters() if self.unit_of(name) == unit]
        for parameter in held:
            parameter.requires_grad_(False)
        self._held[unit] = held

    def _read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.headers[key].file, []).append(key)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with opened(file) as content:
                tensors |= {key: content.get_tensor(key) for key in wanted}
        return tensors

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
        module = self.model.get_submodule(unit) if unit else self.model
        held = module.state_dict(prefix=f"{unit}." if unit else "")
        held = {key: value for key, value in held.items() if not value.is_meta and self.unit_of(key) == unit}
        if unit in self._renamed:
            held = {f"{self._renamed[unit]}{key.removeprefix(unit)}": value for key, value in held.items()}
        if unit == OUTSIDE:
            held = internals.without_tied(self.model, held)
        written = internals.tensors_of_file(self.model, held)
        if unit == OUTSIDE:
            written |= self._read(self.without_place)
        return {key: value.contiguous() for key, value in written.items()}

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


def _skeleton(folder: Path, headers: Mapping[str, Header], device: torch.device, architecture: str | None) -> Any:
    config = read_config(folder)
    if not is_dense(config):
        raise ValueError(
            f"{folder} is quantized already ({quantization_method(config)}); compress the dense model that it was made from"
        )
    model_class = dense_class(folder, config, architecture)
    with valid_config(folder):
        described = model_class.config_class.from_pretrained(folder)
    model, info = load_on_meta(model_class, described, headers, folder)
    expect_complete(folder, model, info)
    internals.fill_computed_buffers(model, device)
    return model

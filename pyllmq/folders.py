"""Folders of packed models: what config.json and the safetensors headers say, read once and checked; written whole or not at all.

Needs no transformers.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .formats import FORMAT_VERSION, FormatError, Structure, structure_from_dict
from .structure import of_module

METHOD = "pyllmq"
"""`quant_method` in config.json."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"

Folder = str | os.PathLike[str]


def read_config(folder: Folder) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a transformers model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}); the folder is damaged") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} holds {type(config).__name__}, not an object; the folder is damaged")
    return config


def quantization_method(config: Mapping[str, Any]) -> Any:
    """`quant_method` of a config.json; None for a dense model."""
    described = config.get("quantization_config")
    return described.get("quant_method") if isinstance(described, Mapping) else described


def expect_packed(folder: Folder, config: Mapping[str, Any]) -> None:
    if (method := quantization_method(config)) != METHOD:
        raise FormatError(
            f"{folder} is not a pyllmq folder (quant_method is {method!r}); compress it first with `pyllmq compress`, or load it "
            "with transformers"
        )


def is_packed(folder: Folder) -> bool:
    """Is this a folder that needs pyllmq to be loaded?"""
    return (Path(folder) / "config.json").is_file() and quantization_method(read_config(folder)) == METHOD


def is_dense(config: Mapping[str, Any]) -> bool:
    """Does a config.json pack nothing? It may say the widths of Linears all the same. Raises FormatError as `Description.parse`."""
    if quantization_method(config) != METHOD:
        return quantization_method(config) is None
    return not Description.parse(config["quantization_config"]).structures


# ---- the description in config.json ---------------------------------------------------------------------------------


class Description(dict[str, Any]):
    """`quantization_config` of a packed model as it stands in config.json, with what it says: parsed and checked once.

    Modules have the names that their tensors have in the files. A module with packed children names them under `children`.
    """

    structures: dict[str, Structure]
    shapes: dict[str, tuple[int, int]]
    """[N, K] of Linears, packed or dense, that the rest of config.json says otherwise: MLPs of several widths."""
    part_of_ranks = 0
    """Of how many processes the modules are one's part; 0: the modules are whole. Never in a file."""
    experts_of_part: Mapping[str, tuple[int, int]] = MappingProxyType({})
    """Stack of packed experts -> (first, stop) of those that this process holds, where that is a part. Never in a file."""
    checked: frozenset[str] = frozenset()
    """Files whose headers were compared with it."""

    @classmethod
    def of(
        cls, structures: Mapping[str, Structure], shapes: Mapping[str, tuple[int, int]] | None = None
    ) -> Description:
        modules = {name: structure.to_dict() for name, structure in structures.items()}
        description = cls(quant_method=METHOD, format_version=FORMAT_VERSION, modules=modules)
        if shapes:
            description["shapes"] = {name: list(shape) for name, shape in shapes.items()}
        description.structures, description.shapes = dict(structures), dict(shapes or {})
        return description

    @classmethod
    def parse(cls, described: Mapping[str, Any]) -> Description:
        """Raises FormatError for anything that this version does not write."""
        if isinstance(described, Description):
            return described
        if (opened := _opened.get()) is not None and opened == described:
            return opened
        version, modules = described.get("format_version", FORMAT_VERSION), described.get("modules")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"format_version is {version!r}; this pyllmq reads version {FORMAT_VERSION}. Update pyllmq-kernels, or "
                "compress the model again"
            )
        if "part_of_ranks" in described:
            raise FormatError("config.json describes one rank's part of a model; folders hold whole models")
        unknown = sorted(map(str, described.keys() - {"quant_method", "format_version", "modules", "shapes"}))
        if unknown:
            raise FormatError(
                f"quantization_config has unknown keys {unknown}; allowed: format_version, modules, shapes"
            )
        shapes = _shapes(described.get("shapes", {}))
        if not isinstance(modules, Mapping) or not (modules or shapes):
            raise FormatError("quantization_config must name its packed modules under 'modules'; the folder is damaged")
        structures = {}
        for name, values in modules.items():
            if not isinstance(values, Mapping):
                raise FormatError(f"quantization_config of module {name} is {values!r}; it must be an object")
            with of_module(f"quantization_config of module {name}"):
                structures[name] = structure_from_dict(values)
        return cls.of(structures, shapes)

    @contextmanager
    def handed_on(self) -> Iterator[None]:
        """Whoever parses the same description meanwhile gets this one: transformers reads config.json itself."""
        token = _opened.set(self)
        try:
            yield
        finally:
            _opened.reset(token)

    def check(self, files: Collection[Folder]) -> dict[str, Header]:
        """Compare the headers of `files` with what is described, before anything is loaded; returns them."""
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise FormatError(f"{file} is not a safetensors file; packed models are stored as nothing else")
        headers = read_headers(files)
        for name, structure in self.structures.items():
            for key, (shape, dtype) in structure.tensors().items():
                full = f"{name}.{key}"
                if full not in headers:
                    raise FormatError(
                        f"the tensor {full} is missing from {', '.join(map(str, files))}; the folder is incomplete"
                    )
                found = headers[full]
                if (found.shape, found.dtype) != (shape, dtype):
                    raise FormatError(
                        f"the tensor {full} is {_text(found.dtype)} {found.shape}, but config.json asks for {_text(dtype)} {shape}"
                    )
        for name, (n, k) in self.shapes.items():
            packed, stored = self.structures.get(name), headers.get(f"{name}.weight")
            if packed is not None:
                held: Any = [packed.out_features, packed.in_features]
            else:
                held = "no such tensor" if stored is None else list(stored.shape)
            # Conv1D has it the other way round, and its format the right way.
            if [n, k] != held and (packed is not None or [k, n] != held):
                raise FormatError(
                    f"config.json says that {name} is [{n}, {k}], and the files hold {held}; the folder is damaged"
                )
        self.checked = frozenset(map(str, files))
        return headers


def _shapes(described: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(described, Mapping):
        raise FormatError(f"shapes is {described!r}; it must map names of Linears to [out_features, in_features]")
    for name, shape in described.items():
        if not isinstance(shape, list | tuple) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
            raise FormatError(
                f"the shape of {name} is {shape!r}; it must be [out_features, in_features], both at least 1"
            )
    return {name: (shape[0], shape[1]) for name, shape in described.items()}


_opened: ContextVar[Description | None] = ContextVar("opened", default=None)


def _text(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


# ---- files of tensors -----------------------------------------------------------------------------------------------

_DTYPES = {
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    **{"BOOL": torch.bool, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


class Header(NamedTuple):
    """What a file says of one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """A safetensors name where torch has no such dtype."""


@contextmanager
def opened(file: Folder) -> Iterator[Any]:
    """A file of tensors, with the interface of `safe_open`. Raises FormatError if it is damaged or cannot be opened."""
    from safetensors import SafetensorError, safe_open

    if str(file).endswith(".bin"):
        yield _Pickled(file)
        return

    def damaged(error: Exception) -> FormatError:
        return FormatError(f"{file} cannot be read ({error}); it is truncated or damaged, copy or compress it again")

    try:
        tensors = safe_open(str(file), framework="pt")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise damaged(error) from error
    try:
        with tensors:
            yield tensors
    except SafetensorError as error:
        raise damaged(error) from error


class _Pickled:
    """A pytorch_model.bin, mapped from the disk. Nothing but tensors is unpickled, so that no code in it can run."""

    def __init__(self, file: Folder) -> None:
        try:
            self.tensors = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
            self.headers = {key: Header(Path(file), tuple(t.shape), t.dtype) for key, t in self.tensors.items()}
        except (pickle.UnpicklingError, RuntimeError, AttributeError, ValueError, EOFError, OSError) as error:
            raise FormatError(
                f"{file} cannot be read as tensors only ({str(error).splitlines()[0]}); load it where you trust it, and write it "
                "again with save_pretrained, which makes safetensors files"
            ) from error

    def keys(self) -> Collection[str]:
        return self.tensors.keys()

    def get_tensor(self, key: str) -> torch.Tensor:
        return self.tensors[key].clone(memory_format=torch.contiguous_format)


def read_headers(files: Iterable[Folder]) -> dict[str, Header]:
    """Key -> header of every tensor. Raises FormatError for a file that is damaged."""
    found: dict[str, Header] = {}
    for file in files:
        with opened(file) as tensors:
            if isinstance(tensors, _Pickled):
                found |= tensors.headers
                continue
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no dict)
                part = tensors.get_slice(key)
                name = part.get_dtype()
                found[key] = Header(Path(file), tuple(part.get_shape()), _DTYPES.get(name, name))
    return found


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, those that transformers takes. Raises FileNotFoundError if they are not there."""
    there = [name for name in (SINGLE, INDEX, PICKLED_SINGLE, PICKLED_INDEX) if (folder / name).is_file()]
    if not there:
        raise FileNotFoundError(
            f"{folder} has no weights: none of {SINGLE}, {INDEX}, {PICKLED_SINGLE}, {PICKLED_INDEX} is there"
        )
    first = folder / there[0]
    if there[0] not in (INDEX, PICKLED_INDEX):
        return [first]
    try:
        files = [folder / name for name in sorted(set(json.loads(first.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{first} cannot be read ({error!r}); the folder is damaged") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} cannot be read: {first} names it, and no such file is there; copy it again"
            )
    return files


@dataclass(frozen=True)
class PackedFolder:
    """A packed folder that was opened: config.json and all headers, compared with each other. No weights."""

    folder: Path
    config: dict[str, Any]
    description: Description
    headers: dict[str, Header]

    @classmethod
    def open(cls, folder: Folder) -> PackedFolder:
        """Raises FormatError for a folder that is damaged, incomplete, of an unknown version, or not packed at all."""
        config = read_config(folder)
        expect_packed(folder, config)
        description = Description.parse(config["quantization_config"])
        try:
            files = checkpoint_files(Path(folder))
        except FileNotFoundError as error:
            raise FormatError(f"{error}; the folder is not whole") from error
        return cls(Path(folder), config, description, description.check(files))

    @property
    def structures(self) -> dict[str, Structure]:
        """Name -> structure of every packed module."""
        return self.description.structures


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(folder: Folder) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` at the end; if anything fails, that stays as it was."""
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give the name of a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield part
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


# ---- what else is in a folder ---------------------------------------------------------------------------------------

_REPLACED = (
    *("config.json", "*.index.json", "model*.safetensors", "pytorch_model*.bin", "consolidated*"),
    *("tf_model*", "flax_model*", "rust_model*", "*.ckpt", "*.onnx", "*.gguf"),
    *("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler.pt"),
)
"""In the first level of a model's folder: its dense weights by every name that they have, and what training leaves behind."""
_WEIGHT_FOLDERS = ("onnx", "openvino", "original", "coreml")
"""In the first level of a model's folder: the same dense weights again, which a packed folder replaces."""


def other_files(folder: Path, skip: Collection[Path] = ()) -> list[Path]:
    """What a model's folder holds besides config.json and weights, relative to it: tokenizer, pooling, chat template, licence.

    Weights of other names (BGE-M3's `sparse_linear.pt`), and those in folders below, belong to modules of their own. Hidden files,
    training checkpoints, other packed folders and what is no plain file are left out, links to files are followed.
    """
    found = []
    with suppress(FileNotFoundError, FormatError):
        skip = {*skip, *checkpoint_files(folder)}
    for place, folders, files in os.walk(folder):
        top = Path(place) == folder
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "checkpoint-"))
            and not (top and name in _WEIGHT_FOLDERS)
            and Path(place, name).resolve() not in skip
            and not _is_packed_below(Path(place, name))
        )
        for name in sorted(files):
            file = Path(place, name)
            replaced = top and (file in skip or any(fnmatchcase(name, pattern) for pattern in _REPLACED))
            if not name.startswith(".") and not replaced and file.is_file():
                found.append(file.relative_to(folder))
    return found


def _is_packed_below(folder: Path) -> bool:
    """A config.json of something else may hold anything."""
    try:
        return is_packed(folder)
    except (FormatError, OSError):
        return False


def copy_others(source: Path, target: Path, skip: Collection[Path] = ()) -> None:
    """Copy what `source` holds besides config.json and weights, but for what is in `target` already or in the folders `skip`."""
    for name in other_files(source, [path.resolve() for path in (*skip, target)]):
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)

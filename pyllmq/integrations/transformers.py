"""transformers: `quant_method: "pyllmq"` in a config.json, packed layers out of `from_pretrained`, and back.

`register()` is called when transformers' quantizers are first imported (see `on_import`), so importing pyllmq does not import
transformers.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import fusion
from ..folders import METHOD, Description, Header, PackedFolder, copy_others, expect_packed, new_folder, read_config
from ..formats import FormatError, Structure
from ..layers.linear import packed_modules
from .skeletons import modules_of_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIGGER = "transformers.quantizers"

CONFIG_ARGUMENTS = {"revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder"}
"""Of `from_pretrained`, those that say where the config is."""


# ---- registration ---------------------------------------------------------------------------------------------------


def register() -> None:
    """Tell transformers' auto classes about the quantization method `pyllmq`; harmless when repeated."""
    from . import quantizer  # noqa: F401


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Lets the import of transformers' quantizers run as it would, then registers the method."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != _TRIGGER or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            execute(module)
            # Only now: an import that fails may be tried again.
            sys.meta_path.remove(self)
            register()

        spec.loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec

    searching = False


def on_import() -> None:
    """Register now if transformers' quantizers are imported already, else as soon as they are."""
    if _TRIGGER in sys.modules:
        register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


# ---- loading --------------------------------------------------------------------------------------------------------


def from_pretrained(
    folder: str | os.PathLike[str], *, auto_class: Any = None, fuse: bool = True, **kwargs: Any
) -> PreTrainedModel:
    """Load a packed model from a folder (or hub id), whatever kind of model it is.

    Args:
        folder: as written by `save_pretrained`.
        auto_class: for example `transformers.AutoModelForCausalLM`; None takes the class that config.json names.
        fuse: let the blocks of a model run as two native calls where it lies on a CPU, see `pyllmq.fuse`;
            `pyllmq.fusion.report` says which do.
        kwargs: passed on to transformers.

    Raises FormatError for a folder that is damaged, incomplete, of an unknown version, or not packed at all. Tensors that only an
    `auto_class` asks for (a new head) are transformers' to fill.
    """
    opened = None
    if Path(folder).is_dir() and not {"subfolder", "variant"} & kwargs.keys():
        opened = PackedFolder.open(folder)  # before transformers builds a model of sizes that no file has
    model_class, _ = model_class_and_config(folder, auto_class, opened, **kwargs)
    info_wanted = kwargs.pop("output_loading_info", False)
    arguments = {"trust_remote_code": False, **kwargs, "output_loading_info": True}
    with nullcontext() if opened is None else opened.description.handed_on():
        model, info = model_class.from_pretrained(folder, **arguments)
    if auto_class is None and not info_wanted:
        expect_complete(folder, model, info)
    if fuse:
        fusion.fuse(model)
    return (model, info) if info_wanted else model  # type: ignore[return-value]


def expect_complete(folder: str | os.PathLike[str], model: Any, info: Mapping[str, Any]) -> None:
    """`info`: what transformers says of the loading."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        experts = (
            f": {found[0]} of {wanted[0]} experts are there"
            if len(wanted) == 3 and found[1:] == wanted[1:] and found[0] < wanted[0]
            else ""
        )
        raise FormatError(
            f"{folder} has shape {list(found)} for {name}, config.json asks for {list(wanted)}{experts}; the folder is incomplete "
            "or its config.json is of another model, copy it again"
        )
    if names := sorted(info["missing_keys"]):
        raise FormatError(
            f"{folder} has no tensors for {len(names)} parameters of {type(model).__name__}, such as {names[0]}, which would be "
            "filled with random numbers; the folder is incomplete, copy or compress it again"
        )


def model_class_and_config(
    folder: str | os.PathLike[str], auto_class: Any, opened: PackedFolder | None, **kwargs: Any
) -> tuple[Any, Any]:
    """The class and the config of a packed folder; arguments and errors as for `from_pretrained`."""
    import transformers

    register()
    config = open_config(folder, **{key: kwargs[key] for key in CONFIG_ARGUMENTS & kwargs.keys()})
    if opened is None:
        expect_packed(folder, {"quantization_config": getattr(config, "quantization_config", None)})
    else:
        config.quantization_config = opened.description
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > len(opened.headers):
            # transformers would build any number of blocks, for hours, before it looks for their tensors
            raise FormatError(
                f"config.json asks for {layers} layers, {folder} holds {len(opened.headers)} tensors; the folder is damaged"
            )
    if auto_class is None:
        auto_class = class_of(config.architectures)
        if auto_class is None:
            auto_class = transformers.AutoModel
            warnings.warn(
                f"config.json of {folder} names no model class that transformers has ({config.architectures}): the model is loaded "
                "without a head. Name the class as auto_class",
                stacklevel=3,
            )
    return auto_class, config


def open_config(folder: str | os.PathLike[str], **arguments: Any) -> Any:
    """The transformers config of a folder (or hub id). Code that a folder brings is never executed."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    if (Path(folder) / "config.json").is_file() and not arguments.get("trust_remote_code"):
        said = read_config(folder)
        if str(said.get("model_type")) not in CONFIG_MAPPING:
            own = "; the code that the folder brings (auto_map) is never executed" if "auto_map" in said else ""
            raise ValueError(f"{folder}: transformers {__version__} has no model_type {said.get('model_type')!r}{own}")
    with valid_config(folder):
        return AutoConfig.from_pretrained(folder, **{"trust_remote_code": False, **arguments})


@contextmanager
def valid_config(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Says which folder's config.json it is that transformers does not take, as an error that commands print in a line."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise FormatError(
            f"config.json of {folder} describes no model ({said}); copy it again, or repair it"
        ) from error


def class_of(architectures: Any) -> Any:
    """The transformers class of a model that config.json names; None where it names none that there is."""
    import transformers

    first = architectures[0] if isinstance(architectures, Sequence) and architectures else None
    found = getattr(transformers, first, None) if isinstance(first, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def dense_class(folder: str | os.PathLike[str], config: Mapping[str, Any], architecture: str | None = None) -> Any:
    """The transformers class of a dense folder: `architecture`, or the one that its config.json names.

    Raises ValueError if there is no such class: another one would leave out its head, or fill it with random numbers; for an
    adapter in the folder, which is no part of the weights; for weights in a file of another name.
    """
    from transformers import __version__

    from .transformers_internals import classes_for

    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json) beside the model's weights; merge it into them with PEFT "
            "(merge_and_unload), or take that file away to go without it"
        )
    if (file := config.get("transformers_weights")) is not None:
        raise ValueError(
            f"config.json of {folder} names {file!r} as its weights (transformers_weights); call the file "
            "model.safetensors and take the entry away"
        )
    names = config.get("architectures")
    found = class_of(names if architecture is None else [architecture])
    if found is not None:
        return found
    what = f"config.json of {folder} names as architectures {names!r}"
    if architecture is not None:
        what = f"architecture is {architecture!r}"
    likely = ", ".join(classes_for(config.get("model_type"))[:4])
    own = ". The code that the folder brings (auto_map) is never executed" if "auto_map" in config else ""
    raise ValueError(
        f"{what}, which is no model class of transformers {__version__}{own}. Name the class of this model "
        f"(--architecture, in Python architecture=){f'; for this model_type: {likely}' if likely else ''}"
    )


def load_on_meta(model_class: Any, config: Any, headers: Mapping[str, Header], folder: Path) -> tuple[Any, Any]:
    """(model of nothing but shapes, what transformers says of its loading): all of `from_pretrained` but the weights."""
    from .transformers_internals import generation_config

    tensors = {}
    for key, (_, shape, dtype) in headers.items():
        tensors[key] = torch.empty(shape, dtype=dtype if isinstance(dtype, torch.dtype) else torch.uint8, device="meta")
    with quiet_transformers():
        return model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype="auto",
            device_map={"": "meta"},
            generation_config=generation_config(folder) if model_class.can_generate() else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `expect_complete` says what is wrong
        )


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


def check_written(folder: Path, model_class: Any) -> None:
    """Open a packed folder as `from_pretrained` does, all but the weights. Raises FormatError if it could not be loaded."""
    opened = PackedFolder.open(folder)
    _, config = model_class_and_config(folder, model_class, opened)
    expect_complete(folder, *load_on_meta(model_class, config, opened.headers, folder))


# ---- saving ---------------------------------------------------------------------------------------------------------


def mark_packed(model: nn.Module) -> None:
    """Let a transformers model know that it holds packed layers, so that `save_pretrained` writes what loading needs."""
    found = packed_modules(model)
    if not found or not is_transformers_model(model):
        return
    names = expect_own_names(model, [name for name, _ in found])
    quantizer = describe_packed(model, {names[name]: module.structure for name, module in found})
    plan = getattr(model, "tensor_parallel_plan", None)
    quantizer.description.part_of_ranks = 0 if plan is None else plan.ranks


def expect_own_names(model: nn.Module, linears: Iterable[str]) -> dict[str, str]:
    """Linear -> what its tensors are called in a saved folder. Raises ValueError where those cannot have names of their own."""
    from .transformers_internals import names_of_file

    written = names_of_file(model, linears)
    read = modules_of_names(model, [found for found in written.values() if found is not None])
    names = {name: found for name, found in written.items() if found is not None and read[found] == name}
    if merged := [name for name in written if name not in names]:
        raise ValueError(
            f"{', '.join(merged)} cannot be packed: files of {type(model).__name__} hold the weight merged with others, or under a "
            "name that leads to another module; add it to exclude"
        )
    return names


def is_transformers_model(model: object) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def describe_packed(
    model: Any, structures: Mapping[str, Structure], shapes: Mapping[str, tuple[int, int]] | None = None
) -> Any:
    """Put into the model's config what loading needs to know of its packed layers; returns its quantizer.

    Args:
        shapes: of Linears that the config says otherwise; None: those that were described before.
    """
    from . import quantizer
    from .transformers_internals import forget_ties

    if shapes is None:
        before = getattr(model.config, "quantization_config", None)
        shapes = before.description.shapes if isinstance(before, quantizer.PyllmqConfig) else {}
    config = quantizer.PyllmqConfig.from_dict(Description.of(structures, shapes))
    model.config.quantization_config = config
    model.hf_quantizer = quantizer.PyllmqQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    forget_ties(model, [name for name, _ in packed_modules(model)])
    return model.hf_quantizer


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *others: Any,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Write a packed model (and `others`, such as its tokenizer) as a folder that is whole or not there.

    Everything is written into a new folder beside the target and opened there as `from_pretrained` does, all but the weights;
    then it takes the target's place. If anything fails, an earlier folder of that name stays as it was.

    Args:
        source: folder that the dense model came from; what it holds besides config.json and weights is copied, but for what
            `others` write.
    """
    with new_folder(folder) as part:
        mark_packed(model)
        for item in (model, *others):
            item.save_pretrained(part)
        if source is not None:
            copy_others(Path(source), part, skip=(Path(folder),))
        if is_transformers_model(model):
            check_written(part, type(model))

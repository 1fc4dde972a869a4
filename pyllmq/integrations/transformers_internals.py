"""Every name of transformers that its documentation does not promise, in one file; `tests/test_transformers_internals.py` holds
this list against the installed version, and CI runs it on the oldest and the newest that pyproject.toml allows.

Import it inside functions: importing pyllmq does not import transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict
from transformers.models.auto import modeling_auto
from transformers.utils import output_capturing

FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    get_model_conversion_mapping: ("model", "add_legacy"),
    rename_source_key: (
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
        "reverse",
    ),
    revert_weight_conversion: ("model", "state_dict"),
    convert_and_load_state_dict_in_model: ("model", "state_dict", "load_config"),
    remove_tied_weights_from_state_dict: ("state_dict", "model"),
    LoadStateDictConfig: ("device_map", "dtype", "weight_mapping"),
    PreTrainedModel._from_config: ("config",),
    PreTrainedModel.tie_weights: ("missing_keys", "recompute_mapping"),
    PreTrainedModel.initialize_weights: (),
}
"""Called with these arguments, the first ones by place; whatever else they take has a default."""

MODEL_ATTRIBUTES = (
    "base_model_prefix",
    "all_tied_weights_keys",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "tp_plan",
    "_tp_plan",
)
"""Of a model instance; `_weight_conversions` comes with loading, `_device_mesh` with tensor parallelism."""


# ---- names in the file, names in the model --------------------------------------------------------------------------

ANY = ".codes"
"""Stands for the tensors of a packed module where only the name of the module is asked for."""


def keys_of_model(model: Any, keys: Iterable[str], known: Mapping[str, Any]) -> dict[str, str]:
    """Key in a checkpoint -> the key that `from_pretrained` looks for in the model, whose keys are `known`."""
    mapping = cast(list[Any], get_model_conversion_mapping(model))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, found = model.base_model_prefix, {}
    for key in sorted(keys):  # groups of renamings wait for their first key in this order
        target, _ = rename_source_key(key, renamings, converters, prefix, known)  # type: ignore[arg-type]
        if target not in known and key in known:
            target, _ = rename_source_key(key, [], [], prefix, known)  # type: ignore[arg-type]
        found[key] = target
    return found


def names_of_file(model: Any, names: Iterable[str]) -> dict[str, str | None]:
    """Module -> its name in the files that `save_pretrained` writes; None where those hold its tensors only merged with others."""
    used = getattr(model, "_weight_conversions", None)
    if used is None:  # as `revert_weight_conversion` does for a model that was not loaded
        mapping = cast(list[Any], get_model_conversion_mapping(model, add_legacy=False))
        used = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    back = [entry.reverse_transform() for entry in used[::-1]]
    renamings = [entry for entry in back if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in back if isinstance(entry, WeightConverter)]
    found: dict[str, str | None] = {}
    for name in sorted(names):
        key, merged = rename_source_key(f"{name}{ANY}", renamings, converters, reverse=True)
        found[name] = key.removesuffix(ANY) if merged is None and key.endswith(ANY) else None
    return found


def tensors_of_file(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model under the names, and in the shapes, that `save_pretrained` writes."""
    return revert_weight_conversion(model, tensors)


def load_tensors(model: Any, tensors: dict[str, Tensor], device: torch.device) -> list[Any]:
    """Put some of a checkpoint's tensors into the model, converted; returns what was wrong."""
    mapping, used = cast(list[Any], get_model_conversion_mapping(model)), model._weight_conversions
    config = LoadStateDictConfig(device_map={"": device}, dtype=model.dtype, weight_mapping=mapping)
    info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    model._weight_conversions = used  # those of the whole checkpoint, which saving is to revert
    return [*info.mismatched_keys, *info.conversion_errors.values(), *info.error_msgs]


def without_tied(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return remove_tied_weights_from_state_dict(tensors, model)


def retie(model: Any, missing: set[str]) -> None:
    """A tied tensor is in the checkpoint once; `missing`: keys of the model that were not there."""
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def forget_ties(model: Any, packed: Iterable[str]) -> None:
    """Packed modules share no tensor with others: neither loading nor saving is to tie them again."""
    names = {f"{name}.weight" for name in packed}
    for target, source in ties(model).items():
        if target in names or source in names:
            del model.all_tied_weights_keys[target]


# ---- settings of a model --------------------------------------------------------------------------------------------


def kept_in_fp32(model: nn.Module) -> list[str]:
    """Regular expressions of the parameters that the architecture keeps in fp32 whatever is asked for."""
    kept = [getattr(model, f"_keep_in_fp32_modules{strict}", None) or () for strict in ("", "_strict")]
    return [re.escape(pattern).replace(r"\*", ".*") for patterns in kept for pattern in patterns]


def ties(model: Any) -> dict[str, str]:
    """Key of a tied parameter -> key of the one whose tensor it is."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tied_modules(model: Any, name: str) -> list[str]:
    """The modules whose weight is, or after loading will be, that of the module `name`."""
    source = ties(model).get(f"{name}.weight", f"{name}.weight")
    group = [source, *(target for target, of in ties(model).items() if of == source)]
    return [key.removesuffix(".weight") for key in group if key != f"{name}.weight" and key.endswith(".weight")]


def was_loaded(tensor: Tensor | None) -> bool:
    return bool(getattr(tensor, "_is_hf_initialized", False))


def leave_alone(module: nn.Module) -> None:
    """Loading is not to fill this module with random numbers."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def skeleton(model_class: Any, config: Any) -> Any:
    """The model with nothing in it, on the default device; an auto class says which class that is."""
    make = getattr(model_class, "from_config", None) or model_class._from_config
    return make(config)


def generation_config(folder: Path) -> GenerationConfig:
    """As `from_pretrained` finds it: from its own file, or from what config.json says of it."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def fill_computed_buffers(model: Any, device: torch.device) -> None:
    """Rotary angles and the like are in no checkpoint: the model computes them."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                # One that no `_init_weights` fills is to be seen in what the model computes.
                unknown = float("nan") if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, unknown, device=device)
                parts = path.split(".")
                for end in range(len(parts) + 1):  # a module above may be the one that fills it, as in Falcon-H1
                    modules[".".join(parts[:end])]._is_hf_initialized = False
    model.initialize_weights()


def classes_for(model_type: Any) -> list[str]:
    """Names of the classes with a head that transformers has for a `model_type`, the likeliest first."""
    tables = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "SEQUENCE_CLASSIFICATION")
    found = []
    for table in ("", *(f"_FOR_{name}" for name in tables)):
        names = getattr(modeling_auto, f"MODEL{table}_MAPPING_NAMES", {}).get(model_type, ())
        found += [names] if isinstance(names, str) else list(names)
    return found[1:] + found[:1]


# ---- tensor parallelism ---------------------------------------------------------------------------------------------


def asked_plan(model: Any) -> dict[str, str] | None:
    """Module pattern -> style, where transformers' tensor parallelism was asked for."""
    asked = getattr(model.config, "distributed_config", None)
    if asked is None or (asked.tp_size or 1) < 2:
        return None
    return dict(asked.tp_plan) if isinstance(asked.tp_plan, Mapping) else dict(model.tp_plan)


def take_from_plan(model: Any, ours: Iterable[str], style: str) -> None:
    """Leave all but the patterns `ours` to transformers: those get the name of a style that does nothing."""
    does_nothing: Any = TensorParallelLayer()
    ALL_PARALLEL_STYLES.register(style, does_nothing)
    asked = model.config.distributed_config
    theirs = cast(dict[str, str], asked_plan(model)) | dict.fromkeys(ours, style)
    if isinstance(asked.tp_plan, Mapping):
        asked.tp_plan = theirs
    model._tp_plan = theirs


def group_of(model: Any) -> Any:
    """The torch.distributed group of transformers' tensor parallelism."""
    mesh = model._device_mesh
    return (mesh if mesh.ndim == 1 else mesh["tp"]).get_group()


# ---- attention ------------------------------------------------------------------------------------------------------

MARKER = "pyllmq_marker"
"""Name of the attention function that notes what it is given."""


@contextmanager
def attention_marker(note: Callable[..., None]) -> Iterator[None]:
    """`note` hears of every call of the attention function, which returns random numbers."""

    def attend(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        out = torch.randn(query.shape[0], query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
        given = {"module": module, "query": query, "key": key, "value": value, "attention_mask": attention_mask}
        note("attention", given | options, out)
        return out, None

    AttentionInterface.register(MARKER, attend)
    AttentionMaskInterface.register(MARKER, sdpa_mask)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[MARKER]
        del AttentionMaskInterface._global_mapping[MARKER]


IMPLEMENTATION = "_attn_implementation_internal"


def implementation_of(state: dict[str, Any]) -> str | None:
    """Name of the attention function, from a configuration's `__dict__`: asking the configuration takes 4 us of Python."""
    return state.get(IMPLEMENTATION)


def collects(hooks: Any) -> bool:
    """Does one of these forward hooks want something at this call? Those that collect attentions stay for ever once they were
    asked for, and sleep."""
    collected = output_capturing._active_collector.get()
    return any(collected or getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks.values())

"""PEFT: LoRA beside packed layers. The packed weight stays as it is; the adapter trains, is saved and loaded by PEFT itself.

    model = peft.get_peft_model(packed_model, register(peft.LoraConfig(target_modules=["q_proj", "v_proj"])))
    model.save_pretrained("adapter"); model = load_adapter(packed_model, "adapter")

PEFT knows layer types of other libraries only where a config lists them, and does not save that list: hence `register`.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners import lora
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..formats import kinds, layer_type
from ..layers.linear import PackedLinear, PackedModule

INITS = (True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base weight as it is."""


def expect_beside_packed(config: PeftConfig) -> None:
    """Raises ValueError, with the reason, for an adapter that cannot do beside a packed layer what it does beside a dense one."""
    if type(config) is not LoraConfig:
        raise ValueError(
            f"{type(config).__name__} is not supported on packed layers, whose weight cannot be changed or given parameters of its "
            "own; give a peft.LoraConfig"
        )
    init = config.init_lora_weights
    if init not in INITS:
        raise ValueError(
            f"init_lora_weights={init!r} takes the adapter out of the base weight, and codes cannot hold what is left; allowed: "
            f"{', '.join(map(repr, INITS))}. An adapter trained so on a dense model: save it with "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    if config.use_dora:
        raise ValueError(
            "DoRA asks for the norms of a dense weight, which a packed layer does not have; set use_dora=False"
        )
    names = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in (*names, "use_qalora", "use_bdlora", "target_parameters", "megatron_config"):
        if value := getattr(config, name, None):
            raise ValueError(f"{name}={value!r} was not tried on packed layers; leave it out")


class PackedLoraLinear(lora.Linear):
    """y = packed(x) + scaling * B A dropout(x), for any number of adapters."""

    def __init__(self, base_layer: PackedLinear, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # PEFT asks layers of types that it does not know for their sizes, and says so
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(base_layer, adapter_name, *args, **kwargs)

    def update_layer(self, adapter_name: str, r: int, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        """Every adapter comes by here, the second one too."""
        expect_beside_packed(config)
        super().update_layer(adapter_name, r, *args, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into a packed layer: codes cannot hold the sum. Keep it beside the layer, or merge it "
            "into the dense model and compress that"
        )

    def unmerge(self) -> None:
        raise ValueError("nothing was merged: adapters stay beside packed layers")


_check_of_peft = AuxiliaryTrainingWrapper.check_module


def _check_module(wrapper: AuxiliaryTrainingWrapper) -> None:
    """In the place of PEFT's own: a wrapper trains a copy of its module, and of a packed one that would be the bias alone."""
    if isinstance(wrapper.original_module, PackedModule):
        raise ValueError(
            f"modules_to_save names a {type(wrapper.original_module).__name__}, whose packed weight cannot be trained; name dense "
            "modules, or name it in target_modules for an adapter beside it"
        )
    _check_of_peft(wrapper)


def register(config: LoraConfig) -> LoraConfig:
    """The config, after telling it how packed layers get an adapter. Its `target_modules` names them ("all-linear" means dense).

    Raises ValueError for a method that does not do on packed layers what it does on dense ones.
    """
    expect_beside_packed(config)
    AuxiliaryTrainingWrapper.check_module = _check_module
    config._register_custom_module(dict.fromkeys(map(layer_type, kinds()), PackedLoraLinear))
    return config


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """`peft.PeftModel.from_pretrained` for a packed model; `is_trainable=True` goes on training."""
    config = register(PeftConfig.from_pretrained(folder))
    config.inference_mode = not kwargs.get("is_trainable", False)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder, config=config, **kwargs)

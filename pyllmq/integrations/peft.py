"""PEFT: LoRA beside packed layers. The packed weight stays as it is; the adapter trains, is saved and loaded by PEFT itself.

    model = peft.get_peft_model(packed_model, register(peft.LoraConfig(target_modules=["q_proj", "v_proj"])))
    model.save_pretrained("adapter"); model = load_adapter(packed_model, "adapter")

PEFT knows layer types of other libraries only where a config lists them, and does not save that list: hence `register`.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..formats import kinds, layer_type
from ..layers.linear import PackedLinear


class PackedLoraLinear(nn.Module, LoraLayer):
    """y = packed(x) + scaling * B A dropout(x)."""

    # What LoraLayer gives; without its types, nn.Module would say that these are tensors or modules.
    update_layer: Any
    active_adapters: Any
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: dict[str, float]

    def __init__(
        self, base_layer: PackedLinear, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1, **_: Any
    ) -> None:
        if config.use_dora:
            raise ValueError(
                "DoRA asks for the norms of a dense weight, which a packed layer does not have; set use_dora=False"
            )
        super().__init__()
        with warnings.catch_warnings():  # PEFT asks layers of types that it does not know for their sizes, and says so
            warnings.filterwarnings("ignore", "Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                part = up(down(self.lora_dropout[name](x.to(down.weight.dtype))))
                y = y + (self.scaling[name] * part).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into a packed layer: codes cannot hold the sum. Keep it beside the layer, or merge it "
            "into the dense model and compress that"
        )

    def unmerge(self) -> None:
        raise ValueError("nothing was merged: adapters stay beside packed layers")


def register(config: LoraConfig) -> LoraConfig:
    """The config, after telling it how packed layers get an adapter. Its `target_modules` names them ("all-linear" means dense)."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{type(config).__name__} is not supported on packed layers; give a peft.LoraConfig")
    config._register_custom_module(dict.fromkeys(map(layer_type, kinds()), PackedLoraLinear))
    return config


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """`peft.PeftModel.from_pretrained` for a packed model; `is_trainable=True` goes on training."""
    config = register(PeftConfig.from_pretrained(folder))
    config.inference_mode = not kwargs.get("is_trainable", False)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder, config=config, **kwargs)

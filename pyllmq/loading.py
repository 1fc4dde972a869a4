"""Opening model folders, packed or dense, with the class that their config.json names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .formats import FormatError, Structure
from .integrations import transformers as integration

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


def is_packed(folder: Folder) -> bool:
    """Is this a folder that pyllmq wrote?"""
    if not (Path(folder) / "config.json").is_file():
        return False
    described = read_config(folder).get("quantization_config")
    return isinstance(described, Mapping) and described.get("quant_method") == integration.METHOD


def packed_structures(folder: Folder) -> dict[str, Structure]:
    """Name -> structure of every packed Linear, from config.json, compared with the headers of the safetensors files."""
    config = read_config(folder)
    if not is_packed(folder):
        raise FormatError(f"{folder} is not a packed folder (no quant_method 'pyllmq' in config.json)")
    from transformers.quantizers.auto import AutoQuantizationConfig

    structures = AutoQuantizationConfig.from_dict(dict(config["quantization_config"])).structures()
    files = sorted(str(p) for p in Path(folder).glob("*.safetensors"))
    if not files:
        raise FormatError(f"{folder} has no safetensors file; the folder is incomplete")
    integration.check_files(structures, files)
    return structures


def load_model(folder: Folder, **kwargs: Any) -> Any:
    """The model of a folder, packed or dense, in eval mode; dense weights keep their dtype.

    Models that bring their own code are refused by transformers: nothing in a folder is executed.
    """
    config = read_config(folder)
    if is_packed(folder):
        return integration.from_pretrained(folder, **kwargs)
    model_class = integration.class_of(config.get("architectures"))
    return model_class.from_pretrained(folder, **{"dtype": "auto", **kwargs})


def load_causal_model(folder: Folder) -> Any:
    model = load_model(folder)
    if not is_causal(model):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}, which does not predict tokens; a causal language model is needed"
        )
    return model


def is_causal(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)()) and not getattr(
        model.config, "is_encoder_decoder", False
    )


def load_tokenizer(folder: Folder) -> Any:
    from transformers import AutoTokenizer

    read_config(folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} has no tokenizer that transformers can load ({error})") from error

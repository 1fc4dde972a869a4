"""Opening model folders, packed or dense, with the class that their config.json names."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from .folders import Folder, is_packed, read_config
from .integrations import transformers as integration


def load_model(folder: Folder, architecture: str | None = None, fuse: bool = True, **kwargs: Any) -> Any:
    """The model of a folder, packed or dense, in eval mode; dense weights keep their dtype.

    Code that a folder brings is never executed. `architecture` names the transformers class of a dense model; None takes the one
    that config.json names. `fuse`: as in `from_pretrained`, of a packed one.
    """
    if is_packed(folder):
        return integration.from_pretrained(folder, fuse=fuse, **kwargs)
    model_class = integration.dense_class(folder, read_config(folder), architecture)
    arguments = {"dtype": "auto", **kwargs, "output_loading_info": True}
    with integration.valid_config(folder):
        model, info = model_class.from_pretrained(folder, **arguments)
    integration.expect_complete(folder, model, info)
    if unused := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{len(unused)} tensors of {folder} have no place in {type(model).__name__} and are not used: {', '.join(unused[:4])}"
            f"{', ...' if len(unused) > 4 else ''}",
            stacklevel=2,
        )
    return model


def load_causal_model(folder: Folder, fuse: bool = True) -> Any:
    model = load_model(folder, fuse=fuse)
    if not is_causal(model):
        raise ValueError(
            f"{folder} holds a {type(model).__name__}, which does not predict tokens; a causal language model is needed"
        )
    return model


def is_causal(model: Any) -> bool:
    """Does the model predict the next token of its only text?"""
    generates = bool(getattr(model, "can_generate", lambda: False)())
    return generates and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def load_extractor(folder: Folder, kind: str) -> Any:
    """What makes a model's inputs of "audio" or of an "image". Raises ValueError, with what to do, where there is none."""
    import transformers

    auto: Any = transformers.AutoFeatureExtractor if kind == "audio" else transformers.AutoImageProcessor
    try:
        if kind == "image" and importlib.util.find_spec("torchvision") is None:
            # The auto class refuses without torchvision; the class that needs Pillow alone is called so.
            said = json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8"))
            auto = getattr(transformers, f"{str(said.get('image_processor_type')).removesuffix('Fast')}Pil", auto)
        return auto.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{folder} has nothing by which transformers makes inputs of {kind} files (preprocessor_config.json): {why}. Copy that "
            "file into the folder, or take a method without calibration"
        ) from error


TOKENIZER_FILES = {
    "tokenizer.json": "tokenizers",
    "tokenizer.model": "sentencepiece",
    "spiece.model": "sentencepiece",
    "sentencepiece.bpe.model": "sentencepiece",
    "tiktoken.model": "tiktoken",
    "vocab.json": "",
    "vocab.txt": "",
}
"""What a tokenizer is made of -> the package that reads it, where that is no part of transformers."""


def load_tokenizer(folder: Folder) -> Any:
    """Raises ValueError, with what is missing, where there is none."""
    from transformers import AutoTokenizer

    read_config(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as error:
        there = [name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
        packages = dict.fromkeys(TOKENIZER_FILES[name] for name in there)
        do = "there is none of them; copy the tokenizer's files into the folder"
        if missing := [package for package in packages if package and importlib.util.find_spec(package) is None]:
            do = f"{', '.join(there)} needs a package that is not installed: pip install {' '.join(missing)}"
        elif there:
            do = f"there is {', '.join(there)}, but: {str(error).strip().splitlines()[0]}"
        raise ValueError(
            f"{folder} has no tokenizer that transformers can load (looked for {', '.join(TOKENIZER_FILES)}): {do}"
        ) from error

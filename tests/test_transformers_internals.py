"""What transformers does not promise and we use: names, signatures, and where in pyllmq they may be used."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from pyllmq.integrations import transformers_internals as internals

from . import models

PACKAGE = Path(internals.__file__).parent.parent


@pytest.mark.parametrize("function", internals.FUNCTIONS, ids=lambda function: function.__name__)
def test_signatures(function):
    asked = internals.FUNCTIONS[function]
    has = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in has.values())
    assert open_ended or set(asked) <= has.keys()
    needed = {n for n, p in has.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    assert needed - {"self", "cls"} <= set(asked), "an argument that we do not give has become necessary"


@pytest.mark.parametrize("name", internals.MODEL_ATTRIBUTES)
def test_attributes_of_a_model(name):
    assert hasattr(models.tiny_llama(), name)


def test_what_loading_leaves_behind(tmp_path):
    models.tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    loaded = type(models.tiny_llama()).from_pretrained(tmp_path)
    assert isinstance(loaded._weight_conversions, list) and internals.was_loaded(loaded.lm_head.weight)
    assert not internals.was_loaded(torch.zeros(1))
    assert internals.kept_in_fp32(models.tiny_t5()) and internals.ties(models.tiny_t5())
    assert "LlamaForCausalLM" in internals.classes_for("llama") and internals.classes_for("nothing") == []


def test_one_file_holds_them():
    """Elsewhere nothing is imported from below transformers' documented modules, and no attribute `_x` of its objects is used."""
    documented = {
        "transformers",
        "transformers.cache_utils",
        "transformers.quantizers",
        "transformers.utils",
        "transformers.utils.quantization_config",
    }
    private = re.compile(
        r"\.(_weight_conversions|_tp_plan|_device_mesh|_is_hf_initialized|_keep_in_fp32|all_tied_weights_keys)"
    )
    for file in PACKAGE.rglob("*.py"):
        if file.name == "transformers_internals.py":
            continue
        text = file.read_text()
        for module in re.findall(r"(?:from|import) (transformers(?:\.\w+)*)(?!\w)", text):
            assert module in documented, f"{file.name} imports {module}"
        assert not private.search(text), f"{file.name} uses {private.search(text)}"

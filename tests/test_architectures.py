"""Tiny models of many architectures: each is packed by the command and read in a new process as the same numbers, or refused
before any work is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyllmq
from pyllmq.cli import main
from pyllmq.compression.calibration import builtin_sentences
from pyllmq.experts import take_apart
from pyllmq.layers.linear import packed_modules
from pyllmq.linears import is_transposed_linear
from pyllmq.loading import load_model

from . import models

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PAIR = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"head_dim": 16},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "Qwen2MoeForCausalLM": EXPERTS | {"shared_expert_intermediate_size": 64},
    "Qwen3MoeForCausalLM": EXPERTS | {"head_dim": 16},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "GemmaForCausalLM": {"head_dim": 16},
    "Gemma2ForCausalLM": {"head_dim": 16, "sliding_window": 8},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {"pad_token_id": 0},
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {},
    "OPTForCausalLM": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "BloomForCausalLM": {},
    "FalconForCausalLM": {},
    "GraniteForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "CohereForCausalLM": {},
    "Glm4ForCausalLM": {"head_dim": 16, "pad_token_id": 0},
    "SmolLM3ForCausalLM": {"pad_token_id": 0},
    "MambaForCausalLM": {},
    "FalconH1ForCausalLM": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
    },
    "BertForMaskedLM": {},
    "RobertaModel": {},
    "DistilBertModel": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "ElectraModel": {"embedding_size": 64},
    "ModernBertForMaskedLM": {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "T5ForConditionalGeneration": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
    "BartForConditionalGeneration": PAIR,
    "MarianMTModel": PAIR | {"pad_token_id": 0, "decoder_start_token_id": 0},
}

REFUSED = {("MarianMTModel", "default"): "does not hold model.encoder.embed_positions.weight"}
"""(architecture, job) -> what is said, before anything is written."""

JOBS = {"default": ["--samples", "8", "--seqlen", "24"], "kmeans": ["--method", "kmeans", "--bits", "4"]}
"""Name -> options of the command; the first has none that chooses a method or a setting of it."""

READER = """
import sys, traceback, torch, pyllmq
for folder in map(str.strip, sys.stdin):
    try:
        model = pyllmq.from_pretrained(folder)
        pyllmq.set_precision(model, "exact")
        with torch.no_grad():
            torch.save(model(**torch.load(folder + ".batch"))[0], folder + ".logits")
        print("read", folder, flush=True)
    except Exception:
        print(repr(traceback.format_exc()), flush=True)
"""


@pytest.fixture(scope="module")
def reader():
    """Folder -> the first output of its model for the batch beside it, in a process that does nothing but load."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", READER], text=True, env=environment, **pipes) as process:

        def read(folder: Path) -> torch.Tensor:
            print(folder, file=process.stdin, flush=True)
            assert process.stdout.readline() == f"read {folder}\n"
            return torch.load(f"{folder}.logits")

        yield read
        process.stdin.close()


@pytest.fixture(scope="module")
def tokenizer_and_text(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(builtin_sentences()[:30]), encoding="utf-8")
    return models.tiny_tokenizer(), text


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request, tokenizer_and_text, tmp_path_factory):
    """(name, folder of the dense model, a batch)."""
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, request.param)
    config = model_class.config_class(**(SIZES | ARCHITECTURES[request.param]))
    folder = tmp_path_factory.mktemp(request.param)
    model_class(config).save_pretrained(folder)
    tokenizer_and_text[0].save_pretrained(folder)
    batch = {"input_ids": torch.randint(3, 512, (2, 24))}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, 512, (2, 12))
    return request.param, folder, batch


@pytest.mark.parametrize("job", JOBS)
def test_packed_and_read_back_or_refused(architecture, tokenizer_and_text, tmp_path, capsys, reader, job) -> None:
    """The oracle is the dense model with each packed weight decoded into it."""
    name, source, batch = architecture
    packed = tmp_path / "packed"
    text = ["--calibration", str(tokenizer_and_text[1])] if job == "default" else []
    done = main(["compress", str(source), str(packed), "--quiet", *JOBS[job], *text])
    if done != 0 or (name, job) in REFUSED:
        said = capsys.readouterr().err
        assert (name, job) in REFUSED and REFUSED[name, job] in said, said
        assert not list(tmp_path.iterdir())
        return
    torch.save(batch, f"{packed}.batch")
    ours = reader(packed)
    decoded = load_model(source)
    take_apart(decoded)
    layers = packed_modules(pyllmq.from_pretrained(packed))
    assert len(layers) >= 2
    for path, layer in layers:
        linear = decoded.get_submodule(path)
        weight = layer.dequantize()
        with torch.no_grad():
            linear.weight.copy_(weight.T if is_transposed_linear(linear) else weight)
            if linear.bias is not None:  # compressing corrects it
                linear.bias.copy_(layer.bias)
    with torch.no_grad():
        plain = decoded(**batch)[0]
    assert plain.isfinite().all()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))

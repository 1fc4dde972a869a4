"""The Python of docs/serving.md runs as it stands there, in one process, and its torchrun command in two."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyllmq

from . import models

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture
def packed(tmp_path, monkeypatch):
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: pyllmq.CodebookLinear.from_dense(linear, 4))
    pyllmq.save_pretrained(model, tmp_path / "my-model-packed", models.tiny_tokenizer())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_torchrun_command(packed):
    command = re.search(r"^    torchrun (.*)$", PAGE, flags=re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1].replace("examples/", f"{ROOT}/examples/"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *words],
        capture_output=True, text=True, timeout=900, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model.layers.0.mlp.down_proj" in done.stdout and "columns 0:64 64:128" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("Once upon a time")]


def test_peft_example(packed):
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pyllmq-kernels[peft]')")
    example = next(code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "peft" in code)
    names: dict = {}
    exec(example, names)
    assert names["model"](torch.randint(0, 512, (1, 4))).logits.shape == (1, 4, 512)


def test_parallel_examples_name_what_exists(packed):
    """In one process: a group of one rank."""
    examples = [code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "tensor_parallel" in code]
    assert len(examples) == 1
    alone = f'"gloo", init_method="file://{packed}/store", rank=0, world_size=1'
    code = examples[0].replace('"gloo")', f"{alone})")
    names: dict = {}
    try:
        exec(code, names)
        assert names["model"](torch.randint(0, 512, (1, 4))).logits.shape == (1, 4, 512)
    finally:
        torch.distributed.destroy_process_group()

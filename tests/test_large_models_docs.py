"""The commands of docs/large-models.md run as they stand there, on a tiny model and a little text."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyllmq
from pyllmq.cli import main
from pyllmq.compression.jobs.manifest import working_folder

from . import models
from .kill_and_resume import ended_after

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "large-models.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True) for line in PAGE.partition("```bash\n")[2].partition("```")[0].splitlines()
]
LITTLE_TEXT = ["--samples", "2", "--seqlen", "16", "--quiet"]


@pytest.fixture
def dense(tmp_path, monkeypatch):
    models.tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "my-model", max_shard_size="100KB")
    models.tiny_tokenizer().save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def more(words):
    return ["--quiet"] if "--workers" in words else LITTLE_TEXT


def loads(folder):
    assert pyllmq.from_pretrained(folder)(torch.randint(0, 512, (1, 4))).logits.shape == (1, 4, 512)


def test_the_page_has_the_commands():
    assert [words[0] for words in COMMANDS] == ["pyllmq"] * 3 + ["torchrun"] + ["pyllmq"] * 2


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "pyllmq" and "--resume" not in w], ids=" ".join)
def test_command(dense, words, capsys):
    assert main([*words[1:], *more(words)]) == 0
    if "--dry-run" in words:
        assert "minutes" in capsys.readouterr().out and {path.name for path in dense.iterdir()} == {"my-model"}
    else:
        loads("my-model-packed")


def test_resume(dense):
    (words,) = [words for words in COMMANDS if "--resume" in words]
    with ended_after(1, KeyboardInterrupt):
        assert main([*(word for word in words[1:] if word != "--resume"), *LITTLE_TEXT]) == 130
    assert working_folder(dense / "my-model-packed").exists()
    assert main([*words[1:], *LITTLE_TEXT]) == 0
    loads("my-model-packed")


@pytest.mark.slow
def test_torchrun(dense):
    (words,) = [words for words in COMMANDS if words[0] == "torchrun"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:], *LITTLE_TEXT]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    loads("my-model-packed")


def test_python_names(dense):
    """What the page calls, as it calls it."""
    report = pyllmq.compress_files("my-model", "packed", pyllmq.KMeansConfig(2), progress=False)
    assert report.layers and {path.name for path in dense.iterdir()} == {"my-model", "packed"}
    names = re.findall(r"`pyllmq\.(\w+)\(", PAGE)
    assert set(names) == {"compress_folder", "compress_files"} and all(hasattr(pyllmq, name) for name in names)
    shutil.rmtree("packed")
    batches = models.token_batches(2, 8)
    pyllmq.compress_folder("my-model", "packed", pyllmq.CLAQConfig(bits=2), batches, progress=False)
    described = json.loads(Path("packed/config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "pyllmq"

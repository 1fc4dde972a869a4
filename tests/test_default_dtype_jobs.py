"""A job gives the same tensors whatever torch's default dtype and device are, and leaves them as they were."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pyllmq

from . import models
from .test_default_dtype import default_device, default_dtype

CONFIGS = {
    "claq": pyllmq.CLAQConfig(bits=3.12, outliers=0.005),
    "balanced": pyllmq.ColumnCodebookConfig.preset("balanced", 3.0, tune_steps=1),
    "mixed": pyllmq.SparseConfig(0.5, quantize=pyllmq.CLAQConfig(bits=3)),
    "owl": pyllmq.SparseConfig(0.5, method="wanda", allocation="owl"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense") / "dense"
    model = models.tiny_llama(num_hidden_layers=1, hidden_size=32, intermediate_size=48, vocab_size=128)
    model.save_pretrained(folder)
    return model, folder, models.token_batches(2, 16, 128)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def in_memory(config):
    def job(llama, output):
        model = copy.deepcopy(llama[0])
        pyllmq.compress(model, config, llama[2], progress=False, embeddings=4)
        pyllmq.save_pretrained(model, output)

    return job


def by_blocks(llama, output):
    pyllmq.compress_folder(llama[1], output, CONFIGS["claq"], llama[2], progress=False, head=4)


def by_files(llama, output):
    pyllmq.compress_files(llama[1], output, pyllmq.KMeansConfig(3), progress=False, embeddings=4)


JOBS = {name: in_memory(config) for name, config in CONFIGS.items()} | {"by blocks": by_blocks, "by files": by_files}


@pytest.mark.parametrize("name", JOBS)
def test_the_same_tensors_under_other_defaults(llama, tmp_path, name):
    JOBS[name](llama, tmp_path / "plain")
    expected = written(tmp_path / "plain")
    for i, change in enumerate((default_dtype(torch.bfloat16), default_device("meta"))):
        with change:
            before = torch.get_default_dtype(), torch.get_default_device()
            JOBS[name](llama, tmp_path / str(i))
            assert (torch.get_default_dtype(), torch.get_default_device()) == before
        found = written(tmp_path / str(i))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_fused_and_loaded_under_another_default(llama, tmp_path):
    by_files(llama, tmp_path / "packed")
    plain = pyllmq.from_pretrained(tmp_path / "packed")
    ids = torch.arange(3, 9)[None]
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            model = pyllmq.from_pretrained(tmp_path / "packed")
        assert pyllmq.fusion.report(model) == pyllmq.fusion.report(plain)
        found, expected = (m.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False) for m in (model, plain))
        assert torch.equal(found, expected)

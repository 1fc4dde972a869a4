"""Folders that an earlier commit saved (tests/data/README.md) load, compute and are saved back byte for byte."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

import pyllmq
from pyllmq import formats

FOLDERS = sorted((Path(__file__).parent / "data/folders").iterdir())


def described(folder):
    """config.json but for the name of the version that wrote it."""
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key != "transformers_version"}


def test_there_is_a_folder_of_every_format():
    found = {m["kind"] for f in FOLDERS for m in described(f)["quantization_config"]["modules"].values()}
    # Formats of other tests may be registered in this process; those of the package stand first.
    assert found == {"codebook", "bitmap", "sparse24", "sparse24_codebook"} <= set(formats.kinds())


@pytest.mark.parametrize("backend", ["chosen", "reference"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_saved_back_byte_for_byte(folder, backend, tmp_path):
    with pyllmq.use_backend("reference") if backend == "reference" else contextlib.nullcontext():
        model = pyllmq.from_pretrained(folder)
        with torch.no_grad():
            assert bool(model(torch.arange(7)[None]).logits.isfinite().all())
        pyllmq.save_pretrained(model, tmp_path / "again")
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    assert described(tmp_path / "again") == described(folder)
    # In the order in which it was written, too.
    modules = [json.dumps(described(each)["quantization_config"]) for each in (folder, tmp_path / "again")]
    assert modules[0] == modules[1]

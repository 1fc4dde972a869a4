"""Kill a compression at random moments, again and again, and compare what it gives in the end with one that was let be.

    python tests/kill_and_resume.py --kills 200

The children are forked from a process that has imported everything but computed nothing, so a kill costs as long as the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
import transformers
import transformers.conversion_mapping
import transformers.core_model_loading
import transformers.generation
import transformers.models.llama.modeling_llama
import transformers.quantizers

from pyllmq import CLAQConfig, ColumnCodebookConfig, compress_folder
from pyllmq.compression.jobs.folder import FolderJob
from pyllmq.compression.jobs.manifest import working_folder

METHODS = {"claq": CLAQConfig(bits=3), "columns": ColumnCodebookConfig(bits=3, cycles=1, kmeans="windowed")}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (2, 24), generator=generator) for _ in range(3)]


def write_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")


def work(source: Path, output: Path, method: str, resume: bool) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    compress_folder(source, output, METHODS[method], batches(), resume=resume, progress=False)


@contextmanager
def ended_after(blocks: int, error: type[BaseException]) -> Iterator[None]:
    """Within it a job of this process raises `error` when it has finished so many blocks."""
    finish, done = FolderJob.finish, 0

    def end(self: Any, *of_a_block: Any) -> None:
        nonlocal done
        finish(self, *of_a_block)
        done += 1
        if done == blocks:
            raise error

    with patch.object(FolderJob, "finish", end):
        yield


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def run(kills: int, place: Path, seed: int = 0) -> dict[str, Any]:
    """Kill at least `kills` times. Raises AssertionError where a folder differs, or is there before it is whole."""
    context = multiprocessing.get_context("fork")
    chance = random.Random(seed)
    source = place / "source"

    def start(*arguments: Any) -> Any:
        process = context.Process(target=work, args=arguments)
        process.start()
        return process

    maker = context.Process(target=write_model, args=(source,))
    maker.start()
    maker.join()
    killed = dict.fromkeys(METHODS, 0)
    resumed = finished = 0
    while sum(killed.values()) < kills or not finished:
        for method in METHODS:
            whole, output = place / f"{method}-whole", place / f"{method}-killed"
            if not whole.exists():
                began = time.perf_counter()
                first = start(source, whole, method, False)
                first.join()
                assert first.exitcode == 0, f"the undisturbed run ended with {first.exitcode}"
                length = time.perf_counter() - began
            while not output.exists():
                resume = (working_folder(output) / "manifest.json").exists()
                resumed += resume
                process = start(source, output, method, resume)
                process.join(chance.uniform(0, 0.7 * length))
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    killed[method] += 1
                    print(f"{sum(killed.values())} kills, {finished} folders compared", file=sys.stderr)
                else:
                    assert process.exitcode == 0, f"a run of {method} ended with {process.exitcode}"
                    assert output.exists()
            assert digests(output) == digests(whole), f"{method}: a resumed folder differs"
            finished += 1
            shutil.rmtree(output)
            shutil.rmtree(working_folder(output), ignore_errors=True)
    return {"kills": killed, "resumed": resumed, "folders compared": finished}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(given.kills, Path(folder), given.seed)))

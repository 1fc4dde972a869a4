"""Jobs of 1, 2 and 3 processes over gloo, one of which loses a process; prints what came out as JSON.

Forked from a process that has imported everything but computed nothing. `tests/test_ranks.py` runs it and says what must hold.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from kill_and_resume import digests, write_model
from torch.distributed import TCPStore

from pyllmq import ColumnCodebookConfig, SparseConfig, compress_folder
from pyllmq.compression.jobs.folder import FolderJob
from pyllmq.compression.jobs.job import Job
from pyllmq.compression.methods import column_codebook
from pyllmq.compression.ranks import joined

METHODS: dict[str, Any] = {
    "columns": ColumnCodebookConfig(bits=3, cycles=1, kmeans="windowed", guidance="rows+tokens"),
    "pruned": SparseConfig(0.5, method="sparsegpt", allocation="owl", true_sequential=False),
    "experts": ColumnCodebookConfig(bits=3, cycles=1, kmeans="windowed"),
}
CONTEXT = multiprocessing.get_context("fork")


def write_experts(folder: Path) -> None:
    """10 batches of 24 tokens leave some of its 16 experts with tokens in one process only, some with none."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(vocab_size=256, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=16,
                                         num_experts_per_tok=2, max_position_embeddings=64)  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data *= torch.linspace(1, 60, 16)[:, None]
    model.save_pretrained(folder)


def batches(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (2, 24), generator=generator) for _ in range(count)]


def work(rank: int, size: int, port: int, log: Path, arguments: tuple[Any, ...], resume: bool, dies: bool) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    hessians: list[torch.Tensor] = []
    swept: list[int] = []
    compress_group, finish, sweep = Job.compress_group, FolderJob.finish, column_codebook.sweep_

    def count_and_sweep(stored: torch.Tensor, *rest: Any) -> Any:
        swept.append(stored.numel())
        return sweep(stored, *rest)

    def seen(self: Job, group: Any, inputs: Any) -> None:
        hessians.append(inputs.hessian.clone())
        compress_group(self, group, inputs)

    def finish_and_die(self: Any, *behind: Any) -> None:
        finish(self, *behind)
        if dies and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Job.compress_group, FolderJob.finish = seen, finish_and_die
    column_codebook.sweep_ = count_and_sweep
    source, output, method = arguments
    try:
        with joined() as ranks:
            report = compress_folder(
                source, output, METHODS[method], batches(), resume=resume, progress=False, ranks=ranks
            )
    except Exception as error:
        log.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        sys.exit(1)
    torch.save(hessians[0], log.with_suffix(".pt"))
    said = {"error": "", "mean": report.mean_error, "bits": report.bits_per_weight}
    log.write_text(json.dumps(said | {"swept": swept}))


def job(
    size: int, place: Path, name: str, method: str, *, resume: bool = False, dies: bool = False
) -> list[dict[str, Any]]:
    """What each process says of itself."""
    # As torchrun does it: a port that was free a moment ago may be another test's by now, and both would wait for ever.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [place / f"{name}.{rank}.json" for rank in range(size)]
    for log in logs:
        log.unlink(missing_ok=True)
    arguments = (place / ("experts source" if method == "experts" else "source"), place / name, method)
    processes = [
        CONTEXT.Process(target=work, args=(rank, size, store.port, logs[rank], arguments, resume, dies))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ended = [json.loads(log.read_text()) if log.exists() else {"error": "no word"} for log in logs]
    return [{**said, "exit": process.exitcode} for said, process in zip(ended, processes, strict=True)]


def main(place: Path) -> dict[str, Any]:
    for write, name in ((write_model, "source"), (write_experts, "experts source")):
        maker = CONTEXT.Process(target=write, args=(place / name,))
        maker.start()
        maker.join()
    found: dict[str, Any] = {}
    for method in METHODS:
        jobs = {}
        for size in (1, 2, 3):
            jobs[size] = job(size, place, f"{method}{size}", method)
            print(f"{method}, {size} processes: {jobs[size]}", file=sys.stderr)
        hessians = {size: [torch.load(place / f"{method}{size}.{rank}.pt") for rank in range(size)] for size in jobs}
        alone = hessians[1][0]
        found[method] = {
            "processes": jobs,
            "files": {size: sorted(digests(place / f"{method}{size}")) for size in jobs},
            "same Hessian in all": {size: all(torch.equal(h, hs[0]) for h in hs) for size, hs in hessians.items()},
            "change of the Hessian": {
                size: float((hs[0] - alone).norm() / alone.norm()) for size, hs in hessians.items()
            },
        }
    lost = job(2, place, "lost", "columns", dies=True)
    found["lost"] = {"processes": lost, "there": (place / "lost").exists()}
    found["resumed by three"] = job(3, place, "lost", "columns", resume=True)
    found["resumed"] = job(2, place, "lost", "columns", resume=True)
    found["same bytes"] = digests(place / "lost") == digests(place / "columns2")
    found["too many"] = job(6, place, "many", "columns")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(main(Path(folder))))

"""What a compression from folder to folder holds in memory, and what a second process gains: one CSV for both.

    python benchmarks/streaming.py memory     a checkpoint of the shape of a 7B model, a few blocks of it compressed
    python benchmarks/streaming.py memory --shape qwen3-30b-a3b      the same with 128 experts in each block
    python benchmarks/streaming.py ranks      the same job in 1 and 2 processes of one thread each, in turn

Each job runs in a process of its own, on random weights and random tokens: neither number depends on what the text says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from pyllmq import ColumnCodebookConfig, SparseConfig, compress_folder
from pyllmq.benchmarks import record
from pyllmq.compression.ranks import joined


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    key_value_heads: int = 0
    """0: as many as heads."""
    head_dim: int = 0
    """0: hidden / heads."""
    experts: int = 0
    """Of `inner` each; 0: a Llama."""
    choices: int = 0

    def config(self, blocks: int) -> Any:
        from transformers import AutoConfig

        sizes: dict[str, Any] = {
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "num_hidden_layers": blocks,
            "num_attention_heads": self.heads, "num_key_value_heads": self.key_value_heads or self.heads,
            "head_dim": self.head_dim or self.hidden // self.heads, "dtype": "bfloat16",
        }  # fmt: skip
        if not self.experts:
            return AutoConfig.for_model(
                "llama", intermediate_size=self.inner, architectures=["LlamaForCausalLM"], **sizes
            )
        sizes |= {"num_experts": self.experts, "num_experts_per_tok": self.choices, "norm_topk_prob": True}
        return AutoConfig.for_model(
            "qwen3_moe", moe_intermediate_size=self.inner, architectures=["Qwen3MoeForCausalLM"], **sizes
        )

    @property
    def block(self) -> int:
        """Bytes of the Linears of a block in fp32."""
        heads = self.heads + (self.key_value_heads or self.heads)
        attention = 2 * self.hidden * heads * (self.head_dim or self.hidden // self.heads)
        return 4 * (attention + 3 * self.hidden * self.inner * max(1, self.experts))


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32000),
    "qwen3-30b-a3b": Shape(2048, 768, 32, 151936, key_value_heads=4, head_dim=128, experts=128, choices=8),
    "few-experts": Shape(2048, 768, 32, 2048, key_value_heads=4, head_dim=128, experts=4, choices=2),
    "small": Shape(512, 1376, 8, 2048),
}
METHODS: dict[str, Any] = {
    "fast": ColumnCodebookConfig.preset("fast", 3),
    "balanced": ColumnCodebookConfig.preset("balanced", 3),
    "wanda": SparseConfig(0.5, method="wanda"),
}


@dataclass(frozen=True)
class Row:
    what: str
    shape: str
    blocks: int
    """Of the checkpoint."""
    compressed: int
    method: str
    processes: int
    threads: int
    """Of each."""
    samples: int
    seqlen: int
    seconds: float
    """Median of the runs, without the start of the interpreter."""
    speedup: float
    """Against one process in the same run."""
    peak_gb: float
    """Most that one process held, interpreter and libraries included."""
    libraries_gb: float
    """What a process holds before it begins."""
    block_fp32_gb: float
    hidden_gb: float
    """Hidden states of the calibration data of one process."""
    peak_blocks: float
    """(peak - hidden) / block."""
    others_cpu: float
    device: str
    torch: str
    pyllmq: str
    commit: str
    timestamp: str


HEADER = [field.name for field in fields(Row)]


def write_checkpoint(folder: Path, shape: str, blocks: int) -> None:
    """Random bfloat16 weights. One set of numbers serves every block: k-means does not see the difference."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = SHAPES[shape].config(blocks)
    config.save_pretrained(folder)
    with torch.device("meta"):
        wanted = dict(_as_in_files(AutoModelForCausalLM.from_config(config).state_dict()))
    noise = torch.randn(max(t.numel() for t in wanted.values()) + 64, generator=torch.Generator().manual_seed(0))
    noise = noise.mul_(0.02).bfloat16()
    units: dict[str, dict[str, torch.Tensor]] = {}
    for i, (key, like) in enumerate(wanted.items()):
        unit = ".".join(key.split(".")[:3]) if ".layers." in key else "outside"
        value = torch.ones(like.shape, dtype=torch.bfloat16) if like.dim() == 1 else None
        if value is None:
            value = noise[i % 64 :][: like.numel()].view(like.shape).clone()
        units.setdefault(unit, {})[key] = value
    where: dict[str, str] = {}
    for i, tensors in enumerate(units.values(), 1):
        name = f"model-{i:05d}-of-{len(units):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _as_in_files(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Files of Qwen3-MoE hold the projections of experts one by one."""
    for key, tensor in tensors.items():
        stack, _, parameter = key.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(parameter, ())
        for expert, of_expert in enumerate(tensor if parts else ()):
            for name, part in zip(parts, of_expert.chunk(len(parts)), strict=True):
                yield f"{stack}.{expert}.{name}.weight", part
        if not parts:
            yield key, tensor


def work(job: dict[str, Any]) -> None:
    """One process of a job; prints what it found as JSON."""
    from pyllmq.memory import peak_memory

    torch.set_num_threads(job["threads"])
    libraries = peak_memory()
    vocabulary = SHAPES[job["shape"]].vocabulary
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, vocabulary, (1, job["seqlen"]), generator=generator) for _ in range(job["samples"])]
    include = [f"layers.{i}" for i in range(job["compressed"])]
    with joined() as ranks:
        report = compress_folder(
            job["source"], job["output"], METHODS[job["method"]], batches, include=include, progress=False, ranks=ranks
        )
        if ranks.first:
            print(json.dumps({"seconds": report.seconds, "peak": report.peak_memory, "libraries": libraries}))


def run_job(job: dict[str, Any], processes: int) -> dict[str, float]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(dir=Path(job["source"]).parent) as place:
        command = [sys.executable, "-W", "ignore", "-m", "pyllmq.benchmarks.streaming", "work"]
        command.append(json.dumps(job | {"output": f"{place}/out"}))
        started = []
        for rank in range(processes):
            environment = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
            environment |= {"OMP_NUM_THREADS": job["threads"], "TORCHELASTIC_USE_AGENT_STORE": True}
            variables = os.environ | {name: str(value) for name, value in environment.items()}
            started.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True))
        printed = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise RuntimeError(f"a process ended with {[process.returncode for process in started]}")
        return json.loads(printed[0].splitlines()[-1])


def measure(what: str, job: dict[str, Any], counts: list[int], repeats: int) -> list[Row]:
    """The job with each number of processes, in turn, so often."""
    others = record.OthersCpu()
    found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            found[count].append(run_job(job, count))
    hidden, block = SHAPES[job["shape"]].hidden, SHAPES[job["shape"]].block
    share = others.share()
    times = {count: statistics.median(run["seconds"] for run in runs) for count, runs in found.items()}
    rows = []
    for count, runs in found.items():
        peak = max(run["peak"] for run in runs)
        states = 2 * hidden * job["seqlen"] * -(-job["samples"] // count)
        rows.append(
            Row(
                what=what, shape=job["shape"], blocks=job["blocks"], compressed=job["compressed"], method=job["method"],
                processes=count, threads=job["threads"], samples=job["samples"], seqlen=job["seqlen"], seconds=times[count],
                speedup=times[counts[0]] / times[count], peak_gb=peak / 1e9, libraries_gb=runs[0]["libraries"] / 1e9,
                block_fp32_gb=block / 1e9, hidden_gb=states / 1e9, peak_blocks=(peak - states) / block, others_cpu=share,
                **record.environment(),
            )
        )  # fmt: skip
    return rows


def table(rows: list[Row]) -> str:
    names = [
        "processes",
        "seconds",
        "speed-up",
        "peak GB",
        "libraries",
        "block fp32",
        "hidden states",
        "(peak - hidden) / block",
    ]
    lines = ["  ".join(names)]
    for r in rows:
        cells = [str(r.processes), f"{r.seconds:.1f}"]
        values = (r.speedup, r.peak_gb, r.libraries_gb, r.block_fp32_gb, r.hidden_gb, r.peak_blocks)
        cells += [f"{value:.2f}" for value in values]
        lines.append("  ".join(cell.rjust(len(name)) for cell, name in zip(cells, names, strict=True)))
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["work"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "ranks"])
    parser.add_argument("--shape", choices=SHAPES, help="default llama-2-7b for memory, small for ranks")
    parser.add_argument("--method", choices=METHODS, default="balanced")
    parser.add_argument("--blocks", type=int, default=4, help="of the checkpoint")
    parser.add_argument("--compressed", type=int, default=2, help="blocks that are compressed")
    parser.add_argument("--samples", type=int, help="default 8 for memory, 128 for ranks")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, help="of each process; default all for memory, 1 for ranks")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--csv", default="benchmarks/streaming.csv", help="append to this file; '' for none")
    given = parser.parse_args()
    ranks = given.what == "ranks"
    job = {
        "shape": given.shape or ("small" if ranks else "llama-2-7b"),
        "method": given.method,
        "blocks": given.blocks,
        "compressed": given.compressed,
        "samples": given.samples or (128 if ranks else 8),
        "seqlen": given.seqlen,
        "threads": given.threads or (1 if ranks else torch.get_num_threads()),
    }
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        source.mkdir()
        write_checkpoint(source, job["shape"], given.blocks)
        rows = measure(given.what, job | {"source": str(source)}, [1, 2] if ranks else [1], given.repeats)
    print(table(rows))
    if given.csv:
        record.append(Path(given.csv), rows, HEADER)


if __name__ == "__main__":
    main()

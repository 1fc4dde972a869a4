"""The processes that tests/test_parallel.py needs, forked after one import: parallel_ranks RANKS FOLDER CASE ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import pyllmq
from pyllmq import parallel
from pyllmq.nn import PackedLinear


def run(rank: int, ranks: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    with torch.inference_mode():
        for case in cases:
            found = check(folder / case, rank, ranks)
            if rank == 0:
                (folder / f"{case}.{ranks}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def check(case: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What this case found, as numbers for the test to judge; errors end the process."""
    expected: dict[str, Any] = torch.load(case / "expected.pt")
    ids, logits, styles = expected["ids"], expected["logits"], expected["styles"]

    part = parallel.from_pretrained(case, styles=styles)
    plan = part.tensor_parallel_plan
    found: dict[str, Any] = {
        "split": {name: str(split) for name, split in plan.splits.items()},
        "whole": plan.whole,
        "experts": plan.experts,
        "cut": _cut_as_planned(part, plan, rank),
    }
    pyllmq.set_precision(part, "exact")
    found["folder"] = _error(part(ids)[0], logits)
    found["bfloat16"] = _error(parallel.from_pretrained(case, styles=styles, dtype=torch.bfloat16)(ids)[0], logits)

    whole = pyllmq.from_pretrained(case)
    pyllmq.set_precision(whole, "exact")
    parallel.parallelize(whole, styles=styles)
    found["memory"] = _error(whole(ids)[0], logits)
    found["same parts"] = all(torch.equal(a, b) for a, b in zip(_tensors(part), _tensors(whole), strict=True))

    if expected["generated"] is not None:
        count = expected["generated"].shape[1] - ids.shape[1]
        made = part.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        found["generated"] = torch.equal(made, expected["generated"])
    if expected["through transformers"]:
        found["transformers"] = _through_transformers(case, ranks, ids, logits)
    never = case / "never"
    found["refusals"] = [
        _refusal(lambda: part.save_pretrained(never)),
        _refusal(lambda: pyllmq.save_pretrained(part, never)),
        _refusal(lambda: parallel.parallelize(part, styles=styles)),
    ]
    return found


def _through_transformers(case: Path, ranks: int, ids: Tensor, logits: Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(case, distributed_config=DistributedConfig(tp_size=ranks))
    pyllmq.set_precision(model, "exact")
    assert model.tensor_parallel_plan.ranks == ranks
    return _error(model(ids)[0], logits)


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the sense of norms."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _tensors(model: Any) -> list[Tensor]:
    return [
        tensor
        for module in model.modules()
        if isinstance(module, PackedLinear)
        for tensor in module.packed_weight().tensors.values()
    ]


def _cut_as_planned(model: Any, plan: parallel.Plan, rank: int) -> bool:
    sizes = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if name in plan.splits}
    wanted = {name: split.ranges[rank][1] - split.ranges[rank][0] for name, split in plan.splits.items()}
    held = {name: model.get_submodule(name) for name in plan.experts}
    shared = all((stack.first, stack.first + stack.experts) == plan.experts[name][rank] for name, stack in held.items())
    sizes_right = all(sizes[name][plan.splits[name].by == parallel.COLUMNS] == size for name, size in wanted.items())
    return sizes_right and shared and all(len(list(s.children())) == 2 * s.experts for s in held.values())


def _refusal(act: Any) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return "accepted"


if __name__ == "__main__":
    ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    multiprocessing.start_processes(run, (ranks, folder, sys.argv[3:]), nprocs=ranks, start_method="fork")

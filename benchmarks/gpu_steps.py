"""The steps of benchmarks/run_gpu.sh, each with a time limit. Standard library only: it must run where the build has not.

A step that fails or runs out of time is reported, and the rest goes on. Files appear in OUT_DIR whole or not at all: logs and
results are written under other names and renamed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_table import gpu_table, read_rows  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOTAL_S = 530.0
"""For all steps together: below the ten minutes after which such machines stop a command."""
FIRST_BLOCK_S = 180.0
"""For the first block but for the build, which takes what it takes: what a short loan must give."""
SHORTEST_S = 5.0
"""A step that would get less than this is not started."""

SHAPES = ("28672x8192", "8192x8192", "4096x4096")
BITS = "2,3,4,2.1+0.005"
TOKENS = "1,2,16,64,512,2048"
WGMMA_TOKENS = "16,64,512,2048"
SPARSE_TOKENS = "1,16,2048"
WIDTHS = "1,2,3,4,5,6,7,8"

WHAT_IS_HERE = """
import importlib.metadata as m, importlib.util as u, platform, shutil, torch
print("Python", platform.python_version(), "torch", torch.__version__, "CUDA of torch", torch.version.cuda)
print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "NONE")
for name in ("setuptools", "pybind11", "triton", "transformers", "pytest", "numpy", "bitsandbytes", "gemlite"):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, "MISSING")
print("nvcc:", shutil.which("nvcc") or "MISSING", " g++:", shutil.which("g++") or "MISSING")
if u.find_spec("pybind11") is None: print("pybind11 is missing: setup.py takes the headers that torch carries")
if u.find_spec("ninja") is None and not shutil.which("ninja"): print("ninja is MISSING: bring it along, on PATH")
if not torch.cuda.is_available(): raise SystemExit("torch finds no GPU here: nothing to measure")
missing = [n for n in ("setuptools", "pytest", "transformers") if u.find_spec(n) is None]
raise SystemExit(f"missing: {missing}; nothing can be built or tested without them" if missing else 0)
"""


@dataclass(frozen=True)
class Step:
    """A shell command, run in the repository's root."""

    name: str
    command: str
    limit_s: float
    needed: bool = False
    """Without it no later step can run."""
    first: bool = False
    """Of the first block, after which the table is printed for the first time."""


@dataclass
class Outcome:
    name: str
    state: str
    """ok, failed, out of time, or not run."""
    seconds: float
    note: str = ""


def steps(out: Path, python: str) -> list[Step]:
    """What a run does, most valuable first: if time ends, the last steps are lost."""
    py, results = shlex.quote(python), shlex.quote(str(out / "results.csv"))
    rates, rates_json = shlex.quote(str(out / ".rates")), shlex.quote(str(out / "rates.json"))
    measure_rates = (
        f"nvcc -O3 -std=c++17 -arch=native -o {rates} benchmarks/gpu_rates.cu && {rates} > {rates_json}.partial; status=$?; "
        f"[ $status = 0 ] && mv {rates_json}.partial {rates_json} && cat {rates_json}; "
        f"rm -f {rates} {rates_json}.partial; exit $status"
    )
    build = "PYLLMQ_CUDA=1 PYLLMQ_CUDA_ARCHS=${PYLLMQ_CUDA_ARCHS:-90a}"
    links = "ln -sfn ../triton_kernels pyllmq/triton_kernels && ln -sfn ../benchmarks pyllmq/benchmarks"
    pytest = f"{py} -m pytest -q -p no:cacheprovider tests/test_gpu.py"
    bench = f"{py} -m pyllmq bench --device cuda --csv {results}"
    sanitizer = "compute-sanitizer --error-exitcode 9 --tool"
    return [
        Step("machine", f"nvidia-smi; {py} -c {shlex.quote(WHAT_IS_HERE)}", 30, needed=True, first=True),
        Step("rates", measure_rates, 30, first=True),
        # In place and through PYTHONPATH, since an environment may be read-only; pip is not asked for anything.
        Step("build", f"{build} {py} setup.py -q build_ext --inplace && {links}", 200, needed=True, first=True),
        Step("smoke", f"{pytest} -k 'sanitized or every_width'", 60, first=True),
        Step("bench widths", f"{bench} --shapes {SHAPES[1]} --bits {WIDTHS} --m 1", 60, first=True),
        Step("doctor", f"{py} -m pyllmq doctor", 30),
        *(
            Step(
                f"bench {shape}",
                f"{bench} --shapes {shape} --bits {BITS} --m {TOKENS}",
                100,
            )
            for shape in SHAPES
        ),
        # No GPU has said yet from how many tokens on, and up to how many, the rows by wgmma are the faster ones.
        Step(
            "bench without wgmma",
            f"PYLLMQ_CUDA_WGMMA=0 {bench} --shapes {SHAPES[1]} --bits {BITS} --m {WGMMA_TOKENS}",
            60,
        ),
        Step(
            "bench sparse",
            f"{bench} --op sparse_linear --shapes {SHAPES[0]} --m {SPARSE_TOKENS}",
            100,
        ),
        Step("bench experts", f"{py} -m pyllmq.benchmarks.gpu_experts --csv {results}", 90),
        Step("softmax_cdist_l1", f"{py} -m pyllmq.benchmarks.softmax_cdist_l1 --device cuda --budget-s 0.5", 40),
        Step("sinkhorn", f"{py} -m pyllmq.benchmarks.sinkhorn --device cuda", 60),
        Step("kmeans_1d", f"{py} -m pyllmq.benchmarks.kmeans_1d --device cuda", 60),
        Step("tests", pytest, 170),
        # torch asks the driver questions that it may answer with an error; those are not ours
        Step("memcheck", f"{sanitizer} memcheck --report-api-errors no {pytest} -k sanitized", 60),
        *(
            Step(f"{tool}check", f"{sanitizer} {tool}check {pytest} -k sanitized", 60)
            for tool in ("race", "sync", "init")
        ),
    ]


def run_step(step: Step, limit_s: float, log: Path) -> Outcome:
    """Run the command with all its children in a group of their own, and end them all at the limit."""
    partial = log.with_name(f".{log.name}.partial")
    begin = time.monotonic()
    with partial.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", step.command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)},
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    os.replace(partial, log)
    seconds = time.monotonic() - begin
    if status == 0:
        return Outcome(step.name, "ok", seconds)
    if status is None:
        return Outcome(step.name, "out of time", seconds, f"ended after its {limit_s:.0f} s; see {log.name}")
    return Outcome(step.name, "failed", seconds, f"exit code {status}: {last_line(log)}")


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def run_steps(
    todo: Sequence[Step],
    out: Path,
    total_s: float = TOTAL_S,
    report: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[Outcome]:
    """All steps in order. After a `needed` one that is not ok, the rest is not run."""
    begin, stopped = time.monotonic(), ""
    outcomes: list[Outcome] = []
    end = begin + total_s
    for number, step in enumerate(todo, 1):
        if number > 1 and todo[number - 2].first and not step.first:
            report(f"\nthe first block, after {time.monotonic() - begin:.0f} s:\n{summary(outcomes, out)}\n")
        left = end - time.monotonic()
        if stopped or left < SHORTEST_S:
            outcomes.append(Outcome(step.name, "not run", 0.0, stopped or "no time left"))
            continue
        report(f"[{number}/{len(todo)}] {step.name} ...")
        log = out / f"{number:02d}-{step.name.replace(' ', '-')}.log"
        outcome = run_step(step, min(step.limit_s, left), log)
        outcomes.append(outcome)
        report(f"      {outcome.state}, {outcome.seconds:.0f} s {outcome.note}".rstrip())
        if step.needed and outcome.state != "ok":
            stopped = f"needs the step {step.name!r}"
        write_whole(out / "steps.json", json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    return outcomes


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    rows, rates = read_rows(out / "results.csv"), out / "rates.json"
    limits = json.loads(rates.read_text()) if rates.exists() else None
    lines = [gpu_table(rows, limits) if rows else "nothing was measured", ""]
    lines += [f"{o.state:<12} {o.name:<18} {o.seconds:5.0f} s  {o.note}".rstrip() for o in outcomes]
    bad = [o.name for o in outcomes if o.state != "ok"]
    lines.append(f"NOT OK: {', '.join(bad)}" if bad else "every step was ok")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run_gpu.sh", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "out", metavar="OUT_DIR", type=Path, help="folder for logs, results.csv, rates.json, steps.json"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the steps and run none")
    parser.add_argument("--only", metavar="NAME,NAME", help="run only these steps")
    parser.add_argument("--total", type=float, default=TOTAL_S, metavar="SECONDS", help="for all steps together")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    todo = steps(out, sys.executable)
    if given.only is not None:
        wanted, known = given.only.split(","), [step.name for step in todo]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            parser.error(f"there is no step {', '.join(unknown)}; known: {', '.join(known)}")
        todo = [step for step in todo if step.name in wanted]
    if given.dry_run:
        for step in todo:
            print(
                f"{step.name}  (limit {step.limit_s:.0f} s{', needed' if step.needed else ''})\n    {step.command.strip()}"
            )
        return 0
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty; give a new folder, so that two runs are not mixed")
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_steps(todo, out, given.total)
    text = summary(outcomes, out)
    write_whole(out / "summary.txt", text + "\n")
    print("\n" + text)
    return int(any(outcome.state != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

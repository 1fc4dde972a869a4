"""The GPU benchmark without a GPU: steps and their limits, the table, the interleaving, what a wrong or failing provider does."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyllmq import backends
from pyllmq.benchmarks import (
    gpu,
    gpu_experts,
    gpu_providers,
    gpu_steps,
    gpu_table,
    gpu_timing,
    providers,
    record,
    tune_triton,
)
from pyllmq.benchmarks.gpu_steps import Step, run_steps
from pyllmq.benchmarks.run import run
from pyllmq.benchmarks.shapes import resolve
from pyllmq.benchmarks.timing import MIN_SAMPLES, Samples
from pyllmq.triton_kernels import configs

ROOT = Path(__file__).parents[1]


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_steps_that_fail_or_are_slow_do_not_stop_the_rest(tmp_path):
    outcomes = run_steps(
        [
            Step("good", "echo fine", 10),
            Step("bad", "echo reason; exit 3", 10),
            Step("slow", "sleep 60 & sleep 60", 0.5),
            Step("last", "test -d tests && echo in the root", 10),
        ],
        tmp_path,
        report=lambda line: None,
    )
    assert [(o.name, o.state) for o in outcomes] == [
        ("good", "ok"),
        ("bad", "failed"),
        ("slow", "out of time"),
        ("last", "ok"),
    ]
    assert outcomes[1].note == "exit code 3: reason" and outcomes[2].seconds < 10
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "01-good.log", "02-bad.log", "03-slow.log", "04-last.log", "steps.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "steps.json").read_text()) == [dataclasses.asdict(o) for o in outcomes]


def test_the_first_block_ends_with_a_table(tmp_path):
    limits = {"device": "a GPU", "read_gb_per_s": 14, "copy_gb_per_s": 7, "per_clock_and_sm": {"prmt": 63.9}}
    row = {"op": "codebook_linear", "provider": "p", "kernel": "k", "n": 1, "k": 2, "m": 1, "bits_per_weight": 2.5}
    row |= {"median_us": 1.0, "gb_per_s": 7.0, "relative_error": 0.1}
    (tmp_path / "rates.json").write_text(json.dumps(limits))
    (tmp_path / "results.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    said = []
    run_steps([Step("bench", "true", 10, first=True), Step("tests", "true", 10)], tmp_path, report=said.append)
    (table,) = [i for i, line in enumerate(said) if "the first block, after" in line]
    assert "tests" in said[table + 1] and " 50%" in said[table]
    assert "a GPU: reads 14 GB/s, copies 7 GB/s; per clock and multiprocessor prmt 63.9" in said[table]


def test_what_a_slow_step_started_is_ended_too(tmp_path):
    mark = tmp_path / "pid"
    run_steps([Step("slow", f"sleep 60 & echo $! > {mark}; wait", 0.5)], tmp_path, report=lambda line: None)
    child = Path("/proc") / mark.read_text().strip() / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_after_a_needed_step_failed_the_rest_is_not_run(tmp_path):
    todo = [Step("build", "exit 1", 10, needed=True), Step("tests", f"touch {tmp_path}/ran", 10)]
    outcomes = run_steps(todo, tmp_path, report=lambda line: None)
    assert outcomes[1].state == "not run" and "'build'" in outcomes[1].note and not (tmp_path / "ran").exists()


def test_the_total_limits_every_step(tmp_path):
    todo = [Step("slow", "sleep 60", 50), Step("next", "true", 10)]
    outcomes = run_steps(todo, tmp_path, total_s=gpu_steps.SHORTEST_S + 0.5, report=lambda line: None)
    assert [o.state for o in outcomes] == ["out of time", "not run"] and outcomes[1].note == "no time left"


def test_the_whole_plan_fits_its_limits(tmp_path):
    todo = gpu_steps.steps(tmp_path, "python3")
    names = [step.name for step in todo]
    assert len(set(names)) == len(names) and {"memcheck", "racecheck", "synccheck", "initcheck"} < set(names)
    assert gpu_steps.TOTAL_S < 540
    first = [step for step in todo if step.first]
    assert first == todo[: len(first)] and [s.name for s in first] == [
        "machine",
        "rates",
        "build",
        "smoke",
        "bench widths",
    ]
    assert sum(step.limit_s for step in first if step.name != "build") <= gpu_steps.FIRST_BLOCK_S
    assert "--bits 1,2,3,4,5,6,7,8 --m 1" in first[-1].command and "every_width" in first[-2].command
    for step in todo:
        syntax = subprocess.run(["bash", "-n", "-c", step.command], capture_output=True, text=True)
        assert syntax.returncode == 0, syntax.stderr


def script(*arguments):
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "run_gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_dry_run_prints_the_steps_and_makes_nothing(tmp_path):
    done = script(str(tmp_path / "out"), "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    for step in gpu_steps.steps(tmp_path / "out", sys.executable):
        assert f"{step.name}  (limit {step.limit_s:.0f} s" in done.stdout
    assert "--shapes 28672x8192 --bits 2,3,4,2.1+0.005 --m 1,2,16,64,512,2048" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_first_step_says_so(tmp_path):
    done = script(str(tmp_path / "out"), "--only", "machine,tests")
    assert done.returncode == 1
    assert "torch finds no GPU here" in done.stdout and "NOT OK: machine, tests" in done.stdout
    assert (tmp_path / "out" / "summary.txt").read_text() in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUT_DIR"),
        (["--only", "matmul"], "there is no step matmul; known: machine, rates, build"),
        (["--x"], "--x"),
    ],
)
def test_arguments_that_are_not_understood(tmp_path, arguments, message):
    given = [str(tmp_path / "out"), *arguments] if arguments else []
    done = script(*given)
    assert done.returncode == 2 and message in done.stderr


def test_a_folder_with_another_run_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("old")
    done = script(str(tmp_path), "--only", "machine")
    assert done.returncode == 2 and "not empty" in done.stderr and (tmp_path / "results.csv").read_text() == "old"


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_replays_take_turns_until_each_had_its_budget():
    order = []

    def capture(copies):
        name, microseconds = copies[0](), itertools.cycle([100, 300, 200])
        return lambda: (order.append(name), 1000 * next(microseconds))[1]

    samples, failures = gpu_timing.measure_replays(
        {"a": [lambda: "a"], "b": [lambda: "b"]}, budget_s=0.1, capture=capture
    )
    assert not failures and samples["a"].percentile_us(50) == pytest.approx(200)
    timed = order[2 * gpu_timing.UNTIMED_REPLAYS :]
    assert timed == ["a", "b"] * (len(timed) // 2) and len(timed) // 2 >= MIN_SAMPLES
    spent_s = sum(samples["a"].nanoseconds) * gpu_timing.CALLS_PER_REPLAY / 1e9
    assert 0.1 <= spent_s < 0.11


def test_a_provider_that_cannot_be_captured_is_left_out():
    def capture(copies):
        if copies[0]() == "bad":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return lambda: 1000

    samples, failures = gpu_timing.measure_replays(
        {"bad": [lambda: "bad"], "good": [lambda: "good"]}, budget_s=1e-6, capture=capture
    )
    assert list(samples) == ["good"] and len(samples["good"].nanoseconds) == MIN_SAMPLES
    assert failures == {"bad": "RuntimeError: operation not permitted when stream is capturing"}


# ---- a run ----------------------------------------------------------------------------------------------------------

FP32, BF16 = providers.RIVALS[:2]


def each_takes_ten_microseconds(calls, budget_s):
    """In place of CUDA graphs: every call is made once, the times are made up, one provider cannot be captured."""
    for copies in calls.values():
        for call in copies:
            call()
    return {name: Samples([10_000] * 5) for name in calls if name != "shy"}, {
        "shy": "no graph"
    } if "shy" in calls else {}


def tiny_run(**options):
    settings = {"shapes": resolve(["48x256"]), "bits": [2], "tokens": [1, 3], "csv": None, "cold_bytes": 200_000}
    fakes = {"device": "cpu", "measure": each_takes_ten_microseconds, "copy": lambda: 4000.0, "place": lambda: "a GPU"}
    return gpu.run_on_gpu("codebook_linear", **(settings | fakes | {"progress": False} | options))


def test_run_prints_and_records(tmp_path, capsys):
    ours = gpu_providers.pyllmq_on_gpu(2, "cpu")
    ours = dataclasses.replace(ours, isa=lambda: "sm_00")
    missing = dataclasses.replace(FP32, name="not here", available=lambda: (False, "it was never written"))
    picky = dataclasses.replace(FP32, name="picky", make=lambda weight: 1 / 0)
    shy = dataclasses.replace(FP32, name="shy")
    csv = tmp_path / "results.csv"
    rows = tiny_run(providers=[FP32, BF16, ours, missing, picky, shy], csv=csv)
    out = capsys.readouterr().out
    assert "not measured: not here: it was never written" in out
    assert "not measured: picky at 48x256: ZeroDivisionError" in out and "shy at 48x256, M = 3: no graph" in out
    names = ["torch fp32", "torch bf16", "pyllmq 2 cpu"]
    assert [(r.op, r.provider, r.m) for r in rows] == [("copy", "torch copy_", 1)] + [
        ("codebook_linear", name, m) for m in (1, 3) for name in names
    ]
    assert [r.provider for r in record.read(csv)] == [r.provider for r in rows]
    for row in rows[1:]:
        assert row.device == "a GPU" and row.median_us == 10 and row.ratio_to_torch_fp32 == 1
        assert row.gb_per_s == pytest.approx(row.bits_per_weight / 8 * 48 * 256 / 10 / 1e3)
    assert rows[3].kernel == "cpu.codebook_linear" and rows[3].isa == "sm_00"


def test_a_wrong_provider_is_not_timed_and_ends_the_run_late(tmp_path, capsys):
    def make(weight):
        layer = FP32.make(weight)
        return dataclasses.replace(layer, run=lambda x: 2 * layer.run(x))

    wrong = dataclasses.replace(FP32, name="wrong", make=make)
    with pytest.raises(providers.WrongResultError, match="wrong is wrong"):
        tiny_run(providers=[FP32, wrong, BF16], csv=tmp_path / "results.csv")
    assert {r.provider for r in record.read(tmp_path / "results.csv")} == {"torch copy_", "torch fp32", "torch bf16"}
    assert "WRONG" in capsys.readouterr().out


def test_inputs_and_weights_rotate_over_more_than_the_cache():
    seen = []

    def measure(calls, budget_s):
        seen.extend(calls["torch fp32"])
        return each_takes_ten_microseconds(calls, budget_s)

    tiny_run(providers=[FP32], tokens=[1], measure=measure)
    x_bytes, weight_bytes = 256 * 4, 48 * 256 * 4
    assert len(seen) * (x_bytes + weight_bytes) > 200_000 >= (len(seen) - 1) * (x_bytes + weight_bytes)
    inputs = {call.args[0].data_ptr() for call in seen}
    weights = {cell.cell_contents.data_ptr() for call in seen for cell in call.func.__closure__}
    assert len(inputs) == len(weights) == len(seen)


@pytest.mark.parametrize("bits", [2, "2.1+0.02"])
def test_our_layer_is_copied_with_its_layout(bits):
    weight = providers.dense_weight(48, 256)
    provider = gpu_providers.pyllmq_on_gpu(bits, "cpu")
    layer = provider.make(weight)
    x = providers.activations(3, 256, torch.bfloat16)
    for each in (layer, layer.copy(), layer.copy().copy()):
        assert each.nbytes == layer.nbytes
        assert providers.check(provider, each, weight, x) < provider.tolerance


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_rivals_and_ours_say_why_they_are_missing():
    for provider in gpu_providers.gpu_providers([2, "2.1+0.005"]):
        ok, why = provider.available()
        assert not ok and why, provider.name
    assert gpu_providers.pyllmq_on_gpu(2, "triton").available() == backends.report()["triton"]


def test_bits_that_are_not_understood_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="allowed: 1 to 8"):
        gpu_providers.gpu_providers(["9"])


def test_a_plot_of_a_gpu_run_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="draws no plot"):
        run(device="cuda", plot="speed.png")


# ---- tiles ----------------------------------------------------------------------------------------------------------


def test_tuned_tiles_make_a_file_that_serves_every_width_and_number_of_tokens(tmp_path, monkeypatch):
    slow, fast = (tune_triton.Tile(64, 64, block, 4, 1, 528) for block in (32, 64))
    assert tune_triton.fastest({slow: Samples([9, 8, 1]), fast: Samples([7, 7, 7])}) == fast
    monkeypatch.setattr(tune_triton.backends, "report", lambda: {"triton": (True, "")})
    tried = []

    def first_candidate(op, bits, tokens):
        tried.append((op, bits, tokens))
        return tune_triton.candidates(op, tokens)[0]

    monkeypatch.setattr(tune_triton, "tune", first_candidate)
    tune_triton.main(tmp_path / "sm_00.json")
    assert len(tried) == 16 and [p.name for p in tmp_path.iterdir()] == ["sm_00.json"]
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    monkeypatch.setattr(configs, "device_class", lambda device: "sm_00")
    for cache in (configs.rows_of, configs.tile_for):
        cache.cache_clear()
    try:
        for bits in range(1, 9):
            assert configs.tile_for("codebook_dequantize", bits, 0, torch.device("cpu")).rows == 32
            blocks = [
                configs.tile_for("codebook_linear", bits, m, torch.device("cpu")).tokens for m in (1, 2, 16, 17, 64)
            ]
            assert blocks == [1, 16, 16, 32, 32]
    finally:
        for cache in (configs.rows_of, configs.tile_for):
            cache.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tiles_are_not_measured_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="only where the back end works"):
        tune_triton.main(tmp_path / "sm_00.json")
    assert not list(tmp_path.iterdir())


# ---- the table ------------------------------------------------------------------------------------------------------


def test_table_leads_with_the_ratio_to_cublas(tmp_path, capsys):
    slow = dataclasses.replace(FP32, name="slow")

    def measure(calls, budget_s):
        times = {"torch fp32": 40_000, "torch bf16": 20_000, "slow": 80_000}
        return {name: Samples([times[name]] * 5) for name in calls}, {}

    rows = tiny_run(providers=[FP32, BF16, slow], tokens=[1], csv=tmp_path / "r.csv", measure=measure)
    printed = capsys.readouterr().out
    lines = gpu_table.gpu_table([dataclasses.asdict(row) for row in rows]).splitlines()
    assert lines[0].split()[:3] == ["x", "cuBLAS", "bf16"]
    assert [line.split()[0] for line in lines[2:5]] == ["0.50", "1.00", "0.25"]
    gb_per_s = 48 * 256 * 2 / 20e-6 / 1e9
    assert f"{gb_per_s / 4000:.0%}" in lines[3] and lines[-1] == "a copy of 1 GiB: 4000 GB/s read and written"
    assert gpu_table.gpu_table(gpu_table.read_rows(tmp_path / "r.csv")).splitlines()[0] == lines[0]
    assert lines[0] in printed


def test_table_without_baseline_or_copy_has_dashes():
    row = {"op": "codebook_linear", "provider": "p", "kernel": "k", "n": 1, "k": 2, "m": 3, "bits_per_weight": 2.5}
    row |= {"median_us": 1.0, "gb_per_s": 7.0, "relative_error": math.nan}
    assert gpu_table.gpu_table([row]).splitlines()[-1].split() == list("-pk123") + ["2.50", "1.0", "7", "-", "-", "nan"]
    assert gpu_table.read_rows(Path("/nonexistent/results.csv")) == []


# ---- experts and rows -----------------------------------------------------------------------------------------------


@pytest.mark.transformers
def test_experts_and_rows_print_and_record(tmp_path, capsys):
    def measure(calls, budget_s):
        assert all(torch.isfinite(call()).all() for copies in calls.values() for call in copies[:2])
        return {name: Samples([10_000]) for name in calls if "batched" not in name}, {
            n: "no graph" for n in calls if "batched" in n
        }

    file = tmp_path / "rows.csv"
    given = ["tiny"], ["4"], [1, 5], ["tiny"], file
    rows = gpu_experts.run_gpu_experts(*given, device="cpu", measure=measure)
    ours = [f"pyllmq {form}" for form in gpu_experts.SPARSE]
    experts, embeddings = ["torch bf16", "pyllmq 4 bits", *ours] * 2, ["torch bf16", "pyllmq 4 bits"] * 2
    assert [row.provider for row in rows] == experts + embeddings
    assert [row.provider for row in record.read(file)] == [row.provider for row in rows]
    assert {row.kernel for row in rows} == {"grouped_mm", "cpu.routed_experts", "F.embedding", "cpu.codebook"}
    out = capsys.readouterr().out
    assert "not measured: torch bf16, batched_mm, tiny, M = 5: no graph" in out and "1.00  pyllmq 4 bits" in out


@pytest.mark.transformers
def test_wrong_experts_are_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_experts, "expected", lambda dense, routing: torch.ones(64, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="pyllmq 4 bits: relative error .* It is not timed"):
        gpu_experts.run_gpu_experts(["tiny"], ["4"], [1], [], device="cpu", sparse=())
    with pytest.raises(ValueError, match="gpt-oss-20b have biases; allowed: qwen3-30b-a3b, mixtral-8x7b, tiny"):
        gpu_experts.run_gpu_experts(["gpt-oss-20b"])

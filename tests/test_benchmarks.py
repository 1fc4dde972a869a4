"""The benchmark harness: statistics, rotation, refusals, record and plot. No test asserts how fast anything is."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from pyllmq import _cpu, dispatch, layouts, operations
from pyllmq.benchmarks import memory, path_cost, plot, providers, record, timing
from pyllmq.benchmarks.memory import READ_LIMIT
from pyllmq.benchmarks.providers import BASELINE, RIVALS, Layer, Provider, Widths, WrongResultError
from pyllmq.benchmarks.run import run
from pyllmq.benchmarks.shapes import MODEL_SHAPES, resolve

FP32 = RIVALS[0]


class FakeClock:
    """Stands still but for what calls cost, so every duration is known."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def costs(self, microseconds):
        """A call that takes the next of `microseconds`, over and over."""
        durations = itertools.cycle(microseconds)

        def call() -> None:
            self.now_ns += int(next(durations) * 1000)

        return call


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_model_name_gives_each_weight_once():
    shapes = resolve(["llama-2-7b", "square-4096", "100x37"])
    assert [(s.n, s.k) for s in shapes] == [(4096, 4096), (11008, 4096), (4096, 11008), (100, 37)]
    assert [s.name for s in shapes] == ["llama-2-7b q/k/v/o", "llama-2-7b gate/up", "llama-2-7b down", "100x37"]


@pytest.mark.parametrize("name", ["llama-9", "4096", "0x16", "16x", "-4x4", ""])
def test_unknown_shape_lists_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        resolve([name])
    assert repr(name) in str(error.value) and all(known in str(error.value) for known in MODEL_SHAPES)


def test_no_shape_is_an_error():
    with pytest.raises(ValueError, match="no shape"):
        resolve([])


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_percentiles():
    samples = timing.Samples([50_000, 10_000, 40_000, 20_000, 30_000, 60_000])
    assert samples.percentile_us(50) == pytest.approx(35.0)
    assert samples.percentile_us(20) == pytest.approx(20.0)
    assert samples.percentile_us(80) == pytest.approx(50.0)


def test_measured_times_are_those_of_single_calls():
    clock = FakeClock()
    calls = {"steady": [clock.costs([500])], "varied": [clock.costs([100, 300, 200])], "slow": [clock.costs([400_000])]}
    samples = timing.measure(calls, budget_s=1.0, clock=clock)
    assert list(samples) == ["steady", "varied", "slow"]
    assert set(samples["steady"].nanoseconds) == {500_000}
    assert samples["varied"].percentile_us(50) == pytest.approx(200)
    assert samples["slow"].percentile_us(50) == pytest.approx(400_000)
    assert len(samples["slow"].nanoseconds) >= timing.MIN_SAMPLES


@pytest.mark.parametrize("budget_s", [0.2, 2.0])
def test_repetitions_adapt_to_the_budget(budget_s):
    clock = FakeClock()
    samples = timing.measure({"a": [clock.costs([1000])]}, budget_s=budget_s, clock=clock)
    timed_s = sum(samples["a"].nanoseconds) / 1e9
    turn_s = timing.TURN_S + timing.LEAD_IN_S
    assert timed_s == pytest.approx(budget_s * timing.TURN_S / turn_s, abs=2 * turn_s)


def test_providers_take_turns():
    clock, order = FakeClock(), []

    def logged(name):
        call = clock.costs([1000])
        return lambda: (order.append(name), call())

    done = []
    timing.measure({"a": [logged("a")], "b": [logged("b")]}, budget_s=0.5, clock=clock, finished=done.append)
    turns = [name for name, _ in itertools.groupby(order)]
    assert len(turns) > 10 and turns == ["a", "b"] * (len(turns) // 2)
    assert done == ["a", "b"]


def test_consecutive_calls_use_consecutive_copies():
    clock, order = FakeClock(), []

    def copy(i):
        call = clock.costs([1000])
        return lambda: (order.append(i), call())

    timing.measure({"a": [copy(i) for i in range(4)]}, budget_s=0.2, clock=clock)
    assert order == [i % 4 for i in range(len(order))] and len(order) > 8


@pytest.mark.parametrize("nbytes", [99_999, 100_000, 100_001, 16 << 10, 500_000])
def test_copies_are_more_than_the_bytes_asked_for(nbytes):
    copies = timing.cold_copies(nbytes, cold_bytes=100_000)
    assert copies * nbytes > 100_000 and (copies - 1) * nbytes <= 100_000


def test_copies_of_the_smallest_weights_are_counted_with_their_objects():
    assert timing.cold_copies(1, 100_000) == timing.cold_copies(timing.COPY_BYTES, 100_000)


def test_empty_weight_cannot_be_rotated():
    with pytest.raises(ValueError, match="0 bytes"):
        timing.cold_copies(0)


# ---- memory ---------------------------------------------------------------------------------------------------------


def write_caches(root, *caches):
    for i, (cpu, level, size, shared) in enumerate(caches):
        folder = root / f"cpu{cpu}" / "cache" / f"index{i}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("caches", "expected"),
    [
        ([], 0),
        ([(0, 1, "48K", "0"), (0, 2, "2048K", "0"), (0, 3, "491520K", "0-1"), (1, 3, "491520K", "0-1")], 480 << 20),
        ([(0, 3, "32768K", "0-7"), (8, 3, "32M", "8-15"), (8, 2, "1M", "8")], 64 << 20),
        ([(0, 2, "many", "0"), (0, 1, "64K", "0")], 64 << 10),
    ],
)
def test_last_level_caches_are_counted_once_each(tmp_path, caches, expected):
    write_caches(tmp_path, *caches)
    assert memory.last_level_cache_bytes(tmp_path) == expected


def test_cold_bytes_follow_the_caches_and_the_ram():
    gib = 1 << 30
    assert memory.cold_bytes_for(10, 32 << 20, 64 * gib) == (timing.COLD_BYTES, "")
    assert memory.cold_bytes_for(10, 480 << 20, 64 * gib) == (960 << 20, "")
    capped, note = memory.cold_bytes_for(10, 480 << 20, 15 * gib)
    assert capped == gib // 2 and "512 MiB in place of 960" in note
    assert memory.ram_bytes() > gib // 4


@pytest.mark.parametrize("isa", _cpu.supported_isas())
@pytest.mark.parametrize("words", [0, 1, 7, 16, 999, (1 << 17) + 3, (3 << 17) + 17])
def test_read_probe_reads_every_word(isa, words):
    before = _cpu.isa()
    values = torch.randint(-(2**62), 2**62, (words + 2,))
    try:
        _cpu.set_isa(isa)
        found = _cpu.read_bandwidth_probe(values.data_ptr() + 8, 8 * words)
    finally:
        _cpu.set_isa(before)
    assert found == sum(values[1 : words + 1].tolist()) % 2**64


@pytest.mark.parametrize("nbytes", [-8, 7])
def test_read_probe_refuses_parts_of_words(nbytes):
    with pytest.raises(ValueError, match="multiple of 8"):
        _cpu.read_bandwidth_probe(torch.zeros(2).data_ptr(), nbytes)


def test_read_limit_covers_the_bytes_asked_for():
    calls = memory.read_limit_calls(1004, 10_000)  # a block is rounded up to whole words: 126 of them
    assert len(calls) == 10_000 // 1008 + 1 and {call() for call in calls} == {126 * 0x0101010101010101}


# ---- providers ------------------------------------------------------------------------------------------------------

WEIGHT = providers.dense_weight(48, 256)
OURS = [providers.pyllmq_codebook(bits) for bits in (1, 2, 3, 4, 8, "2.1", "3.5+0.02")]
OURS += [providers.pyllmq_codebook(2, torch.bfloat16)]
OURS += [providers.pyllmq_codebook(4, precision=precision) for precision in ("exact", "fast")]


@pytest.mark.parametrize("m", [1, 8, 40])
@pytest.mark.parametrize("provider", [*RIVALS, *OURS], ids=lambda p: p.name)
def test_every_provider_multiplies(provider, m):
    ok, why = provider.available()
    if not ok:
        assert why
        pytest.skip(why)
    layer = provider.make(WEIGHT)
    x = providers.activations(m, 256, layer.dtype)
    assert providers.check(provider, layer, WEIGHT, x) <= provider.tolerance
    assert layer.nbytes > 0 and layer.kernel(m)
    copy = layer.copy()
    assert copy.nbytes == layer.nbytes
    assert providers.check(provider, copy, WEIGHT, x) <= provider.tolerance


@pytest.mark.parametrize("provider", [RIVALS[0], RIVALS[1], providers.pyllmq_codebook(3)], ids=lambda p: p.name)
def test_copies_lie_in_memory_of_their_own(provider):
    ok, why = provider.available()
    if not ok:
        pytest.skip(why)

    def held(layer):
        cells = [cell.cell_contents for cell in layer.run.__closure__]
        tensors = [c for c in cells if isinstance(c, torch.Tensor)]
        tensors += [t for c in cells if isinstance(c, layouts.WeightOperand) for t in c.tensors]
        return {t.data_ptr() for t in tensors if t.numel()}

    layer = provider.make(WEIGHT)
    layers = [layer, layer.copy(), layer.copy()]
    pointers = [held(each) for each in layers]
    assert all(pointers) and len(set.union(*pointers)) == sum(map(len, pointers))


def test_precision_is_a_provider_of_its_own():
    made = [
        providers.pyllmq_codebook(4, dtype, p)
        for dtype in (torch.float32, torch.bfloat16)
        for p in operations.PRECISIONS
    ]
    assert [p.name for p in made[:3]] == ["pyllmq 4 exact", "pyllmq 4", "pyllmq 4 fast"]
    assert made[5].name == "pyllmq 4 fast bf16"
    assert [p.precision for p in made[:3]] == ["exact", "high", "fast"]
    assert made[0].tolerance < made[1].tolerance < made[2].tolerance
    x = providers.activations(1, 256, torch.float32)
    exact, high, fast = (p.make(WEIGHT).run(x) for p in made[:3])
    assert not torch.equal(exact, high) and not torch.equal(exact, fast)
    copies = [p.make(WEIGHT).copy().run(x) for p in made[:3]]
    assert all(torch.equal(copied, result) for copied, result in zip(copies, (exact, high, fast), strict=True))
    with pytest.raises(ValueError, match="allowed: 'exact', 'high', 'fast'"):
        providers.pyllmq_codebook(4, precision="quick")


def broken(change) -> Provider:
    def make(weight):
        return change(dataclasses.replace(FP32.make(weight)))

    return dataclasses.replace(FP32, name="broken", make=make)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda l: dataclasses.replace(l, run=lambda x: 1.01 * l.run(x)), "relative error 0.01"),
        (lambda l: dataclasses.replace(l, run=lambda x: l.run(x) * float("nan")), "relative error nan"),
        (lambda l: dataclasses.replace(l, run=lambda x: l.run(x).T), r"returned \(48, 3\)"),
        (lambda l: dataclasses.replace(l, dense=lambda: l.dense().roll(1, 1)), "differs by"),
        (lambda l: dataclasses.replace(l, dense=lambda: l.dense().T), "differs by inf"),
        (lambda l: dataclasses.replace(l, dense=lambda: l.dense() * float("nan")), "differs by nan"),
    ],
)
def test_wrong_provider_is_refused(change, message):
    provider = broken(change)
    with pytest.raises(WrongResultError, match=message):
        providers.check(provider, provider.make(WEIGHT), WEIGHT, providers.activations(3, 256, torch.float32))


def test_run_refuses_a_wrong_provider_before_timing(capsys):
    wrong = broken(lambda l: dataclasses.replace(l, run=lambda x: 2 * l.run(x)))
    with pytest.raises(WrongResultError, match="broken"):
        tiny_run(providers=[FP32, wrong])
    assert "broken" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "widths", "outliers"),
    [
        (3, {3: 200}, 0),
        ("8", {8: 200}, 0),
        (2.1, {2: 190, 4: 10}, 0),
        ("2.1+0.005", {2: 190, 4: 10}, 0.005),
        ("3.1", {3: 180, 4: 20}, 0),
        ("1.5", {1: 100, 2: 100}, 0),
    ],
)
def test_widths(text, widths, outliers):
    parsed = Widths.parse(text)
    found = parsed.column_bits(200).unique(return_counts=True)
    assert dict(zip(*(t.tolist() for t in found), strict=True)) == widths
    assert parsed.outliers == outliers


@pytest.mark.parametrize("text", ["0", "9", "8.5", "two", "2+", "2+x", "2+0.2", "2+-1", "nan", ""])
def test_widths_that_are_not_understood(text):
    with pytest.raises(ValueError, match="allowed: 1 to 8"):
        Widths.parse(text)


def test_mixed_widths_and_outliers_are_what_is_packed():
    packed = providers.pack_normal(WEIGHT, Widths.parse("2.5+0.03"))
    assert packed.structure.columns == (0, 192, 0, 64, 0, 0, 0, 0)
    assert 0.01 < packed.structure.outliers / WEIGHT.numel() < 0.06


# ---- record ---------------------------------------------------------------------------------------------------------

ROW = record.Row(
    ratio_to_torch_fp32=3.5, op="codebook_linear", provider="pyllmq 2", kernel="cpu.tables", shape="llama, \"q\"", n=48,
    k=256, m=1, bits_per_weight=2.25, activations="float32", precision="fast", threads=2, samples=9, median_us=1.5, p20_us=1.25,
    p80_us=2.0, gweights_per_s=8.0, gb_per_s=2.5,
    share_of_read_limit=0.5, relative_error=1e-7, others_cpu=0.25, device="a CPU", isa="avx2",
    torch="2.13", pyllmq="0.1", commit="abc", timestamp="2030-01-01T00:00:00+00:00",
)  # fmt: skip


def test_csv_round_trip_and_append(tmp_path):
    path = tmp_path / "deep" / "results.csv"
    record.append(path, [ROW])
    record.append(path, [dataclasses.replace(ROW, m=8), dataclasses.replace(ROW, m=512)])
    assert record.read(path) == [ROW, dataclasses.replace(ROW, m=8), dataclasses.replace(ROW, m=512)]
    assert path.read_text().splitlines()[0] == ",".join(record.HEADER)
    assert [p.name for p in path.parent.iterdir()] == ["results.csv"]


def test_csv_is_all_or_nothing(tmp_path):
    path = tmp_path / "results.csv"
    record.append(path, [ROW])
    before = path.read_bytes()
    with pytest.raises((TypeError, AttributeError)):
        record.append(path, [ROW, "not a row"])  # type: ignore[list-item]
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("a,b,c\n1,2,3\n", "not known: .*'a'"),
        (",".join(record.HEADER[1:]) + "\n", "columns missing: .*ratio_to_torch_fp32"),
        (",".join(reversed(record.HEADER)) + "\n", "order differs"),
    ],
)
def test_csv_with_another_header_is_left_alone(tmp_path, header, message):
    path = tmp_path / "results.csv"
    path.write_text(header)
    for action in (lambda: record.append(path, [ROW]), lambda: record.read(path), lambda: tiny_run(csv=path)):
        with pytest.raises(ValueError, match=message):
            action()
    assert path.read_text() == header


def test_damaged_csv_names_the_line(tmp_path):
    path = tmp_path / "results.csv"
    record.append(path, [ROW, ROW])
    path.write_text(path.read_text().replace("cpu.tables,", "cpu.tables,x,", 1))
    with pytest.raises(ValueError, match="line 2 cannot be read"):
        record.read(path)
    path.write_text(path.read_text().rstrip("\n"))
    with pytest.raises(ValueError, match="cut off"):
        record.append(path, [ROW])


def test_table_leads_with_the_ratio():
    lines = record.table([ROW, dataclasses.replace(ROW, m=8, provider="another")]).splitlines()
    assert lines[0].split()[:4] == ["x", "torch", "fp32", "provider"]
    assert [line.split()[0] for line in lines if line][1:] == ["3.50", "3.50"]
    assert len({len(line) for line in lines if line}) == 1
    assert record.table([]).startswith("x torch fp32")


def test_share_of_other_processes(monkeypatch):
    # 1000 ticks pass, 600 of them in use, 250 by this process.
    ticks = iter([(0.0, 0.0, 0.0), (1000.0, 600.0, 250.0), (1000.0, 200.0, 250.0), None])
    monkeypatch.setattr(record.OthersCpu, "_ticks", staticmethod(lambda: next(ticks)))
    others = record.OthersCpu()
    assert others.share() == pytest.approx(0.35)
    assert others.share() == 0.0  # clocks of different grain must not give a negative share
    assert math.isnan(others.share())


def test_environment_says_where():
    found = record.environment()
    assert found["torch"] == torch.__version__ and all(found.values())


# ---- a whole run ----------------------------------------------------------------------------------------------------


def tiny_run(**options):
    settings = {"shapes": ["48x256"], "tokens": [1, 3], "budget_s": 0.01, "cold_bytes": 200_000, "progress": False}
    return run(**(settings | {"providers": [FP32, RIVALS[1]]} | options))


def test_run_prints_records_and_draws(tmp_path, capsys):
    missing = dataclasses.replace(FP32, name="not here", available=lambda: (False, "it was never written"))
    csv, png = tmp_path / "results.csv", tmp_path / "plots" / "speed.png"
    rows = tiny_run(providers=[FP32, RIVALS[1], missing], csv=csv, plot=png)
    names = [BASELINE, "torch bf16"]
    assert [(r.provider, r.m) for r in rows] == [(p, 1) for p in (READ_LIMIT, *names)] + [(p, 3) for p in names]
    for row in rows:
        assert row.p20_us <= row.median_us <= row.p80_us and row.samples >= timing.MIN_SAMPLES
        assert row.gweights_per_s == pytest.approx(48 * 256 / row.median_us / 1e3)
        assert row.gb_per_s == pytest.approx(row.bits_per_weight / 8 * row.gweights_per_s)
        assert row.threads == torch.get_num_threads()
    assert [r.ratio_to_torch_fp32 for r in rows if r.provider == BASELINE] == [1.0, 1.0]
    assert [r.bits_per_weight for r in rows] == [32, 32, 16, 32, 16]
    limit = rows[0]
    for row in rows[:3]:
        assert row.share_of_read_limit == pytest.approx(row.gb_per_s / limit.gb_per_s)
    assert limit.share_of_read_limit == 1 and all(math.isnan(row.share_of_read_limit) for row in rows[3:])
    written = record.read(csv)
    assert [(r.provider, r.m, r.timestamp) for r in written] == [(r.provider, r.m, r.timestamp) for r in rows]
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out = capsys.readouterr().out
    assert "not measured: not here: it was never written" in out and "torch bf16" in out


def test_run_measures_our_layers_beside_all_rivals(capsys):
    with dispatch.use_backend("reference"):
        rows = tiny_run(providers=None, bits=[2, "2.1+0.005"], tokens=[2], shapes=["40x96"])
    out = capsys.readouterr().out
    assert {"pyllmq 2", "pyllmq 2.1+0.005", "pyllmq 2 bf16", BASELINE} <= {r.provider for r in rows}
    for rival in RIVALS:
        assert rival.name in {r.provider for r in rows} or f"not measured: {rival.name}" in out
    assert "takes N in multiples of 16" in out  # torch's int4 cannot run 40x96


def test_rotation_covers_the_bytes_asked_for():
    made = []

    def counted(layer: Layer) -> Layer:
        made.append(layer.nbytes)
        return dataclasses.replace(layer, copy=lambda: counted(FP32.make(WEIGHT)))

    tiny_run(providers=[dataclasses.replace(FP32, make=lambda w: counted(FP32.make(w)))], tokens=[1])
    assert sum(made) > 200_000 >= sum(made[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "sinkhorn"}, "known: codebook_linear"),
        ({"device": "tpu"}, "allowed: 'cpu'"),
        ({"tokens": [0]}, "at least 1"),
        ({"tokens": []}, "at least 1"),
        ({"shapes": ["gpt-5"]}, "known: llama-2-7b"),
        ({"providers": None, "bits": ["9"]}, "allowed: 1 to 8"),
        ({"providers": None, "precision": ["low"]}, "allowed: 'exact', 'high', 'fast'"),
        ({"providers": [RIVALS[1]]}, "'torch fp32' among them"),
        ({"providers": [FP32, FP32]}, "names of their own"),
        ({"budget_s": 0}, "must be positive"),
        ({"plot": "speed.png"}, "only from a CSV"),
    ],
)
def test_run_refuses_what_it_does_not_know(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_a_clear_error():
    with pytest.raises(ValueError, match="no GPU"):
        tiny_run(device="cuda")


# ---- plot -----------------------------------------------------------------------------------------------------------


def test_plot_takes_the_newest_rows_of_one_machine():
    old = dataclasses.replace(ROW, timestamp="2029-01-01T00:00:00+00:00")
    old_rival, other = dataclasses.replace(old, provider="a rival"), dataclasses.replace(ROW, device="another CPU")
    old_case, rival = dataclasses.replace(old, m=8), dataclasses.replace(ROW, provider="torch fp32")
    assert plot.latest([old, old_rival, old_case, other, rival, ROW]) == [old_case, rival, ROW]


def test_plot_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="does not exist; `pyllmq bench"):
        plot.draw(tmp_path / "results.csv", tmp_path / "out.png")
    record.append(tmp_path / "results.csv", [])
    with pytest.raises(ValueError, match="holds no rows"):
        plot.draw(tmp_path / "results.csv", tmp_path / "out.png")


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pyllmq-kernels\[plot\]"):
        tiny_run(csv=tmp_path / "results.csv", plot=tmp_path / "out.png")
    assert not (tmp_path / "results.csv").exists()


# ---- costs of the CPU paths -----------------------------------------------------------------------------------------


def test_fit_finds_both_costs_and_none_is_negative():
    tokens = np.array([1.0, 2, 8, 12, 32])
    passes = np.ceil(tokens / path_cost.TOKEN_BLOCK)
    assert path_cost.fit(passes, tokens, 30 * passes + 4 * tokens) == pytest.approx((30, 4))
    assert path_cost.fit(np.ones(5), tokens, 7 * tokens - 2)[0] == 0
    assert path_cost.fit(np.ones(5), tokens, 9 - 0.1 * tokens)[1] == 0


def test_path_cost_prints_a_row_of_the_table_per_isa(monkeypatch, capsys):
    monkeypatch.setattr(path_cost, "SHAPE", dict.fromkeys(path_cost.ISAS, (32, 64)))
    monkeypatch.setattr(path_cost, "TURN_S", 0)
    before, threads = _cpu.isa(), torch.get_num_threads()
    try:
        assert path_cost.main(["scalar"]) == 0
    finally:
        _cpu.set_isa(before)
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "// scalar" in printed and printed.count("{") == 1 + 3 + 3 * 4 and printed.count("{") == printed.count("}")

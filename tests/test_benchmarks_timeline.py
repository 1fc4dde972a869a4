"""One token on a time line: spans cut into pieces, and a real trace of a fused model."""

from __future__ import annotations

import pytest
import torch

import pyllmq
from pyllmq.benchmarks import timeline, transformers_worker
from pyllmq.benchmarks.timeline import ATTENTION, LINEAR, PYTHON, REST
from pyllmq.cli import main

from .test_benchmarks_generation import TINY


def test_each_moment_belongs_to_the_innermost_span():
    spans = [("linear", 0, 12, 14), ("attention", 0, 15, 17), ("work", 3, 12, 15), ("step", 0, 10, 20),
             ("linear", 0, 25, 28), ("work", 3, 45, 47), ("step", 0, 40, 50)]  # fmt: skip
    first, second = timeline.tokens_of(spans, [5, 30, 60])
    assert first.caller == [
        (PYTHON, 5, 10), (REST, 10, 12), (LINEAR, 12, 14), (REST, 14, 15), (ATTENTION, 15, 17), (REST, 17, 20),
        (PYTHON, 20, 25), (LINEAR, 25, 28), (PYTHON, 28, 30),
    ]  # fmt: skip
    assert first.workers == {3: [(12, 15)]} and second.workers == {3: [(45, 47)]}
    assert second.caller == [(PYTHON, 30, 40), (REST, 40, 50), (PYTHON, 50, 60)]
    assert {p: round(ms * 1e6) for p, ms in first.milliseconds().items()} == {
        LINEAR: 5,
        ATTENTION: 2,
        REST: 6,
        PYTHON: 12,
    }
    assert first.idle_share() == pytest.approx(1 - 3 / 13) and second.idle_share() == pytest.approx(0.8)


def test_a_traced_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(transformers_worker.SHAPES, "tiny", ("llama", TINY))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    kernels = pytest.importorskip("pyllmq._cpu")
    assert main(["bench", "--model", "tiny", "--timeline", str(tmp_path / "a" / "token.png")]) == 0
    assert (tmp_path / "a" / "token.png").read_bytes()[:4] == b"\x89PNG"
    assert "ms a token" in capsys.readouterr().out
    assert kernels.take_trace() == []  # the trace was taken and stopped
    layer = pyllmq.CodebookLinear.from_dense(torch.randn(8, 8), bits=4)
    kernels.start_trace()
    layer(torch.ones(1, 8))
    ((part, _, begin, end),) = kernels.take_trace()
    assert part == "linear" and 0 < begin <= end <= kernels.trace_clock()
    assert main(["bench", "--timeline", "x.png"]) == 1
    assert "needs --model" in capsys.readouterr().err

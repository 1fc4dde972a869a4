"""benchmarks/softmax_cdist_l1.py on sizes that take no time: what it prints and returns. Speed itself is not tested."""

import platform

import pytest
import torch

from pyllmq.benchmarks import softmax_cdist_l1 as bench


def test_ratios_and_errors_are_printed(capsys):
    before = torch.get_num_threads()
    try:
        ratio = bench.run(5, 60, torch.bfloat16, 1, budget_s=0.01)
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert set(ratio) == {"forward", "both"} and all(value > 0 for value in ratio.values())
    assert "5 x 5 rows of 60, bfloat16, 1 threads" in printed and "(goal 3x)" in printed
    assert printed.count("largest error against fp64") == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
def test_memory_is_counted_in_buffers_of_one_side(capsys):
    buffers = bench.memory(64, 20000, torch.float32)
    assert buffers["torch"] > 1.5, "torch holds the softmaxes of both sides"
    assert -0.2 < buffers["pyllmq"] < bench.MEMORY_GOAL
    assert "(goal: below 1)" in capsys.readouterr().out

"""Timing on a GPU: CUDA graphs over rotating weights, providers interleaved, medians; and what a plain copy reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from .timing import MIN_SAMPLES, Samples

CALLS_PER_REPLAY = 20
"""At least: the events round a replay cost some microseconds, which are shared by its calls."""

UNTIMED_REPLAYS = 2
COPY_BYTES = 1 << 30

Replay = Callable[[], int]
"""Runs the captured calls once and returns nanoseconds per call."""


def capture(copies: Sequence[Callable[[], object]]) -> Replay:
    """Capture calls that use consecutive copies, each copy equally often, into one CUDA graph.

    Every copy runs once before, so that what a first call does (compiling, loading modules, workspaces) is over.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for copy in copies:
            copy()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    rounds = math.ceil(CALLS_PER_REPLAY / len(copies))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for copy in copies:
                copy()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> int:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return round(begin.elapsed_time(end) * 1e6 / (rounds * len(copies)))

    return replay


def measure_replays(
    calls: Mapping[str, Sequence[Callable[[], object]]],
    *,
    budget_s: float,
    capture: Callable[[Sequence[Callable[[], object]]], Replay] = capture,
) -> tuple[dict[str, Samples], dict[str, str]]:
    """(provider -> samples, provider -> why it was not measured).

    Providers take turns of one replay, round after round, until each has spent `budget_s`; at least MIN_SAMPLES are taken of
    each. A provider whose calls raise, or cannot be captured, is left out with its error, and the others go on.
    """
    replays: dict[str, Replay] = {}
    failures: dict[str, str] = {}
    for name, copies in calls.items():
        try:
            replays[name] = capture(copies)
            for _ in range(UNTIMED_REPLAYS):
                replays[name]()
        except Exception as error:  # whatever a rival raises must not end the run
            replays.pop(name, None)
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    samples = {name: Samples() for name in replays}
    calls_each = {name: max(CALLS_PER_REPLAY, len(calls[name])) for name in replays}
    active = dict(replays)
    while active:
        for name, replay in list(active.items()):
            taken = samples[name].nanoseconds
            taken.append(replay())
            if sum(taken) * calls_each[name] >= budget_s * 1e9 and len(taken) >= MIN_SAMPLES:
                del active[name]
    return samples, failures


def copy_gb_per_s() -> float:
    """Bytes read and written per second by a copy of 1 GiB, in GB: what "share of copy" is a share of."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    samples, failures = measure_replays({"copy": [lambda: target.copy_(source)]}, budget_s=0.2)
    if failures:
        raise RuntimeError(f"the copy could not be timed: {failures['copy']}")
    return 2 * COPY_BYTES / samples["copy"].percentile_us(50) / 1e3


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)

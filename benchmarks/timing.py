"""Timing of calls that compete: caches cold, providers interleaved, single calls, percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Clock = Callable[[], int]
"""Nanoseconds, never going back."""

COLD_BYTES = 256 << 20
"""Calls rotate over at least this many bytes of weights, so that the next copy has left the caches: between two tokens
a model's other layers do the same to a layer. 8x the 32 MiB of last-level cache that a small cloud machine sees; `run` takes
twice the cache that the OS reports where that is more (memory.py)."""

COPY_BYTES = 16 << 10
"""What a copy of the smallest weight takes: its tensors and Python objects were 11 KB at 64x64, and leave the caches, too."""

FEW_TOKENS = 64
"""Beyond this M the arithmetic hides where the weight lies, and one copy is enough."""

WARM_UP_S = 0.1
TURN_S = 0.045
CALLS_PER_TURN = 3
"""One provider's turn in a round lasts for both: long beside a call, short beside the drift of a shared machine."""

LEAD_IN_S = 0.015
"""Untimed calls at the start of a turn, at least one. torch's threads (libgomp) spin for about 8 ms after its last call
and would be charged to the next provider: 4096x4096, 4 bits, M = 1 then took 750 us in place of 435 on 2 cores.
Rejected: turns of a single call (570 -> 770 us), a lead-in of 5 ms (the slow calls still reach the median)."""

MIN_SAMPLES = 5


def cold_copies(nbytes: int, cold_bytes: int = COLD_BYTES) -> int:
    """How many copies of `nbytes` are more than `cold_bytes` together, each counted as COPY_BYTES at least."""
    if nbytes < 1:
        raise ValueError(f"a weight of {nbytes} bytes cannot be rotated; it must hold at least 1")
    return cold_bytes // max(nbytes, COPY_BYTES) + 1


@dataclass
class Samples:
    """Times of single calls, in nanoseconds."""

    nanoseconds: list[int] = field(default_factory=list)

    def percentile_us(self, percent: float) -> float:
        return float(np.percentile(self.nanoseconds, percent)) / 1e3


@dataclass
class _Runner:
    """One provider: the copies it rotates over, what it has been given of its budget, its samples."""

    copies: Sequence[Callable[[], object]]
    samples: Samples = field(default_factory=Samples)
    next_copy: int = 0
    spent_ns: int = 0

    def call(self, clock: Clock) -> int:
        copy = self.copies[self.next_copy]
        self.next_copy = (self.next_copy + 1) % len(self.copies)
        begin = clock()
        copy()
        return clock() - begin

    def untimed(self, seconds: float, clock: Clock, at_least: int = 1) -> None:
        end = clock() + int(seconds * 1e9)
        calls = 0
        while calls < at_least or clock() < end:
            self.call(clock)
            calls += 1

    def turn(self, clock: Clock) -> None:
        begin = clock()
        self.untimed(LEAD_IN_S, clock)
        end = clock() + int(TURN_S * 1e9)
        calls = 0
        while calls < CALLS_PER_TURN or clock() < end:
            self.samples.nanoseconds.append(self.call(clock))
            calls += 1
        self.spent_ns += clock() - begin


def measure(
    calls: Mapping[str, Sequence[Callable[[], object]]],
    *,
    budget_s: float = 1.5,
    clock: Clock = time.perf_counter_ns,
    finished: Callable[[str], None] | None = None,
) -> dict[str, Samples]:
    """Time every provider's calls, round after round, until each has had its budget.

    Args:
        calls: provider -> one callable per copy of its weight; consecutive calls use consecutive copies.
        budget_s: seconds per provider, lead-in included; at least MIN_SAMPLES calls are timed whatever they cost.
        clock: nanoseconds; tests give one of their own.
        finished: called with the provider's name when it is done, for a progress bar.

    Within a round each provider gets one turn, so a machine that slows down for a second slows all of them.
    """
    runners = {name: _Runner(copies) for name, copies in calls.items()}
    for runner in runners.values():
        runner.untimed(WARM_UP_S, clock, at_least=2)
    active = dict(runners)
    while active:
        for name, runner in list(active.items()):
            runner.turn(clock)
            if runner.spent_ns >= budget_s * 1e9 and len(runner.samples.nanoseconds) >= MIN_SAMPLES:
                del active[name]
                if finished:
                    finished(name)
    return {name: runner.samples for name, runner in runners.items()}

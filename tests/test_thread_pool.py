"""The fork-join pool: every task runs exactly once, whatever the number of threads, callers, forks and failures."""

import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch

from pyllmq import _cpu, functional
from pyllmq.backends.cpu import runtime

from .oracle import random_case

pytestmark = pytest.mark.kernels

LONG_TASK_US = 2000.0  # long enough for a sleeping worker to wake and take part


@pytest.fixture(autouse=True)
def keep_threads():
    before = _cpu.num_threads()
    yield
    _cpu.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5, 33])
def test_every_task_runs_once_with_more_threads_than_cores(threads):
    _cpu.set_num_threads(threads)
    assert _cpu.num_threads() == threads
    for tasks in (0, 1, 2, 7, 1000):
        visits, used = _cpu.parallel_probe(tasks)
        assert visits == [1] * tasks
        assert used <= min(threads, tasks)


def test_work_is_shared():
    _cpu.set_num_threads(3)
    used = [_cpu.parallel_probe(12, task_us=LONG_TASK_US)[1] for _ in range(20)]
    assert max(used) == 3


def test_one_thread_means_the_caller_alone():
    _cpu.set_num_threads(1)
    assert _cpu.parallel_probe(50, task_us=50.0) == ([1] * 50, 1)


def test_resize_up_and_down_between_jobs():
    for threads in (4, 1, 2, 8, 3, 3):
        _cpu.set_num_threads(threads)
        visits, used = _cpu.parallel_probe(100, task_us=5.0)
        assert visits == [1] * 100 and used <= threads


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_bad_thread_counts_are_refused(threads):
    with pytest.raises(ValueError, match="allowed: 1..1024"):
        _cpu.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 4])
def test_exception_reaches_the_caller_and_the_pool_lives_on(threads):
    _cpu.set_num_threads(threads)
    for failing in (0, 57, 99):
        with pytest.raises(RuntimeError, match=f"task {failing} failed"):
            _cpu.parallel_probe(100, failing_task=failing)
        assert _cpu.parallel_probe(100)[0] == [1] * 100


def test_nested_calls_run_inline():
    _cpu.set_num_threads(4)
    visits, _ = _cpu.parallel_probe(40, nested_tasks=25)
    assert visits == [1 + 25] * 40


def test_several_python_threads_at_once_while_another_resizes():
    _cpu.set_num_threads(4)
    wrong = []

    def work():
        for _ in range(200):
            visits, _ = _cpu.parallel_probe(50, task_us=1.0)
            if visits != [1] * 50:
                wrong.append(visits)

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for i in range(30):
        _cpu.set_num_threads(1 + i % 5)
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3, 2, 16])
def test_operations_follow_torch_set_num_threads(torch_threads, threads):
    """Also with more threads than cores, and whatever the pool's size was before."""
    case = random_case(700, 300, (2, 3, 4, 7), outliers=0.01)
    x = torch.randn(5, 300)
    torch.set_num_threads(1)
    alone = functional.codebook_linear(x, case.weight)
    torch.testing.assert_close(alone.double(), x.double() @ case.dense.T, rtol=1e-3, atol=1e-3)
    torch.set_num_threads(threads)
    assert torch.equal(functional.codebook_linear(x, case.weight), alone)
    assert _cpu.num_threads() == threads
    assert _cpu.parallel_probe(4 * threads, task_us=LONG_TASK_US)[0] == [1] * (4 * threads)


def linear_in_child(queue, weight, x):
    queue.put(functional.codebook_linear(x, weight).tolist())


def test_operations_work_in_a_forked_child():
    weight, x = random_case(700, 300, (2, 4)).weight, torch.randn(2, 300)
    expected = functional.codebook_linear(x, weight).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=linear_in_child, args=(queue, weight, x))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and queue.get() == expected


def test_every_task_runs_once_beside_busy_processes():
    """Workers that the system puts aside in the middle of a job; how long that takes is what `pyllmq bench --goals` shows."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        for threads in (2, 5):
            _cpu.set_num_threads(threads)
            for _ in range(50):
                assert _cpu.parallel_probe(40, task_us=20.0)[0] == [1] * 40
    finally:
        for process in busy:
            process.kill()
            process.wait()


def probe_in_child(queue):
    queue.put((_cpu.parallel_probe(64, task_us=100.0)[0], _cpu.num_threads()))


def test_forked_child_gets_a_pool_of_its_own():
    _cpu.set_num_threads(3)
    assert _cpu.parallel_probe(64, task_us=100.0)[0] == [1] * 64
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        queue = context.SimpleQueue()
        child = context.Process(target=probe_in_child, args=(queue,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == ([1] * 64, 3)
    assert _cpu.parallel_probe(64)[0] == [1] * 64


def small_layout_in_child(queue):
    queue.put(runtime.empty_layout(runtime.SMALL_LAYOUT).numel())


def trace_in_child(queue):
    queue.put(_cpu.take_trace())


@pytest.mark.parametrize("in_child, expected", [(small_layout_in_child, runtime.SMALL_LAYOUT), (trace_in_child, [])])
def test_a_forked_child_waits_for_no_thread_of_its_parent(in_child, expected):
    """Forked in the middle of another thread's layout, or of a trace, whose spans stay the parent's."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_child, args=(queue,))
    _cpu.start_trace()
    try:
        _cpu.parallel_probe(64, task_us=LONG_TASK_US)
        functional.codebook_linear(torch.randn(2, 300), random_case(700, 300, (2,)).weight)
        with runtime._shared_pages.lock:
            child.start()
        child.join(60)
        assert child.exitcode == 0 and queue.get() == expected
    finally:
        child.kill()
        assert _cpu.take_trace() != []


THREADS_BEFORE_AND_AFTER = """
import os
import torch
before = len(os.listdir("/proc/self/task"))
from pyllmq import _cpu
imported = len(os.listdir("/proc/self/task"))
_cpu.set_num_threads(3)
_cpu.parallel_probe(64, task_us=10.0)
print(imported - before, len(os.listdir("/proc/self/task")) - imported)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_import_starts_no_thread_and_the_process_ends_cleanly():
    done = subprocess.run(
        [sys.executable, "-c", THREADS_BEFORE_AND_AFTER], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["0", "2"], "")

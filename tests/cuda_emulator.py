"""The CUDA back end on a CPU: the same kernel bodies and bindings, compiled by g++ against its emulator.

`emulated` (a fixture) makes pyllmq's `cuda` back end run on CPU tensors, so that everything above the driver is tested:
prepack, dispatch, workspaces, launches, kernels.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import itertools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pyllmq import dispatch
from pyllmq.backends import cuda
from pyllmq.backends.cuda import runtime

ROOT = Path(__file__).resolve().parents[1]


@cache
def emulated_extension():
    """Module `_cuda` on the emulator. setup.py builds what has changed, under build/; of several workers one does it."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches fibers by x86-64 code")
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by g++, which is not here: an installed wheel is tested")
    import fcntl

    sanitized = "PYLLMQ_SANITIZED" in os.environ
    base = ROOT / "build" / ("emulator_sanitized" if sanitized else "emulator")
    flags = "-O1 -w" + (" -fsanitize=address -fno-omit-frame-pointer" if sanitized else "")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"PYLLMQ_CUDA": "emulated", "PYLLMQ_DEBUG": "1", "CXXFLAGS": flags}
    base.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={base}", f"--build-lib={base}/lib"]
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stdout + done.stderr
    (library,) = (base / "lib" / "pyllmq").glob("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
    loader.exec_module(module)
    return module


def orders() -> Iterator[dict[str, bool]]:
    """What `set_schedule` takes: every order of threads, blocks, copies and warps, the hardest first."""
    names = "warps_apart", "eager_copies", "last_thread_first", "last_block_first"
    for settings in itertools.product((True, False), repeat=3):
        yield dict(zip(names, (*settings, False), strict=True))
    for settings in itertools.product((False, True), repeat=2):
        yield dict(zip(names, (False, *settings, True), strict=True))
    for last_thread_first in (True, False):
        yield {"warps_apart": True, "blocks_apart": True, "last_thread_first": last_thread_first}


def in_every_order(extension: Any, run: Callable[[], torch.Tensor]) -> None:
    """A kernel gives the same bits in every order."""
    results = []
    for order in orders():
        extension.emulator.set_schedule(**order)
        results.append(run())
    assert all(torch.equal(results[0], result) for result in results)


GUARD_BYTES = 64
POISON = 0xFF  # NaN in every float type


class PoisoningTorch:
    """The module torch, but `empty` gives memory full of NaN with guard bytes around it."""

    def __init__(self):
        self.buffers = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, dtype, device=None):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        count = shape.numel() * dtype.itemsize
        whole = torch.full((count + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8)
        self.buffers.append((whole, count))
        return whole[GUARD_BYTES : GUARD_BYTES + count].view(dtype).view(shape)

    def check_guards(self):
        for whole, count in self.buffers:
            guards = torch.cat([whole[:GUARD_BYTES], whole[GUARD_BYTES + count :]])
            assert bool((guards == POISON).all()), f"bytes around a buffer of {count} bytes were overwritten"
        self.buffers.clear()


@pytest.fixture
def emulated(monkeypatch):
    """The `cuda` back end serves CPU tensors through the emulator; yields the extension module.

    What the back end allocates is poisoned and guarded; the guards are checked at the end of the test.
    """
    extension = emulated_extension()
    poisoning = PoisoningTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("pyllmq.backends.cuda.") and hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", poisoning)
    monkeypatch.setattr(runtime, "DEVICE", "cpu")
    for module in (cuda, runtime):
        monkeypatch.setattr(module, "available", lambda: (True, "emulated"))
    monkeypatch.setattr(runtime, "extension", lambda: extension)
    monkeypatch.setattr(runtime, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(runtime, "stream", lambda device: 0)
    layouts = []  # as they were when kernels first saw them
    bound = runtime.bound

    def watched(bind, weight):
        if weight.bound is None:
            layouts.append((weight.tensors[0], weight.tensors[0].clone()))
        return bound(bind, weight)

    monkeypatch.setattr(runtime, "bound", watched)
    dispatch.clear_cache()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the oracle's small operations would spin in OpenMP
    yield extension
    poisoning.check_guards()
    assert all(torch.equal(*pair) for pair in layouts), (
        "a kernel left a counter that is not zero, or wrote into a layout"
    )
    extension.emulator.set_schedule()
    torch.set_num_threads(torch_threads)
    dispatch.clear_cache()

"""The CUDA back end on a CPU: the same kernel bodies and bindings, compiled by g++ against csrc/cuda_emulator.

`emulated` (a fixture) makes pyllmq's `cuda` back end run on CPU tensors, so that everything above the driver is tested:
prepack, dispatch, workspaces, launches, kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from pyllmq import dispatch
from pyllmq.backends import cuda, cuda_sinkhorn, cuda_sparse

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = (
    CSRC / "bindings_cuda.cpp",
    *(p for p in sorted(CSRC.glob("*/cuda/*.c*")) if p.suffix in (".cpp", ".cu") and p.name != "runtime.cu"),
    *sorted((CSRC / "cuda_emulator").glob("*.cpp")),
)
"""All of the back end but its runtime, which the emulator replaces."""
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer"] if "PYLLMQ_SANITIZED" in os.environ else []


@cache
def emulated_extension():
    """Module `_cuda` on the emulator; compiled once for each state of csrc/, kept under build/."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches fibers by x86-64 code")
    import pybind11

    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-unknown-pragmas", *SANITIZE]
    flags += ["-DPYLLMQ_CUDA_EMULATED", f"-I{CSRC}", f"-I{pybind11.get_include()}"]
    flags += [f"-I{sysconfig.get_paths()['include']}"]
    state = hashlib.sha256(" ".join(flags).encode())
    for file in sorted(f for f in CSRC.rglob("*") if f.suffix in (".h", ".cuh", ".cpp", ".cu")):
        state.update(file.read_bytes())
    folder = ROOT / "build" / "cuda_emulator" / state.hexdigest()[:16]
    library = folder / "_cuda.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        objects = [str(folder / "_".join(source.relative_to(CSRC).parts)) + ".o" for source in SOURCES]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            commands = [
                [*cxx, *flags, "-x", "c++", "-c", str(s), "-o", o] for s, o in zip(SOURCES, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        unfinished = folder / f"_cuda.{os.getpid()}.so"
        _run([*cxx, "-shared", "-pthread", *SANITIZE, *objects, "-o", str(unfinished)])
        unfinished.replace(library)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
    loader.exec_module(module)
    return module


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stderr


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
    for module in (cuda, cuda_sinkhorn, cuda_sparse):
        monkeypatch.setattr(module, "torch", poisoning)
    for module in (cuda, cuda_sparse):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "available", lambda: (True, "emulated"))
    monkeypatch.setattr(cuda, "_extension", lambda: extension)
    monkeypatch.setattr(cuda, "_current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setattr(cuda, "_capturing", lambda: False)
    monkeypatch.setattr(cuda, "_counters", {})
    _clear_caches()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the oracle's small operations would spin in OpenMP
    yield extension
    poisoning.check_guards()
    assert all(not counters.any() for counters in cuda._counters.values()), "a kernel left a counter that is not zero"
    extension.emulator.set_schedule()
    torch.set_num_threads(torch_threads)
    _clear_caches()


def _clear_caches():
    for cached in (cuda._workspace_sizes, cuda_sparse._workspace_sizes, cuda_sparse._described, dispatch.kernel_for):
        cached.cache_clear()

"""The extension `_cpu`, its thread pool, memory for layouts, and what its rows have in common."""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Problem, Support
from ...layouts import Shape, WeightOperand
from ...operations import ACTIVATION_DTYPES, PRECISIONS, takes

DEVICE = "cpu"
ORDER = 100

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PRECISION_CODE = {name: code for code, name in enumerate(PRECISIONS)}
KMEANS_CODE = {"exact": 0, "windowed": 1, "lloyd": 2}
"""KMeans1dMethod in csrc/kmeans/cpu/kmeans_1d.h."""

ISA_VARIABLE = "PYLLMQ_ISA"
"""The environment variable that holds kernels to one of `_cpu.supported_isas()`, such as avx2: to compare, to rule out a fault."""


def available() -> tuple[bool, str]:
    try:
        _cpu = extension()
    except ImportError as error:
        return False, f"pyllmq._cpu could not be imported ({error}); reinstall pyllmq-kernels with a C++20 compiler"
    return True, f"{_cpu.isa()} kernels, {torch.get_num_threads()} threads"


@cache
def extension() -> ModuleType:
    from ... import _cpu  # an import statement at every call would cost 1 us

    held_to = os.environ.get(ISA_VARIABLE)
    if held_to:
        try:
            _cpu.set_isa(held_to)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}={held_to}: {error}") from None
    _cpu.use_tensors(Tensor, torch.nn.Parameter, torch.is_grad_enabled, torch.get_num_threads)
    return _cpu


def kernels() -> ModuleType:
    """The extension module, its thread pool as large as torch's (`torch.set_num_threads` is respected at every call)."""
    _cpu = extension()
    threads = torch.get_num_threads()
    if _cpu.num_threads() != threads:
        _cpu.set_num_threads(threads)
    return _cpu


HUGE_PAGE = 2 << 20
"""Bytes. Layouts get memory that is aligned to such pages and advised to the kernel as huge pages: 4096x4096 at 4 bits from memory
takes 246 us on them and 359 on pages of 4 KiB (AVX-512, 2 threads)."""

SHARED_PAGES = 8
"""Huge pages that layouts smaller than one share, such as those of experts. They are free when the last of these layouts is."""


SMALL_LAYOUT = 64 << 10
"""Bytes. A smaller layout fits in the caches of a core and gets ordinary memory."""


class _SharedPages:
    """Where the next small layout goes."""

    lock: threading.Lock
    memory: mmap.mmap | None
    used: int
    end: int

    def __init__(self) -> None:
        self.begin_anew()
        if hasattr(os, "register_at_fork"):  # a child would wait for a thread of its parent that held the lock
            os.register_at_fork(after_in_child=self.begin_anew)

    def begin_anew(self) -> None:
        self.lock, self.memory, self.used, self.end = threading.Lock(), None, 0, 0

    def take(self, size: int) -> Tensor:
        with self.lock:
            if self.memory is None or self.used + size > self.end:
                self.memory, self.used = _huge_pages(SHARED_PAGES)
                self.end = self.used + SHARED_PAGES * HUGE_PAGE
            begin, self.used = self.used, self.used + size + -size % ALIGNMENT
            return torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=begin)


ALIGNMENT = 64
_shared_pages = _SharedPages()


def empty_layout(size: int) -> Tensor:
    """Uninitialised uint8 memory for a layout, aligned to 64 bytes."""
    if size < SMALL_LAYOUT or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device=DEVICE)
    if size < HUGE_PAGE:
        return _shared_pages.take(size)
    memory, start = _huge_pages(size // HUGE_PAGE, size % HUGE_PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)


def _huge_pages(pages: int, more: int = 0) -> tuple[mmap.mmap, int]:
    """Memory, and where in it so many huge pages begin, with `more` bytes behind them."""
    memory = mmap.mmap(-1, (pages + 1) * HUGE_PAGE + more, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with suppress(OSError):  # a kernel without transparent huge pages: slower, nothing else
        memory.madvise(
            mmap.MADV_HUGEPAGE, start, pages * HUGE_PAGE
        )  # not the rest: a half-used huge page would waste memory
    return memory, start


def from_blob(kind: str, blob: Tensor, shape: Shape) -> WeightOperand:
    return WeightOperand(kind, f"cpu.{kind}", (blob,), (), shape)


def settle(weight: WeightOperand) -> WeightOperand | None:
    """On huge pages again, which a copy or a pickle leaves. None for a layout of another instruction set."""
    if not available()[0] or not bound(weight).is_native:
        return None
    (blob,) = weight.tensors
    return from_blob(weight.kind, empty_layout(blob.numel()).copy_(blob), weight.shape)


def bound(weight: WeightOperand) -> Any:
    """The `_cpu.CodebookOperand` or `_cpu.SparseOperand` of a layout: its header is checked here, once.

    Raises ValueError where the memory holds no intact layout of that kind, or one of another shape: kernels read x and write y
    by it.
    """
    operand = weight.bound
    if operand is None or not operand.is_intact:
        (blob,) = weight.tensors
        operand_type = extension().CodebookOperand if weight.kind == "codebook" else extension().SparseOperand
        operand = operand_type(blob.data_ptr(), blob.numel())
        if (operand.rows, operand.columns) != weight.shape:
            raise ValueError(
                f"the layout holds a weight of shape {[operand.rows, operand.columns]}, but was given as {list(weight.shape)}"
            )
        weight.bound = operand
    return operand


def packed_linear(x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
    """y = x W^T + bias by a layout of any kind."""
    operand = bound(weight)
    kernels()
    x = x.contiguous()
    tokens, dtype = x.shape[0], x.dtype
    # In the dtype and on the device of x; torch.empty with both costs 1 us more.
    y = x.new_empty(tokens, weight.shape[0])
    bias_pointer, bias_dtype = (0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODE[bias.dtype])
    operand.linear(
        x.data_ptr(), DTYPE_CODE[dtype], tokens, bias_pointer, bias_dtype, y.data_ptr(), PRECISION_CODE[precision]
    )
    return y


def serves(device: str) -> bool:
    return device == DEVICE and available()[0]


def on_cpu(problem: Problem) -> Support:
    if problem.device != DEVICE:
        return False, f"needs tensors on the CPU, these are on {problem.device}"
    return available()


takes_activations = takes(ACTIVATION_DTYPES, on_cpu)
takes_fp32 = takes((torch.float32,), on_cpu)

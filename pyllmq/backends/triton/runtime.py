"""Where triton's kernels run, machine layouts that they read as views of one blob, and what rows have in common."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Problem, Support
from ...layouts import Fields, Shape, WeightOperand
from ...operations import ACTIVATION_DTYPES, takes

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""Where its tensors must lie. torch calls AMD's GPUs cuda too; triton decides once, at its import, whether it interprets."""
ORDER = 300

MAX_FUSED_TOKENS = 64
"""Up to this many tokens weights are decoded on the way to the multiplication. Predicted, not measured: beyond it, writing the
decoded matrix once (2 bytes a weight) costs less than decoding it in every block of 32 tokens."""

_ALIGNMENT = 256
_OLDEST_CAPABILITY = (8, 0)


def available() -> tuple[bool, str]:
    """Of the current device."""
    if find_spec("triton") is None:
        return False, "triton is not installed (pip install 'pyllmq-kernels[triton]')"
    if DEVICE == "cpu":
        return True, "Triton's interpreter on the CPU (TRITON_INTERPRET=1), for tests"
    if not torch.cuda.is_available():
        return False, "torch finds no GPU here"
    if torch.version.hip is None and torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        found, wanted = (".".join(map(str, c)) for c in (torch.cuda.get_device_capability(), _OLDEST_CAPABILITY))
        return False, f"needs compute capability {wanted}, this GPU has {found}"
    return True, f"kernels are compiled at their first call, for {torch.cuda.get_device_name()}"


def on(device: str) -> AbstractContextManager[Any]:
    """Makes the device of a problem current for a block, as `available` asks the current one; without an index it is that."""
    return torch.cuda.device(device) if ":" in device else nullcontext()


def serves(device: str) -> bool:
    if device.partition(":")[0] != DEVICE:
        return False
    with on(device):
        return available()[0]


def on_device(problem: Problem) -> Support:
    if problem.device_type != DEVICE:
        return False, f"needs tensors on {DEVICE}, these are on {problem.device}"
    with on(problem.device):
        return available()


takes_activations = takes(ACTIVATION_DTYPES, on_device)
takes_fp32 = takes((torch.float32,), on_device)


def launch(name: str, device_of: Tensor, *arguments: Any) -> Any:
    """module.function of triton_kernels with these arguments, tensors contiguous; imported at the first call.

    Triton launches on the current device, whatever its arguments say: that of `device_of` is made the current one.
    """
    module, _, function = name.rpartition(".")
    run = getattr(import_module(f"...triton_kernels.{module}", __package__), function)
    with torch.cuda.device_of(device_of):
        return run(*(each.contiguous() if isinstance(each, Tensor) else each for each in arguments))


# ---- machine layouts --------------------------------------------------------------------------------------------------

Section = tuple[tuple[int, ...], torch.dtype]


def outlier_words(field: Fields) -> list[int]:
    """(how many, whether their columns are int32), words of a header."""
    columns = field.get("outlier_columns")
    return [0, 0] if columns is None else [columns.numel(), int(columns.dtype == torch.int32)]


def outlier_sections(rows: int, outliers: int, wide: int) -> list[Section]:
    """Row offsets, columns, values, and what the code under each says."""
    columns = ((outliers,), torch.int32 if wide else torch.uint16)
    half = ((outliers,), torch.float16)
    return [((rows + 1 if outliers else 0,), torch.int32), columns, half, half]


@dataclass(frozen=True)
class Blob:
    """A machine layout of weights of one kind: a uint8 vector that begins with a header of int64, and holds tensors behind it."""

    kind: str
    words: int
    """Of the header, behind a number that tells the kinds apart and the weight's shape."""
    sections: Callable[[int, int, list[int]], list[Section]]
    """Rows, columns and those words -> shape and dtype of every tensor, in order."""

    @property
    def name(self) -> str:
        return f"triton.{self.kind}"

    @property
    def magic(self) -> int:
        return zlib.crc32(f"{self.name} 1".encode())

    @property
    def begin(self) -> int:
        """Of the first tensor."""
        return _aligned(8 * (3 + self.words))

    def open(self, blob: Tensor, shape: Shape) -> WeightOperand:
        """Raises ValueError if the blob is no such layout, is cut off, or holds a weight of another shape."""
        if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() < self.begin:
            raise ValueError(
                f"a layout {self.name!r} is a uint8 vector of at least {self.begin} bytes, given: {blob.dtype} {tuple(blob.shape)}"
            )
        magic, *sizes = blob[: 8 * (3 + self.words)].view(torch.int64).tolist()
        if magic != self.magic:
            raise ValueError(f"this blob is no layout {self.name!r}: it begins with {magic}, not with {self.magic}")
        if sizes[:2] != list(shape):
            raise ValueError(f"the layout holds a weight of shape {sizes[:2]}, but was given as {list(shape)}")
        views, begin = [], self.begin
        for part, dtype in self.sections(*shape, sizes[2:]):
            nbytes = math.prod(part) * dtype.itemsize
            if begin + nbytes > blob.numel():
                raise ValueError(f"the layout is cut off: {blob.numel()} bytes, and a tensor ends at {begin + nbytes}")
            views.append(blob[begin : begin + nbytes].view(dtype).view(part))
            begin += _aligned(nbytes)
        return WeightOperand(self.kind, self.name, (blob, *views), (), shape)

    def make(self, shape: Shape, words: list[int], device: torch.device) -> WeightOperand:
        """Of zeros behind the header."""
        sizes = (math.prod(part) * dtype.itemsize for part, dtype in self.sections(*shape, words))
        blob = torch.zeros(self.begin + sum(map(_aligned, sizes)), dtype=torch.uint8, device=device)
        header = torch.tensor([self.magic, *shape, *words], dtype=torch.int64, device="cpu").view(torch.uint8)
        blob[: len(header)] = header.to(device)
        return self.open(blob, shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class LayoutKernels:
    """The kernels that read one layout, by their names in triton_kernels."""

    read: Callable[[WeightOperand], Any]
    """An operand's tensors by name, as the kernels take them."""
    linear: str
    dequantize: str

    def packed_linear(self, x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
        """Sums in fp32 whatever `precision` says: a GPU gains nothing from coarser tables."""
        if not x.shape[0]:
            return x.new_empty(0, weight.shape[0])
        return launch(self.linear, x, x, self.read(weight), bias)

    def packed_dequantize(self, weight: WeightOperand, dtype: torch.dtype) -> Tensor:
        return launch(self.dequantize, weight.tensors[0], self.read(weight), dtype)

    def decode_and_matmul(self, x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str) -> Tensor:
        """The weight decoded to x's dtype, then torch's matmul. Where that dtype cannot hold a decoded weight it is rounded."""
        dense = self.packed_dequantize(weight, x.dtype)
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))

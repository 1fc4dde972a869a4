"""Where triton's kernels run, machine layouts that they read as views of one blob, and what rows have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib.util import find_spec

import torch
from torch import Tensor

from ...dispatch import Problem, Support
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


def serves(device: str) -> bool:
    return device == DEVICE and available()[0]


def on_device(problem: Problem) -> Support:
    if problem.device != DEVICE:
        return False, f"needs tensors on {DEVICE}, these are on {problem.device}"
    return available()


takes_activations = takes(ACTIVATION_DTYPES, on_device)
takes_fp32 = takes((torch.float32,), on_device)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments say."""
    return torch.cuda.device_of(tensor)


def aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def blob_views(blob: Tensor, begin: int, sections: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Views of what lies in a blob from `begin` on, aligned; ValueError if it is cut off."""
    views = []
    for shape, dtype in sections:
        nbytes = math.prod(shape) * dtype.itemsize
        if begin + nbytes > blob.numel():
            raise ValueError(f"the layout is cut off: {blob.numel()} bytes, and a tensor ends at {begin + nbytes}")
        views.append(blob[begin : begin + nbytes].view(dtype).view(shape))
        begin += aligned(nbytes)
    return views


def write_header(blob: Tensor, header: list[int]) -> None:
    """As int64, at the beginning of a blob."""
    words = torch.tensor(header, dtype=torch.int64, device="cpu")
    blob[: 8 * len(header)] = words.view(torch.uint8).to(blob.device)

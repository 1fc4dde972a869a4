"""The extension `_cuda`, the driver, streams, and what its rows have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...dispatch import Problem, Support
from ...layouts import WeightOperand
from ...operations import ACTIVATION_DTYPES, takes

DEVICE = "cuda"
"""The device type that the kernels serve."""
ORDER = 200

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> tuple[bool, str]:
    """Of the current device. Asks the driver, so it is called when a kernel is chosen, never at import."""
    try:
        from ... import _cuda
    except ImportError as error:
        return False, f"pyllmq._cuda was not built ({error}); install with nvcc on PATH, or PYLLMQ_CUDA=1 to insist"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} is built for CPUs only; install a build of torch for CUDA"
    problem = _cuda.device_problem()
    if problem:
        return False, f"the driver refuses: {problem} (built with CUDA {_version(_cuda.runtime_version())})"
    name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    return True, f"{name}, compute capability {capability}, built with CUDA {_version(_cuda.runtime_version())}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@cache
def extension() -> ModuleType:
    from ... import _cuda  # an import statement at every call would cost 1 us

    return _cuda


current = torch.cuda.device
"""Makes a device current for a block: the extension works on the current device."""


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def on(device: str) -> AbstractContextManager[Any]:
    """Makes the device of a problem current for a block, as what the driver is asked is asked of the current device; without an
    index it is the current one."""
    return current(torch.device(device)) if ":" in device else nullcontext()


def serves(device: str) -> bool:
    if device.partition(":")[0] != DEVICE:
        return False
    with on(device):
        return available()[0]


def on_device(problem: Problem) -> Support:
    if problem.device_type != DEVICE:
        return False, f"needs tensors on a {DEVICE} device, these are on {problem.device}"
    with on(problem.device):
        return available()


takes_activations = takes(ACTIVATION_DTYPES, on_device)


def run_linear(
    bind: Callable[[WeightOperand], Any], x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str
) -> Tensor:
    """y = x W^T + bias by the extension's operand that `bind` makes; sums in fp32, whatever the precision asked."""
    x = x.contiguous()
    tokens, dtype, device = x.shape[0], DTYPE_CODE[x.dtype], x.device
    y = torch.empty(tokens, weight.shape[0], dtype=x.dtype, device=device)
    if tokens == 0:
        return y
    with current(device):
        operand = bound(bind, weight)
        partials = torch.empty(operand.room(tokens, dtype), dtype=torch.float32, device=device)
        bias_pointer, bias_dtype = (0, 0) if bias is None else (bias.data_ptr(), DTYPE_CODE[bias.dtype])
        pointers = y.data_ptr(), partials.data_ptr()
        operand.linear(x.data_ptr(), dtype, tokens, bias_pointer, bias_dtype, *pointers, stream(device))
    return y


def dequantize(bind: Callable[[WeightOperand], Any], weight: WeightOperand, dtype: torch.dtype) -> Tensor:
    device = weight.tensors[0].device
    dense = torch.empty(weight.shape, dtype=dtype, device=device)
    with current(device):
        bound(bind, weight).dequantize(dense.data_ptr(), DTYPE_CODE[dtype], stream(device))
    return dense


def dequantize_matmul(
    bind: Callable[[WeightOperand], Any], x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str
) -> Tensor:
    """The dense matrix in x's dtype, which torch's allocator takes back at once, and torch's matmul."""
    return torch.nn.functional.linear(x, dequantize(bind, weight, x.dtype), None if bias is None else bias.to(x.dtype))


def bound(bind: Callable[[WeightOperand], Any], weight: WeightOperand) -> Any:
    """The operands of a layout, made at its first call, and anew where its memory is another: by the function that makes them."""
    operands = weight.bound if weight.bound is not None else {}
    operand = operands.get(bind)
    if operand is None or operand.layout != weight.tensors[0].data_ptr():
        operand = bind(weight)
        weight.bound = {**operands, bind: operand}
    return operand

"""sinkhorn in Triton: matrices that one program holds in registers (triton_kernels/sinkhorn.py), and others in tiles."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Kernel, Problem, Support, register
from . import triton

MAX_ENTRIES = 4096
"""Of a matrix padded to powers of two. 128 x 128 on 1024 threads spills 416 bytes of each thread (sm_90)."""


def _forward(kernels: str) -> Callable[..., Any]:
    def sinkhorn(
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        iterations: int,
        tolerance: float,
        rho_a: float,
        rho_b: float,
        tape: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        module = import_module(f"..triton_kernels.{kernels}", __package__)
        cost, a, b, epsilon = (tensor.contiguous() for tensor in (cost, a, b, epsilon))
        with torch.cuda.device_of(cost):
            return module.sinkhorn(cost, a, b, epsilon, iterations, tolerance, rho_a, rho_b, tape)

    return sinkhorn


def _backward(kernels: str) -> Callable[..., Any]:
    def sinkhorn_backward(
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        tape: Tensor,
        count: Tensor,
        grad_plan: Tensor,
        grad_u: Tensor,
        grad_v: Tensor,
        rho_a: float,
        rho_b: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        module = import_module(f"..triton_kernels.{kernels}", __package__)
        cost, a, b, epsilon = (tensor.contiguous() for tensor in (cost, a, b, epsilon))
        with torch.cuda.device_of(cost):
            return module.sinkhorn_backward(cost, a, b, epsilon, tape, count, grad_plan, grad_u, grad_v, rho_a, rho_b)

    return sinkhorn_backward


def _fp32_on_gpu(problem: Problem) -> Support:
    if problem.device != triton.DEVICE:
        return False, f"needs tensors on {triton.DEVICE}, these are on {problem.device}"
    if problem.dtype != torch.float32:
        return False, f"computes in fp32, asked for {problem.dtype}"
    return triton.available()


def _in_registers(problem: Problem) -> Support:
    if problem.tokens > MAX_ENTRIES:
        return False, f"holds up to {MAX_ENTRIES} entries of a matrix (padded to powers of two), here {problem.tokens}"
    return _fp32_on_gpu(problem)


def register_kernels() -> None:
    held = "all iterations in one launch, the matrix in registers (limit predicted, not measured)"
    for name, kernels, supports, because in (
        ("sinkhorn", "sinkhorn", _in_registers, held),
        ("sinkhorn_tiles", "sinkhorn_tiles", _fp32_on_gpu, "any size; two launches an iteration"),
    ):
        register(Kernel("sinkhorn", f"triton.{name}", supports, _forward(kernels), because))
        backward = f"triton.{name}_backward"
        register(Kernel("sinkhorn_backward", backward, supports, _backward(kernels), because))

"""sinkhorn in Triton: matrices that one program holds in registers (triton_kernels/sinkhorn.py), and others in tiles."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...dispatch import Support
from ...operations import SINKHORN, SINKHORN_BACKWARD, Arriving, SinkhornProblem, Transport
from . import runtime
from .runtime import ORDER

MAX_ENTRIES = 4096
"""Of a matrix padded to powers of two. 128 x 128 on 1024 threads spills 416 bytes of each thread (sm_90)."""


@dataclass(frozen=True)
class TritonSinkhorn:
    kernels: str
    """Name of a module of triton_kernels."""

    def tape_row(self, n: int, m: int) -> int:
        return n + m

    def __call__(
        self, transport: Transport, iterations: int, tolerance: float, tape: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = (*transport[:4], iterations, tolerance, *transport[4:], tape)
        return runtime.launch(f"{self.kernels}.sinkhorn", tape, *given)


@dataclass(frozen=True)
class TritonSinkhornBackward:
    kernels: str

    def __call__(self, transport: Transport, arriving: Arriving) -> tuple[Tensor, Tensor, Tensor]:
        given = (*transport[:4], *arriving, *transport[4:])
        return runtime.launch(f"{self.kernels}.sinkhorn_backward", arriving.tape, *given)


def _in_registers(problem: SinkhornProblem) -> Support:
    entries = (1 << (problem.n - 1).bit_length()) * (1 << (problem.m - 1).bit_length())
    if entries > MAX_ENTRIES:
        return False, f"holds up to {MAX_ENTRIES} entries of a matrix (padded to powers of two), here {entries}"
    return runtime.takes_fp32(problem)


held = "all iterations in one launch, the matrix in registers (limit predicted, not measured)"
SINKHORN.register("triton.sinkhorn", ORDER, _in_registers, TritonSinkhorn("sinkhorn"), held)
backward = TritonSinkhornBackward("sinkhorn")
SINKHORN_BACKWARD.register("triton.sinkhorn_backward", ORDER, _in_registers, backward, held)
tiles = "any size; two launches an iteration"
any_size = runtime.takes_fp32
SINKHORN.register("triton.sinkhorn_tiles", ORDER + 1, any_size, TritonSinkhorn("sinkhorn_tiles"), tiles)
backward = TritonSinkhornBackward("sinkhorn_tiles")
SINKHORN_BACKWARD.register("triton.sinkhorn_tiles_backward", ORDER + 1, any_size, backward, tiles)

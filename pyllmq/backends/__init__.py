"""Back ends: each module registers its kernels in `pyllmq.dispatch` and answers `available() -> (ok, why)`."""

from __future__ import annotations

from . import cpu, reference

__all__ = ["cpu", "prepack", "reference", "report"]

from ..dispatch import CHECKPOINT, WeightOperand, forced_backend


def prepack(operand: WeightOperand) -> WeightOperand:
    """The codebook operand in the layout that is fastest on the device where its tensors lie.

    Only the checkpoint layout can be prepacked. Without a back end for the device, or with PYLLMQ_BACKEND=reference, the
    operand comes back as it is: the reference back end reads the checkpoint layout.
    """
    if operand.layout != CHECKPOINT:
        return operand
    if operand.tensors[0].device.type == "cpu" and forced_backend() in (None, "cpu") and cpu.available()[0]:
        return cpu.prepack(operand)
    return operand


def report() -> dict[str, tuple[bool, str]]:
    """For every back end: does it work here, and why (not)."""
    return {
        "cpu": cpu.available(),
        "cuda": cuda_available(),
        "triton": triton_available(),
        "reference": reference.available(),
    }


def cuda_available() -> tuple[bool, str]:
    try:
        from .. import _cuda
    except ImportError as error:
        return False, f"pyllmq._cuda was not built ({error}); install with nvcc on PATH, or PYLLMQ_CUDA=1 to insist"
    return False, f"built with CUDA runtime {_cuda.runtime_version()}, but this version ships no CUDA kernels yet"


def triton_available() -> tuple[bool, str]:
    return False, "this version ships no Triton kernels yet"

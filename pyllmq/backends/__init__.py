"""Back ends: each registers its kernels and layouts, and answers `available() -> (ok, why)`."""

from __future__ import annotations

from . import cpu, cuda, reference, triton

__all__ = ["cpu", "cuda", "reference", "register_kernels", "report", "triton"]

_BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}


def register_kernels() -> None:
    for backend in _BACKENDS.values():
        backend.register_kernels()


def report() -> dict[str, tuple[bool, str]]:
    """For every back end: does it work here, and why (not)."""
    return {name: backend.available() for name, backend in _BACKENDS.items()}


register_kernels()

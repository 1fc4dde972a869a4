"""Back ends: each registers its kernels and layouts, and answers `available() -> (ok, why)`."""

from __future__ import annotations

from . import cpu, cuda, reference, triton

__all__ = ["cpu", "cuda", "reference", "report", "triton"]


def report() -> dict[str, tuple[bool, str]]:
    """For every back end: does it work here, and why (not)."""
    of_name = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}
    return {name: backend.available() for name, backend in of_name.items()}

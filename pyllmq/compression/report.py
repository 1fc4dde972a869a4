"""What a compression did: one row per Linear, totals, and what stayed dense."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..linears import LeftDense


@dataclass(frozen=True)
class LayerReport:
    """One compressed Linear. `error` is tr(E H E^T) / tr(W H W^T): the relative squared error of the layer's output."""

    name: str
    out_features: int
    in_features: int
    bits_per_weight: float
    paper_bits: float
    nbytes: int
    dense_nbytes: int
    error: float
    seconds: float
    pruned: float = 0.0
    """Share of the weights."""


@dataclass
class CompressionReport:
    """What `pyllmq.compress` returns.

    `bits_per_weight` counts every byte stored; `paper_bits` counts as the method's paper does.
    """

    method: str
    config: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    left_dense: list[LeftDense] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    tuning_losses: list[float] = field(default_factory=list)
    peak_memory: int = 0
    """Most bytes of RAM that a process of the job held at a time; 0: not known."""

    @property
    def weights(self) -> int:
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(self.weights, 1)

    @property
    def paper_bits(self) -> float:
        total = sum(layer.paper_bits * layer.out_features * layer.in_features for layer in self.layers)
        return total / max(self.weights, 1)

    @property
    def mean_error(self) -> float:
        return sum(layer.error for layer in self.layers) / max(len(self.layers), 1)

    def to_dict(self) -> dict[str, Any]:
        names = ("bits_per_weight", "paper_bits", "mean_error", "nbytes", "dense_nbytes")
        return {**asdict(self), "totals": {name: getattr(self, name) for name in names}}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON; the file is whole or not there."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(part, target)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        pruned = any(layer.pruned for layer in self.layers)
        lines = [f"{'layer':<{width}}  {'shape':>13}  true bits  paper bits     error  seconds{'  pruned' * pruned}"]
        for layer in self.layers:
            shape = f"{layer.out_features}x{layer.in_features}"
            lines.append(
                f"{layer.name:<{width}}  {shape:>13}  {layer.bits_per_weight:9.3f}  {layer.paper_bits:10.3f}  "
                f"{layer.error:8.5f}  {layer.seconds:7.2f}" + f"  {layer.pruned:6.3f}" * pruned
            )
        lines.append(self.totals())
        if self.left_dense:
            lines.append("left dense: " + summary(self.left_dense))
        return "\n".join(lines)

    def totals(self) -> str:
        """One line: Linears, true and paper bits, megabytes before and after, mean error, time."""
        return (
            f"{len(self.layers)} Linears: {self.bits_per_weight:.3f} true bits per weight ({self.paper_bits:.3f} as the paper "
            f"counts), {self.dense_nbytes / 1e6:.1f} MB -> {self.nbytes / 1e6:.1f} MB, mean error {self.mean_error:.5f}, "
            f"{self.seconds:.1f} s"
            + (f", at most {self.peak_memory / 1e9:.2f} GB of memory" if self.peak_memory else "")
        )


def summary(left: Sequence[LeftDense], most: int = 6) -> str:
    """Name, size and reason of the largest tensors left dense, and how many more there are."""
    largest = sorted(left, key=lambda item: -item.parameters)
    named = ", ".join(f"{item.name} ({item.parameters / 1e6:.2f} M, {item.why})" for item in largest[:most])
    return named + (f" and {len(left) - most} more" if len(left) > most else "")

"""Settings of the compression methods: checked when made, saved in `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

FULL_BITS = 16
MAX_OUTLIERS = 0.1


@dataclass(frozen=True)
class CLAQConfig:
    """CLAQ: a k-means codebook per input column, more bits for columns with many outliers, outliers kept in fp16.

    Source: CLAQ (arXiv 2405.17233) and its released code. The points that the paper names, as `bits` / `outliers`:
    2, 3, 4 (one width); 2.1, 2.2, 2.5, 3.1 (Adaptive Precision); 2.12 / 0.005, 2.24 / 0.01, 3.12 / 0.005, 3.23 / 0.01
    (with Outlier Reservation).
    """

    bits: float
    """1 to 8, in the paper's way of counting: code bits + (16 - base width) * outliers. Codebooks and the positions of
    the outliers are not in it; `CodebookWeight.bits_per_weight` counts everything."""
    outliers: float = 0.0
    """Share of the weights that is kept in fp16, 0 to 0.1. The top 10 % of the columns keep 2.8 times this share, the
    others 0.8 times."""
    kmeans: str = "exact"
    """"exact" (optimal) or "lloyd" (the kind of solver that the paper used)."""
    act_order: bool = True
    """Process the columns by falling diagonal of the Hessian."""
    block_size: int = 128
    """Columns between two updates of all later columns."""
    damping: float = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal."""
    true_sequential: bool = True
    """Calibrate q/k/v, o, gate/up, down one after the other, each on the outputs of those before."""
    outlier_order_threshold: float = 13.0
    """S: a weight is an outlier if its magnitude is at least S times the mean magnitude of its matrix."""
    share_bits: bool = True
    """Linears with the same input (q/k/v, gate/up) get the same width in each column: serving engines merge them."""
    published: bool = False
    """Choose columns and outliers as the released code does, oversights included: outliers from the top AND from the
    bottom (twice the share), k-means over the outliers too, keep shares read by the position in the block, allocation
    in each matrix by itself (`share_bits` is ignored). `kmeans` stays a free choice; "lloyd" is what was released."""

    def __post_init__(self) -> None:
        _number("bits", self.bits, 1, 8)
        _number("outliers", self.outliers, 0, MAX_OUTLIERS)
        _number("damping", self.damping, 0, 1)
        _number("outlier_order_threshold", self.outlier_order_threshold, 0, math.inf)
        if self.kmeans not in ("exact", "windowed", "lloyd"):
            raise ValueError(f"kmeans is {self.kmeans!r}; allowed: 'exact', 'windowed', 'lloyd'")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size!r}; allowed: an integer >= 1")
        for name in ("act_order", "true_sequential", "share_bits", "published"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: True, False")
        if self.code_bits < 1:
            raise ValueError(
                f"bits = {self.bits:g} with outliers = {self.outliers:g} leaves {self.code_bits:g} bits for the codes, "
                f"which need at least 1; raise bits to {1 + (FULL_BITS - 1) * self.outliers:g} or keep fewer outliers"
            )

    @property
    def base_bits(self) -> int:
        """Width of the columns that get no extra bits."""
        return self._split_bits()[0]

    @property
    def code_bits(self) -> float:
        """Average width of the codes: bits without the outliers' share."""
        return self._split_bits()[1]

    @property
    def high_bits(self) -> int:
        """Width of the columns that get extra bits. The paper defines 2 -> 4 and 3 -> 4; elsewhere it is one bit
        more, an extension of this library."""
        return {2: 4, 8: 8}.get(self.base_bits, self.base_bits + 1)

    @property
    def high_fraction(self) -> float:
        """Share of the columns that get `high_bits`."""
        extra = self.high_bits - self.base_bits
        return (self.code_bits - self.base_bits) / extra if extra else 0.0

    def _split_bits(self) -> tuple[int, float]:
        """(base width, code bits). An outlier costs 16 - base, and the base follows from the code bits: search down."""
        for base in range(math.floor(self.bits + 1e-9), 0, -1):
            code_bits = self.bits - (FULL_BITS - base) * self.outliers
            if code_bits > base - 1e-9:
                # 2.07 - 14 * 0.005 is 2 less 2e-16: decimal settings must not fall below their width.
                return base, float(base) if abs(code_bits - base) < 1e-9 else code_bits
        return 1, self.bits - (FULL_BITS - 1) * self.outliers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLAQConfig:
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            ValueError: unknown keys (the allowed ones are named), no `bits`, or a value out of range.
        """
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(allowed), key=str)
        if unknown:
            raise ValueError(f"CLAQConfig does not know {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}")
        if "bits" not in values:
            raise ValueError(f"CLAQConfig needs 'bits', given: {sorted(values)}")
        return cls(**values)


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        limits = f"{low:g} to {high:g}" if math.isfinite(high) else f"finite and >= {low:g}"
        raise ValueError(f"{name} is {value!r}; allowed: a number, {limits}")

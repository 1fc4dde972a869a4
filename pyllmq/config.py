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
        _check_keys(cls, values)
        return cls(**values)


@dataclass(frozen=True)
class KMeansConfig:
    """Exact k-means in every input column, by the weights alone: no calibration data, minutes instead of hours."""

    bits: int
    """Width of the codes of all columns, 1 to 8."""
    row_scale: bool = False
    """One fp16 factor per row, its root mean square."""

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}; allowed: an integer from 1 to 8")
        if not isinstance(self.row_scale, bool):
            raise ValueError(f"row_scale is {self.row_scale!r}; allowed: True, False")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KMeansConfig:
        """The inverse of `to_dict`; missing keys take their defaults. Raises ValueError as CLAQConfig's does."""
        _check_keys(cls, values)
        return cls(**values)


PRESETS = ("fast", "balanced", "best")
GUIDANCE = ("none", "rows", "tokens", "rows+tokens")


@dataclass(frozen=True)
class ColumnCodebookConfig:
    """Column codebooks at their best: CLAQ's format, every stored byte spent where it lowers the error most.

    docs/accuracy.md says what each setting is worth. `preset` makes the usual ones.
    """

    bits: float
    """True bits per weight, 1.1 to 8: everything stored for the compressed Linears, together, over their weights."""
    widths: tuple[int, ...] | None = None
    """Widths that a column may have; None: from 1 to two above the whole part of `bits`."""
    outliers: bool = True
    """Weights may stay in fp16, where that lowers the error more than the same bytes do as bits."""
    row_scale: bool = True
    """One fp16 factor per row, its root mean square: lets one codebook serve rows of all sizes."""
    cycles: int = 3
    """Passes of block coordinate descent over all columns after the sweep; 0 for none."""
    tolerance: float = 0.05
    """The descent ends when a pass gains less than this share of what the first gained."""
    correct_bias: bool = True
    """Where the Linear has a bias, let it take up the mean error, and weigh the rest by the input's covariance."""
    propagation: float = 1.0
    """Share of the damage done by earlier Linears that a Linear's target makes up for, 0 to 1. Above 0 the dense block runs beside
    the one being compressed: twice the runs of blocks, a second copy of one block and of the hidden states."""
    guidance: str = "rows"
    """Weigh "rows", "tokens" or "rows+tokens" by the gradient of the model's loss, which takes a backward pass; "none"
    weighs all alike."""
    share_bits: bool = True
    """Linears with the same input (q/k/v, gate/up) get the same width in each column: serving engines merge them."""
    kmeans: str = "exact"
    """"exact", or "windowed": a few 1e-6 above it, in a fifth of the time at 4096 rows and 16 centroids."""
    tune_steps: int = 0
    """Steps of codebook tuning against the dense model after compression; 0 for none."""
    act_order: bool = True
    """Process the columns by falling diagonal of the Hessian."""
    block_size: int = 128
    """Columns between two updates of all later columns."""
    damping: float = 0.05
    """Share of the Hessian's mean diagonal added to its diagonal; less lets the descent fit the calibration text too closely."""
    true_sequential: bool = True
    """Calibrate q/k/v, o, gate/up, down one after the other, each on the outputs of those before."""

    def __post_init__(self) -> None:
        _number("bits", self.bits, 1.1, 8)
        _number("tolerance", self.tolerance, 0, 1)
        _number("damping", self.damping, 0, 1)
        _number("propagation", self.propagation, 0, 1)
        if self.widths is not None:
            widths = tuple(self.widths)
            good = widths and all(isinstance(w, int) and not isinstance(w, bool) and 1 <= w <= 8 for w in widths)
            if not good or list(widths) != sorted(set(widths)):
                raise ValueError(f"widths is {self.widths!r}; allowed: rising integers from 1 to 8, or None")
            object.__setattr__(self, "widths", widths)
        if self.kmeans not in ("exact", "windowed"):
            raise ValueError(f"kmeans is {self.kmeans!r}; allowed: 'exact', 'windowed'")
        if self.guidance not in GUIDANCE:
            raise ValueError(f"guidance is {self.guidance!r}; allowed: {', '.join(map(repr, GUIDANCE))}")
        for name, least in (("cycles", 0), ("tune_steps", 0), ("block_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: an integer >= {least}")
        for name in ("outliers", "row_scale", "correct_bias", "share_bits", "act_order", "true_sequential"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: True, False")

    @classmethod
    def preset(cls, name: str, bits: float, **changes: Any) -> ColumnCodebookConfig:
        """Presets: `fast` sweeps and allocates, `balanced` is guided by the loss and descends, `best` descends longer and tunes."""
        settings: dict[str, dict[str, Any]] = {
            "fast": {"cycles": 0, "kmeans": "windowed", "outliers": False, "guidance": "none"},
            "balanced": {},
            "best": {"cycles": 6, "tolerance": 0.02, "tune_steps": 200},
        }
        if name not in settings:
            raise ValueError(f"the preset is {name!r}; allowed: {', '.join(map(repr, PRESETS))}")
        return cls(bits=bits, **(settings[name] | changes))

    @property
    def allowed_widths(self) -> tuple[int, ...]:
        if self.widths is not None:
            return self.widths
        return tuple(range(1, min(8, math.floor(self.bits + 1e-9) + 2) + 1))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ColumnCodebookConfig:
        """The inverse of `to_dict`; missing keys take their defaults. Raises ValueError as CLAQConfig's does."""
        _check_keys(cls, values)
        return cls(**values)


PRUNING_METHODS = ("magnitude", "wanda", "sparsegpt", "mixed")
ALLOCATIONS = ("uniform", "fisher", "hutchinson", "owl")
GROUPS = (2, 4, 8)


@dataclass(frozen=True)
class SparseConfig:
    """Pruning, alone or together with CLAQ: docs/pruning.md has the formulas and sources."""

    sparsity: float | None = None
    """Share of the weights that become 0, 0 to 0.99. With an N:M pattern it follows from that."""
    pattern: str = "unstructured"
    """"unstructured", or "N:M": at most N of M neighbours in a row are kept, M = 2, 4 or 8. "2:4" has its own format."""
    method: str = "mixed"
    """"magnitude", "wanda", "sparsegpt", or "mixed": its criterion, and sparsities by the sensitivity of each matrix."""
    values: str | None = None
    """What kept weights are stored in: "float16", "bfloat16", "float32" or "int8"; None is the model's dtype."""
    quantize: CLAQConfig | None = None
    """Quantize the kept weights in the same sweep, to codebooks. With "2:4" every column has one width, 2, 3 or 4 bits;
    otherwise one entry of each codebook is the 0 of the pruned weights, and the size is that of the codes. `damping`,
    `block_size` and `true_sequential` are those of this config, columns go from left to right, and `published` is not
    allowed."""
    allocation: str | None = None
    """Which matrices are pruned more: "uniform"; by rank of the sensitivity of the model's loss, "fisher" (first
    derivatives) or "hutchinson" (trace of the Hessian); "owl". None: "fisher" for mixed, else "uniform"; with an N:M
    pattern always "uniform"."""
    level: str = "matrix"
    """Sensitivities are ranked by "matrix" or by "layer"; OWL always goes by layer."""
    spread: float = 0.1
    """Half the range of the sparsities, 0.5 with 0.1: 0.4 to 0.6."""
    block_size: int = 128
    """Columns among which a sweep chooses what to prune."""
    damping: float = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal."""
    refine: int = 1
    """Most cycles of coordinate descent over the kept weights after a sweep; 0 to 100, none with `published`."""
    true_sequential: bool = True
    """Calibrate q/k/v, o, gate/up, down one after the other, each on the outputs of those before."""
    published: bool = False
    """Sweep as the papers do: the same share from every block of `block_size` columns, no refinement."""

    def __post_init__(self) -> None:
        allowed = {
            "method": PRUNING_METHODS,
            "level": ("matrix", "layer"),
            "values": (None, "float16", "bfloat16", "float32", "int8"),
            "allocation": (None, *(ALLOCATIONS if self.pattern == "unstructured" else ("uniform",))),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, values))}")
        group = self.kept_of
        if group is not None:
            share = 1 - group[0] / group[1]
            if self.sparsity is None:
                object.__setattr__(self, "sparsity", share)
            elif abs(self.sparsity - share) > 1e-9:
                raise ValueError(
                    f"sparsity is {self.sparsity!r}, but the pattern {self.pattern} prunes {share:g}; leave sparsity out"
                )
        _number("sparsity", self.sparsity, 0, 0.99)
        _number("spread", self.spread, 0, 0.5)
        _number("damping", self.damping, 0, 1)
        if isinstance(self.refine, bool) or not isinstance(self.refine, int) or not 0 <= self.refine <= 100:
            raise ValueError(f"refine is {self.refine!r}; allowed: an integer from 0 to 100")
        step = group[1] if group else 8
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size!r}; allowed: an integer >= 1")
        if self.block_size % step:
            raise ValueError(f"block_size is {self.block_size}; with {self.pattern} it must be a multiple of {step}")
        for flag in ("true_sequential", "published"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"{flag} is {getattr(self, flag)!r}; allowed: True, False")
        if self.quantize is not None and not isinstance(self.quantize, CLAQConfig):
            raise ValueError(f"quantize is {self.quantize!r}; allowed: None or a CLAQConfig")
        if self.quantize is not None and self.quantize.published:
            raise ValueError("quantize has published=True; the released code does not prune, leave it out")
        if self.quantize is not None and self.values is not None:
            raise ValueError(f"values is {self.values!r} and quantize is given; codebooks are fp16, leave values out")
        if self.quantize is not None and self.pattern == "2:4" and self.quantize.code_bits not in (2, 3, 4):
            raise ValueError(
                f"quantize has {self.quantize.code_bits:g} bits for the codes; with the pattern 2:4 it must be 2, 3 or 4"
            )
        if self.allocation is None:
            by_method = "fisher" if self.method == "mixed" and group is None else "uniform"
            object.__setattr__(self, "allocation", by_method)

    @property
    def share(self) -> float:
        """`sparsity` as a number, whether it was given or follows from the pattern."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, None if unstructured."""
        if self.pattern == "unstructured":
            return None
        kept, colon, group = str(self.pattern).partition(":")
        if not (
            colon and kept.isdecimal() and group.isdecimal() and int(group) in GROUPS and 0 < int(kept) < int(group)
        ):
            raise ValueError(
                f"pattern is {self.pattern!r}; allowed: 'unstructured', or 'N:M' with M = 2, 4 or 8 and N from 1 to M - 1"
            )
        return int(kept), int(group)

    @property
    def sweeps(self) -> bool:
        """Does the column sweep run? Magnitude and Wanda alone leave the kept weights as they are."""
        return self.quantize is not None or self.method in ("sparsegpt", "mixed")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseConfig:
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            ValueError: unknown keys (the allowed ones are named), or a value out of range.
        """
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(allowed), key=str)
        if unknown:
            raise ValueError(
                f"SparseConfig does not know {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}"
            )
        values = dict(values)
        if isinstance(values.get("quantize"), Mapping):
            values["quantize"] = CLAQConfig.from_dict(values["quantize"])
        return cls(**values)


def _check_keys(config: type, values: Mapping[str, Any]) -> None:
    allowed = [field.name for field in fields(config)]
    unknown = sorted(set(values) - set(allowed), key=str)
    if unknown:
        raise ValueError(
            f"{config.__name__} does not know {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}"
        )
    if "bits" not in values:
        raise ValueError(f"{config.__name__} needs 'bits', given: {sorted(values)}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        limits = f"{low:g} to {high:g}" if math.isfinite(high) else f"finite and >= {low:g}"
        raise ValueError(f"{name} is {value!r}; allowed: a number, {limits}")

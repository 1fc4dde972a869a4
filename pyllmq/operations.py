"""Every operation that kernels serve: by what a kernel is chosen, and the signature that it must have.

Kernels get checked arguments: dtypes and shapes as their `Protocol` says, on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import Operation, Problem, Support
from .layouts import WeightOperand

PRECISIONS = ("exact", "high", "fast")
"""What a caller of a linear operation permits: "exact" errs no more than torch does in the activations' dtype, "high" has a
relative error of at most 2e-4 beyond that of the dtype, "fast" of at most 2e-2. A kernel may be more exact than asked."""

DEFAULT_PRECISION = "high"

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed: {', '.join(map(repr, PRECISIONS))}")


def anything(problem: Problem) -> Support:
    """Of a row that runs anywhere."""
    return True, ""


def takes(dtypes: Sequence[torch.dtype], then: Callable[[Problem], Support]) -> Callable[[Problem], Support]:
    """A row for these dtypes, on what `then` says."""
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def supports(problem: Problem) -> Support:
        return then(problem) if problem.dtype in dtypes else (False, f"takes {allowed}, not {problem.dtype}")

    return supports


# ---- packed weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightProblem(Problem):
    """`layout` and `meta` are those of the operand, `tokens` the number of rows of x, `precision` what a linear permits."""

    layout: str
    tokens: int = 0
    meta: tuple[int, ...] = ()
    precision: str = DEFAULT_PRECISION


def reads(
    layout: str,
    then: Callable[[WeightProblem], Support],
    most_tokens: int | None = None,
) -> Callable[[WeightProblem], Support]:
    """A row that reads weights of one layout, for up to so many tokens, on what `then` says."""

    def supports(problem: WeightProblem) -> Support:
        if problem.layout != layout:
            return False, f"reads the layout {layout!r}, this weight is {problem.layout!r}"
        if most_tokens is not None and problem.tokens > most_tokens:
            return False, f"serves up to {most_tokens} tokens, here {problem.tokens}"
        return then(problem)

    return supports


class PackedLinear(Protocol):
    def __call__(self, x: Tensor, weight: WeightOperand, bias: Tensor | None, precision: str, /) -> Tensor:
        """x [M, K], any strides; bias [N] contiguous. -> [M, N] in x's dtype."""


class PackedDequantize(Protocol):
    def __call__(self, weight: WeightOperand, dtype: torch.dtype, /) -> Tensor:
        """-> [N, K]."""


class PackedRows(Protocol):
    def __call__(self, weight: WeightOperand, ids: Tensor, dtype: torch.dtype, /) -> Tensor:
        """ids int64 [M], contiguous -> rows [M, K]. An id outside of 0..N-1: IndexError on a CPU, a row of NaN on a GPU."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}
"""Those that native steps know."""


@dataclass(frozen=True)
class Gate:
    """What an expert does between its Linears, to h [..., rows of up] = [gate, up], or gate and up in turn:

    act(alpha * min(gate, limit)) / alpha * (clamp(up, -limit, limit) + offset); not gated: act(h).
    """

    activation: str
    gated: bool = True
    interleaved: bool = False
    limit: float = math.inf
    alpha: float = 1.0
    offset: float = 0.0

    def __call__(self, h: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return act(h)
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, -1)
        bounded = up.clamp(-self.limit, self.limit) + self.offset
        return act(self.alpha * gate.clamp(max=self.limit)) / self.alpha * bounded


@dataclass(eq=False)
class PackedExperts:
    """All experts of a layer: operands by expert, each of any kind and width; biases fp32 [experts, rows] or None."""

    up: tuple[WeightOperand, ...]
    """Gate and up in one weight, as `gate` says."""
    down: tuple[WeightOperand, ...]
    gate: Gate
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    precision: str = DEFAULT_PRECISION
    bound: Any = field(default=None, repr=False)
    """What the back end made of them at the first call. Never copied."""

    def __post_init__(self) -> None:
        self.layouts = tuple(sorted({operand.layout for operand in (*self.up, *self.down)}))

    @property
    def units(self) -> int:
        """Width between the Linears."""
        return self.up[0].shape[0] // (2 if self.gate.gated else 1)

    def check_shapes(self) -> None:
        """Raises ValueError unless all experts have the shapes of the first, and down takes what the gate gives."""
        for name, operands in (("up", self.up), ("down", self.down)):
            if len(shapes := {operand.shape for operand in operands}) > 1:
                raise ValueError(
                    f"the Linears {name} of the experts have several shapes: {sorted(shapes)}; needs one for all of them"
                )
        up, needed = self.up[0].shape, (self.up[0].shape[1], self.units)
        if self.down[0].shape != needed or self.gate.gated and up[0] % 2:
            raise ValueError(
                f"down is {list(self.down[0].shape)}; needs {list(needed)}: [hidden, units] where up is {list(up)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": None}


@dataclass(frozen=True)
class ExpertsProblem(Problem):
    """`layouts` are those of all experts' operands."""

    layouts: tuple[str, ...]


def by_expert(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    run: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The weighted sum of each token's experts, one expert after the other: `run(expert, its tokens' states)`."""
    total = torch.zeros_like(hidden_states)
    for index in top_k_index.unique().tolist():
        if index == experts:
            continue
        if not 0 <= index < experts:
            raise IndexError(f"a token was sent to expert {index}; allowed: 0 to {experts - 1}")
        token, place = torch.where(top_k_index == index)
        weighted = run(index, hidden_states[token]) * top_k_weights[token, place, None]
        total.index_add_(0, token, weighted.to(total.dtype))
    return total


class RoutedExperts(Protocol):
    def __call__(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: PackedExperts, /
    ) -> Tensor:
        """[tokens, hidden], index int64 and weights [tokens, k], all contiguous -> [tokens, hidden].

        An index outside of 0..E: IndexError, or on a GPU that is not waited for a token of NaN."""


class CodebookGradient(Protocol):
    def __call__(self, weight_gradient: Tensor, weight: WeightOperand, /) -> Tensor:
        """dL/dW fp32 [N, K], 0 at outliers, a weight in the layout checkpoint.codebook -> dL/dcodebook fp32 [segments, entries]."""


class PackCodes(Protocol):
    def __call__(self, codes: Tensor, bits: int, /) -> Tensor:
        """uint8 [rows, columns] -> uint8 [rows, ceil(columns * bits / 8)]."""


class UnpackCodes(Protocol):
    def __call__(self, packed: Tensor, bits: int, columns: int, /) -> Tensor: ...


PACKED_LINEAR: Operation[WeightProblem, PackedLinear] = Operation("packed_linear", WeightProblem)
PACKED_DEQUANTIZE: Operation[WeightProblem, PackedDequantize] = Operation("packed_dequantize", WeightProblem)
PACKED_ROWS: Operation[WeightProblem, PackedRows] = Operation("packed_rows", WeightProblem)
ROUTED_EXPERTS: Operation[ExpertsProblem, RoutedExperts] = Operation("routed_experts", ExpertsProblem)
CODEBOOK_GRADIENT: Operation[WeightProblem, CodebookGradient] = Operation("codebook_gradient", WeightProblem)
PACK_CODES: Operation[Problem, PackCodes] = Operation("pack_codes", Problem)
UNPACK_CODES: Operation[Problem, UnpackCodes] = Operation("unpack_codes", Problem)


# ---- softmax_cdist_l1 -----------------------------------------------------------------------------------------------


class Cdist(NamedTuple):
    """Logits [batch, rows, V] of two sides; statistics of each row: (largest logit, 1 / sum of exponentials), [batch, rows, 2]."""

    logits: Tensor
    other_logits: Tensor
    statistics: Tensor
    other_statistics: Tensor
    temperature: float


class SoftmaxCdistL1(Protocol):
    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, B, V] and [batch, C, V] -> distances [batch, B, C] and the statistics of either side; in fp32, fp64 for fp64."""


class SoftmaxCdistL1Backward(Protocol):
    def __call__(self, grad: Tensor, sides: Cdist, /) -> Tensor:
        """grad [batch, B, C] -> the gradient of `logits`, in their shape and dtype."""


SOFTMAX_CDIST_L1: Operation[Problem, SoftmaxCdistL1] = Operation("softmax_cdist_l1", Problem)
SOFTMAX_CDIST_L1_BACKWARD: Operation[Problem, SoftmaxCdistL1Backward] = Operation("softmax_cdist_l1_backward", Problem)


# ---- 1-D k-means ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterProblem(Problem):
    method: str


def finds_optimum(then: Callable[[Problem], Support]) -> Callable[[ClusterProblem], Support]:
    """A row that finds the optimum whichever method is asked for, but for the one that is asked for its own sake."""

    def supports(problem: ClusterProblem) -> Support:
        if problem.method == "lloyd":
            return False, "finds the optimum, not what k-means++ and Lloyd's iteration find"
        return then(problem)

    return supports


class Points(NamedTuple):
    """C problems: values fp32 [C, n], weights fp32 [C, n] or [n], both contiguous, to be clustered into each number of `ks`."""

    values: Tensor
    weights: Tensor | None
    ks: Sequence[int]
    method: str


class KMeans1d(Protocol):
    def __call__(self, points: Points, seed: int, half_centroids: bool, packed: bool, /) -> list[tuple[Tensor, Tensor]]:
        """-> for each k (centroids fp32 [C, k], codes)."""


class KMeans1dErrors(Protocol):
    def __call__(self, points: Points, /) -> Tensor:
        """-> fp64 [C, len(ks)]."""


class ColumnBlock(NamedTuple):
    """Columns of a codebook weight that are fitted one after the other; see `kmeans.fit_columns`."""

    block: Tensor
    coupling: Tensor
    pivot: Tensor
    row_weights: Tensor
    row_scale: Tensor
    bits: Tensor
    kept_counts: Tensor
    stored: Tensor
    codes: Tensor
    kept: Tensor
    centroids: Tensor


class FitColumns(Protocol):
    def __call__(self, columns: ColumnBlock, method: str, descend: bool, /) -> tuple[Tensor, float]: ...


KMEANS_1D: Operation[ClusterProblem, KMeans1d] = Operation("kmeans_1d", ClusterProblem)
KMEANS_1D_ERRORS: Operation[ClusterProblem, KMeans1dErrors] = Operation("kmeans_1d_errors", ClusterProblem)
FIT_COLUMNS: Operation[ClusterProblem, FitColumns] = Operation("fit_columns", ClusterProblem)


# ---- transport ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SinkhornProblem(Problem):
    """Matrices of n rows and m columns."""

    n: int
    m: int


class Transport(NamedTuple):
    """Problems of entropic transport: cost [B, n, m], a [B, n], b [B, m], epsilon [B], in fp32 or fp64.

    The batch of cost, a and b may be expanded, epsilon is contiguous. rho is the price of missing a marginal, infinite where it
    is kept exactly.
    """

    cost: Tensor
    a: Tensor
    b: Tensor
    epsilon: Tensor
    rho_a: float
    rho_b: float


class Sinkhorn(Protocol):
    def __call__(
        self, transport: Transport, iterations: int, tolerance: float, tape: Tensor, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> (plan [B, n, m], u [B, n], v [B, m], count int32 [B], negated where offsets moved). Fills a tape that is there."""

    def tape_row(self, n: int, m: int, /) -> int:
        """How many numbers the backward pass wants of each iteration; 0: it runs the loop again."""


class Arriving(NamedTuple):
    """What the backward pass of sinkhorn is given: tape and count of the loop, and the gradients of what came out of it."""

    tape: Tensor
    count: Tensor  # type: ignore[assignment]  # not how often a tuple holds something
    grad_plan: Tensor
    grad_u: Tensor
    grad_v: Tensor


class SinkhornBackward(Protocol):
    def __call__(self, transport: Transport, arriving: Arriving, /) -> tuple[Tensor, Tensor, Tensor]:
        """-> gradients of (cost, a, b), one for each problem."""


class Normalisation(NamedTuple):
    """How doubly_stochastic runs; see `transport.doubly_stochastic`."""

    iterations: int
    columns_first: bool
    softmax_start: bool
    shift: str
    matrix_epsilon: float
    division_epsilon: float


class DoublyStochastic(Protocol):
    def __call__(self, logits: Tensor, how: Normalisation, /) -> Tensor:
        """[B, n, m] -> [B, n, m]."""


class DoublyStochasticBackward(Protocol):
    def __call__(self, logits: Tensor, grad: Tensor, how: Normalisation, /) -> Tensor: ...


SINKHORN: Operation[SinkhornProblem, Sinkhorn] = Operation("sinkhorn", SinkhornProblem)
SINKHORN_BACKWARD: Operation[SinkhornProblem, SinkhornBackward] = Operation("sinkhorn_backward", SinkhornProblem)
DOUBLY_STOCHASTIC: Operation[SinkhornProblem, DoublyStochastic] = Operation("doubly_stochastic", SinkhornProblem)
DOUBLY_STOCHASTIC_BACKWARD: Operation[SinkhornProblem, DoublyStochasticBackward] = Operation(
    "doubly_stochastic_backward", SinkhornProblem
)

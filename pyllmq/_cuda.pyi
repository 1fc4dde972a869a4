"""CUDA kernels on the current device, arguments as those of `_cpu`. Whatever launches takes the address of a stream."""

from typing import Any

from ._cpu import CodebookCheckpoint, SparseCheckpoint

def runtime_version() -> int: ...
def device_problem() -> str:
    """Why the kernels cannot run on the current device, or ""."""

class LinearOperand:
    """A layout in device memory, bound once; csrc/linear_operand_cuda.h. Dtypes: 0 fp32, 1 bf16, 2 fp16."""

    layout: int
    def room(self, tokens: int, dtype: int) -> int:
        """fp32 elements of workspace."""

    def linear(
        self, x: int, dtype: int, tokens: int, bias: int, bias_dtype: int, y: int, partials: int, stream: int
    ) -> None: ...
    def dequantize(self, weight: int, dtype: int, stream: int) -> None: ...

class CodebookOperand(LinearOperand):
    def __init__(self, layout: int, layout_bytes: int, rows: int, columns: int) -> None: ...
    def row_values(self, ids: int, count: int, out: int, dtype: int, stream: int) -> None:
        """ids int64 [count] -> out [count, columns]; NaN for an id outside of the weight."""

class CodebookBytePlanes(LinearOperand):
    """Of one or two tokens and columns of at most 4 bits; `widest` is the largest width of a column."""

    def __init__(self, layout: int, layout_bytes: int, rows: int, columns: int, widest: int) -> None: ...

class CodebookWgmma(LinearOperand):
    """Of many tokens in fp16 or bf16, on compute capability 9.0."""

    def __init__(self, layout: int, layout_bytes: int, rows: int, columns: int) -> None: ...
    @staticmethod
    def runs() -> bool:
        """Whether the current device is such a one, and the build is for it."""

class CodebookWgmmaRegisters(LinearOperand):
    """Of up to 32 tokens, 16 in fp32, and columns of at most 4 bits, where CodebookWgmma runs."""

    def __init__(self, layout: int, layout_bytes: int, rows: int, columns: int) -> None: ...

codebook_header_bytes: int

def codebook_layout_meta(header: int, layout_bytes: int, rows: int, columns: int) -> tuple[int, int]:
    """The largest width of a column and whether there are patches, from a copy of the layout's header on the host."""

def codebook_layout_bytes(checkpoint: CodebookCheckpoint) -> int: ...
def codebook_layout_pack(layout: int, layout_bytes: int, checkpoint: CodebookCheckpoint) -> None: ...
def codebook_layout_codes(layout: int, layout_bytes: int, rows: int, columns: int, codes_out: int) -> None: ...
def pack_codes(codes: int, packed: int, rows: int, columns: int, bits: int, stream: int) -> None: ...
def unpack_codes(packed: int, codes: int, rows: int, columns: int, bits: int, stream: int) -> None: ...

class RoutedExperts:
    """csrc/experts/cuda/routed_experts.h; the fields of `up` and `down` begin with these words."""

    def __init__(self, **fields: Any) -> None: ...

def codebook_layout_blocks(header: int, layout_bytes: int) -> int:
    """How many blocks its rows are, from a copy of the layout's header on the host."""

def routed_experts_workspace(experts: RoutedExperts, tokens: int, choices: int, dtype: int) -> int:
    """Bytes."""

def routed_experts(
    experts: RoutedExperts,
    x: int,
    y: int,
    dtype: int,
    tokens: int,
    choices: int,
    index: int,
    weights: int,
    workspace: int,
    stream: int,
) -> None: ...

class GradientCall:
    """csrc/codebook/cuda/gradient.h; `codes` and `code_bytes` of a row for the widths 1 to 8."""

    def __init__(self, **fields: Any) -> None: ...

def codebook_gradient_workspace(call: GradientCall) -> int: ...
def codebook_gradient(call: GradientCall, gradient: int, workspace: int, stream: int) -> None: ...

class Cdist:
    """csrc/softmax_cdist/cuda/softmax_cdist_l1.h."""

    def __init__(self, **fields: Any) -> None: ...

def softmax_cdist_l1_workspace(call: Cdist) -> int: ...
def softmax_cdist_l1_backward_workspace(call: Cdist) -> int: ...
def softmax_cdist_l1(call: Cdist, distances: int, workspace: int, stream: int) -> None: ...
def softmax_cdist_l1_backward(call: Cdist, gradient: int, x_gradient: int, workspace: int, stream: int) -> None: ...

class SinkhornProblem:
    """csrc/sinkhorn/problem.h."""

    def __init__(self, **fields: Any) -> None: ...

def sinkhorn_fits(n: int, m: int) -> bool: ...
def sinkhorn_room(problem: SinkhornProblem, backward_iterations: int) -> tuple[int, int]: ...
def sinkhorn(problem: SinkhornProblem, **fields: Any) -> None:
    """SinkhornForward, workspace, counters and stream."""

def sinkhorn_backward(problem: SinkhornProblem, **fields: Any) -> None:
    """SinkhornBackward, workspace, counters and stream."""

class SparseOperand(LinearOperand):
    """kind: "bitmap", "columns", "sparse24" or "sparse24_codebook"; values: 0 fp32, 1 bf16, 2 fp16, 3 int8."""

    def __init__(
        self,
        layout: int,
        layout_bytes: int,
        rows: int,
        columns: int,
        kind: str,
        values: int,
        bits: int,
        stage_bytes: int,
    ) -> None: ...

class SparseProducts(LinearOperand):
    """Of one token and codes of 2 bits in 2:4."""

    def __init__(self, layout: int, layout_bytes: int, rows: int, columns: int, stage_bytes: int) -> None: ...

class SparseTables(LinearOperand):
    """Of one token and codes of 3 or 4 bits in 2:4."""

    def __init__(self, layout: int, layout_bytes: int, rows: int, columns: int, stage_bytes: int) -> None: ...

sparse_header_bytes: int

def sparse_layout_bytes(checkpoint: SparseCheckpoint, sparse_columns: float) -> int: ...
def sparse_layout_pack(layout: int, layout_bytes: int, checkpoint: SparseCheckpoint, sparse_columns: float) -> None: ...
def sparse_layout_unpack(layout: int, layout_bytes: int, checkpoint: SparseCheckpoint) -> None: ...
def sparse_layout_describe(header: int, layout_bytes: int, rows: int, columns: int) -> tuple[str, int, int, int, int]:
    """(kind, values, bits, stage_bytes, data_offset)."""

def kmeans_1d_layers(
    sums: int, masses: int, gains: int, best: int, problems: int, n: int, k_max: int, stream: int
) -> None:
    """csrc/kmeans/cuda/kmeans_1d.h."""

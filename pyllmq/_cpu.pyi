"""CPU kernels. Tensors are passed as addresses (`tensor.data_ptr()`) and sizes; the caller checks shapes and dtypes.

What takes `**fields` takes all fields of a C++ struct by name, each exactly once: numbers, and arrays as tensors, addresses, or
None for null. The header that is named describes them. A name that is missing or unknown raises TypeError, a tensor whose
elements have another size than the field's ValueError.

All arrays are contiguous and row-major. dtype codes: 0 fp32, 1 bf16, 2 fp16. A layout is a uint8 buffer aligned to 64
bytes without pointers inside: it may be copied to another aligned place. Arguments that would make a kernel read or
write outside raise ValueError.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

def supported_isas() -> list[str]:
    """Instruction sets compiled in and usable on this machine, best first."""

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def use_tensors(
    tensor_type: type, parameter_type: type, is_grad_enabled: Callable[[], bool], num_threads: Callable[[], int]
) -> bool:
    """Reads torch's tensors without asking Python, by DLPack's table of C functions. False: this torch has none (before 2.10)."""

def set_num_threads(threads: int) -> None:
    """Size of the thread pool, the calling thread included: 1..1024. Waits for a running kernel."""

def trace_clock() -> int:
    """Nanoseconds of the clock that spans are measured by."""

def start_trace() -> None:
    """Keep what the threads do from now on, until `take_trace`."""

def take_trace() -> list[tuple[str, int, int, int]]:
    """(part, thread, begin, end) in the order of their ends: "step" (an attention or MLP module), "linear" and "attention" of the
    calling thread, "work" of a worker."""

def worker_sleep() -> tuple[int, int]:
    """How often threads of the pool woke from sleep so far, and how many sleep now."""

def parallel_probe(
    tasks: int, task_us: float = 0.0, failing_task: int = -1, nested_tasks: int = 0
) -> tuple[list[int], int]:
    """For tests: how often each task ran (plus its nested tasks), and on how many threads."""

def read_bandwidth_probe(pointer: int, bytes: int) -> int:
    """Sum modulo 2**64 of the 64-bit words at `pointer`, on the pool's threads: timed, it is what reading memory costs."""

def pack_codes(codes: int, packed: int, rows: int, columns: int, bits: int) -> None:
    """uint8 [rows, columns] -> uint8 [rows, ceil(columns*bits/8)], LSB first; a code >= 2**bits raises ValueError."""

def unpack_codes(packed: int, codes: int, rows: int, columns: int, bits: int) -> None: ...

class CodebookCheckpoint:
    """csrc/codebook/shape.h; `codes` are those of the widths 1 to 8. Keeps its tensors alive."""

    def __init__(self, **fields: Any) -> None: ...

def codebook_layout_bytes(checkpoint: CodebookCheckpoint) -> int: ...
def codebook_layout_pack(layout: int, layout_bytes: int, checkpoint: CodebookCheckpoint) -> None: ...

class LinearOperand:
    """A layout of any kind, bound once: its header was checked. The memory of the layout must outlive the object."""

    rows: int
    columns: int
    is_intact: bool
    """False once the memory holds another layout than the one that was bound; calls then raise ValueError."""
    is_native: bool
    """Are its bytes in the order that the kernels of the active instruction set read? Scalar code reads any, 30 times as slowly."""

    def linear(self, x: int, x_dtype: int, tokens: int, bias: int, bias_dtype: int, y: int, precision: int) -> None:
        """y [tokens, rows] = x [tokens, columns] @ W.T + bias [rows]; y has x's dtype, bias 0 = none; precision 0 exact, 1 high,
        2 fast."""

    def linear_of_tensors(self, x: Tensor, bias: Tensor | None, precision: str) -> Tensor | None:
        """The same of tensors, with a new y [..., rows]. None where x or bias is more than memory to read: it wants a gradient,
        is of a subclass, on another device, of another shape or dtype, not contiguous, negated only as it is read."""

class CodebookOperand(LinearOperand):
    def __init__(self, layout: int, layout_bytes: int) -> None: ...
    def linear_by(
        self, path: int, x: int, x_dtype: int, tokens: int, bias: int, bias_dtype: int, y: int, precision: int
    ) -> None:
        """`linear` with path 0 tables, 1 decode or 2 automatic, which is what `linear` takes."""

    def path(self, x_dtype: int, tokens: int, precision: int) -> str:
        """What path 2 is for this many tokens: "tables" or "decode"."""

    def dequantize(self, row_begin: int, row_end: int, out: int, out_dtype: int) -> None:
        """out [row_end - row_begin, columns] = those rows of W: exact in fp32, else rounded to nearest even."""

    def codes(self, codes_out: int) -> None:
        """The inverse of packing, for the codes: uint8 [rows, columns], also those under outliers."""

class SparseOperand(LinearOperand):
    def __init__(self, layout: int, layout_bytes: int) -> None: ...
    def dequantize(self, out: int, out_dtype: int) -> None:
        """out [rows, columns] = W."""

    def unpack(self, checkpoint: SparseCheckpoint) -> None:
        """The inverse of packing: fills the tensors of `checkpoint`, which must be those of the weight that was packed."""

def codebook_decode(checkpoint: CodebookCheckpoint, row_scale: int, codebook: int, weight: int) -> None:
    """weight fp32 [rows, columns] from the codes of a checkpoint, with the codebook [segments, sum 2**column_bits] and row_scale
    ([rows] or 0) in fp32."""

def codebook_gradient(checkpoint: CodebookCheckpoint, row_scale: int, weight_gradient: int, gradient: int) -> None:
    """gradient fp32 [segments, sum 2**column_bits]: row_scale * weight_gradient [rows, columns] summed for each entry."""

class Cdist:
    """SoftmaxCdistProblem in csrc/softmax_cdist/cpu/softmax_cdist_l1.h: x, x_dtype, x_rows, x_statistics, the same of y, batch,
    columns, scale = 1 / temperature."""

    def __init__(self, **fields: Any) -> None: ...

def softmax_cdist_l1(call: Cdist, distances: int) -> None: ...
def softmax_cdist_l1_backward(call: Cdist, gradient: int, x_gradient: int) -> None:
    """fp32 gradient [batch, x_rows, y_rows] of the distances -> gradient of x, in its shape and dtype. For y: swap the sides."""

def kmeans_1d(**fields: Any) -> None:
    """csrc/kmeans/cpu/kmeans_1d.h; `centroids` and `codes` are lists of one array per k, or empty."""

def fit_columns(**fields: Any) -> float:
    """csrc/fit_columns/cpu/fit_columns.h. Returns the decrease."""

def sinkhorn(**fields: Any) -> None:
    """SinkhornProblem and SinkhornForward in csrc/sinkhorn/problem.h."""

def sinkhorn_backward(**fields: Any) -> None:
    """SinkhornProblem and SinkhornBackward in csrc/sinkhorn/problem.h."""

class DoublyStochastic:
    """csrc/sinkhorn/cpu/doubly_stochastic.h; shift: 0 none, 1 line, 2 matrix."""

    def __init__(self, **fields: Any) -> None: ...

def doubly_stochastic(call: DoublyStochastic, out: int) -> None: ...
def doubly_stochastic_backward(call: DoublyStochastic, gradient: int, logits_gradient: int) -> None: ...

class SparseCheckpoint:
    """csrc/sparse/shape.h; kind: "bitmap", "sparse24" or "sparse24_codebook". `tensors` holds those of a checkpoint by name
    (docs/formats.md). Keeps them alive."""

    def __init__(self, **fields: Any) -> None: ...

def sparse_layout_bytes(checkpoint: SparseCheckpoint, sparse_columns: float) -> int:
    """Size of a layout. A bitmap that keeps a smaller share than sparse_columns is laid out as column numbers."""

def sparse_layout_pack(layout: int, layout_bytes: int, checkpoint: SparseCheckpoint, sparse_columns: float) -> None: ...

# --- decode steps: csrc/decode_step ---------------------------------------------------------------------------------

class DenseOperand(LinearOperand):
    def __init__(self, weight: int, dtype: int, rows: int, columns: int) -> None:
        """weight: the address of [rows, columns], contiguous."""

class Norm:
    """kind "rms" or "layer". weight and bias are copied; without a weight it is ones, without a bias zeros. A weight that
    stands for 1 + w is given as 1 + w."""

    def __init__(self, kind: str, eps: float, weight: list[float] = ..., bias: list[float] = ...) -> None: ...

class KeyValueCache:
    """csrc/decode_step/attention_step.h; keys and values as addresses. Owned by the caller, who must keep them as long as this."""

    def __init__(self, **fields: Any) -> None: ...

class StepTokens:
    """csrc/decode_step/attention_step.h, and the dtype of x, y and residual. cos, sin and mask are addresses or 0, and may be left
    out like starts; mask_strides: of batch and query, in elements. The memory must outlive this."""

    def __init__(self, **fields: Any) -> None: ...

class AttentionStep:
    """csrc/decode_step/attention_step.h. Fields that have a default there may be left out.

    inputs, output: operands. input_bias: of all rows of the inputs, one after the other; output_bias, output_norm, multiplier.
    q_rows, k_rows, v_rows: (operand, first row, rows from one head to the next). rotary: "none", "halves", "interleaved".
    precision: 0 exact, 1 high, 2 fast; may be set later. Sizes that do not fit raise ValueError.
    """

    precision: int
    def __init__(self, **fields: Any) -> None: ...
    def __call__(self, x: int, y: int, tokens: StepTokens, cache: KeyValueCache, past: int, residual: int = 0) -> None:
        """x, y, residual: the addresses of [batch, queries, hidden], contiguous, of the dtype of `tokens`; y may be x or the
        residual, 0 is no residual. Writes keys and values at positions past..past + queries of the cache and attends
        over the cache up to there."""

class MlpStep:
    """csrc/decode_step/mlp_step.h; fields as of AttentionStep, gate_rows and up_rows with rows from one unit to the next. Without
    up_rows the activation ("silu", "gelu", "gelu_tanh", "relu" or "relu_squared") of the gate rows alone."""

    precision: int
    def __init__(self, **fields: Any) -> None: ...
    def __call__(self, x: int, y: int, tokens: StepTokens, residual: int = 0) -> None: ...

class RoutedExperts:
    """csrc/experts/routed_experts.h. Fields as there; gate_rows and up_rows (first, stride), up_rows None: no gate."""

    precision: int
    def __init__(self, **fields: Any) -> None: ...
    def __call__(self, x: int, y: int, dtype: int, tokens: int, choices: int, index: int, weights: int) -> None:
        """x, y: the addresses of [tokens, hidden] of dtype; index int64 and weights fp32 [tokens, choices]."""

class BlockRun:
    """Blocks one after the other: for each an attention step, an MLP step, both with their residuals, and whether the MLP reads
    what the attention made (else x, beside it)."""

    def __init__(self, blocks: list[tuple[AttentionStep, MlpStep, bool]]) -> None: ...
    def __call__(
        self,
        x: int,
        y: int,
        copies: int,
        tokens: StepTokens,
        caches: tuple[KeyValueCache, ...],
        pasts: tuple[int, ...],
        norm: Norm | None = None,
    ) -> None:
        """x: the address of [batch, queries, hidden]; y, copies: of [blocks, batch, queries, hidden], each block's output twice,
        copies 0: once. With a norm y has one place more, for that of the last output."""

class StateGuard:
    """Is the state of Python objects what it was? slots: (dict, key, value), Ellipsis where the key must be absent. empty:
    containers that must stay empty. tensors: (tensor, data_ptr, version or None)."""

    def __init__(
        self,
        slots: list[tuple[dict[str, Any], str, Any]],
        empty: list[Any],
        tensors: list[tuple[Any, int, int | None]],
    ) -> None: ...
    def holds(self) -> bool: ...

def same_bytes(a: int, b: int, bytes: int) -> bool: ...

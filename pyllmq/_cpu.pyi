"""CPU kernels. Tensors are passed as addresses (`tensor.data_ptr()`) and sizes; the caller checks shapes and dtypes.

All arrays are contiguous and row-major. dtype codes: 0 fp32, 1 bf16, 2 fp16. A layout is a uint8 buffer aligned to 64
bytes without pointers inside: it may be copied to another aligned place. Arguments that would make a kernel read or
write outside raise ValueError.
"""

def supported_isas() -> list[str]:
    """Instruction sets compiled in and usable on this machine, best first."""

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
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
def codebook_layout_bytes(
    rows: int, columns: int, column_bits: int, segment_rows: int, segments: int, outliers: int
) -> int:
    """Size of a layout. column_bits uint8 [columns], segment_rows int32 [segments]; outliers: how many in all."""

def codebook_layout_pack(
    layout: int,
    layout_bytes: int,
    rows: int,
    columns: int,
    column_bits: int,
    segment_rows: int,
    segments: int,
    codes: list[int],
    codebook: int,
    row_scale: int,
    outlier_row_offsets: int,
    outlier_columns: int,
    outlier_columns_bytes: int,
    outlier_values: int,
) -> None:
    """Checkpoint tensors -> layout.

    codes: the addresses of codes_b1..codes_b8 (uint8 [rows, ceil(columns_b*b/8)]), 0 where a width does not occur;
    codebook fp16 [segments, sum 2**column_bits]; row_scale fp16 [rows] or 0; outlier_row_offsets int32 [rows + 1] or 0;
    outlier_columns uint16 or int32 (outlier_columns_bytes 2 or 4), ascending within a row; outlier_values fp16.
    """

class LinearOperand:
    """A layout of any kind, bound once: its header was checked. The memory of the layout must outlive the object."""

    rows: int
    columns: int
    is_intact: bool
    """False once the memory holds another layout than the one that was bound; calls then raise ValueError."""

    def linear(self, x: int, x_dtype: int, tokens: int, bias: int, bias_dtype: int, y: int, precision: int) -> None:
        """y [tokens, rows] = x [tokens, columns] @ W.T + bias [rows]; y has x's dtype, bias 0 = none; precision 0 exact, 1 high,
        2 fast."""

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

def codebook_decode(
    rows: int,
    columns: int,
    column_bits: int,
    segment_rows: int,
    segments: int,
    codes: list[int],
    row_scale: int,
    codebook: int,
    weight: int,
) -> None:
    """weight fp32 [rows, columns] from the tensors of a checkpoint (as for codebook_layout_pack), but with the codebook
    [segments, sum 2**column_bits] and row_scale ([rows] or 0) in fp32."""

def codebook_gradient(
    rows: int,
    columns: int,
    column_bits: int,
    segment_rows: int,
    segments: int,
    codes: list[int],
    row_scale: int,
    weight_gradient: int,
    gradient: int,
) -> None:
    """gradient fp32 [segments, sum 2**column_bits]: row_scale * weight_gradient [rows, columns] summed for each entry."""

def softmax_cdist_l1(
    x: int,
    x_dtype: int,
    y: int,
    y_dtype: int,
    batch: int,
    x_rows: int,
    y_rows: int,
    columns: int,
    inverse_temperature: float,
    x_statistics: int,
    y_statistics: int,
    distances: int,
) -> None:
    """Logits x [batch, x_rows, columns] and y [batch, y_rows, columns] -> fp32 distances [batch, x_rows, y_rows], and for each
    row (largest logit, 1 / sum of exponentials) in fp32 statistics [batch, rows, 2]."""

def softmax_cdist_l1_backward(
    x: int,
    x_dtype: int,
    y: int,
    y_dtype: int,
    batch: int,
    x_rows: int,
    y_rows: int,
    columns: int,
    inverse_temperature: float,
    x_statistics: int,
    y_statistics: int,
    gradient: int,
    x_gradient: int,
) -> None:
    """fp32 gradient [batch, x_rows, y_rows] of the distances -> gradient of x, in its shape and dtype. For y: swap the sides."""

def kmeans_1d(
    values: int,
    weights: int,
    weights_stride: int,
    problems: int,
    n: int,
    ks: list[int],
    method: int,
    seed: int,
    half_centroids: bool,
    packed: bool,
    centroids: list[int],
    codes: list[int],
    errors: int,
) -> None:
    """values [problems, n]; `centroids` and `codes` hold one pointer per k or nothing, errors fp64 [problems, len(ks)] or 0."""

def fit_columns(
    columns: int,
    rows: int,
    descend: bool,
    method: int,
    block: int,
    coupling: int,
    coupling_stride: int,
    pivot: int,
    row_weights: int,
    row_scale: int,
    bits: int,
    kept: int,
    stored: int,
    codes: int,
    kept_mask: int,
    centroids: int,
    moves: int,
) -> float:
    """Sweep (descend = False) or descent over the columns of a block; see csrc/fit_columns/cpu/fit_columns.h. Returns the
    decrease."""

def sinkhorn(
    inputs: list[int],
    strides: list[int],
    problems: int,
    n: int,
    m: int,
    iterations: int,
    tolerance: float,
    rho_a: float,
    rho_b: float,
    plan: int,
    u: int,
    v: int,
    tape: int,
    count: int,
) -> None:
    """inputs: the addresses of cost [problems, n, m], a, b and epsilon, all fp32. strides: of cost, a and b between problems,
    n m, n and m, or 0 where all share one. Out: plan, u, v, tape [problems, iterations, n + m] (or 0), count int32 [problems],
    see csrc/sinkhorn/cpu/sinkhorn.h.
    """

def sinkhorn_backward(
    inputs: list[int],
    strides: list[int],
    problems: int,
    n: int,
    m: int,
    iterations: int,
    rho_a: float,
    rho_b: float,
    tape: int,
    count: int,
    grad_plan: int,
    grad_u: int,
    grad_v: int,
    grad_cost: int,
    grad_a: int,
    grad_b: int,
) -> None:
    """iterations: of the tape, or without one (tape 0) at least the largest count. grad_cost is per problem."""

class DoublyStochastic:
    """logits: the address of [problems, n, m] in fp32, n m at most 64. shift: 0 none, 1 line, 2 matrix."""

    def __init__(
        self,
        logits: int,
        problems: int,
        n: int,
        m: int,
        iterations: int,
        columns_first: bool,
        softmax_start: bool,
        shift: int,
        matrix_epsilon: float,
        division_epsilon: float,
    ) -> None: ...

def doubly_stochastic(call: DoublyStochastic, out: int) -> None: ...
def doubly_stochastic_backward(call: DoublyStochastic, gradient: int, logits_gradient: int) -> None: ...

class SparseCheckpoint:
    """The tensors of a sparse format as they stand in a checkpoint (docs/formats.md), by name, as addresses.

    kind: "bitmap", "sparse24" or "sparse24_codebook"; value_type: 0 fp32, 1 bf16, 2 fp16, 3 int8; kept: how many values
    are stored; bits and outliers: of codes; column_bytes: 2 or 4, of a column number, 0 where there is none.
    """

    def __init__(
        self,
        kind: str,
        value_type: int,
        rows: int,
        columns: int,
        kept: int,
        bits: int,
        outliers: int,
        column_bytes: int,
        tensors: dict[str, int],
    ) -> None: ...

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
    """keys [batch, kv_heads, capacity, head_size] and values [batch, kv_heads, capacity, value_size] of one dtype, as addresses;
    strides of batch, head and position in elements, elements of a head side by side. Owned by the caller, who must keep
    them as long as this."""

    def __init__(
        self,
        *,
        keys: int,
        values: int,
        dtype: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_size: int,
        value_size: int,
        key_strides: tuple[int, int, int],
        value_strides: tuple[int, int, int],
    ) -> None: ...

class StepTokens:
    """The tokens of one call, the same for all blocks: [batch, queries] of them.

    dtype: of x, y and residual. cos, sin: the addresses of fp32 [batch * queries, rotary_size / 2], one number for each
    rotated pair, or 0. starts: for each sequence the first key that is no padding; empty: 0. mask: 0, or the address of fp32
    [batch, queries, past + queries] with mask_strides of batch and query in elements, added to the scores; it alone then
    says which key a query sees: window, causality and starts of the step do not apply. -inf hides a key; a query that sees
    no key gets 0. The memory must outlive this.
    """

    def __init__(
        self,
        *,
        batch: int,
        queries: int,
        dtype: int,
        cos: int = 0,
        sin: int = 0,
        starts: list[int] = ...,
        mask: int = 0,
        mask_strides: tuple[int, int] = ...,
    ) -> None: ...

class AttentionStep:
    """y = residual + multiplier * output_norm(attention(norm(x)) W_out^T + output_bias); csrc/decode_step/attention_step.h.

    inputs: Linears of one input with rows for q, k and v; input_bias of all their rows, one after the other. q_rows, k_rows,
    v_rows: (operand, first row, rows from one head to the next). q_norm, k_norm, v_norm: over each head (weight of one
    head, or of all heads), or with norms_span_heads over all heads of a token. rotary: "none", "halves", "interleaved".
    scale: of q k^T; a factor of q behind its Linear goes in here, too. window: keys that a query sees, its own included;
    0: all. sinks: for each head the logit of a key without value. precision: 0 exact, 1 high, 2 fast; may be set later.
    Sizes that do not fit raise ValueError.
    """

    precision: int
    def __init__(
        self,
        *,
        inputs: tuple[LinearOperand, ...],
        q_rows: tuple[int, int, int],
        k_rows: tuple[int, int, int],
        v_rows: tuple[int, int, int],
        heads: int,
        kv_heads: int,
        head_size: int,
        value_size: int,
        scale: float,
        output: LinearOperand,
        norm: Norm | None = None,
        input_bias: list[float] = ...,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        v_norm: Norm | None = None,
        norms_span_heads: bool = False,
        norms_after_rotary: bool = False,
        rotary: str = "none",
        rotary_size: int = 0,
        soft_cap: float = 0.0,
        window: int = 0,
        causal: bool = True,
        sinks: list[float] = ...,
        output_bias: list[float] = ...,
        output_norm: Norm | None = None,
        multiplier: float = 1.0,
        precision: int = 1,
    ) -> None: ...
    def __call__(self, x: int, y: int, tokens: StepTokens, cache: KeyValueCache, past: int, residual: int = 0) -> None:
        """x, y, residual: the addresses of [batch, queries, hidden], contiguous, of the dtype of `tokens`; y may be x or the
        residual, 0 is no residual. Writes keys and values at positions past..past + queries of the cache and attends
        over the cache up to there."""

class MlpStep:
    """y = residual + multiplier * output_norm((activation(gate) * up) W_down^T + output_bias), gate and up of norm(x).

    inputs, input_bias, output_...: as for AttentionStep. gate_rows, up_rows: (operand, first row, rows from one unit to the
    next); without up_rows the activation of the gate rows alone. activation: "silu", "gelu", "gelu_tanh", "relu" or
    "relu_squared". units: the width between the Linears.
    """

    precision: int
    def __init__(
        self,
        *,
        inputs: tuple[LinearOperand, ...],
        units: int,
        gate_rows: tuple[int, int, int],
        activation: str,
        output: LinearOperand,
        up_rows: tuple[int, int, int] | None = None,
        norm: Norm | None = None,
        input_bias: list[float] = ...,
        output_bias: list[float] = ...,
        output_norm: Norm | None = None,
        multiplier: float = 1.0,
        precision: int = 1,
    ) -> None: ...
    def __call__(self, x: int, y: int, tokens: StepTokens, residual: int = 0) -> None: ...

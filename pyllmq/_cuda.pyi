def runtime_version() -> int: ...
def device_problem() -> str: ...
def codebook_layout_bytes(
    rows: int, columns: int, column_bits: int, segment_rows: int, segments: int, outliers: int, row_scale: bool
) -> int: ...
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
) -> None: ...
def codebook_layout_shape(layout: int, layout_bytes: int) -> tuple[int, int]: ...
def codebook_layout_codes(layout: int, layout_bytes: int, codes_out: int) -> None: ...
def codebook_linear_workspace(rows: int, columns: int, tokens: int, dtype: int) -> tuple[int, int]: ...
def codebook_linear(
    layout: int,
    layout_bytes: int,
    rows: int,
    columns: int,
    x: int,
    dtype: int,
    tokens: int,
    bias: int,
    bias_dtype: int,
    y: int,
    partials: int,
    counters: int,
    stream: int,
) -> None: ...
def linear_tables_fit() -> bool: ...
def codebook_linear_tables_workspace(rows: int, columns: int) -> tuple[int, int]: ...
def codebook_linear_tables(
    layout: int,
    layout_bytes: int,
    rows: int,
    columns: int,
    x: int,
    dtype: int,
    bias: int,
    bias_dtype: int,
    y: int,
    partials: int,
    counters: int,
    stream: int,
) -> None: ...
def codebook_dequantize(
    layout: int, layout_bytes: int, rows: int, columns: int, weight: int, dtype: int, stream: int
) -> None: ...
def pack_codes(codes: int, packed: int, rows: int, columns: int, bits: int, stream: int) -> None: ...
def unpack_codes(packed: int, codes: int, rows: int, columns: int, bits: int, stream: int) -> None: ...

class GradientCall:
    """Addresses and sizes of a checkpoint's tensors and of dL/dW; `codes` and `code_bytes` of a row for the widths 1 to 8."""

    def __init__(
        self,
        rows: int,
        columns: int,
        segments: int,
        entries: int,
        segment_starts: int,
        sorted_columns: int,
        width_starts: int,
        first_entry: int,
        codes: list[int],
        code_bytes: list[int],
        row_scale: int,
        row_scale_dtype: int,
        weight_gradient: int,
    ) -> None: ...

def codebook_gradient_workspace(call: GradientCall) -> int: ...
def codebook_gradient(call: GradientCall, gradient: int, workspace: int, stream: int) -> None: ...

class CdistCall:
    """Addresses and sizes of two sides' logits; dtypes 0 fp32, 1 bf16, 2 fp16; statistics fp32 [batch, rows, 2]."""

    def __init__(
        self,
        x: int,
        x_dtype: int,
        y: int,
        y_dtype: int,
        batch: int,
        x_rows: int,
        y_rows: int,
        columns: int,
        scale: float,
        x_statistics: int,
        y_statistics: int,
    ) -> None: ...

def softmax_cdist_l1_workspace(call: CdistCall) -> int: ...
def softmax_cdist_l1_backward_workspace(call: CdistCall) -> int: ...
def softmax_cdist_l1(call: CdistCall, distances: int, workspace: int, stream: int) -> None: ...
def softmax_cdist_l1_backward(call: CdistCall, gradient: int, x_gradient: int, workspace: int, stream: int) -> None: ...

class SinkhornCall:
    """Addresses of cost, a, b, epsilon in fp32, how far their problems lie apart (0: one for all), and what they mean."""

    def __init__(
        self, inputs: list[int], strides: list[int], problems: int, n: int, m: int, rho_a: float, rho_b: float
    ) -> None: ...

def sinkhorn_fits(n: int, m: int) -> bool: ...
def sinkhorn_room(call: SinkhornCall, backward_iterations: int) -> tuple[int, int]: ...
def sinkhorn(
    call: SinkhornCall,
    iterations: int,
    tolerance: float,
    plan: int,
    u: int,
    v: int,
    tape: int,
    count: int,
    workspace: int,
    counters: int,
    stream: int,
) -> None: ...
def sinkhorn_backward(
    call: SinkhornCall,
    iterations: int,
    tape: int,
    count: int,
    grad_plan: int,
    grad_u: int,
    grad_v: int,
    grad_cost: int,
    grad_a: int,
    grad_b: int,
    workspace: int,
    counters: int,
    stream: int,
) -> None: ...

class SparseCheckpoint:
    """As `_cpu.SparseCheckpoint`."""

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

class SparseOperand:
    """kind: "bitmap", "columns", "sparse24" or "sparse24_codebook"; values: 0 fp32, 1 bf16, 2 fp16, 3 int8."""

    def __init__(self, kind: str, values: int, bits: int, stage_bytes: int) -> None: ...

sparse_header_bytes: int

def sparse_layout_bytes(checkpoint: SparseCheckpoint, sparse_columns: float) -> int: ...
def sparse_layout_pack(layout: int, layout_bytes: int, checkpoint: SparseCheckpoint, sparse_columns: float) -> None: ...
def sparse_layout_unpack(layout: int, layout_bytes: int, checkpoint: SparseCheckpoint) -> None: ...
def sparse_layout_describe(
    header: int, layout_bytes: int, rows: int, columns: int
) -> tuple[str, int, int, int, int]: ...
def sparse_linear_workspace(
    operand: SparseOperand, rows: int, columns: int, tokens: int, dtype: int
) -> tuple[int, int]: ...
def sparse_linear(
    operand: SparseOperand,
    layout: int,
    layout_bytes: int,
    rows: int,
    columns: int,
    x: int,
    dtype: int,
    tokens: int,
    bias: int,
    bias_dtype: int,
    y: int,
    partials: int,
    counters: int,
    stream: int,
) -> None: ...
def sparse_dequantize(
    operand: SparseOperand,
    layout: int,
    layout_bytes: int,
    rows: int,
    columns: int,
    weight: int,
    dtype: int,
    stream: int,
) -> None: ...
def kmeans_1d_layers(
    sums: int, masses: int, gains: int, best: int, problems: int, n: int, k_max: int, stream: int
) -> None:
    """fp64 prefix sums [problems, n + 1] -> int32 best splits [problems, k_max + 1, n + 1]; gains: fp64 [problems, 2, n + 1]."""

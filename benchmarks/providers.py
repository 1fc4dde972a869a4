"""Who competes: ways to hold a weight [N, K] and multiply with it, ours and the rivals, each a row of a table.

A provider makes a `Layer` from a dense weight. The layer says which dense matrix it really multiplies with, after
rounding to its format, and its result is checked against the fp64 product with that matrix before anything is timed. So
the error printed is that of the kernel and its activations; what a format loses is a matter of the compression method.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllmq import backends, dispatch, layouts, operations, ops
from pyllmq.formats.codebook import CodebookWeight

Available = tuple[bool, str]

BASELINE = "torch fp32"
CHECKED_TOKENS = 16
MAX_WEIGHT_ERROR = 0.75
"""Relative error of a layer's own matrix against the weight given. 1-bit columns are at 0.6; a transposed or permuted
weight is at 1.4, zeros are at 1.0."""


@dataclass(frozen=True)
class Layer:
    """A weight in a provider's format, ready to run."""

    run: Callable[[Tensor], Tensor]
    """x [M, K] in `dtype` -> [M, N]."""
    dense: Callable[[], Tensor]
    """The matrix [N, K] that `run` multiplies with."""
    copy: Callable[[], Layer]
    """The same layer in memory of its own."""
    nbytes: int
    """Bytes stored for the weight."""
    dtype: torch.dtype
    kernel: Callable[[int], str]
    """Number of tokens -> name of what runs."""


@dataclass(frozen=True)
class Provider:
    """One row. `tolerance` bounds the relative error of its result against fp64; `isa` is what it says it runs on."""

    name: str
    available: Callable[[], Available]
    make: Callable[[Tensor], Layer]
    tolerance: float
    isa: Callable[[], str]
    precision: str = ""
    """What our arithmetic may cost in accuracy; empty for rivals, which have no choice."""
    most_lost: float = MAX_WEIGHT_ERROR
    """Relative error of the layer's own matrix that is taken as rounding (or, where it is 1, pruning), not as a mistake."""


class WrongResultError(RuntimeError):
    """A provider's result does not match fp64; it is not timed."""


def dense_weight(n: int, k: int, seed: int = 0) -> Tensor:
    """float32 [n, k]: normal, columns of different spread, as in trained layers."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.02 * (0.5 + torch.rand(k, generator=generator))
    return torch.randn(n, k, generator=generator) * spread


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """[m, k], normal."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(provider: Provider, layer: Layer, weight: Tensor, x: Tensor) -> float:
    """Relative error (Frobenius norm) of `layer` against fp64 over up to 16 tokens spread over x [M, K].

    Raises WrongResultError if that is more than the provider's tolerance, if the shape is wrong, or if the layer stands
    for another matrix than `weight`.
    """
    dense = layer.dense().float()
    lost = float((dense - weight).norm() / weight.norm()) if dense.shape == weight.shape else float("inf")
    if not lost <= provider.most_lost:
        raise WrongResultError(
            f"{provider.name} holds a matrix {tuple(dense.shape)} that differs by {lost:.2g} from the weight "
            f"{tuple(weight.shape)} it was given; allowed: {provider.most_lost}. It is not timed: repair its make()"
        )
    y = layer.run(x)
    expected_shape = (x.shape[0], weight.shape[0])
    if tuple(y.shape) != expected_shape:
        raise WrongResultError(f"{provider.name} returned {tuple(y.shape)}, expected {expected_shape}. It is not timed")
    tokens = torch.linspace(0, x.shape[0] - 1, min(CHECKED_TOKENS, x.shape[0])).long()
    exact = x[tokens].double() @ dense.double().T
    error = float((y[tokens].double() - exact).norm() / exact.norm())
    if not error <= provider.tolerance:
        raise WrongResultError(
            f"{provider.name} is wrong for x {list(x.shape)}, weight {list(weight.shape)}: "
            f"relative error {error:.2g} against fp64, allowed {provider.tolerance:.2g}. "
            "It is not timed: repair it, or leave it out of the run"
        )
    return error


# ---- torch ----------------------------------------------------------------------------------------------------------


def _always() -> Available:
    return True, "part of torch"


def _torch_isa() -> str:
    return torch.backends.cpu.get_cpu_capability()


def torch_dense(name: str, dtype: torch.dtype, tolerance: float) -> Provider:
    def make(weight: Tensor) -> Layer:
        held = weight.to(dtype, copy=True)
        return Layer(
            lambda x: F.linear(x, held), lambda: held, lambda: make(held), held.nbytes, dtype, lambda m: "F.linear"
        )

    return Provider(name, _always, make, tolerance, _torch_isa)


def _int8_available() -> Available:
    engines = [e for e in torch.backends.quantized.supported_engines if e in ("x86", "fbgemm", "onednn")]
    if not engines or not hasattr(torch.ops.quantized, "linear_prepack"):
        return False, f"torch {torch.__version__} has no x86, fbgemm or onednn quantized engine here"
    return True, f"torch quantized engine {torch.backends.quantized.engine}"


def _int8_layer(quantized: Tensor) -> Layer:
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    # reduce_range=True is what torch.ao.nn.quantized.dynamic.Linear passes: 7-bit activations.
    return Layer(
        lambda x: torch.ops.quantized.linear_dynamic(x, packed, True),
        quantized.dequantize,
        lambda: _int8_layer(quantized),
        quantized.numel() + 4 * quantized.shape[0],
        torch.float32,
        lambda m: "quantized::linear_dynamic",
    )


def _make_int8(weight: Tensor) -> Layer:
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-12).double()
    with warnings.catch_warnings():  # torch announces that quantized tensors move to torchao
        warnings.simplefilter("ignore")
        zero_point = torch.zeros(len(scale), dtype=torch.long)
        return _int8_layer(torch.quantize_per_channel(weight, scale, zero_point, 0, torch.qint8))


INT4_GROUP = 128


def _int4_available() -> Available:
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return False, f"torch {torch.__version__} has no aten::_weight_int4pack_mm_for_cpu"
    try:
        _make_int4(torch.ones(64, INT4_GROUP)).run(torch.ones(1, INT4_GROUP, dtype=torch.bfloat16))
    except RuntimeError as error:
        return False, f"aten::_weight_int4pack_mm_for_cpu does not run here: {error}"
    return True, "part of torch"


def _make_int4(weight: Tensor) -> Layer:
    n, k = weight.shape
    if k % INT4_GROUP or n % 16:
        raise ValueError(f"takes N in multiples of 16 and K in multiples of {INT4_GROUP}, given [{n}, {k}]")
    groups = weight.view(n, k // INT4_GROUP, INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-12).bfloat16().float()
    middle = (low + 8 * scale).bfloat16().float()
    codes = ((groups - middle) / scale + 8).round().clamp(0, 15)
    dense = ((codes - 8) * scale + middle).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).int(), 2)
    scale_and_middle = torch.cat([scale, middle], -1).transpose(0, 1).contiguous().bfloat16()
    return _int4_layer(packed, scale_and_middle, dense)


def _int4_layer(packed: Tensor, scale_and_middle: Tensor, dense: Tensor) -> Layer:
    return Layer(
        lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, INT4_GROUP, scale_and_middle),
        lambda: dense,
        lambda: _int4_layer(packed.clone(), scale_and_middle.clone(), dense),
        packed.nbytes + scale_and_middle.nbytes,
        torch.bfloat16,
        lambda m: "aten::_weight_int4pack_mm_for_cpu",
    )


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def _nf4_available() -> Available:
    if find_spec("bitsandbytes") is None:
        return False, "bitsandbytes is not installed (pip install bitsandbytes)"
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # importing it loads shared libraries and may fail in many ways
        return False, f"bitsandbytes could not be imported: {error}"
    return True, f"bitsandbytes {version('bitsandbytes')}"


def _make_nf4(weight: Tensor) -> Layer:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return _nf4_layer(packed, state, functional.dequantize_4bit(packed, state))


def _nf4_layer(packed: Tensor, state: Any, dense: Tensor) -> Layer:
    from bitsandbytes import matmul_4bit

    return Layer(
        lambda x: matmul_4bit(x, packed.t(), quant_state=state),
        lambda: dense,
        lambda: _nf4_layer(packed.clone(), state, dense),
        packed.nbytes + state.absmax.nbytes,
        torch.float32,
        lambda m: f"bitsandbytes {version('bitsandbytes')} matmul_4bit",
    )


RIVALS = (
    torch_dense(BASELINE, torch.float32, 1e-5),
    torch_dense("torch bf16", torch.bfloat16, 1e-2),
    Provider("torch int8 dynamic", _int8_available, _make_int8, 5e-2, _torch_isa),
    Provider("torch int4 g128", _int4_available, _make_int4, 1e-2, _torch_isa),
    Provider("bitsandbytes nf4", _nf4_available, _make_nf4, 1e-2, _torch_isa),
)
"""Relative errors seen at K = 4096: fp32 5e-7, bf16 2e-3, int8 2e-2 (7-bit activations), int4 2e-3 (bf16 output)."""


# ---- pyllmq ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widths:
    """Bits per column and the share of outliers, as written on the command line: "3", "2.1", "2.1+0.005"."""

    base: int
    wide: int
    wide_share: float
    outliers: float

    @classmethod
    def parse(cls, text: str | int | float) -> Widths:
        """A base width plus a share of wider columns, as CLAQ mixes them (arXiv 2405.17233, Adaptive Precision).

        "2.1" is 5 % of the columns at 4 bits and the others at 2; from 3 bits on the wider columns have one bit more:
        "3.1" is 10 % at 4 bits. "+0.005" keeps that share of the weights in fp16. Raises ValueError for anything else.
        """
        bits_text, plus, outliers_text = str(text).partition("+")
        try:
            bits = float(bits_text)
            outliers = float(outliers_text) if plus else 0.0
        except ValueError:
            bits = outliers = float("nan")
        if not (1 <= bits <= 8 and 0 <= outliers <= 0.1):
            raise ValueError(
                f"bits {str(text)!r} is not understood; allowed: 1 to 8, a mix such as 2.1, "
                "and a share of outliers from 0 to 0.1 behind a plus, such as 2.1+0.005"
            )
        base = int(bits)
        wide = 4 if base == 2 else min(base + 1, 8)
        return cls(base, wide, round((bits - base) / max(wide - base, 1), 6), outliers)

    def column_bits(self, k: int, seed: int = 2) -> Tensor:
        """uint8 [k]; the wider columns lie anywhere, as they do when a method picks them by importance."""
        bits = torch.full((k,), self.base, dtype=torch.uint8)
        chosen = torch.randperm(k, generator=torch.Generator().manual_seed(seed))[: round(k * self.wide_share)]
        bits[chosen] = self.wide
        return bits


def pack_normal(weight: Tensor, widths: Widths) -> CodebookWeight:
    """Pack `weight` [N, K], normal in each column, to the nearest of 2**bits normal quantiles per column.

    No k-means is needed: a kernel's time depends on widths and sizes, not on the values in the codebooks.
    """
    n, k = weight.shape
    column_bits = widths.column_bits(k).to(weight.device)
    spread = weight.square().mean(0).sqrt()
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    codebook: list[Tensor] = [torch.empty(0)] * k
    for bits in column_bits.unique().tolist():
        levels = torch.special.ndtri((torch.arange(1 << bits, device=weight.device) + 0.5) / (1 << bits))
        members = torch.nonzero(column_bits == bits).flatten()
        middles = (levels[1:] + levels[:-1]) / 2
        codes[:, members] = torch.bucketize(weight[:, members] / spread[members], middles).to(torch.uint8)
        for column in members.tolist():
            codebook[column] = levels * spread[column]
    mask = None
    if widths.outliers:
        mask = torch.rand(n, k, generator=torch.Generator().manual_seed(3)) < widths.outliers
    return CodebookWeight.pack(
        codes, torch.cat(codebook), column_bits, outlier_mask=mask, outlier_weight=None if mask is None else weight
    )


def pyllmq_codebook(
    bits: str | int | float, dtype: torch.dtype = torch.float32, precision: str = operations.DEFAULT_PRECISION
) -> Provider:
    """Our packed layer at `bits` (see `Widths.parse`), activations in float32 or bfloat16.

    Named "pyllmq BITS", then the precision if it is not the default, then "bf16" for those activations.
    """
    if dtype not in _PYLLMQ_SUFFIX:
        raise ValueError(f"activations in {dtype} are not measured; allowed: {', '.join(map(str, _PYLLMQ_SUFFIX))}")
    operations.check_precision(precision)
    widths = Widths.parse(bits)
    suffix, rounding = _PYLLMQ_SUFFIX[dtype]
    chosen = "" if precision == operations.DEFAULT_PRECISION else f" {precision}"

    def make(weight: Tensor) -> Layer:
        packed = pack_normal(weight, widths)
        dense = partial(packed.dequantize, torch.float32)
        return _codebook_layer(packed.operand(), packed.nbytes, dtype, precision, dense)

    tolerance = _PERMITTED[precision] + rounding
    return Provider(f"pyllmq {bits}{chosen}{suffix}", _pyllmq_available, make, tolerance, _pyllmq_isa, precision)


_PYLLMQ_SUFFIX = {torch.float32: ("", 1e-5), torch.bfloat16: (" bf16", 1e-2)}
"""Activations -> end of the provider's name, tolerance for the dtype's own rounding."""

_PERMITTED = {"exact": 0.0, "high": 2e-4, "fast": 2e-2}
"""Precision -> relative error that it permits beyond that (operations.PRECISIONS)."""


def copy_of_layout(operand: layouts.WeightOperand) -> layouts.WeightOperand:
    """The same weight in memory of its own, laid out for the CPU."""
    (blob,) = operand.tensors
    return replace(operand, tensors=(backends.cpu.runtime.empty_layout(blob.numel()).copy_(blob),), bound=None)


def linear_path(operand: layouts.WeightOperand, dtype: torch.dtype, tokens: int, precision: str) -> str:
    """What the CPU does for this many tokens: "tables" of partial products, or "decode" once and multiply."""
    runtime = backends.cpu.runtime
    return runtime.bound(operand).path(runtime.DTYPE_CODE[dtype], tokens, runtime.PRECISION_CODE[precision])


def _codebook_layer(
    operand: layouts.WeightOperand, nbytes: int, dtype: torch.dtype, precision: str, dense: Callable[[], Tensor]
) -> Layer:
    def copy() -> Layer:
        if operand.layout == "cpu.codebook":
            moved = copy_of_layout(operand)
        else:
            moved = replace(operand, tensors=tuple(tensor.clone() for tensor in operand.tensors), bound=None)
        return _codebook_layer(moved, nbytes, dtype, precision, dense)

    def kernel(m: int) -> str:
        name = dispatch.choose(operations.WeightProblem("packed_linear", "cpu", dtype, operand.layout, m)).name
        if operand.layout != "cpu.codebook":
            return name
        return f"{name} ({linear_path(operand, dtype, m, precision)})"

    return Layer(lambda x: ops.codebook_linear(x, operand, None, precision), dense, copy, nbytes, dtype, kernel)


def _pyllmq_available() -> Available:
    if dispatch.forced_backend():
        return True, f"back end {dispatch.forced_backend()!r} was asked for"
    return backends.cpu.available()


def _pyllmq_isa() -> str:
    if dispatch.forced_backend() == "reference":
        return _torch_isa()
    from pyllmq import _cpu

    return _cpu.isa()

"""What the kernels are measured against: short enough to believe, in fp64, with nothing of pyllmq's arithmetic in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyllmq import CodebookWeight, _cpu, formats
from pyllmq.structure import format_of

CODEBOOK_SIZE = 0.05
"""Root mean square of what random_case draws for codebooks."""


@dataclass
class Case:
    """A random packed weight together with the parts that it was made from."""

    weight: CodebookWeight
    codes: Tensor
    column_bits: Tensor
    dense: Tensor  # fp64 [N, K], decoded by this file


def random_case(
    n: int,
    k: int,
    widths: tuple[int, ...] = (2,),
    *,
    segments: int = 1,
    outliers: float = 0.0,
    row_scale: bool = False,
) -> Case:
    column_bits = torch.tensor([widths[i] for i in torch.randint(len(widths), (k,))])
    codes = torch.stack([torch.randint(0, 2 ** int(b), (n,)) for b in column_bits], 1).to(torch.uint8)
    codebook = torch.randn(segments, int((2**column_bits).sum())) * CODEBOOK_SIZE
    segment_rows = torch.full((segments,), n // segments)
    segment_rows[-1] += n - int(segment_rows.sum())
    mask = torch.rand(n, k) < outliers
    values = torch.randn(n, k)
    scale = torch.rand(n) + 0.5 if row_scale else None
    weight = CodebookWeight.pack(
        codes,
        codebook,
        column_bits,
        segment_rows=segment_rows,
        outlier_mask=mask,
        outlier_weight=values,
        row_scale=scale,
    )
    dense = decode(codes, codebook.half().double(), column_bits, segment_rows)
    if scale is not None:
        dense *= scale.half().double()[:, None]
    dense[mask] = values[mask].half().double()
    return Case(weight, codes, column_bits, dense)


def vector_isas() -> list[str]:
    """This machine's instruction sets, but those that differ from another one in products of decoded codes alone."""
    return [isa for isa in _cpu.supported_isas() if isa != "avx_vnni"]


def decode(codes: Tensor, codebook: Tensor, column_bits: Tensor, segment_rows: Tensor) -> Tensor:
    """W[r, k] = codebook[segment of r][start of k + code], one column at a time."""
    n, k = codes.shape
    dense = torch.empty(n, k, dtype=torch.float64)
    row = 0
    for segment, rows in enumerate(segment_rows.tolist()):
        start = 0
        for column in range(k):
            entries = 2 ** int(column_bits[column])
            book = codebook[segment, start : start + entries]
            dense[row : row + rows, column] = book[codes[row : row + rows, column].long()]
            start += entries
        row += rows
    return dense


def assert_as_good_as_torch(
    actual: Tensor, exact: Tensor, *torchs: Tensor, factor: float = 2.0, roundings: float = 1.0
) -> None:
    """The largest error against fp64 is at most `factor` times that of plain torch in the same dtype.

    With few outputs torch's error is luck, so the caller may give its results for several orders of summation. Where torch
    happens to be exact (K = 1), one rounding of the largest output in that dtype is allowed, or as many as `roundings` says.
    """
    assert actual.dtype == torchs[0].dtype and actual.shape == exact.shape
    assert bool(torch.isfinite(actual).all())
    if exact.numel() == 0:
        return
    ours = float((actual.double() - exact).abs().max())
    theirs = max(float((result.double() - exact).abs().max()) for result in torchs)
    one_rounding = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    assert ours <= max(factor * theirs, roundings * one_rounding), (
        f"error {ours:.3e}, torch's own {theirs:.3e}, one rounding {one_rounding:.3e}"
    )


def linear_and_size(dense: Tensor, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x times `dense`, with a bias, in fp64; and the same of magnitudes alone, by which errors of sums are judged."""
    exact, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    return (exact, size) if bias is None else (exact + bias.double(), size + bias.double().abs())


def assert_linear_as_good_as_torch(
    dense: Tensor, x: Tensor, y: Tensor, bias: Tensor | None = None, factor: float = 2.0
) -> None:
    """y is x times `dense` as well as torch computes it in x's dtype, in any order of the columns."""
    exact, _ = linear_and_size(dense, x, bias)
    rounded, of_bias = dense.to(x.dtype), None if bias is None else bias.to(x.dtype)
    orders = [torch.randperm(x.shape[1]) for _ in range(4 if exact.numel() >= 4096 else 16)]
    torchs = [torch.nn.functional.linear(x[:, order], rounded[:, order], of_bias) for order in orders]
    assert_as_good_as_torch(y, exact, *torchs, factor=factor, roundings=1.0 if x.shape[1] > 8 else 2.0)


def assert_within(permitted: float, case: Case, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """The norm of y's error is at most `permitted` of what products of this size sum to, beside twice that of torch."""
    assert y.dtype == x.dtype and y.shape == (len(x), len(case.dense))
    dense = case.dense.to(x.device)
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    of_torch = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    of_codebook = 1.5 * CODEBOOK_SIZE  # a row scale is at most 1.5
    size = of_codebook * float(x.double().norm()) * len(dense) ** 0.5
    allowed = permitted * size + 2 * float((of_torch.double() - exact).norm())
    allowed += torch.finfo(x.dtype).eps * float(exact.norm())  # where torch's rounding is luck
    error = float((y.double() - exact).norm())
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def built_in_kinds() -> list[str]:
    """The formats of the package that kernels read: tests register others, for the whole process; composites have no kernel."""
    known = {kind: format_of(kind) for kind in formats.kinds()}
    return [kind for kind, f in known.items() if f.weight is not None and f.layer.__module__.startswith("pyllmq.")]

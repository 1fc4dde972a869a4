"""The decode path of the CPU back end for high and fast: errors, what falls back to fp32, and tokens beside others."""

import pytest
import torch

from pyllmq import _cpu

from .test_cpu_layout import WIDTHS, Weight, isa, keep_threads, max_error, one_torch_thread

pytestmark = pytest.mark.kernels
__all__ = ["isa", "keep_threads", "one_torch_thread"]  # fixtures

both_precisions = pytest.mark.parametrize("precision", ["high", "fast"])


def relative_error(weight, x, precision, bias=None):
    exact = torch.nn.functional.linear(x.double(), weight.dense, None if bias is None else bias.double())
    ours = weight.linear(x, bias, path="decode", precision=precision).double()
    return (torch.linalg.norm(ours - exact) / torch.linalg.norm(exact)).item()


@both_precisions
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 17, 33])
def test_error_is_below_the_precision_s_word(widths, precision, tokens):
    for seed, (rows, columns) in enumerate([(32, 64), (100, 257), (64, 600), (70, 1200)]):
        weight = Weight(rows, columns, widths, segments=2, outlier_fraction=0.01, row_scale=True, seed=seed)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
        assert relative_error(weight, x, precision, torch.randn(rows)) <= max_error(precision, "decode")
        x[:, columns // 2] = 1e4  # the same for all tokens: its rounding errors do not average out
        assert relative_error(weight, x, precision) <= max_error(precision, "decode")


@both_precisions
def test_what_takes_the_exact_path(precision, isa):
    """Scalar code always, and NEON where it multiplies no bytes."""
    weight = Weight(64, 300, [2, 3, 4, 6])
    x = torch.randn(9, 300)
    coarse, exact = (weight.linear(x, path="decode", precision=p) for p in (precision, "exact"))
    in_fp32 = isa in ("scalar", "neon") or (isa.startswith("neon") and precision == "high")
    assert torch.equal(coarse, exact) == in_fp32


@both_precisions
@pytest.mark.parametrize("rows, columns", [(31, 300), (300, 63), (1, 1)])
def test_few_rows_or_columns_are_exact(precision, rows, columns):
    weight = Weight(rows, columns, [4])
    x = torch.randn(5, columns)
    assert torch.equal(
        weight.linear(x, path="decode", precision=precision), weight.linear(x, path="decode", precision="exact")
    )


@both_precisions
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e35, 1e-35], ids=str)
def test_x_out_of_range_is_exact(precision, bad):
    weight = Weight(64, 300, [2, 5], outlier_fraction=0.01)
    x = torch.randn(20, 300)
    x[7] = bad
    coarse, exact = (weight.linear(x, path="decode", precision=p) for p in (precision, "exact"))
    assert torch.equal(coarse[:7], exact[:7]) and torch.equal(coarse[8:], exact[8:])
    assert torch.equal(coarse[7].nan_to_num(), exact[7].nan_to_num())


@both_precisions
def test_zeros_and_zero_columns(precision):
    weight = Weight(64, 300, [3])
    x = torch.randn(5, 300)
    x[2] = 0
    y = weight.linear(x, path="decode", precision=precision)
    assert torch.all(y[2] == 0) and relative_error(weight, x, precision) <= max_error(precision, "decode")
    weight.codebook.zero_()
    weight.layout = weight.pack()
    assert torch.all(weight.linear(x, path="decode", precision=precision) == 0)


@both_precisions
def test_infinite_codebook_and_zero_row_scale_with_outliers(precision):
    weight = Weight(64, 300, [3], outlier_fraction=0.05, row_scale=True)
    weight.row_scale[5] = 0
    weight.dense[5] = 0
    begin, end = weight.outlier_offsets[5:7].tolist()
    weight.dense[5, weight.outlier_columns[begin:end].long()] = weight.outlier_values[begin:end].double()
    weight.layout = weight.pack()
    assert relative_error(weight, torch.randn(9, 300), precision) <= max_error(precision, "decode")
    weight.codebook.fill_(float("inf"))
    weight.layout = weight.pack()
    assert not weight.linear(torch.randn(2, 300), path="decode", precision=precision)[:, :5].isfinite().any()


@both_precisions
@pytest.mark.parametrize("widths", [[4], [1, 3, 6], [2, 8]], ids=str)
def test_a_token_has_the_same_bits_beside_any_others(widths, precision):
    weight = Weight(45, 300, widths, segments=2, outlier_fraction=0.02, row_scale=True)
    x = torch.randn(70, 300)
    all_tokens = weight.linear(x, path="decode", precision=precision)
    for tokens in range(1, 70):
        some = weight.linear(x[:tokens], path="decode", precision=precision)
        assert torch.equal(some, all_tokens[:tokens]), tokens


@both_precisions
def test_same_bits_for_any_number_of_threads(precision):
    weight = Weight(1000, 600, [2, 4, 7], segments=3, outlier_fraction=0.01)
    x = torch.randn(19, 600)
    results = []
    for threads in (1, 2, 5):
        _cpu.set_num_threads(threads)
        results.append(weight.linear(x, path="decode", precision=precision))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

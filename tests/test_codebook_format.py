"""Format `codebook` v1: pack and unpack are inverse, bytes are counted true, damaged tensors are refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllmq import CodebookStructure, CodebookWeight, FormatError, functional

from .oracle import Case, decode, random_case

pytestmark = pytest.mark.kernels


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 40),
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=8).map(tuple),
    segments=st.integers(1, 3),
    outliers=st.sampled_from([0.0, 0.02, 0.5]),
    row_scale=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip(n, k, widths, segments, outliers, row_scale, seed):
    torch.manual_seed(seed)
    case = random_case(n, k, widths, segments=min(segments, n), outliers=outliers, row_scale=row_scale)
    weight = case.weight
    assert torch.equal(weight.unpack(), case.codes)
    # The decoded matrix is one fp32 product (row scale x codebook) away from the fp64 oracle, and exact without a row scale.
    exact = case.dense.float() if not row_scale else case.dense
    torch.testing.assert_close(weight.dequantize().to(exact.dtype), exact, rtol=0 if not row_scale else 2**-23, atol=0)

    again = CodebookWeight.from_tensors(weight.tensors, n, k)
    assert again.structure == weight.structure
    assert CodebookStructure.from_dict(weight.structure.to_dict()) == weight.structure
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in weight.tensors.values())
    assert weight.bits_per_weight == 8 * weight.nbytes / (n * k)


def test_true_bits_by_hand():
    case = random_case(4096, 512, (2,))
    codes, books, widths, rows = 2 * 512 / 8 * 4096, 512 * 4 * 2, 512, 4
    assert case.weight.nbytes == codes + books + widths + rows
    assert case.weight.bits_per_weight == pytest.approx(2 + 8 * (books + widths + rows) / (4096 * 512))


def test_outliers_cost_value_and_position():
    n, k = 64, 64
    plain, kept = random_case(n, k, (3,)), random_case(n, k, (3,), outliers=0.1)
    count = kept.weight.structure.outliers
    assert count > 0
    assert kept.weight.nbytes - plain.weight.nbytes == count * (2 + 2) + 4 * (n + 1)


def test_wide_matrix_uses_int32_positions():
    n, k = 2, (1 << 16) + 3
    mask = torch.zeros(n, k, dtype=torch.bool)
    mask[1, -1] = True
    weight = CodebookWeight.pack(
        torch.zeros(n, k, dtype=torch.uint8), torch.zeros(2 * k), torch.ones(k, dtype=torch.int64),
        outlier_mask=mask, outlier_weight=torch.full((n, k), 1.5),
    )  # fmt: skip
    assert weight.tensors["outlier_columns"].dtype == torch.int32
    dense = weight.dequantize()
    assert dense[1, -1] == 1.5 and dense.count_nonzero() == 1


def valid_tensors():
    return dict(random_case(12, 9, (1, 3, 4), segments=2, outliers=0.2, row_scale=True).weight.tensors)


DAMAGE = {
    "missing": (lambda t: t.pop("codebook"), "'codebook' is missing"),
    "extra": (lambda t: t.update(zeros=torch.zeros(1)), "the keys are"),
    "width 0": (lambda t: t["column_bits"].__setitem__(0, 0), "allowed: 1 to 8"),
    "width 9": (lambda t: t["column_bits"].__setitem__(0, 9), "allowed: 1 to 8"),
    "short codebook": (lambda t: t.update(codebook=t["codebook"][:, :-1].contiguous()), "codebook is"),
    "bf16 codebook": (lambda t: t.update(codebook=t["codebook"].bfloat16()), "must be torch.float16"),
    "nan codebook": (lambda t: t["codebook"].view(-1).__setitem__(3, math.nan), "not finite"),
    "short codes": (lambda t: t.update(codes_b3=t["codes_b3"][:-1].contiguous()), "codes_b3 is"),
    "segment sum": (lambda t: t["segment_rows"].__setitem__(0, 5), "out_features = 12"),
    "negative segment": (lambda t: t["segment_rows"].copy_(torch.tensor([13, -1])), "must be positive"),
    "offsets fall": (lambda t: t["outlier_row_offsets"].__setitem__(3, 0), "must rise from 0|ascend within"),
    "offsets end": (lambda t: t["outlier_row_offsets"].__setitem__(-1, 1), "must rise from 0"),
    "column too far": (lambda t: t.update(outlier_columns=torch.full_like(t["outlier_columns"], 9)), "allowed: 0 to 8"),
    "column twice": (lambda t: t.update(outlier_columns=torch.zeros_like(t["outlier_columns"])), "at most once"),
    "inf outlier": (lambda t: t["outlier_values"].__setitem__(0, math.inf), "not finite"),
    "row scale length": (lambda t: t.update(row_scale=t["row_scale"][:-1].contiguous()), "row_scale is"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused(damage):
    torch.manual_seed(3)
    tensors = {key: tensor.clone() for key, tensor in valid_tensors().items()}
    assert (tensors["outlier_row_offsets"].diff() > 1).any(), "the case must have two outliers in one row"
    act, message = DAMAGE[damage]
    act(tensors)
    with pytest.raises(FormatError, match=message):
        CodebookWeight.from_tensors(tensors, 12, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "trellis"}, "reads: 'codebook'"),
        ({"columns": {"9": 9}}, "widths '1' to '8'"),
        ({"columns": {"2": 8}}, "sum to in_features = 9"),
        ({"out_features": 0}, "at least 1"),
        ({"out_features": "12"}, "must be integers"),
        ({"segments": 13}, "1 to out_features"),
        ({"outliers": 1000}, "1000 outliers"),
        ({"more": 1}, "described by the keys"),
    ],
)
def test_damaged_structures_are_refused(change, message):
    described = {"kind": "codebook", "out_features": 12, "in_features": 9, "columns": {"2": 9}, "segments": 1, "outliers": 0,
                 "row_scale": False}  # fmt: skip
    assert CodebookStructure.from_dict(described).columns[1] == 9
    with pytest.raises(FormatError, match=message):
        CodebookStructure.from_dict({**described, **change})


def test_pack_refuses_bad_input():
    codes, book, bits = torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(8), torch.tensor([2, 2])
    assert CodebookWeight.pack(codes, book, bits).out_features == 3
    with pytest.raises(FormatError, match="2-bit columns do not fit"):
        CodebookWeight.pack(codes + 4, book, bits)
    with pytest.raises(FormatError, match="torch.uint8 matrix"):
        CodebookWeight.pack(codes.long(), book, bits)
    with pytest.raises(FormatError, match="torch.uint8 matrix"):
        CodebookWeight.pack(codes[:0], book, bits)
    with pytest.raises(FormatError, match="must be 2 integers"):
        CodebookWeight.pack(codes, book, torch.tensor([2, 2, 2]))
    with pytest.raises(FormatError, match="allowed: 1 to 8"):
        CodebookWeight.pack(codes, book, torch.tensor([2, 9]))
    with pytest.raises(FormatError, match="codebook is"):
        CodebookWeight.pack(codes, torch.zeros(9), bits)
    with pytest.raises(FormatError, match="fp16"):
        CodebookWeight.pack(codes, torch.full((8,), 1e6), bits)
    with pytest.raises(FormatError, match="fp16"):
        CodebookWeight.pack(codes, torch.full((8,), 1e-9), bits)
    with pytest.raises(FormatError, match="outlier_mask"):
        CodebookWeight.pack(codes, book, bits, outlier_mask=torch.ones(3, 2, dtype=torch.bool))


# ---- several weights in one -----------------------------------------------------------------------------------------


def siblings(*rows: int, k: int = 45, **changes) -> list:
    """Cases with one column_bits, as q, k and v that were compressed together."""
    torch.manual_seed(7)
    first = random_case(rows[0], k, (1, 2, 3, 4, 6), **changes)
    found = [first]
    for n in rows[1:]:
        codes = torch.stack([torch.randint(0, 2 ** int(b), (n,)) for b in first.column_bits], 1).to(torch.uint8)
        codebook = torch.randn(1, int((2**first.column_bits).sum())) * 0.05
        weight = CodebookWeight.pack(codes, codebook, first.column_bits)
        dense = decode(codes, codebook.half().double(), first.column_bits, torch.tensor([n]))
        found.append(Case(weight, codes, first.column_bits, dense))
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"segments": 2}, {"outliers": 0.05}, {"row_scale": True, "outliers": 0.05, "segments": 3}]
)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("m", [1, 5, 70])
def test_concatenated_weights_are_one_call(changes, order, m):
    cases = siblings(33, 7, 64, **changes)[::order]
    fused = CodebookWeight.concatenate([case.weight for case in cases])
    assert (fused.out_features, fused.in_features) == (104, 45)
    assert fused.structure.segments == sum(case.weight.structure.segments for case in cases)
    assert fused.structure.outliers == sum(case.weight.structure.outliers for case in cases)
    assert torch.equal(fused.unpack(), torch.cat([case.codes for case in cases]))
    dense = torch.cat([case.dense for case in cases])
    torch.testing.assert_close(fused.dequantize().double(), dense, rtol=2**-22, atol=0)
    x, bias = torch.randn(m, 45), torch.randn(104)
    y = functional.codebook_linear(x, fused, bias, "exact")
    torch.testing.assert_close(y.double(), x.double() @ dense.T + bias, rtol=1e-5, atol=1e-6)


def test_one_weight_concatenated_is_itself():
    weight = random_case(9, 12, (2, 5), segments=2, outliers=0.1, row_scale=True).weight
    again = CodebookWeight.concatenate([weight])
    assert again.structure == weight.structure
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in weight.tensors.items())


def test_concatenate_refuses_what_cannot_share_a_call():
    with pytest.raises(FormatError, match="at least one"):
        CodebookWeight.concatenate([])
    two, three, wider = (random_case(8, k, (bits,)).weight for k, bits in ((6, 2), (6, 3), (7, 2)))
    with pytest.raises(FormatError, match="weight 1 has 6 columns of widths"):
        CodebookWeight.concatenate([two, three])
    with pytest.raises(FormatError, match="weight 2 has 7 columns"):
        CodebookWeight.concatenate([two, two, wider])
    with pytest.raises(FormatError, match="weight 1 is on meta"):
        CodebookWeight.concatenate([two, two.to("meta")])

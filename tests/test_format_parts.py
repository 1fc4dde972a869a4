"""Rows and columns cut out of a packed weight, of every format: the same numbers to the bit, the bytes of packing them alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllmq import BitmapWeight, CodebookWeight, FormatError, Sparse24CodebookWeight, Sparse24Weight
from pyllmq.packing import mask_24, unstructured_mask

from .oracle import random_case
from .test_sparse_formats import random_codes

pytestmark = pytest.mark.kernels

KINDS = {
    "codebook": lambda n, k: random_case(n, k, (1, 2, 3, 4, 8), segments=min(n, 3), outliers=0.05, row_scale=True).weight,
    "codebook plain": lambda n, k: random_case(n, k, (3,)).weight,
    "bitmap mask": lambda n, k: BitmapWeight.pack(*pruned(n, k, 0.6), torch.bfloat16, "mask"),
    "bitmap columns": lambda n, k: BitmapWeight.pack(*pruned(n, k, 0.97), torch.int8, "columns"),
    "sparse24": lambda n, k: Sparse24Weight.pack(*pruned_24(n, k), torch.float16),
    "sparse24 int8": lambda n, k: Sparse24Weight.pack(*pruned_24(n, k), torch.int8),
    "sparse24_codebook": lambda n, k: random_codes(n, k, 3, 0.05)[0],
    "sparse24_codebook plain": lambda n, k: random_codes(n, k, 2)[0],
}  # fmt: skip


def pruned(n, k, sparsity):
    weight = torch.randn(n, k)
    return weight, unstructured_mask(weight, sparsity) if k > 1 else torch.ones(n, k, dtype=torch.bool)


def pruned_24(n, k):
    weight = torch.randn(n, k)
    return weight, mask_24(weight)


def same(a, b):
    assert a.structure == b.structure
    for key, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[key].dtype and torch.equal(tensor, b.tensors[key]), key


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    places=st.lists(st.integers(0, 70), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_parts_hold_the_numbers_of_the_whole(kind, n, k, places, seed):
    torch.manual_seed(seed)
    whole = KINDS[kind](n, k)
    dense = whole.dequantize()
    start, stop = sorted(place % (n + 1) for place in places)
    if start < stop:
        part = whole.cut_rows(start, stop)
        assert torch.equal(part.dequantize(), dense[start:stop])
        same(type(part).from_tensors(part.tensors, stop - start, k), part)
    start, stop = sorted(place % (k + 1) for place in places)
    start, stop = start - start % whole.column_unit, stop if stop == k else stop - stop % whole.column_unit
    if start < stop:
        part = whole.cut_columns(start, stop)
        assert torch.equal(part.dequantize(), dense[:, start:stop])
        same(type(part).from_tensors(part.tensors, n, stop - start), part)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_as_a_part_is_the_same_bytes(kind):
    whole = KINDS[kind](13, 38)
    same(whole.cut_rows(0, 13), whole)
    same(whole.cut_columns(0, 38), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_part_is_the_part(kind):
    whole = KINDS[kind](24, 64)
    same(whole.cut_columns(8, 48).cut_columns(12, 36), whole.cut_columns(20, 44))
    same(whole.cut_rows(3, 20).cut_rows(2, 9), whole.cut_rows(5, 12))
    same(whole.cut_rows(3, 20).cut_columns(8, 64), whole.cut_columns(8, 64).cut_rows(3, 20))


def test_padding_bits_of_a_part_are_zero():
    """Codes of the next column must not stand in the last byte of a row: parts are the bytes that packing gives."""
    case = random_case(5, 23, (3,))
    part = case.weight.cut_columns(3, 12)
    packed = CodebookWeight.pack(case.codes[:, 3:12], case.weight.tensors["codebook"][:, 24:96], case.column_bits[3:12])
    same(part, packed)


def test_segments_are_cut_with_their_rows():
    case = random_case(30, 7, (2, 4), segments=3)
    assert case.weight.cut_rows(5, 15).tensors["segment_rows"].tolist() == [5, 5]
    assert case.weight.cut_rows(10, 20).tensors["segment_rows"].tolist() == [10]
    assert case.weight.cut_rows(19, 30).tensors["segment_rows"].tolist() == [1, 10]


def test_a_part_without_anything_is_a_zero():
    weight = torch.zeros(6, 20)
    weight[0, 0], weight[5, 19] = 1, 2
    for positions in ("mask", "columns"):
        packed = BitmapWeight.pack(weight, positions=positions)
        for part, expected in ((packed.cut_rows(1, 4), weight[1:4]), (packed.cut_columns(3, 19), weight[:, 3:19])):
            assert part.structure.kept == 1 and torch.equal(part.dequantize(), expected)


def test_wide_parts_change_the_dtype_of_positions():
    wide = (1 << 16) + 8
    mask = torch.zeros(2, wide, dtype=torch.bool)
    mask[0, 5] = mask[1, wide - 1] = True
    packed = BitmapWeight.pack(torch.randn(2, wide), mask, positions="columns")
    part = packed.cut_columns(8, wide)
    assert packed.tensors["columns"].dtype == torch.int32 and part.tensors["columns"].dtype == torch.uint16
    assert torch.equal(part.dequantize(), packed.dequantize()[:, 8:])


@pytest.mark.parametrize("kind", ["codebook", "bitmap mask", "sparse24", "sparse24_codebook"])
def test_wrong_places_are_refused(kind):
    whole = KINDS[kind](12, 38)
    for start, stop in ((0, 13), (-1, 3), (4, 4), (5, 2)):
        with pytest.raises(FormatError, match="allowed: 0 <= start < stop <= 12"):
            whole.cut_rows(start, stop)
    with pytest.raises(FormatError, match="allowed: 0 <= start < stop <= 38"):
        whole.cut_columns(0, 39)
    assert type(whole) in (Sparse24Weight, Sparse24CodebookWeight) or whole.cut_columns(1, 3).in_features == 2
    if whole.column_unit > 1:
        for start, stop in ((2, 8), (4, 10)):
            with pytest.raises(FormatError, match="multiples of 4, or at 38"):
                whole.cut_columns(start, stop)
        assert whole.cut_columns(4, 38).in_features == 34

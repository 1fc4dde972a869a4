"""The sparse formats: a pruned matrix survives packing to the bit, bytes are as described, damage is named."""

import pytest
import torch

from pyllmq import BitmapWeight, FormatError, Sparse24CodebookWeight, Sparse24Weight
from pyllmq.formats import structure_from_dict
from pyllmq.formats.bitmap import BitmapStructure
from pyllmq.formats.sparse24 import Sparse24Structure
from pyllmq.formats.sparse24_codebook import Sparse24CodebookStructure
from pyllmq.packing import mask_24, unstructured_mask

SHAPES = [(1, 1), (1, 2), (3, 5), (7, 33), (16, 64), (33, 127), (40, 258)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def random_codes(n, k, bits, outliers=0.0):
    """(weight, the fp64 matrix that it stands for)."""
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    mask, codebook = mask_24(torch.randn(n, k)), torch.randn(k, 1 << bits)
    far, values = torch.rand(n, k) < outliers, torch.randn(n, k)
    packed = Sparse24CodebookWeight.pack(codes, mask, codebook, outlier_mask=far, outlier_weight=values)
    dense = codebook.half().double()[torch.arange(k), codes.long()] * mask
    dense[far] = values[far].half().double()
    return packed, dense


def examples():
    weight = torch.randn(12, 50)
    yield BitmapWeight.pack(weight, unstructured_mask(weight, 0.6), torch.bfloat16)
    yield BitmapWeight.pack(weight, unstructured_mask(weight, 0.96), torch.int8)
    yield Sparse24Weight.pack(weight, mask_24(weight), torch.float32)
    yield Sparse24Weight.pack(weight, mask_24(weight), torch.int8)
    yield random_codes(12, 50, 3, 0.02)[0]
    yield random_codes(12, 50, 4)[0]


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("positions", ["mask", "columns"])
def test_bitmap_keeps_every_value(n, k, dtype, sparsity, positions):
    weight = torch.randn(n, k).to(dtype)
    weight[torch.rand(n, k) < sparsity] = 0
    packed = BitmapWeight.pack(weight, positions=positions)
    assert torch.equal(packed.dequantize(), weight.float())
    assert torch.equal(packed.mask() & (weight != 0), weight != 0)


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sparse24_keeps_every_value(n, k, dtype):
    weight = torch.randn(n, k).to(dtype)
    weight *= mask_24(weight)
    weight[torch.rand(n, k) < 0.1] = 0
    packed = Sparse24Weight.pack(weight)
    assert torch.equal(packed.dequantize(), weight.float())


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_sparse24_codebook_stands_for_the_matrix(n, k, bits, outliers):
    packed, dense = random_codes(n, k, bits, outliers)
    assert torch.equal(packed.dequantize().double(), dense)
    again = Sparse24CodebookWeight.pack(packed.unpack(), packed.mask(), packed.tensors["codebook"])
    assert all(torch.equal(again.tensors[key], packed.tensors[key]) for key in again.tensors)


@pytest.mark.parametrize("pack", [BitmapWeight.pack, Sparse24Weight.pack])
def test_int8_errs_by_half_a_step(pack):
    weight = torch.randn(30, 64) * torch.logspace(-6, 6, 30)[:, None]
    weight *= mask_24(weight)
    weight[3] = 0
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (pack(weight, value_dtype=torch.int8).dequantize() - weight).abs()
    assert bool((error <= 0.5001 * step).all()) and bool((error[4] > 0).any())


def test_a_weight_of_zeros():
    zeros = torch.zeros(5, 9)
    for packed in (
        BitmapWeight.pack(zeros),
        BitmapWeight.pack(zeros, value_dtype=torch.int8),
        Sparse24Weight.pack(zeros),
    ):
        assert torch.equal(packed.dequantize(), zeros)


@pytest.mark.parametrize("packed", list(examples()), ids=lambda w: type(w).__name__)
def test_description_and_tensors_give_the_weight_back(packed):
    structure = structure_from_dict(packed.structure.to_dict())
    assert structure == packed.structure
    assert {key: (tuple(t.shape), t.dtype) for key, t in packed.tensors.items()} == structure.tensors()
    assert structure.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors.values()) == packed.nbytes
    assert packed.bits_per_weight == 8 * packed.nbytes / (packed.out_features * packed.in_features)
    again = type(packed).from_tensors(packed.tensors, packed.out_features, packed.in_features)
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_true_bits():
    assert Sparse24Structure(4096, 4096, "float16").bits_per_weight == 9
    assert Sparse24CodebookStructure(4096, 4096, 2).bits_per_weight == 1 + 1 + 16 * 4 / 4096
    half = BitmapStructure(4096, 4096, 4096 * 2048, "bfloat16")
    assert half.bits_per_weight == pytest.approx(9 + 32 * 4097 / 4096**2)


def test_columns_are_stored_where_they_take_less():
    weight = torch.zeros(64, 256)
    weight[:, :15] = 1
    assert BitmapWeight.pack(weight).structure.positions == "columns"
    weight[:, :17] = 1
    assert BitmapWeight.pack(weight).structure.positions == "mask"


def test_more_than_65536_columns():
    weight = torch.zeros(2, 70000)
    weight[0, 69999] = weight[1, 3] = 1
    packed = BitmapWeight.pack(weight)
    assert packed.tensors["columns"].dtype == torch.int32 and torch.equal(packed.dequantize(), weight)


def test_what_cannot_be_packed_is_refused():
    weight = torch.randn(6, 12)
    with pytest.raises(FormatError, match=r"row 0 keeps 4 of the weights 0..3; 2:4 keeps at most 2 of 4"):
        Sparse24Weight.pack(weight)
    with pytest.raises(FormatError, match="beyond torch.float16"):
        BitmapWeight.pack(weight * 1e6, value_dtype=torch.float16)
    with pytest.raises(FormatError, match="1 values that are not finite"):
        broken = weight.clone()
        broken[0, 0] = float("nan")
        BitmapWeight.pack(broken)
    with pytest.raises(FormatError, match="value_dtype is torch.float64; allowed: torch.float16"):
        BitmapWeight.pack(weight.double())
    with pytest.raises(FormatError, match="mask is"):
        BitmapWeight.pack(weight, torch.ones(6, 11, dtype=torch.bool))
    with pytest.raises(FormatError, match="a code cannot say zero"):
        Sparse24CodebookWeight.pack(
            torch.zeros(6, 12, dtype=torch.uint8), torch.zeros(6, 12, dtype=torch.bool), torch.zeros(12, 4)
        )
    with pytest.raises(FormatError, match="do not fit the codebook's 2 bits"):
        Sparse24CodebookWeight.pack(torch.full((6, 12), 4, dtype=torch.uint8), mask_24(weight), torch.zeros(12, 4))


@pytest.mark.parametrize("packed", list(examples()), ids=lambda w: type(w).__name__)
def test_damaged_tensors_are_refused(packed):
    n, k = packed.out_features, packed.in_features

    def damaged(**changed):
        return type(packed).from_tensors({**packed.tensors, **changed}, n, k)

    for key, tensor in packed.tensors.items():
        with pytest.raises(FormatError):
            damaged(**{key: tensor[:-1].contiguous()})
        with pytest.raises(FormatError):
            damaged(**{key: tensor.to(torch.float64)})
        if tensor.dtype.is_floating_point:
            broken = tensor.clone()
            broken.view(-1)[0] = float("inf")
            with pytest.raises(FormatError, match="not finite"):
                damaged(**{key: broken})
        with pytest.raises(FormatError, match="codebook is missing|is missing|the keys are"):
            type(packed).from_tensors({k: t for k, t in packed.tensors.items() if k != key}, n, k)
    with pytest.raises(FormatError, match="the keys are"):
        damaged(other=torch.zeros(1))
    if "positions" in packed.tensors:
        with pytest.raises(FormatError, match="first position is not below its second"):
            damaged(positions=torch.zeros_like(packed.tensors["positions"]))
    if "mask" in packed.tensors:
        with pytest.raises(FormatError, match="disagree"):
            damaged(mask=packed.tensors["mask"] ^ 1)
    if "columns" in packed.tensors:
        columns = packed.tensors["columns"].to(torch.int32)
        columns[0] = k
        with pytest.raises(FormatError, match="columns holds"):
            damaged(columns=columns.to(torch.uint16))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "bitmat"},
        {"kept": 10**9},
        {"kept": "7"},
        {"values": "float8"},
        {"positions": "list"},
        {"in_features": 0},
        {"more": 1},
    ],
)
def test_wrong_descriptions_are_refused(change):
    described = BitmapStructure(12, 50, 100).to_dict()
    assert structure_from_dict(described).kept == 100
    with pytest.raises(FormatError):
        structure_from_dict({**described, **change})


def test_masks_by_magnitude():
    weight = torch.randn(9, 30)
    mask = unstructured_mask(weight, 0.6)
    assert bool((mask.sum(1) == 12).all())
    assert bool(((weight.abs() * mask).where(mask, torch.inf).amin(1) >= (weight.abs() * ~mask).amax(1)).all())
    four = mask_24(weight)
    kept = (weight.abs() * four)[:, :28].view(9, 7, 4)
    assert torch.equal(kept.sum(-1), weight.abs()[:, :28].view(9, 7, 4).topk(2).values.sum(-1))
    assert torch.equal(mask_24(weight * four), four)
    with pytest.raises(ValueError, match="sparsity is 1"):
        unstructured_mask(weight, 1)

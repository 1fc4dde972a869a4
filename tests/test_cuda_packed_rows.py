"""packed_rows in CUDA, on the emulator, against fp64: an fp16 entry times an fp16 scale has 22 bits and is rounded once."""

import pytest
import torch

import pyllmq
from pyllmq import CodebookEmbedding, CodebookWeight
from pyllmq.functional import packed_rows
from pyllmq.layouts import WeightOperand

from .cuda_emulator import emulated  # noqa: F401
from .oracle import random_case

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("emulated")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = {"outliers": 0.03, "row_scale": True}


def check(case, ids, dtype=torch.float32):
    with pyllmq.use_backend("cuda"):
        weight = CodebookWeight(case.weight.structure, case.weight.tensors)
        assert weight.operand().layout == "cuda.codebook"
        rows = packed_rows(weight, ids, dtype)
    assert rows.shape == (*ids.shape, case.dense.shape[1]) and rows.dtype == dtype
    assert torch.equal(rows, case.dense[ids.long()].to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits):
    """All 64 rows of a tile, and 3 of the next."""
    check(random_case(67, 35, (bits,)), torch.arange(67))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 300), (300, 1), (31, 33), (1030, 17), (5, 2500), (3, 5)])
def test_shapes_of_a_mix_with_everything(n, k):
    case = random_case(n, k, (1, 2, 3, 4, 6, 8), segments=min(3, n), **EVERYTHING)
    ids = torch.arange(n) if n < 40 else torch.randint(n, (17,))
    for dtype in DTYPES:
        check(case, torch.cat([ids, torch.tensor([n - 1])]), dtype)


def test_any_shape_of_ids_and_all_weights_outliers():
    case = random_case(40, 24, (3,), outliers=1.1)
    transposed = torch.randint(40, (5, 3)).T
    for ids in (
        torch.tensor(7),
        torch.empty(2, 0, 3, dtype=torch.int64),
        transposed,
        transposed.int(),
        torch.full((9,), 39),
    ):
        check(case, ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_id_outside_gives_nan_in_its_row_alone(dtype):
    case = random_case(40, 1100, (2, 5), **EVERYTHING)
    with pyllmq.use_backend("cuda"):
        weight = CodebookWeight(case.weight.structure, case.weight.tensors)
        rows = packed_rows(weight, torch.tensor([0, 40, -1, 2**40, 39]), dtype)
    assert torch.equal(rows[::4], case.dense[[0, 39]].to(dtype)) and rows[1:4].isnan().all()


def test_a_layout_of_another_shape_gives_nan():
    with pyllmq.use_backend("cuda"):
        tensors = random_case(40, 64, (3,)).weight.operand().tensors
        other = WeightOperand("codebook", "cuda.codebook", tensors, (3,), (41, 64))
        assert packed_rows(other, torch.tensor([0, 1])).isnan().all()


def test_an_embedding_with_a_padding_index():
    with pyllmq.use_backend("cuda"):
        embedding = CodebookEmbedding.from_dense(torch.nn.Embedding(90, 40, padding_idx=4), 5)
        ids = torch.randint(90, (3, 7))
        assert embedding.operand().layout == "cuda.codebook"
        assert torch.equal(embedding(ids), embedding.dequantize()[ids]) and not embedding(torch.tensor([4])).any()

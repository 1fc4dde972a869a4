"""packed_rows against fp64 on every back end that runs here; embeddings made of it."""

import copy

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import CodebookEmbedding, CodebookWeight, NoKernelError
from pyllmq.functional import packed_dequantize, packed_linear, packed_rows
from pyllmq.layers.embedding import put_embedding

from .oracle import random_case
from .test_cpu_layout import isa, keep_threads

pytestmark = pytest.mark.kernels
__all__ = ["isa", "keep_threads"]  # fixtures

BACKENDS = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(case, ids, dtype=torch.float32, backend="cpu"):
    """Exact: an fp16 entry times an fp16 scale has 22 bits, and is rounded once."""
    with pyllmq.use_backend(backend):
        weight = CodebookWeight(case.weight.structure, case.weight.tensors)
        rows = packed_rows(weight, ids, dtype)
    assert rows.shape == (*ids.shape, case.dense.shape[1]) and rows.dtype == dtype
    assert torch.equal(rows, case.dense[ids.long()].to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(backend, bits, isa):
    check(random_case(67, 259, (bits,)), torch.randint(67, (2, 9)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 300), (300, 1), (31, 33), (33, 257), (129, 1200), (3, 5)])
def test_shapes_of_a_mix_with_everything(backend, n, k, isa):
    case = random_case(n, k, (1, 2, 3, 4, 6, 8), segments=min(3, n), outliers=0.03, row_scale=True)
    check(case, torch.cat([torch.arange(n), torch.randint(n, (17,))]), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", ["plain", "outliers", "segments", "row_scale"])
def test_dtypes(backend, dtype, extra):
    case = random_case(96, 320, (2, 4), segments=3 if extra == "segments" else 1, outliers=0.02 * (extra == "outliers"),
                       row_scale=extra == "row_scale")  # fmt: skip
    check(case, torch.randint(96, (200,)), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_of_ids(backend):
    case = random_case(40, 24, (3,), outliers=0.05)
    transposed = torch.randint(40, (5, 3)).T
    for ids in (torch.tensor(7), torch.empty(0, dtype=torch.int64), torch.empty(2, 0, 3, dtype=torch.int64), transposed,
                transposed.int(), torch.full((33,), 39)):  # fmt: skip
        check(case, ids, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_ids_out_of_range_are_refused(backend, bad):
    with pyllmq.use_backend(backend):
        weight = random_case(40, 24, (3,)).weight
        with pytest.raises(IndexError, match=f"id {bad} at place 2; allowed: 0 to 39"):
            packed_rows(weight, torch.tensor([0, 39, bad]))


def test_arguments_are_checked():
    weight = random_case(40, 24, (3,)).weight
    with pytest.raises(TypeError, match="ids is torch.float32; allowed: torch.int64"):
        packed_rows(weight, torch.rand(3))
    with pytest.raises(TypeError, match="dtype is torch.float64"):
        packed_rows(weight, torch.tensor([1]), torch.float64)
    with pytest.raises(ValueError, match="ids are on meta"):
        packed_rows(weight, torch.empty(3, dtype=torch.int64, device="meta"))
    sparse = pyllmq.Sparse24Weight.pack(
        torch.randn(8, 8), torch.tensor([1, 1, 0, 0] * 2).bool().expand(8, 8), torch.float32
    )
    with pytest.raises(NoKernelError, match="cpu.codebook_rows: reads the layout"):
        packed_rows(sparse, torch.tensor([1]))
    with pyllmq.use_backend("reference"):  # any format's own decoding
        operand = sparse.checkpoint_operand()
        assert torch.equal(packed_rows(operand, torch.tensor([5, 1])), packed_dequantize(operand)[[5, 1]])


def test_as_torch_sees_it():
    operand = random_case(40, 24, (3, 4), outliers=0.05).weight.operand()
    ids = torch.randint(40, (2, 5))
    arguments = (operand.tensors, operand.kind, operand.layout, operand.meta, operand.shape, ids, torch.float32)
    torch.library.opcheck(torch.ops.pyllmq.packed_rows, arguments)
    compiled = torch.compile(lambda ids: packed_rows(operand, ids), fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), packed_rows(operand, ids))


def test_trained_tensors_get_gradients():
    case = random_case(30, 20, (2, 3), outliers=0.2, row_scale=True)  # some in the three rows
    tensors = {key: tensor.clone() for key, tensor in case.weight.tensors.items()}
    for key in ("codebook", "row_scale", "outlier_values"):
        tensors[key].requires_grad_()
    operand = CodebookWeight(case.weight.structure, tensors).checkpoint_operand()
    ids, upstream = torch.tensor([[3, 3], [29, 7]]), torch.randn(2, 2, 20)
    trained = [tensor for tensor in operand.tensors if tensor.requires_grad]
    ours = torch.autograd.grad((packed_rows(operand, ids) * upstream).sum(), trained)
    through = (packed_linear(torch.eye(20), operand).T[ids] * upstream).sum()  # the same rows by another operation
    theirs = torch.autograd.grad(through, trained)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="second derivative of packed_rows"):
        (first,) = torch.autograd.grad(
            packed_rows(operand, ids).square().sum(), [operand.tensors[1]], create_graph=True
        )
        first.sum().backward()


# ---- the module -----------------------------------------------------------------------------------------------------


def test_an_embedding_is_what_its_weight_says():
    dense = nn.Embedding(300, 48, padding_idx=4)
    packed = CodebookEmbedding.from_dense(dense, 6)
    ids = torch.randint(300, (3, 7))
    assert (packed.num_embeddings, packed.embedding_dim, packed.padding_idx) == (300, 48, 4)
    assert torch.equal(packed(ids), packed.dequantize()[ids]) and torch.equal(packed.weight[ids], packed(ids))
    assert not packed(torch.tensor(4)).any()  # a row of zeros stays one
    error = (packed(ids) - dense(ids).detach()).square().mean() / dense(ids).square().mean()
    assert float(error) < 2e-3
    assert "padding_idx=4" in repr(packed) and packed(ids).dtype == torch.float32
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16 and torch.equal(half(ids), packed(ids).bfloat16())
    other = CodebookEmbedding(packed.structure)
    other.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(other(ids), packed(ids))


def test_rows_that_count_more_come_closer():
    torch.manual_seed(3)
    dense = nn.Embedding(400, 96)
    often = torch.where(torch.arange(400) < 40, 1000.0, 1.0)
    alike, weighted = (
        CodebookEmbedding.from_dense(dense, 2, row_weights=w).dequantize() - dense.weight for w in (None, often)
    )
    assert weighted[:40].square().sum() < 0.8 * alike[:40].square().sum()
    assert weighted[40:].square().sum() > alike[40:].square().sum()
    with pytest.raises(ValueError, match="must be 400 numbers >= 0"):
        CodebookEmbedding.from_dense(dense, 2, row_weights=torch.ones(3))
    with pytest.raises(ValueError, match="not all of them 0"):
        CodebookEmbedding.from_dense(dense, 2, row_weights=torch.zeros(400))


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (nn.Embedding(9, 4, max_norm=1.0), "max_norm=1.0"),
        (nn.Embedding(9, 4, sparse=True), "sparse gradients"),
        (type("Shifted", (nn.Embedding,), {"forward": lambda self, ids: self.weight[ids + 2]})(9, 4), "way of its own"),
    ],
)
def test_what_changes_while_it_is_used_is_refused(dense, message):
    with pytest.raises(ValueError, match=message):
        CodebookEmbedding.from_dense(dense, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_scale(dtype):
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    ids = torch.randint(50, (9,))
    for dense in (BartScaledWordEmbedding(50, 24, 1, 24**0.5), Gemma3TextScaledWordEmbedding(50, 24, 0, 24**0.5)):
        dense = dense.to(dtype)
        packed = CodebookEmbedding.from_dense(dense, 8)
        dense.weight = nn.Parameter(packed.dequantize())
        assert torch.equal(packed(ids), dense(ids))


def test_what_shares_the_weight_shares_the_packed_one():
    model = nn.ModuleDict(
        {"a": nn.Embedding(60, 16), "b": nn.Embedding(60, 16), "head": nn.Linear(16, 60), "other": nn.Linear(16, 60)}
    )
    model["b"].weight = model["head"].weight = model["a"].weight
    packed = CodebookEmbedding.from_dense(model["a"], 4)
    replaced = put_embedding(model, "a", packed)
    assert list(replaced) == ["a", "b", "head"] and type(model["other"]) is nn.Linear
    ids, x = torch.randint(60, (5,)), torch.randn(3, 16)
    again = copy.deepcopy(model)
    for each in (model, again):
        assert torch.equal(each["b"](ids), each["a"](ids))
        assert torch.equal(each["head"](x), packed_linear(x, each["a"].operand(), each["head"].bias))
        assert each["head"].owner is each["a"] and each["b"].owner is each["a"]
    assert again["a"] is not model["a"]
    keys = set(model.state_dict())
    assert keys == {f"a.{key}" for key in packed.state_dict()} | {"head.bias", "other.weight", "other.bias"}
    assert pyllmq.set_precision(model, "exact") == 1 and "precision='exact'" in repr(model["head"])


def test_a_stranger_that_shares_the_weight_is_in_the_way():
    model = nn.ModuleDict({"a": nn.Embedding(60, 16), "norm": nn.Bilinear(4, 16, 60)})
    model["norm"].weight = model["a"].weight
    with pytest.raises(ValueError, match="shares its weight with norm, a Bilinear"):
        put_embedding(model, "a", CodebookEmbedding.from_dense(model["a"], 4))
    assert type(model["a"]) is nn.Embedding

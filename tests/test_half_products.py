"""Jobs on models in bf16 and fp16: products run in fp32 where the processor has none of its own, and inputs come in their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyllmq
from pyllmq.compression import half_products
from pyllmq.compression.calibration import as_batches
from pyllmq.compression.half_products import WideProducts, dtypes_without_products, widened_products
from pyllmq.compression.statistics.sensitivity import trace_per_weight
from pyllmq.compression.tune import tune_blocks, tune_codebooks
from pyllmq.linears import select_linears

from . import models
from .models import token_batches

HALVES = (torch.bfloat16, torch.float16)


PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "x W^T": (functional.linear, [(5, 7), (9, 7)]),
    "x W^T + b": (functional.linear, [(5, 7), (9, 7), (9,)]),
    "one column and b": (functional.linear, [(5, 7), (1, 7), (1,)]),
    "c + a b": (torch.addmm, [(5, 1), (5, 7), (7, 3)]),
    "2 c - a b": (lambda c, a, b: torch.addmm(c, a, b, beta=2, alpha=-1), [(3,), (5, 7), (7, 3)]),
    "nothing": (torch.mm, [(0, 7), (7, 3)]),
    "batches": (torch.bmm, [(2, 5, 7), (2, 7, 3)]),
    "one c + batches": (torch.baddbmm, [(1, 5, 3), (2, 5, 7), (2, 7, 3)]),
    "no batches": (torch.bmm, [(0, 5, 7), (0, 7, 3)]),
    "c + batches": (torch.baddbmm, [(2, 5, 3), (2, 5, 7), (2, 7, 3)]),
    "convolution": (lambda x, w, b: functional.conv1d(x, w, b, stride=2), [(2, 6, 11), (4, 6, 3), (4,)]),
    "patches": (lambda x, w: functional.conv2d(x, w, stride=4), [(2, 3, 8, 8), (5, 3, 4, 4)]),
    "attention": (functional.scaled_dot_product_attention, [(2, 3, 5, 8)] * 3),
    "causal attention": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 3, 5, 8)] * 3,
    ),
    "masked attention": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 5).tril().bool()),
        [(2, 3, 5, 8)] * 3,
    ),
}


def with_gradients(of: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
    given = [tensor.clone().requires_grad_() for tensor in given]
    y = of(*given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, given, weights)]


@pytest.mark.parametrize("slice_", [1 << 23, 16])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_fp32_rounded_once(name, dtype, slice_, monkeypatch):
    monkeypatch.setattr(half_products, "_SLICE", slice_)
    of, shapes = PRODUCTS[name]
    given = [torch.randn(shape).to(dtype) for shape in shapes]
    before = [tensor.clone() for tensor in given]
    with WideProducts([dtype]):
        found = with_gradients(of, given)
    wanted = with_gradients(of, [tensor.float() for tensor in given])
    close = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    if "attention" in name:  # its backward pass reads what came out, rounded
        close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, **close)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_other_dtypes_are_left_alone():
    x, w = torch.randn(5, 7).half(), torch.randn(9, 7).half()
    alone = functional.linear(x, w), functional.linear(x.float(), w.float())
    with WideProducts([torch.bfloat16]):
        inside = functional.linear(x, w), functional.linear(x.float(), w.float())
    assert torch.equal(alone[0], inside[0]) and torch.equal(alone[1], inside[1])


def test_it_is_used_where_the_processor_has_no_products(monkeypatch):
    model = models.tiny_bert().half()
    monkeypatch.setattr(half_products, "dtypes_without_products", lambda: [torch.bfloat16])
    assert not isinstance(widened_products(model), WideProducts)
    monkeypatch.setattr(half_products, "dtypes_without_products", lambda: list(HALVES))
    assert widened_products(model).dtypes == (torch.float16,)
    assert not isinstance(widened_products(model.float()), WideProducts)
    with torch.device("meta"):  # a block at a time will be loaded
        assert widened_products(models.tiny_bert().half()).dtypes == (torch.float16,)


def test_what_onednn_multiplies_is_not_widened():
    """By torch's own names, so that a renamed function is seen."""
    names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
    wanted = [dtype for dtype, name in zip(HALVES, names, strict=True) if not getattr(torch.ops.mkldnn, name)()]
    assert dtypes_without_products() == wanted


# ---- jobs ---------------------------------------------------------------------------------------------------------------


class HalfProducts(TorchDispatchMode):
    """Names of the products that a job runs in bf16 or fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op)
        half = any(isinstance(leaf, torch.Tensor) and leaf.dtype in HALVES for leaf in tree_leaves(args))
        if half and any(word in name for word in ("mm.", "mv.", "conv", "attention", "matmul")):
            self.seen.add(name)
        return op(*args, **(kwargs or {}))


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return make()


def sounds() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_features": torch.randn(2, 16, 40, generator=generator),
            "decoder_input_ids": torch.randint(1, 60, (2, 12), generator=generator),
        }
        for _ in range(3)
    ]


def pictures() -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(3)]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "llama": (models.tiny_llama, lambda: token_batches(2)),
    "whisper": (models.tiny_whisper, sounds),
    "vit": (models.tiny_vit, pictures),
}


def tuned(model: Any, batches: Any) -> None:
    dense, dtype = seeded(lambda: type(model)(model.config)), model.dtype
    pyllmq.compress(model, pyllmq.KMeansConfig(2), progress=False)
    tune_codebooks(model, dense.to(dtype), batches, steps=2, progress=False)
    tune_blocks(model, dense, batches, steps=1, progress=False)


JOBS: dict[str, Callable[[Any, Any], Any]] = {
    "balanced": lambda m, b: pyllmq.compress(m, pyllmq.ColumnCodebookConfig.preset("balanced", 3), b, progress=False),
    "low rank": lambda m, b: pyllmq.compress(m, pyllmq.LowRankConfig(keep=0.6), b, progress=False),
    "fisher": lambda m, b: pyllmq.compress(m, pyllmq.SparseConfig(0.5), b, progress=False),
    "structured": lambda m, b: pyllmq.prune_structured(m, pyllmq.StructuredConfig(0.5), b),
    "tuned": tuned,
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_job_multiplies_nothing_in_half_precision(dtype, job, kind, monkeypatch):
    """Of float32 sounds and images, too, as the processors of transformers make them."""
    monkeypatch.setattr(half_products, "dtypes_without_products", lambda: list(HALVES))
    make, batches = MODELS[kind]
    model = seeded(make).to(dtype)
    with HalfProducts() as products:
        JOBS[job](model, batches())
    assert not products.seen
    assert {p.dtype for p in model.parameters()} <= {dtype, torch.float32} and dtype in {
        p.dtype for p in model.parameters()
    }


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_second_derivatives_are_those_of_fp32(kind, dtype):
    make, batches = MODELS[kind]
    found = []
    for used in (torch.float32, dtype):
        model = seeded(make).to(used)
        linears = select_linears(model, ["mlp"])
        traces = trace_per_weight(model, linears, as_batches(batches(), model), method="hutchinson", draws=4)
        found.append(torch.tensor(list(traces.values())))
    torch.testing.assert_close(*found, rtol=0.05, atol=0.01 * float(found[0].max()))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("kind", MODELS)
def test_tuning_goes_as_in_fp32(kind, dtype):
    """Norms and biases take steps smaller than what bf16 and fp16 tell apart, by gradients below what fp16 holds."""
    make, batches = MODELS[kind]
    losses = []
    for used in (torch.float32, dtype):
        dense, model = seeded(make).to(used), seeded(make).to(used)
        pyllmq.compress(model, pyllmq.KMeansConfig(2, row_scale=True), progress=False)
        losses.append(tune_codebooks(model, dense, batches(), steps=20, progress=False))
    assert sum(losses[0][-3:]) < 0.75 * sum(losses[0][:3])
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.06 * losses[0][0])


def with_an_infinite_gradient() -> Any:
    def spoil(module: Any, args: Any, y: torch.Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * torch.inf)

    model = seeded(models.tiny_llama).half()
    model.model.norm.register_forward_hook(spoil)
    return model


def test_gradients_that_are_not_finite_are_not_used():
    config = pyllmq.ColumnCodebookConfig.preset("balanced", 3)
    with pytest.warns(UserWarning, match=r"guidance='none': the gradient of the loss at .* is not finite"):
        pyllmq.compress(with_an_infinite_gradient(), config, token_batches(2), progress=False)
    with pytest.raises(
        ValueError, match=r"'fisher' sensitivities of 14 of 14 Linears, such as .*not finite in torch.float16"
    ):
        pyllmq.compress(with_an_infinite_gradient(), pyllmq.SparseConfig(0.5), token_batches(2), progress=False)


@pytest.mark.parametrize("kind", MODELS)
def test_the_error_is_that_of_fp32(kind):
    make, batches = MODELS[kind]
    config = pyllmq.ColumnCodebookConfig.preset("balanced", 3)
    errors = [
        pyllmq.compress(seeded(make).to(dtype), config, batches(), progress=False).mean_error
        for dtype in (torch.float32, torch.float16)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)

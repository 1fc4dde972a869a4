"""Making up for what earlier Linears broke: where outputs are looked at, the regression, and what whole models gain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pyllmq
from pyllmq import ColumnCodebookConfig
from pyllmq.compression.methods import column_codebook as columns
from pyllmq.compression.solver.hessian import as_matrix, factor_hessian
from pyllmq.compression.statistics.asymmetric import AsymmetricTarget, DenseBlock, Place, watch

from .models import tiny_bert, tiny_llama

IDS = [torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def dense_block_of(model: nn.Module, block: nn.Module) -> tuple[DenseBlock, dict[str, nn.Module]]:
    calls = []
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(IDS[0])
        handle.remove()
        args, kwargs = calls[0]
        linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        return DenseBlock(block, linears, lambda at, index: first(at(*args, **kwargs))), linears


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_outputs_are_looked_at_where_they_join_the_residual_stream() -> None:
    model = tiny_llama()
    block = model.model.layers[0]
    copied, linears = dense_block_of(model, block)
    joined = {"self_attn.o_proj": Place(block.post_attention_layernorm, entering=True), "mlp.down_proj": Place(block)}
    assert copied.places_in_block == {name: joined.get(name, Place(linear)) for name, linear in linears.items()}
    block = (model := tiny_bert()).encoder.layer[0]
    copied, linears = dense_block_of(model, block)
    joined = {
        f"{part}output.dense": Place(block.get_submodule(f"{part}output.LayerNorm"), True)
        for part in ("attention.", "")
    }
    assert copied.places_in_block == {name: joined.get(name, Place(linear)) for name, linear in linears.items()}


def test_a_norm_after_the_linear_hides_the_stream() -> None:
    """As in Gemma 2: what the Linear gives is normalised before it is added."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.linear(x))

    block, x = Block(), torch.randn(2, 5, 16)
    copied = DenseBlock(block, {"linear": block.linear}, lambda at, index: at(x))
    assert copied.places_in_block["linear"] in (Place(block.linear), Place(block.norm, entering=True))


@pytest.mark.parametrize("biased", [False, True])
def test_the_target_is_a_ridge_regression(biased: bool) -> None:
    torch.manual_seed(0)
    rows, size, tokens, damping = 9, 14, 40, 0.05
    weight, x, e = torch.randn(rows, size), torch.randn(tokens, size) + 1, torch.randn(tokens, rows) + 2
    mean = x.mean(0) if biased else None
    products = e.T @ x / tokens
    covariance = x.T @ x / tokens - (0 if mean is None else torch.outer(mean, mean))
    factor = factor_hessian(covariance, damping)

    def target(error: AsymmetricTarget | None, share: float) -> Tensor:
        return as_matrix(columns.ridge_target(weight, error, mean, factor, share), factor.order)

    error = AsymmetricTarget(products, e.mean(0))
    found = target(error, 1.0)
    with pytest.raises(RuntimeError, match="were taken"):
        target(error, 1.0)
    error = AsymmetricTarget(products, e.mean(0))
    if biased:
        x, e = x - x.mean(0), e - e.mean(0)
    x, e = x.double(), e.double()
    ridge = (damping * (x.T @ x / tokens).diagonal().mean()).sqrt() * tokens**0.5 * torch.eye(size).double()
    change = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([e, torch.zeros(size, rows).double()])).solution.T
    torch.testing.assert_close(found.double(), weight.double() + change, rtol=1e-4, atol=1e-4)
    half = target(error, 0.5)
    torch.testing.assert_close(half, (weight + found) / 2, rtol=1e-5, atol=1e-5)
    assert torch.equal(target(None, 1.0), weight) and torch.equal(target(error, 0.0), weight)


def at_places(model: nn.Module, places: dict[str, Place]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in places}
    for ids in IDS:
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), watch(places, seen):
            model(ids)
        for name, value in seen.items():
            found[name].append(value.flatten(0, 1))
    return {name: torch.cat(values) for name, values in found.items()}


def test_biases_bring_the_residual_stream_back_to_its_mean() -> None:
    torch.manual_seed(0)
    dense = tiny_bert()
    model = copy.deepcopy(dense)
    pyllmq.compress(model, ColumnCodebookConfig(bits=3.0), IDS, progress=False)

    def norms(of: nn.Module) -> dict[str, Place]:
        return {
            n: Place(m, entering=True) for n, m in of.named_modules() if n.startswith("encoder") and "LayerNorm" in n
        }

    wanted, found = at_places(dense, norms(dense)), at_places(model, norms(model))
    assert len(wanted) == 4
    for name in wanted:
        difference = found[name] - wanted[name]
        assert 0 < float(difference.mean(0).abs().max()) < 0.01 * float(difference.abs().max())


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_models_come_closer_to_the_dense_one(make) -> None:
    torch.manual_seed(0)
    dense = make()

    def lost(propagation: float) -> float:
        model = copy.deepcopy(dense)
        config = ColumnCodebookConfig(bits=2.8, propagation=propagation)
        pyllmq.compress(model, config, IDS, progress=False)
        with torch.no_grad():
            return sum(float((model(ids)[0] - dense(ids)[0]).square().sum()) for ids in IDS)

    assert lost(1.0) < 0.95 * lost(0.0)

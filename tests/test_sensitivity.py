"""Trace estimates against exact Hessians of small models, in fp64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyllmq.compression.statistics.sensitivity import trace_per_weight

from . import models


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: beside a busy core, torch's threads cost 8 ms for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Two Linears and an output that is not linear in them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("method", ["fisher", "hutchinson"])
def test_without_logits_it_is_the_curvature_of_the_outputs_change(method: str) -> None:
    model = Net()
    x = torch.randn(6, 3, dtype=torch.float64)
    linears = {"a": model.a, "b": model.b}
    found = trace_per_weight(model, linears, [{"x": x}], method, draws=3000, seed=1)
    for name, linear in linears.items():
        # 1/2 |f - f0|^2 has the Hessian J^T J where f = f0; its trace is the sum of squares of J.
        jacobian = torch.autograd.functional.jacobian(lambda w, n=name: functional(model, n, w, x), linear.weight)
        exact = float(jacobian.square().sum()) / len(x) / linear.weight.numel()
        assert found[name] == pytest.approx(exact, rel=0.08)


def functional(model: Net, name: str, weight: Tensor, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, {f"{name}.weight": weight}, (x,))


def tiny_causal() -> nn.Module:
    torch.manual_seed(0)
    return models.tiny_llama(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1).double()  # fmt: skip


def exact_traces(model: nn.Module, name: str, ids: Tensor) -> tuple[float, float]:
    """Of the Hessian of the mean token loss, and of its Gauss-Newton part, per weight."""
    weight = model.get_submodule(name).weight

    def logits(w: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {f"{name}.weight": w.view_as(weight)}, (), {"input_ids": ids})
        return out.logits[0, :-1]

    def loss(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(w), ids[0, 1:])

    flat = weight.detach().flatten()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, flat)
        jacobian = torch.autograd.functional.jacobian(logits, flat).numpy()
        p = logits(flat).softmax(-1).detach().numpy()
    gauss_newton = 0.0
    for t in range(len(p)):
        inner = np.diag(p[t]) - np.outer(p[t], p[t])
        gauss_newton += np.trace(jacobian[t].T @ inner @ jacobian[t]) / len(p)
    return float(hessian.trace()) / weight.numel(), gauss_newton / weight.numel()


def test_causal_models_against_the_exact_hessian() -> None:
    model, ids = tiny_causal(), torch.randint(0, 16, (1, 6))
    name = "model.layers.0.mlp.down_proj"
    linears = {name: model.get_submodule(name)}
    hessian, gauss_newton = exact_traces(model, name, ids)
    found = trace_per_weight(model, linears, [{"input_ids": ids}], "hutchinson", draws=300)
    assert found[name] == pytest.approx(hessian, rel=0.2)
    found = trace_per_weight(model, linears, [{"input_ids": ids}], "fisher", draws=600)
    assert found[name] == pytest.approx(gauss_newton, rel=0.15)


def test_padding_does_not_count_and_nothing_is_left_behind() -> None:
    model, ids = tiny_causal(), torch.randint(0, 16, (1, 6))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    name = "model.layers.0.mlp.up_proj"
    linears = {name: model.get_submodule(name)}
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 4, dtype=torch.int64)], 1)
    one = trace_per_weight(model, linears, [{"input_ids": ids}], "hutchinson", draws=5)
    two = trace_per_weight(model, linears, [{"input_ids": padded, "attention_mask": mask}], "hutchinson", draws=5)
    assert two[name] == pytest.approx(one[name], rel=1e-6)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_conv1d_and_linears_that_never_run() -> None:
    model = models.tiny_gpt2()
    linears = {"c_attn": model.transformer.h[0].attn.c_attn, "unused": nn.Linear(3, 3)}
    model.extra = linears["unused"]
    found = trace_per_weight(model, linears, [{"input_ids": torch.randint(0, 512, (2, 8))}], "fisher")
    assert found["c_attn"] > 0 == found["unused"]


def test_what_cannot_be_measured_says_so() -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": super().forward(x)}

    model = Odd()
    with pytest.raises(ValueError, match="Odd gives a dict .* use allocation='uniform' or 'owl'"):
        trace_per_weight(model, {"a": model.a}, [{"x": torch.randn(2, 3, dtype=torch.float64)}], "fisher")
    with pytest.raises(ValueError, match="method is 'trace'"):
        trace_per_weight(model, {"a": model.a}, [], "trace")

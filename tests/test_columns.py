"""Column codebooks: the block kernel against the loops' definition, allocation at one price, guidance, tuning, whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pyllmq
from pyllmq import ColumnCodebookConfig, kmeans_1d
from pyllmq.compression.jobs.in_memory import DESCRIPTION_BYTES, bits_for_size
from pyllmq.compression.methods import column_codebook as columns
from pyllmq.compression.solver import bits as allocate
from pyllmq.compression.solver.hessian import as_columns, centre_, factor_hessian
from pyllmq.compression.solver.sweep import ColumnQuantizer, refine_columns, sweep_columns
from pyllmq.compression.statistics import loss_gradients as guide

from .models import tiny_bert, tiny_llama


def problem(rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Heavy-tailed weight [rows, size], Hessian and mean of correlated inputs that are not centred."""
    torch.manual_seed(seed)
    weight = 0.02 * torch.distributions.StudentT(4.0).sample((rows, size)) * torch.randn(rows, 1).mul(0.4).exp()
    mix = torch.eye(size) + 0.5 * torch.randn(size, size) / size**0.5
    inputs = torch.randn(4 * size, size) @ mix * torch.randn(size).mul(0.5).exp() + torch.randn(size)
    return weight, inputs.t() @ inputs / len(inputs), inputs.mean(0)


class InPython(ColumnQuantizer):
    """What `fit_columns` does, column by column with `kmeans_1d`."""

    def __init__(self, importance: Tensor, row_weights: Tensor, scale: Tensor, bits: list[int]) -> None:
        self.importance, self.row_weights, self.scale, self.bits = importance, row_weights, scale, bits

    def column(self, position: int, column: int, values: Tensor) -> Tensor:
        points = (values / self.scale)[None]
        centroids, codes = kmeans_1d(points, 1 << self.bits[column], self.importance, centroid_dtype=torch.float16)
        return centroids.float().gather(1, codes.long())[0] * self.scale

    def refit(self, column: int, target: Tensor, stored: Tensor) -> tuple[Tensor, float]:
        found = self.column(0, column, target)
        before, after = (((q - target).double().square() * self.row_weights).sum() for q in (stored, found))
        return (found, float(before - after)) if after < before else (stored, 0.0)


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor, damping: float, row_weights: Tensor) -> float:
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian)).double()
    error = quantized.double() - weight.double()
    return float((((error @ damped) * error).sum(1) * row_weights).sum())


@pytest.mark.kernels
@pytest.mark.parametrize(("rows", "size", "block"), [(5, 9, 4), (61, 40, 16), (130, 150, 128)])
def test_the_kernel_is_the_loop(rows: int, size: int, block: int) -> None:
    weight, hessian, _ = problem(rows, size, seed=rows)
    factor, row_weights = factor_hessian(hessian), torch.rand(rows) + 0.5
    fits = columns.ColumnFits("layer", as_columns(weight, factor.order), row_weights, True, "exact")
    bits = torch.randint(1, 5, (size,)).to(torch.uint8)
    fits.plan(bits, torch.zeros(size, dtype=torch.int64))
    slow = InPython(fits.importance, row_weights, fits.scale, bits.tolist())
    swept = sweep_columns(weight, factor, fits, block)
    expected = sweep_columns(weight, factor, slow, block)
    # A value between two centroids may fall to either side; the objective hardly notices.
    assert swept.loss == pytest.approx(expected.loss, rel=0.02)
    assert float((swept.quantized - expected.quantized).abs().gt(1e-4 * weight.abs().max()).float().mean()) < 0.05
    reached = objective(weight, swept.quantized, hessian, factor.damping, row_weights)
    refined = refine_columns(weight, swept.quantized, factor, fits, 4, 0.0, block)
    after = objective(weight, refined.quantized, hessian, factor.damping, row_weights)
    assert all(decrease >= 0 for decrease in refined.decreases) and refined.decreases[0] > 0
    assert after == pytest.approx(reached - sum(refined.decreases), rel=1e-3) and after < reached
    again = refine_columns(weight, expected.quantized, factor, slow, 4, 0.0, block)
    assert after == pytest.approx(objective(weight, again.quantized, hessian, factor.damping, row_weights), rel=0.03)
    assert torch.equal(fits.pack(refined.quantized).dequantize(), refined.quantized)


@pytest.mark.kernels
def test_kept_weights_are_the_worst_served_and_the_codebook_is_of_the_others() -> None:
    torch.manual_seed(1)
    column = torch.cat([torch.tensor([1.0, -1.0]).repeat(20), torch.tensor([9.0, -7.0])])
    weight = column[:, None].contiguous()
    fits = columns.ColumnFits("layer", weight.t().contiguous(), None, False, "exact")
    fits.plan(torch.tensor([1], dtype=torch.uint8), torch.tensor([2]))
    quantized = sweep_columns(weight, factor_hessian(torch.eye(1)), fits).quantized
    assert fits.outlier_mask[0].nonzero()[:, 0].tolist() == [40, 41] and torch.equal(quantized, weight)
    packed = fits.pack(quantized)
    assert packed.tensors["codebook"].tolist() == [[-1.0, 1.0]] and packed.structure.outliers == 2
    assert torch.equal(packed.dequantize(), weight)


@pytest.mark.kernels
def test_a_column_beyond_fp16_is_named() -> None:
    fits = columns.ColumnFits("the layer", torch.full((2, 3), 6e4), None, False, "exact")
    fits.plan(torch.tensor([1, 1], dtype=torch.uint8), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="column 1 of 'the layer' grew to"):
        fits.sweep_block([0, 1], torch.tensor([[1.0, 2, 3], [1e5, 2e5, 3e5]]), torch.zeros(2, 2), torch.ones(2))


# ---- allocation -------------------------------------------------------------------------------------------------------


def errors_of(rows: int, size: int, widths: tuple[int, ...], most: int, seed: int) -> allocate.ColumnErrors:
    torch.manual_seed(seed)
    worst = torch.rand(size, 1, most, dtype=torch.float64).sort(2, descending=True).values
    fall = torch.tensor([4.0**-w for w in widths], dtype=torch.float64)
    size_of = torch.randn(size, 1, dtype=torch.float64).mul(2).exp()
    error = size_of * fall
    return allocate.ColumnErrors(rows, widths, error, worst * error[:, :, None] / max(1, most))


def used_bytes(found: allocate.Allocation, rows: list[int], size: int, row_scale: bool) -> int:
    counts = tuple(torch.bincount(found.column_bits.long(), minlength=9)[1:9].tolist())
    return sum(
        pyllmq.CodebookStructure(n, size, counts, outliers=int(kept.sum()), row_scale=row_scale).nbytes
        for n, kept in zip(rows, found.outlier_counts, strict=True)
    )


@pytest.mark.parametrize("most", [0, 6])
@pytest.mark.parametrize(("rows", "size"), [([64], 48), ([40, 24], 33), ([1], 7)])
def test_the_budget_is_kept_and_used(rows: list[int], size: int, most: int) -> None:
    widths = (1, 2, 3, 4)
    groups = [errors_of(n, size, widths, min(most, n // 4), seed=n) for n in rows]
    low = sum(pyllmq.CodebookStructure.bytes_of(n, size, {1: size}, row_scale=True) for n in rows)
    high = sum(pyllmq.CodebookStructure.bytes_of(n, size, {4: size}, row_scale=True) for n in rows)
    for share in (0.05, 0.3, 0.7, 1.1):
        budget = low + sum(rows) * 2 + share * (high - low)
        found = allocate.spend(groups, budget, row_scale=True)
        spent = used_bytes(found, rows, size, True)
        assert spent <= budget
        # One more column, and what a row of codes takes to its next byte, for each width.
        step = sum(rows) * (1 + len(widths)) + 2 * len(rows) * 16
        assert spent >= min(budget, high) - step


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_no_other_widths_predict_much_less_for_the_same_bytes(share: float) -> None:
    """Duality: at any price p, nothing of B bytes loses less than sum_j min_b(loss + p * bytes) - p * B."""
    widths, rows, size = (1, 2, 3), 40, 400
    group = errors_of(rows, size, widths, 0, seed=3)
    cost = torch.tensor([rows * b / 8 + 2 * 2**b for b in widths], dtype=torch.float64)
    budget = pyllmq.CodebookStructure.bytes_of(rows, size, {1 + 2 * share: size})
    found = allocate.spend([group], budget, row_scale=False)

    def bound(nbytes: float) -> float:
        prices = torch.logspace(-9, 3, 2000, dtype=torch.float64)
        spent = (group.error[None] + prices[:, None, None] * cost).amin(2).sum(1)
        return float((spent - prices * (nbytes - size - 4)).max())

    assert found.predicted == pytest.approx(float(group.error[torch.arange(size), found.column_bits.long() - 1].sum()))
    # Rows of codes end on bytes: up to one for each width and row is not to be had.
    assert bound(budget) <= found.predicted <= bound(budget - 4 * rows)


def test_too_few_bytes_say_the_least() -> None:
    with pytest.raises(ValueError, match=r"100 bytes do not hold 1 Linears of 48 columns: \d+ is the least"):
        allocate.spend([errors_of(64, 48, (2, 3), 0, 0)], 100, row_scale=False)


def test_budgets_sum_to_what_is_asked() -> None:
    shapes = {"a": (64, 48), "b": (128, 64), "c": (16, 512)}
    shared = allocate.share_out(shapes, 3000, row_scale=True)
    assert sum(shared.values()) == pytest.approx(3000, rel=1e-9)


# ---- one group --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2.4, 3.0, 4.2])
def test_siblings_share_widths_within_their_bytes(bits: float) -> None:
    weight, hessian, _ = problem(96, 64)
    other = problem(32, 64, seed=5)[0]
    budget = bits * (weight.numel() + other.numel()) / 8
    done = columns.compress_linears(
        {"q": weight, "k": other}, columns.InputStatistics(hessian.clone()), budget, ColumnCodebookConfig(bits=bits)
    )
    assert torch.equal(done["q"].weight.column_bits, done["k"].weight.column_bits)
    assert sum(d.weight.nbytes for d in done.values()) <= budget
    pyllmq.CodebookWeight.concatenate([done["q"].weight, done["k"].weight])


def test_descent_and_allocation_lower_the_error_at_equal_bytes() -> None:
    weight, hessian, _ = problem(128, 96)
    budget = 2.7 * weight.numel() / 8

    def error(weight=weight, **changes) -> float:
        config = ColumnCodebookConfig(bits=2.7, **({"row_scale": False, "outliers": False} | changes))
        inputs = columns.InputStatistics(hessian.clone())
        done = columns.compress_linears({"w": weight}, inputs, budget, config)["w"]
        with pytest.raises(RuntimeError, match="were taken|was taken"):
            columns.compress_linears({"w": weight}, inputs, budget, config)
        return done.error

    plain = error(cycles=0, widths=(2, 3))
    assert error(widths=(2, 3)) < plain and error() < 0.95 * plain
    rows_of_all_sizes = weight * torch.logspace(-0.7, 0.7, len(weight))[:, None]
    assert error(rows_of_all_sizes, row_scale=True) < error(rows_of_all_sizes)


def test_the_bias_takes_up_the_mean_error() -> None:
    weight, hessian, mean = problem(40, 32)
    config = ColumnCodebookConfig(bits=3.0)
    done = columns.compress_linears(
        {"w": weight}, columns.InputStatistics(hessian.clone(), mean), 3.2 * weight.numel() / 8, config
    )["w"]
    change = done.weight.dequantize() - weight
    assert done.bias_change is not None
    torch.testing.assert_close(change @ mean + done.bias_change, torch.zeros(40), rtol=0, atol=1e-5)
    covariance = hessian - torch.outer(mean, mean)
    expected = float(((change @ covariance) * change).sum() / ((weight @ hessian) * weight).sum())
    assert done.error == pytest.approx(expected, rel=1e-3)
    without = columns.compress_linears(
        {"w": weight}, columns.InputStatistics(hessian.clone()), 3.2 * weight.numel() / 8, config
    )["w"]
    assert without.bias_change is None and done.error < without.error


def test_an_input_that_hardly_changes_is_no_hessian_of_rounding_errors() -> None:
    """Its covariance is the difference of two equal matrices."""
    x = torch.randn(64) * 0.1 + torch.zeros(20, 64)
    x[:, :3] += 1e-9 * torch.randn(20, 3)
    mean = x.mean(0)
    hessian = x.t() @ x / len(x)
    centre_(hessian, mean)
    factor = factor_hessian(hessian, 0.01)
    assert factor.damping == 0.01 and not bool(factor.diagonal.any())
    x[:, 5] += torch.randn(20)
    hessian = x.t() @ x / len(x)
    centre_(hessian, x.mean(0))
    assert factor_hessian(hessian, 0.01).diagonal.count_nonzero() == 1


def test_row_weights_buy_accuracy_where_they_are_high() -> None:
    weight, hessian, _ = problem(64, 48)
    row_weights = torch.cat([torch.full((32,), 10.0), torch.full((32,), 0.1)])
    config, budget = ColumnCodebookConfig(bits=2.9), 2.9 * weight.numel() / 8

    def lost(**guided) -> Tensor:
        inputs = columns.InputStatistics(hessian.clone())
        done = columns.compress_linears({"w": weight}, inputs, budget, config, **guided)["w"]
        change = done.weight.dequantize() - weight
        return ((change @ hessian) * change).sum(1)

    plain, guided = lost(), lost(row_weights={"w": row_weights})
    assert float(guided[:32].sum()) < float(plain[:32].sum()) and float(guided[32:].sum()) > float(plain[32:].sum())


# ---- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_is_the_squared_gradient_of_the_models_loss() -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    batch = {"input_ids": torch.randint(0, 512, (2, 9))}
    name = "model.layers.0.mlp.down_proj"
    linear = model.get_submodule(name)
    found = guide.output_gradients(model, {name: linear}, [batch])
    kept: list[Tensor] = []
    handle = linear.register_forward_hook(lambda m, a, output: (output.retain_grad(), kept.append(output))[0])
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    square = kept[0].grad.square()
    expected = square.mean((0, 1)) / square.mean()
    limited = expected.clamp(1 / guide.LIMIT, guide.LIMIT)
    torch.testing.assert_close(found.row_weights[name], limited / limited.mean(), rtol=1e-3, atol=1e-3)
    assert found.token_weights[name][0].shape == (2, 9)
    assert all(p.requires_grad for p in model.parameters())


# ---- whole models -----------------------------------------------------------------------------------------------------

IDS = [torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.mark.parametrize("guidance", ["none", "rows+tokens"])
def test_a_model_has_the_bits_that_were_asked_for(guidance: str) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    report = pyllmq.compress(model, ColumnCodebookConfig(bits=3.5, guidance=guidance), IDS, progress=False)
    assert report.method == "column-codebook"
    assert 3.5 * 0.98 <= report.bits_per_weight <= 3.5


def test_an_encoder_keeps_its_mean_outputs() -> None:
    model, dense = tiny_bert(), None
    dense = copy.deepcopy(model)
    report = pyllmq.compress(model, ColumnCodebookConfig(bits=4.5, guidance="rows"), IDS, progress=False)
    assert report.bits_per_weight <= 4.5
    first = "encoder.layer.0.attention.self.query"
    hidden = torch.cat([dense.embeddings(ids).flatten(0, 1) for ids in IDS])
    before, after = (m.get_submodule(first)(hidden).mean(0) for m in (dense, model))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_a_size_is_met() -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    dense = sum(p.numel() * 4 for p in {id(p): p for p in model.parameters()}.values())
    linears = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    described = DESCRIPTION_BYTES * sum(isinstance(m, nn.Linear) for m in model.model.modules())
    wanted = dense - 4 * linears + round(3.3 * linears / 8) + 1000 + described
    assert bits_for_size(model, wanted, other_files=1000) == pytest.approx(3.3, rel=1e-3)
    with pytest.raises(ValueError, match="bits per weight beside"):
        bits_for_size(model, 1000)


def test_tuning_lowers_the_loss_and_changes_no_size() -> None:
    torch.manual_seed(0)
    dense = tiny_llama(hidden_size=128, intermediate_size=256)
    model = copy.deepcopy(dense)
    report = pyllmq.compress(model, ColumnCodebookConfig(bits=2.9), IDS, progress=False)
    before = {n: m.structure for n, m in model.named_modules() if isinstance(m, pyllmq.CodebookLinear)}
    codes = {n: m.packed_weight().unpack() for n, m in model.named_modules() if n in before}
    norm = model.model.norm.weight.detach().clone()
    losses = pyllmq.tune_codebooks(model, dense, IDS, steps=40, progress=False)
    assert len(losses) == 40 and sum(losses[-8:]) < 0.9 * sum(losses[:8])
    for name, structure in before.items():
        layer = model.get_submodule(name)
        assert layer.structure == structure and torch.equal(layer.packed_weight().unpack(), codes[name])
    assert not torch.equal(model.model.norm.weight, norm)
    assert 8 * sum(s.nbytes for s in before.values()) / report.weights == pytest.approx(report.bits_per_weight)


def test_tuning_with_checkpointed_blocks_takes_the_same_way() -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    pyllmq.compress(model, ColumnCodebookConfig(bits=3.5), IDS, progress=False)
    plain, saving = (
        pyllmq.tune_codebooks(copy.deepcopy(model), dense, IDS, steps=8, checkpoint=checkpoint, progress=False)
        for checkpoint in (False, True)
    )
    assert sum(plain[4:]) < sum(plain[:4]) and saving == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_tuning_block_by_block_brings_every_block_closer(make) -> None:
    torch.manual_seed(1)
    dense = make()
    model = copy.deepcopy(dense)
    pyllmq.compress(model, ColumnCodebookConfig(bits=2.9), IDS, progress=False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, pyllmq.CodebookLinear)}
    before = {n: (m.structure, m.packed_weight().unpack()) for n, m in layers.items()}
    state = {name: p.requires_grad for name, p in model.named_parameters()}
    # With a rate of 0.02 the loss rises in the first epochs, to twice its value, and 24 steps may not bring it back.
    found = pyllmq.tune_blocks(model, dense, IDS, steps=48, learning_rate=0.005, progress=False)
    assert len(found) == 2
    for losses in found.values():
        epochs = [sum(losses[i : i + len(IDS)]) for i in range(0, 48, len(IDS))]
        assert len(losses) == 48 and epochs[-1] < 0.95 * epochs[0] and max(epochs) < 1.02 * epochs[0]
    for name, (structure, codes) in before.items():
        layer = model.get_submodule(name)
        assert layer.structure == structure and torch.equal(layer.packed_weight().unpack(), codes)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == state
    with pytest.raises(ValueError, match="has no packed layer"):
        pyllmq.tune_blocks(dense, dense, IDS, steps=1)


def test_tuning_that_fails_leaves_the_model_as_it_was() -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    pyllmq.compress(model, ColumnCodebookConfig(bits=3.5), IDS, progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="the tuning loss is"):
        pyllmq.tune_codebooks(model, dense, IDS, steps=50, learning_rate=1e30, progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="has no packed layer"):
        pyllmq.tune_codebooks(dense, dense, IDS, steps=1)
    with pytest.raises(ValueError, match="steps is 0"):
        pyllmq.tune_codebooks(model, dense, IDS, steps=0)


# ---- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1.0}, "bits is 1.0; allowed: a number, 1.1 to 8"),
        ({"bits": 3, "widths": (3, 2)}, r"widths is \(3, 2\); allowed: rising integers from 1 to 8"),
        ({"bits": 3, "widths": ()}, "widths is"),
        ({"bits": 3, "guidance": "columns"}, "guidance is 'columns'; allowed: 'none', 'rows'"),
        ({"bits": 3, "cycles": -1}, "cycles is -1; allowed: an integer >= 0"),
        ({"bits": 3, "propagation": 2}, "propagation is 2; allowed: a number, 0 to 1"),
        ({"bits": 3, "tune_steps": 1.5}, "tune_steps is 1.5"),
        ({"bits": 3, "outliers": 0.005}, "outliers is 0.005; allowed: True, False"),
        ({"bits": 3, "kmeans": "lloyd"}, "kmeans is 'lloyd'; allowed: 'exact', 'windowed'"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColumnCodebookConfig(**settings)


def test_presets_and_dicts() -> None:
    fast, best = ColumnCodebookConfig.preset("fast", 2.25), ColumnCodebookConfig.preset("best", 2.25, tune_steps=7)
    assert fast.cycles == 0 and best.tune_steps == 7 and ColumnCodebookConfig.preset("balanced", 3).tune_steps == 0
    assert ColumnCodebookConfig.from_dict(best.to_dict()) == best
    assert ColumnCodebookConfig(bits=2.25).allowed_widths == (1, 2, 3, 4)
    assert ColumnCodebookConfig(bits=7.5).allowed_widths == (1, 2, 3, 4, 5, 6, 7, 8)
    with pytest.raises(ValueError, match="the preset is 'quick'; allowed: 'fast', 'balanced', 'best'"):
        ColumnCodebookConfig.preset("quick", 3)
    with pytest.raises(ValueError, match="does not know 'bit'"):
        ColumnCodebookConfig.from_dict({"bits": 3, "bit": 2})

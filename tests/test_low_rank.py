"""Low rank: the layer of two factors, the solver against brute force, ranks at one price, and the method in every kind of job."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pyllmq
from pyllmq import CodebookLinear, FormatError, LowRankConfig, LowRankLinear, parallel
from pyllmq.benchmarks import accuracy
from pyllmq.benchmarks.low_rank import kept_share
from pyllmq.cli import main
from pyllmq.compression.methods import low_rank
from pyllmq.compression.methods.low_rank import WHOLE, factors, output_basis, price_ranks, uniform_rank
from pyllmq.compression.solver.bayesian import bayesian_minimum
from pyllmq.folders import PackedFolder
from pyllmq.formats import structure_from_dict
from pyllmq.layers.linear import packed_modules

from . import models
from .damage import refused_of
from .kill_and_resume import digests
from .test_methods import SMALL, ended_after_one

# ---- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_given_factors(dtype, bias):
    inner, outer = torch.randn(5, 37).to(dtype), torch.randn(21, 5).to(dtype)
    shift = torch.randn(21).to(dtype) if bias else None
    layer = LowRankLinear.from_factors(inner, outer, shift).requires_grad_(False)
    x = torch.randn(2, 3, 37).to(dtype)
    exact = x.double() @ inner.double().t() @ outer.double().t() + (shift.double() if bias else 0)
    plain = nn.functional.linear(nn.functional.linear(x, inner), outer, shift)
    ours, theirs = (float((y.double() - exact).abs().max()) for y in (layer(x), plain))
    assert ours <= 2 * theirs + 1e-6 and layer(x).dtype == dtype
    assert layer.rank == 5 and layer.nbytes == dtype.itemsize * 5 * (37 + 21)
    assert layer.weight.dtype == dtype and layer.weight.shape == (21, 37)
    torch.testing.assert_close(layer.weight + 0, (outer.float() @ inner.float()).to(dtype))
    same = [copy.deepcopy(layer), LowRankLinear(layer.structure, bias, dtype)]
    same[1].load_state_dict(layer.state_dict(), assign=True)
    assert all(torch.equal(other(x), layer(x)) for other in same) and "rank=5, inner=dense, outer=dense" in repr(layer)


def test_it_takes_the_dtype_of_its_model_and_can_be_trained():
    layer = LowRankLinear.from_factors(torch.randn(4, 12), torch.randn(9, 4), torch.randn(9))
    layer(torch.randn(3, 12)).sum().backward()
    assert layer.inner.weight.grad.shape == (4, 12) and layer.outer.weight.grad.shape == (9, 4)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(torch.randn(3, 12).bfloat16()).dtype == torch.bfloat16
    assert {child.values for child in half.structure.children.values()} == {"bfloat16"}


def test_packed_and_mixed_factors():
    inner = pyllmq.CodebookWeight.from_dense(torch.randn(16, 40), torch.full((40,), 5))
    outer = torch.randn(30, 16)
    x = torch.randn(7, 40)
    layer = LowRankLinear.from_factors(inner, outer)
    expected = x @ inner.dequantize().t() @ outer.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-2)
    assert isinstance(layer.inner, CodebookLinear) and "inner=codebook, outer=dense" in repr(layer)
    assert structure_from_dict(json.loads(json.dumps(layer.structure.to_dict()))) == layer.structure
    assert pyllmq.set_precision(layer, "exact") == 1


@pytest.mark.parametrize(
    ("inner", "outer", "message"),
    [
        (torch.ones(4, 12), torch.ones(9, 5), "inner .r, K. and outer .N, r."),
        (torch.ones(4), torch.ones(9, 4), "inner is torch.float32 .4."),
        (torch.ones(4, 12).int(), torch.ones(9, 4), "inner is torch.int32"),
        (torch.ones(4, 12), [1.0], "outer is list"),
        (torch.ones(4, 12) / 0, torch.ones(9, 4), "inner holds values that are not finite"),
    ],
)
def test_factors_that_do_not_fit(inner, outer, message):
    with pytest.raises(FormatError, match=message):
        LowRankLinear.from_factors(inner, outer)


def test_a_wrong_description_is_refused():
    described = LowRankLinear.from_factors(torch.ones(4, 12), torch.ones(9, 4)).structure.to_dict()
    nested = LowRankLinear.from_factors(torch.ones(2, 12), torch.ones(4, 2)).structure.to_dict()
    for change, message in (
        ({"out_features": 8}, "has children inner .r, 12. and outer .8, r."),
        ({"children": {"inner": described["children"]["inner"]}}, "two children"),
        ({"children": {**described["children"], "inner": nested}}, "no composite"),
        (
            {"children": {**described["children"], "outer": {"kind": "dense", "values": "int8"}}},
            "described by the keys",
        ),
        (
            {"children": {**described["children"], "outer": {**described["children"]["outer"], "values": "int8"}}},
            "values is 'int8'; allowed: 'float32'",
        ),
    ):
        with pytest.raises(FormatError, match=message):
            structure_from_dict(described | change)


def halved(linear: nn.Linear) -> LowRankLinear:
    n, k = linear.weight.shape
    u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    rank = n * k // (n + k) // 2
    return LowRankLinear.from_factors(v[:rank], u[:, :rank] * s[:rank], linear.bias)


def test_saved_loaded_inspected_and_not_cut(tmp_path, capsys):
    model = models.tiny_llama(attention_bias=True)
    pyllmq.swap_linear(model, halved)
    pyllmq.save_pretrained(model, tmp_path / "m")
    loaded = pyllmq.from_pretrained(tmp_path / "m")
    ids = torch.randint(0, 512, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits) and len(packed_modules(loaded)) == 14
    held = load_file(tmp_path / "m/model.safetensors")
    assert held["model.layers.0.mlp.up_proj.inner.weight"].shape == (21, 64)
    assert main(["inspect", str(tmp_path / "m")]) == 0
    assert "low_rank: rank=16, inner=dense, outer=dense" in capsys.readouterr().out
    in_half = pyllmq.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert in_half.model.layers[0].mlp.up_proj.inner.weight.dtype == torch.bfloat16
    pyllmq.save_pretrained(in_half, tmp_path / "half")
    assert (
        PackedFolder.open(tmp_path / "half").structures["model.layers.0.mlp.up_proj"].children["inner"].values
        == "bfloat16"
    )
    plan = parallel.plan(model, 2)
    why = plan.whole["model.layers.0.self_attn.q_proj"]
    assert "made of several packed weights (low_rank), which are not cut" in why


def test_damaged_folders_give_an_error_or_a_model(tmp_path):
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, halved)
    pyllmq.save_pretrained(model, tmp_path / "m")
    refused = refused_of(tmp_path / "m", 30, tmp_path)
    assert refused >= 8


# ---- the solver -------------------------------------------------------------------------------------------------------


def problem(n, k, tokens=500):
    weight = torch.randn(n, k, dtype=torch.float64)
    x = torch.randn(tokens, k, dtype=torch.float64) @ torch.randn(k, k, dtype=torch.float64) + 3 * torch.randn(k)
    omega = torch.rand(n, dtype=torch.float64) + 0.1
    covariance = torch.cov(x.t(), correction=0)
    return weight, covariance, omega


def loss(weight, product, covariance, omega):
    lost = weight - product
    return float((omega[:, None] * (lost @ covariance) * lost).sum())


@pytest.mark.parametrize(("n", "k", "tokens"), [(17, 23, 500), (29, 11, 500), (13, 13, 500), (25, 14, 6), (9, 14, 6)])
def test_no_other_matrix_of_that_rank_is_better(n, k, tokens):
    """Against the singular values, and against descent from random starts."""
    weight, covariance, omega = problem(n, k, tokens)
    basis, squares = output_basis(weight, covariance, omega)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(min(n, k), dtype=torch.float64), atol=1e-9, rtol=0)
    values, vectors = torch.linalg.eigh(covariance)
    whitened = omega.sqrt()[:, None] * weight @ (vectors * values.clamp_min(0).sqrt())
    singular = torch.linalg.svdvals(whitened).square()
    torch.testing.assert_close(squares, singular, rtol=1e-7, atol=1e-9 * float(singular[0]))
    for rank in (1, 4, 7):
        inner, outer = factors(weight, basis[:, :rank], omega)
        assert inner.shape == (rank, k) and outer.shape == (n, rank)
        best = loss(weight, outer @ inner, covariance, omega)
        assert best == pytest.approx(float(squares[rank:].sum()), rel=1e-6, abs=1e-8 * float(singular[0]))
        others = [torch.randn(rank, k, dtype=torch.float64) for _ in range(3)]
        others += [inner + 0.1 * torch.randn_like(inner) for _ in range(3)]
        for other in others:
            for _ in range(4):  # alternating least squares
                between = other @ covariance @ other.t() + 1e-12 * torch.eye(rank)
                left = torch.linalg.solve(between, other @ covariance @ weight.t()).t()
                assert loss(weight, left @ other, covariance, omega) >= best * (1 - 1e-6) - 1e-9
                scaled = left.t() * omega
                other = torch.linalg.solve(scaled @ left + 1e-12 * torch.eye(rank), scaled @ weight)


def test_no_other_ranks_of_that_size_lose_less():
    shapes = {"a": (64, 48), "b": (48, 64), "c": (96, 48), "d": (24, 24)}
    generator = torch.Generator().manual_seed(3)
    losses = {
        name: (torch.rand(min(shape), generator=generator, dtype=torch.float64) * scale).sort(descending=True).values
        for (name, shape), scale in zip(shapes.items(), (1.0, 30.0, 5.0, 0.2), strict=True)
    }
    options = {name: low_rank._options(losses[name], shape) for name, shape in shapes.items()}
    every = [
        (
            sum(float(options[n][1][i]) for n, i in zip(shapes, at, strict=True)),
            sum(float(options[n][2][i]) for n, i in zip(shapes, at, strict=True)),
        )
        for at in itertools.product(*(range(len(options[name][0])) for name in shapes))
    ]
    numbers = sum(n * k for n, k in shapes.values())
    for keep in (0.5, 0.6, 0.7, 0.8, 0.9):
        ranks = price_ranks(losses, shapes, keep)
        at = {name: options[name][0].tolist().index(ranks[name]) for name in shapes}
        cost, lost = (sum(float(options[n][part][i]) for n, i in at.items()) for part in (1, 2))
        assert cost <= keep * numbers
        assert lost <= min(other for used, other in every if used <= cost) + 1e-9
    assert price_ranks(losses, shapes, 1.0) == dict.fromkeys(shapes, WHOLE)
    with pytest.raises(ValueError, match="a rank of 8 in every Linear already takes 0.294"):
        price_ranks(losses, shapes, 0.1)


def test_uniform_ranks():
    assert uniform_rank((384, 384), 0.5) == 96 and uniform_rank((1536, 384), 0.5) == 152
    assert uniform_rank((384, 384), 1) == WHOLE and uniform_rank((12, 12), 0.5) == WHOLE


def test_the_search_finds_a_minimum_and_begins_at_the_origin():
    def bowl(point):
        return float((point - torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)).square().sum())

    best, values = bayesian_minimum(bowl, 3, 2.0, 20, 6)
    assert (
        values[0] == bowl(torch.zeros(3, dtype=torch.float64))
        and len(values) == 20
        and values[best] == min(values) < 0.1
    )
    best, _ = bayesian_minimum(lambda point: float(point.square().sum()), 3, 2.0, 12, 6)
    assert best == 0


# ---- the method -------------------------------------------------------------------------------------------------------


def planted(model, rank):
    """Linears of a model become products of two thin ones."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not getattr(model, "lm_head", None):
            u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            module.weight.data = (u[:, :rank] * s[:rank]) @ v[:rank]
    return model


@pytest.mark.parametrize("allocation", ["price", "uniform"])
@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_bert])
def test_what_has_that_rank_is_kept(make, allocation):
    model = planted(make(), 16)
    ids = torch.randint(0, 512, (2, 16))
    expected = model(ids)[0].detach()
    report = pyllmq.compress(model, LowRankConfig(0.8, allocation), models.token_batches(), progress=False)
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) >= 8
    assert report.mean_error < 1e-6 and all(
        item.why == "would gain nothing"
        for item in report.left_dense
        if "layer" in item.name and "pooler" not in item.name
    )
    torch.testing.assert_close(model(ids)[0], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [models.tiny_gpt2, models.tiny_t5, models.tiny_gemma3, models.tiny_mixtral])
def test_other_architectures(make, tmp_path):
    model, text = make(), models.token_batches(2, 16)
    batches = [
        {"input_ids": ids} | ({"decoder_input_ids": ids} if "T5" in type(model).__name__ else {}) for ids in text
    ]
    dense = sum(p.numel() for p in model.parameters())
    pyllmq.compress(model, LowRankConfig(0.6), batches, progress=False)
    pyllmq.save_pretrained(model, tmp_path / "m")
    loaded = pyllmq.from_pretrained(tmp_path / "m", fuse=False)
    torch.testing.assert_close(loaded(**batches[0])[0], model(**batches[0])[0], rtol=0, atol=1e-5)
    assert sum(p.numel() for p in loaded.parameters()) < dense


def test_the_price_of_ranks_lowers_the_loss():
    torch.manual_seed(0)
    model, batches = models.tiny_bert(), models.token_batches(8, 24)
    model.encoder.layer[0].intermediate.dense.weight.data *= 8
    model.encoder.layer[1].attention.self.query.weight.data *= 0.05
    wanted = [model(ids).last_hidden_state.mean(1).detach() for ids in batches]
    damage = {}
    for allocation in ("price", "uniform"):
        split = copy.deepcopy(model)
        pyllmq.compress(split, LowRankConfig(0.5, allocation), batches, progress=False)
        damage[allocation] = sum(
            float(1 - nn.functional.cosine_similarity(split(ids).last_hidden_state.mean(1), y).mean().detach())
            for ids, y in zip(batches, wanted, strict=True)
        )
        assert kept_share(split, model, ["pooler"]) <= 0.5
    assert damage["price"] < 0.9 * damage["uniform"]


def test_codes_for_what_stays():
    model = models.tiny_bert()
    report = pyllmq.compress(model, LowRankConfig(0.9, bits=6), models.token_batches(), progress=False)
    split = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    whole = [m for _, m in packed_modules(model) if isinstance(m, CodebookLinear)]
    assert split and whole and len(split) + len(whole) == 12 and not any("encoder" in i.name for i in report.left_dense)
    assert all(isinstance(m.inner, CodebookLinear) and isinstance(m.outer, CodebookLinear) for m in split)
    assert report.bits_per_weight <= 0.9 * 6


def test_the_search_keeps_the_price_where_nothing_beats_it(monkeypatch):
    monkeypatch.setattr(low_rank, "EVALUATIONS", 8)
    batches = models.token_batches(2, 16)
    model = models.tiny_bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    judged = []

    def always(measure, *rest):
        judged.append(measure(torch.zeros(rest[0], dtype=torch.float64)))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        judged.append(measure(torch.full((rest[0],), 1.0, dtype=torch.float64)))
        return 0, judged

    monkeypatch.setattr(low_rank, "bayesian_minimum", always)
    by_price = copy.deepcopy(model)
    for searched, allocation in ((model, "search"), (by_price, "price")):
        pyllmq.compress(searched, LowRankConfig(0.5, allocation), batches, progress=False)
    assert judged[0] == pytest.approx(judged[1]) and judged[0] > 0  # the same weight for every type changes nothing
    assert [m.structure for _, m in packed_modules(model)] == [m.structure for _, m in packed_modules(by_price)]


def test_every_job_of_the_command(tmp_path, capsys, monkeypatch):
    models.tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    models.tiny_tokenizer().save_pretrained(tmp_path / "dense")
    command = ["compress", str(tmp_path / "dense"), "--method", "low-rank", "--keep", "0.5", *SMALL, "--quiet"]  # fmt: skip
    assert main([*command, str(tmp_path / "dry"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        "14 Linears in 2 blocks" in printed and "50 % of the parameters" in printed and not (tmp_path / "dry").exists()
    )
    reports = [tmp_path / name for name in ("whole.json", "ended.json")]
    assert main([*command, str(tmp_path / "whole"), "--report", str(reports[0])]) == 0
    ended_after_one(monkeypatch, [*command, str(tmp_path / "ended")])
    assert main([*command, str(tmp_path / "ended"), "--resume", "--report", str(reports[1])]) == 0
    left = [json.loads(report.read_text())["left_dense"] for report in reports]
    assert left[0] == left[1] and any(row["why"] == "would gain nothing" for row in left[0])
    assert digests(tmp_path / "whole") == digests(tmp_path / "ended")
    assert main([*command, str(tmp_path / "memory"), "--in-memory"]) == 0
    streamed, held = (pyllmq.from_pretrained(tmp_path / name, fuse=False) for name in ("whole", "memory"))
    ids = torch.randint(0, 512, (1, 9))
    torch.testing.assert_close(streamed(ids).logits, held(ids).logits, rtol=0, atol=1e-3)
    capsys.readouterr()
    for more, message in (
        (["--keep", "1.2"], "keep is 1.2; allowed: a number, 0.05 to 1"),
        (["--keep", "1"], "no Linear has fewer numbers as two factors"),
        (["--allocation", "search", "--resume"], "runs the whole model for each of its evaluations"),
        (["--propagation", "0", "--damping", "0.1"], "--damping has no effect"),
    ):
        assert main([*command, str(tmp_path / "no"), *more]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "most"), [(0.8, 0.065), (0.5, 0.17)])
def test_a_real_model(minilm, keep, most):
    """The goals of docs/low-rank.md, the first of its three draws."""
    subject = accuracy.encoder(minilm, "all-MiniLM-L6-v2")
    model = copy.deepcopy(subject.dense)
    pyllmq.compress(model, LowRankConfig(keep), subject.calibration(0), exclude=subject.exclude, progress=False)
    assert subject.judge(model) <= most

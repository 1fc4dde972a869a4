"""`pyllmq bench --op experts`: what it measures is right, and says what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyllmq.benchmarks import experts, experts_accuracy, record
from pyllmq.benchmarks.accuracy import Subject
from pyllmq.benchmarks.experts import SHAPES, Layer, check, fitting, routes, run_experts

pytestmark = pytest.mark.transformers


def test_one_table_and_a_csv(tmp_path, capsys):
    rows = run_experts(["tiny"], ["2", "4"], [1, 5], csv=tmp_path / "rows.csv", budget_s=0.01, progress=False)
    torch_rows = ["torch fp32", "torch batched_mm", "torch grouped_mm"]
    assert [row.provider for row in rows] == [*torch_rows, "pyllmq 2 bits", "pyllmq 4 bits"] * 2
    assert [row.provider for row in record.read(tmp_path / "rows.csv")] == [row.provider for row in rows]
    assert "tiny, 6 experts" in capsys.readouterr().out
    of_one = [row for row in rows if row.m == 1]
    assert all(row.share_of_read_limit > 0 and row.relative_error < 5e-4 for row in of_one)
    # Codebooks of 64 rows weigh 2**bits * 16 / 64 bits, those of `down` too: it has 64 rows.
    assert [row.bits_per_weight for row in of_one[3:]] == pytest.approx([2 + 1, 4 + 4], abs=0.3)


def test_a_wrong_result_is_not_timed():
    shape = SHAPES["tiny"]
    layer = experts._packed(shape, "4", "high")
    routing = routes(shape, 1)[0]
    check("ours", layer, shape, routing)
    wrong = replace(layer, weights=lambda e: tuple(2 * w for w in layer.weights(e)))
    assert isinstance(wrong, Layer)
    with torch.no_grad(), pytest.raises(experts.WrongResultError, match="ours: relative error"):
        check("ours", wrong, shape, routing)


@pytest.mark.parametrize("name", SHAPES)
def test_a_token_chooses_experts_that_the_last_one_did_not(name):
    shape = SHAPES[name]
    chosen = [set(index.flatten().tolist()) for _, index, _ in routes(replace(shape, hidden=1), 1)]
    assert all(len(of_token) == shape.choices for of_token in chosen)
    assert all(not a & b for a, b in zip(chosen, chosen[1:], strict=False))


def test_refusals_and_limits():
    assert fitting(SHAPES["qwen3-30b-a3b"], 40).experts == 40 and fitting(SHAPES["qwen3-30b-a3b"], 1).experts == 8
    assert 2 <= fitting(SHAPES["mixtral-8x7b"], None).experts <= 8
    with pytest.raises(ValueError, match="shape 'llama' of experts is not known; known: qwen3-30b-a3b"):
        run_experts(["llama"])
    with pytest.raises(ValueError, match="0 experts; at least 1"):
        run_experts(["tiny"], experts=0)
    with pytest.raises(ValueError, match="each must be at least 1"):
        run_experts(["tiny"], tokens=[0])


def test_what_is_routed_decides_how_bits_are_shared_out():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    routing = {"num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **routing)).eval()
    dense.model.layers[0].mlp.gate.weight.data *= torch.tensor([1.0, 5.0, 20.0, 80.0])[:, None]
    ids = torch.randint(0, 512, (6, 40))
    given = []
    subject = Subject(
        "tiny", dense, lambda draw: [{"input_ids": ids}], [], lambda model: given.append(model) or 0.5, ()
    )
    found = experts_accuracy.routed(dense, experts_accuracy.windows(subject, 4, 0))
    assert sum(each.tokens for name, each in found.items() if name.endswith("_up")) == 4 * 40 * 2
    alike, by_mass = (
        experts_accuracy.run(subject, *how, 4, 0)
        for how in ((experts_accuracy.PRIOR, "K"), (experts_accuracy.SHARE, "mass"))
    )
    assert alike.damage == 0.5 and alike.fewest == min(each.tokens for each in found.values())
    for result in (alike, by_mass):
        assert 2.9 < result.true_bits <= 3.0
    masses, sizes = [], []
    for name, module in given[1].named_modules():
        if name in found and name.endswith("_up"):
            masses.append(found[name].mass)
            sizes.append(module.nbytes - given[0].get_submodule(name).nbytes)
    assert len(sizes) == 4 and sizes[masses.index(max(masses))] > 0 > sizes[masses.index(min(masses))]

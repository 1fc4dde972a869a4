"""The rivals of the structured pass, on a tiny encoder: as many channels stay by every score, and least squares repairs."""

from __future__ import annotations

import copy

import pytest
import torch

from pyllmq.benchmarks import structured
from pyllmq.benchmarks.accuracy import Subject
from pyllmq.benchmarks.record import read_rows

from . import models


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = models.tiny_bert()
    batches = [{"input_ids": ids} for ids in models.token_batches(4, 24)]
    with torch.no_grad():
        return model, batches, [model(**batch)[0] for batch in batches]


def distance(model, batches, wanted):
    with torch.no_grad():
        return sum(
            float((model(**batch)[0] - want).square().sum()) for batch, want in zip(batches, wanted, strict=True)
        )


def test_every_score_keeps_as_many(encoder):
    model, batches, wanted = encoder
    lost = {}
    for method in (method for method in structured.METHODS if method not in structured.OWN):
        thin = copy.deepcopy(model)
        structured.narrow(thin, method, 0.5, batches)
        for layer in thin.encoder.layer:
            assert int((layer.output.dense.weight != 0).any(0).sum()) == 64, method
        lost[method] = distance(thin, batches, wanted)
    for name in structured.SCORES:
        assert 0 < lost[f"{name} + least squares"] < lost[name], name


def test_both_halves_of_whisper():
    torch.manual_seed(0)
    model = models.tiny_whisper()
    ids = torch.randint(0, 512, (2, 9))
    structured.narrow(
        model,
        "FLAP + least squares",
        0.5,
        [{"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids}],
    )
    kept = [int((m.weight != 0).any(0).sum()) for name, m in model.named_modules() if name.endswith("fc2")]
    assert kept == [64] * 4


def test_scores():
    """FLAP: the variance of what is lost; fidelity is 1 where an input is all of an output."""
    weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    mean = torch.tensor([1.0, 2.0], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([4.0, 9.0], dtype=torch.float64))
    x = structured.Inputs(covariance, mean, covariance + mean.outer(mean))
    assert structured.SCORES["FLAP"](weight, x).tolist() == [4 * 4, 9 * 9]
    assert structured.SCORES["Wanda-sp"](weight, x).tolist() == pytest.approx([2 * 5**0.5, 3 * 13**0.5])
    assert structured.SCORES["ModHiFi"](weight, x).tolist() == pytest.approx([1, 1])


def test_heads_of_a_causal_model(monkeypatch, tmp_path, capsys):
    """Half of the heads go by default, then half of the layers; what the file has is not run again."""
    torch.manual_seed(0)
    dense = models.tiny_llama(num_attention_heads=8, num_key_value_heads=4)
    batches = [{"input_ids": ids} for ids in models.token_batches(2, 24)]
    seen = []

    def judge(model):
        seen.append((model.config.num_attention_heads, model.config.num_hidden_layers))
        return 0.5

    subject = Subject("tiny", dense, lambda draw: batches, [], judge, ("lm_head",))
    monkeypatch.setattr(structured, "causal", lambda folder, name: subject)
    file = tmp_path / "rows.csv"
    for _ in range(2):
        structured.main(["--causal", "tiny", "--keep", "0.5", "--draws", "0", "--csv", str(file)])
    assert seen == [(4, 2), (8, 1)]
    assert [row.method for row in read_rows(file, structured.Result)] == [structured.HEADS, structured.LAYERS]
    with pytest.raises(SystemExit, match="--methods does not know \\['heads'\\]"):
        structured.main(["--causal", "tiny", "--methods", "heads"])

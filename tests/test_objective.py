"""Every kind of model has a loss: that of transformers where labels are given, its own distribution or embeddings where not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import pyllmq
from pyllmq.compression.calibration import as_batches, given_to_model, token_mask
from pyllmq.compression.jobs.folder import HiddenStates
from pyllmq.compression.jobs.in_memory import visit_groups
from pyllmq.compression.objective import answer_of, drawn, losses, mismatch
from pyllmq.compression.ranks import ALONE
from pyllmq.compression.statistics.blocks import BlockLoop, find_stages
from pyllmq.compression.statistics.loss_gradients import output_gradients, output_gradients_by_block
from pyllmq.compression.statistics.sensitivity import trace_per_weight
from pyllmq.compression.tune import tune_codebooks
from pyllmq.integrations.checkpoint import StreamedModel
from pyllmq.loading import load_model

from . import models
from .new_process import run_python

BERT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bert(head: str, **more: Any) -> Any:
    config = transformers.BertConfig(attention_probs_dropout_prob=0.0, **BERT, **more)
    return getattr(transformers, f"BertFor{head}")(config).eval()


MODELS = {
    "t5": models.tiny_t5,
    "bart": models.tiny_bart,
    "whisper": models.tiny_whisper,
    "texts": lambda: bert("SequenceClassification", num_labels=4),
    "tokens": lambda: bert("TokenClassification", num_labels=4),
    "vit": models.tiny_vit,
    "clip": models.tiny_clip,
}


def batches_of(kind: str, count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Of two texts, images or sounds, the second padded; no labels."""
    found = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, 512, (2, 12), generator=generator)
        mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind in ("t5", "bart"):
            batch |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": mask}
        if kind == "whisper":
            frames = (torch.arange(40) < torch.tensor([[40], [22]])).long()
            batch = {"input_features": torch.randn(2, 16, 40, generator=generator), "attention_mask": frames,
                     "decoder_input_ids": ids, "decoder_attention_mask": mask}  # fmt: skip
        if kind in ("vit", "clip"):
            pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
            batch = pixels | (batch if kind == "clip" else {})
        found.append(batch)
    return found


def padded(batch: dict[str, torch.Tensor], more: int = 5) -> dict[str, torch.Tensor]:
    """The same texts with more padding."""
    shape = {"attention_mask": 0, "decoder_attention_mask": 0, "input_ids": 7, "decoder_input_ids": 7, "labels": -100}
    return {key: nn.functional.pad(value, (0, more), value=shape[key]) for key, value in batch.items()}


# ---- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "make", "labels"),
    [
        ("t5", models.tiny_t5, {"labels": torch.tensor([[5, 6, 7], [8, 9, -100]])}),
        ("bart", models.tiny_bart, {"labels": torch.tensor([[5, 6, 7], [8, 9, -100]])}),
        ("whisper", models.tiny_whisper, {"labels": torch.tensor([[5, 6, 7], [8, 9, -100]])}),
        ("texts", MODELS["texts"], {"labels": torch.tensor([3, 1])}),
        ("texts", lambda: bert("SequenceClassification", num_labels=4, problem_type="multi_label_classification"),
         {"labels": torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 1]])}),
        ("tokens", MODELS["tokens"], {"labels": torch.tensor([[2] * 12, [1] * 7 + [-100] * 5])}),
        ("texts", lambda: bert("MaskedLM"), {"labels": torch.tensor([[9] + [-100] * 11, [-100] * 5 + [8] + [-100] * 6])}),
        ("texts", lambda: bert("QuestionAnswering"),
         {"start_positions": torch.tensor([3, 1]), "end_positions": torch.tensor([6, 2])}),
        ("vit", models.tiny_vit, {"labels": torch.tensor([4, 0])}),
    ],
)  # fmt: skip
def test_with_labels_it_is_the_loss_of_transformers(kind, make, labels):
    model = make()
    (batch,) = batches_of(kind, 1)
    if kind in ("t5", "bart", "whisper"):
        batch = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    if "start_positions" in labels:  # transformers does not leave the padding out
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    wanted = model(**batch, **labels).loss
    config = model.config.to_dict()
    (made,) = as_batches([batch | labels], model)
    answer = answer_of(model, model(**given_to_model(made, model)), made)
    (loss,) = losses(answer, torch.Generator())
    counted = sum(int((targets >= 0).sum()) for targets in answer.targets if targets is not None)
    torch.testing.assert_close(loss / counted, wanted, rtol=1e-4, atol=1e-4)
    assert model.config.to_dict() == config


def test_labels_are_drawn_from_the_models_own_distribution():
    logits = torch.randn(1, 6)
    shares = logits.softmax(-1)
    generator = torch.Generator().manual_seed(0)
    classes = drawn(logits.expand(20000, 6), generator)
    torch.testing.assert_close(torch.bincount(classes, minlength=6) / 20000, shares[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_differs_from_another_and_not_from_itself(kind):
    (batch,) = batches_of(kind, 1)
    model, other = MODELS[kind](), MODELS[kind]()
    with torch.no_grad():
        one, two = model(**batch), other(**batch)
        assert float(mismatch(model, one, one, batch)) == pytest.approx(0, abs=1e-5)
        assert float(mismatch(model, two, one, batch)) > 1e-4


def test_places_of_an_answer_are_not_in_the_padding():
    model = bert("QuestionAnswering")
    (batch,) = batches_of("texts", 1)
    answer = answer_of(model, model(**batch), batch)
    assert all(float(rows.softmax(-1)[1, 7:].abs().max()) == 0 for rows in answer.logits)


# ---- guidance, sensitivities, tuning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart", "texts", "tokens"])
def test_padding_changes_no_statistics(kind):
    model, more = MODELS[kind](), []
    batches = batches_of(kind, 2)
    for batch in batches:
        more.append(padded(batch))
        if kind == "texts":
            batch["labels"] = more[-1]["labels"] = torch.tensor([1, 2])
        else:
            batch["labels"] = torch.where(batch["attention_mask"] == 1, 3, -100)
            more[-1]["labels"] = padded({"labels": batch["labels"]})["labels"]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and (".layer" in n or ".block" in n)}
    found = []
    for given in (batches, more):
        given = as_batches(given, model)
        hessians: dict[str, torch.Tensor] = {}
        visit_groups(model, given, lambda group, inputs, h=hessians: h.update(dict.fromkeys(group, inputs.hessian)))
        guided = output_gradients(model, linears, given).row_weights
        found.append((hessians, guided, trace_per_weight(model, linears, given, "hutchinson")))
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys() and set(linears) <= set(one)
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=1e-4)


def test_silence_is_left_out_of_the_encoders_statistics():
    model = models.tiny_whisper()
    batches = batches_of("whisper", 2)
    inputs: dict[str, list[torch.Tensor]] = {}
    names = (
        "model.encoder.layers.0.self_attn.q_proj",
        "model.decoder.layers.1.encoder_attn.k_proj",
        "model.decoder.layers.0.fc1",
    )
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, a, out, n=name: inputs.setdefault(n, []).append(a[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    seen = {name: list(given) for name, given in inputs.items()}
    hessians: dict[str, torch.Tensor] = {}
    visit_groups(model, batches, lambda group, found: hessians.update(dict.fromkeys(group, found.hessian)))
    for name in names:
        long, short = (12, 7) if "fc1" in name else (20, 11)
        tokens = torch.cat([torch.cat([x[0, :long], x[1, :short]]) for x in seen[name]])
        torch.testing.assert_close(hessians[name], 2 / len(tokens) * tokens.T @ tokens, rtol=1e-3, atol=1e-4)
    assert token_mask(batches[0], "", (2, 20))[1].tolist() == [1] * 11 + [0] * 9


@pytest.mark.parametrize("kind", ["t5", "whisper", "clip"])
def test_gradients_block_by_block_through_several_rows_of_blocks(kind, tmp_path):
    """The encoder's gradient comes through every block of the decoder; those of a pair through its head alone."""
    MODELS[kind]().save_pretrained(tmp_path / "dense")
    model, batches = load_model(tmp_path / "dense"), batches_of(kind)
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and (".layers." in n or ".block." in n)
    }
    wanted = output_gradients(model, linears, batches)
    streamed = StreamedModel(tmp_path / "dense")
    stages = find_stages(streamed.model, {n: streamed.model.get_submodule(n) for n in linears}, False)
    streamed.split(stage.name for stage in stages)
    loop = BlockLoop(streamed.model, batches[0], batches, streamed)
    with torch.no_grad():
        chains = loop.find_chains(stages)
        assert len(chains) == 2
        inside = {n: m for stage in stages for n, m in stage.linears.items()}
        found = output_gradients_by_block(loop, chains, inside, HiddenStates(tmp_path, "x", ALONE))
    assert found.row_weights.keys() == wanted.row_weights.keys() == linears.keys()
    for name in linears:
        assert found.scales[name] == pytest.approx(wanted.scales[name], rel=1e-3), name
        torch.testing.assert_close(found.row_weights[name], wanted.row_weights[name], rtol=1e-3, atol=1e-4)
        for a, b in zip(found.token_weights[name], wanted.token_weights[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not loop.outputs and [p.name for p in tmp_path.iterdir()] == ["dense"]


def guided(kind: str, guidance: str) -> Any:
    torch.manual_seed(1)
    model = MODELS[kind]()
    config = pyllmq.ColumnCodebookConfig.preset("balanced", 3.0, guidance=guidance, kmeans="windowed", cycles=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*stay dense without being asked.*")
        warnings.filterwarnings("ignore", message=".*Cholesky.*")  # two texts are few
        pyllmq.compress(model, config, batches_of(kind, 2), progress=False)
    return model


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in ("t5", "whisper", "tokens") else k for k in MODELS]
)
def test_balanced_is_guided_and_loads_again(kind, tmp_path):
    model, plain = guided(kind, "rows"), guided(kind, "none")
    packed = [{n: m for n, m in of.named_modules() if isinstance(m, pyllmq.CodebookLinear)} for of in (model, plain)]
    assert packed[0].keys() == packed[1].keys() and len(packed[0]) >= 8
    differ = [n for n in packed[0] if not torch.equal(packed[0][n].dequantize(), packed[1][n].dequantize())]
    assert {n.partition("encoder")[1] for n in differ} == {n.partition("encoder")[1] for n in packed[0]}
    (batch,) = batches_of(kind, 1)
    pyllmq.save_pretrained(model, tmp_path / "packed")
    loaded = pyllmq.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["whisper", "clip", "tokens"])
def test_tuning_lowers_the_mismatch(kind):
    torch.manual_seed(0)
    dense = MODELS[kind]()
    torch.manual_seed(0)
    model = MODELS[kind]()
    batches = batches_of(kind, 2)
    pyllmq.compress(model, pyllmq.KMeansConfig(2, row_scale=True), progress=False)
    found = tune_codebooks(model, dense, batches, steps=12, progress=False)
    assert sum(found[-2:]) < 0.9 * sum(found[:2])


class Nameless(nn.Module):
    """Nobody knows what of its output is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.blocks[1](self.blocks[0](x).relu())}


def test_without_a_loss_one_line_says_so():
    model = Nameless()
    with pytest.warns(UserWarning) as said:
        config = pyllmq.ColumnCodebookConfig.preset("best", 4.0, tune_steps=2)
        pyllmq.compress(model, config, [{"x": torch.randn(9, 32)}], progress=False)
    about = [
        str(w.message) for w in said if "there is no loss" in str(w.message) or "nothing is tuned" in str(w.message)
    ]
    assert len(about) == 2 and "as with guidance='none': Nameless gives a dict" in about[0]
    assert all(isinstance(block, pyllmq.CodebookLinear) for block in model.blocks)


@pytest.mark.slow
def test_block_by_block_in_a_new_process(tmp_path):
    """The command on an encoder-decoder: guided, and no line about a missing gradient."""
    models.tiny_bart().save_pretrained(tmp_path / "dense")
    models.tiny_tokenizer().save_pretrained(tmp_path / "dense")
    words = ["-m", "pyllmq", "compress", "dense", "packed", "--samples", "4", "--seqlen", "24", "--quiet"]
    done = run_python(*words, cwd=tmp_path)
    assert done.returncode == 0 and "weigh alike" not in done.stderr, done.stderr
    code = "import pyllmq; print(type(pyllmq.from_pretrained('packed')).__name__)"
    assert run_python("-c", code, cwd=tmp_path).stdout.strip() == "BartForConditionalGeneration"


def test_an_encoder_longer_than_what_is_sampled():
    """Keys and values of 150 frames beside a stream of 80 tokens, both longer than the sample that places are found by."""
    config = models.tiny_whisper().config
    config.max_source_positions, config.max_target_positions, config.encoder_layers, config.decoder_layers = (
        150,
        96,
        1,
        1,
    )
    model = type(models.tiny_whisper())(config).eval()
    batch = {"input_features": torch.randn(1, 16, 300), "decoder_input_ids": torch.randint(0, 512, (1, 80))}
    report = pyllmq.compress(model, pyllmq.ColumnCodebookConfig(4, cycles=1, guidance="none"), [batch], progress=False)
    assert any("encoder_attn.k_proj" in layer.name for layer in report.layers)

"""The command on models of every kind: what is calibrated with, what is copied, and what is said where something is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import loading
from pyllmq.cli import main
from pyllmq.compression import calibration
from pyllmq.compression.jobs.dry_run import plan_folder
from pyllmq.compression.jobs.in_memory import visit_groups

from . import models

SMALL = ["--preset", "fast", "--samples", "4", "--seqlen", "64", "--quiet"]
BERT = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(model, folder: Path, tokenizer: bool = True, **special: str) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        made = models.tiny_tokenizer()
        for name, token in special.items():
            setattr(made, name, token)
        made.save_pretrained(folder)
    return folder


def reward_llama():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(num_labels=1, **BERT)).eval()


def short_bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(max_position_embeddings=32, **BERT)).eval()


def short_roberta():
    """Positions are counted from the padding's id on: 29 of 32 are for tokens."""
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(max_position_embeddings=32, pad_token_id=2, **BERT)).eval()


@pytest.mark.parametrize(
    ("make", "special"),
    [(models.tiny_t5, {}), (reward_llama, {"pad_token": None}), (short_bert, {}), (short_roberta, {})],
)
def test_models_of_text_by_command(tmp_path, make, special) -> None:
    source = saved(make(), tmp_path / "source", **special)
    assert main(["compress", str(source), str(tmp_path / "out"), *SMALL]) == 0
    assert any(isinstance(m, pyllmq.CodebookLinear) for m in pyllmq.from_pretrained(tmp_path / "out").modules())


def test_a_model_of_images_needs_no_tokenizer_without_calibration(tmp_path, capsys) -> None:
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **small))
    source = saved(vit, tmp_path / "source", tokenizer=False)
    command = ["compress", str(source), str(tmp_path / "out"), "--quiet", "--exclude", "pooler"]
    assert main([*command, "--preset", "fast"]) == 1
    assert "ViTModel takes pixel_values, and the command calibrates with text" in capsys.readouterr().err
    assert main([*command, "--method", "kmeans"]) == 0


def test_a_size_counts_tensors_that_are_copied(tmp_path, capsys) -> None:
    """A head that the class has no place for is half of this folder."""
    from transformers import BertConfig, BertForPreTraining

    head = BertForPreTraining(
        BertConfig(tie_word_embeddings=False, **(BERT | {"hidden_size": 64, "num_hidden_layers": 2}))
    )
    source = saved(head, tmp_path / "source")
    described = json.loads((source / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (source / "config.json").write_text(json.dumps(described))
    command = ["compress", str(source), str(tmp_path / "out"), *SMALL, "--exclude", "pooler"]
    assert main([*command, "--bits", "3"]) == 0
    assert "are copied as they are: cls." in capsys.readouterr().err
    nbytes = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    bits = {}
    for size in (nbytes, nbytes // 2):
        bits[size] = main([*command, "--size", f"{size}B", "--dry-run"]), capsys.readouterr()
    assert bits[nbytes][0] == 0 and 2 < float(re.search(r"weights: ([\d.]+) bits", bits[nbytes][1].out)[1]) < 5
    assert bits[nbytes // 2][0] == 1 and "in tensors that the model has no place for" in bits[nbytes // 2][1].err


def test_a_dry_run_refuses_what_the_job_refuses(tmp_path) -> None:
    """Marian's positions are in no file: the model computes them, which block by block does not happen."""
    from transformers import MarianConfig, MarianMTModel

    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    marian = MarianMTModel(MarianConfig(vocab_size=512, pad_token_id=0, decoder_start_token_id=0, **small))
    source = saved(marian, tmp_path / "source", tokenizer=False)
    ids = torch.randint(3, 512, (1, 8))
    config = pyllmq.ColumnCodebookConfig.preset("fast", 4.0)
    for job in (pyllmq.compress_folder, plan_folder):
        with pytest.raises(ValueError, match="does not hold model.encoder.embed_positions.weight"):
            job(source, tmp_path / "out", config, [{"input_ids": ids, "decoder_input_ids": ids}])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    models.tiny_llama(num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ((), "looked for tokenizer.json, tokenizer.model, .*there is none of them; copy the tokenizer's files"),
        (("tokenizer.json",), "there is tokenizer.json, but: "),
        (("tiktoken.model",), "tiktoken.model needs a package that is not installed: pip install tiktoken"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(llama, tmp_path, capsys, monkeypatch, there, message) -> None:
    import importlib.util
    import shutil

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tiktoken" else find(name, *a))
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    for name in there:
        (source / name).write_text("no tokenizer")
    assert main(["compress", str(source), str(tmp_path / "out"), *SMALL]) == 1
    said = capsys.readouterr().err
    assert str(source) in said and re.search(message, said) and "--method kmeans or magnitude or pack" in said, said
    assert main(["compress", str(source), str(tmp_path / "out"), "--method", "kmeans", "--quiet"]) == 0
    assert all((tmp_path / "out" / name).read_text() == "no tokenizer" for name in there)


@pytest.mark.parametrize("options", [["--method", "kmeans"], SMALL, [*SMALL, "--in-memory"]])
def test_what_is_not_replaced_is_copied(tmp_path, options) -> None:
    source = saved(models.tiny_llama(num_hidden_layers=1), tmp_path / "source")
    (source / "1_Pooling").mkdir()
    for name in ("modules.json", "1_Pooling/config.json", "LICENSE", "chat_template.jinja", "README.md"):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_text("weights of another kind")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("mine")
    out = tmp_path / "out"
    assert main(["compress", str(source), str(out), *options]) == 0
    for name in ("modules.json", "1_Pooling/config.json", "LICENSE", "chat_template.jinja", "README.md"):
        assert (out / name).read_text() == name
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (out / "pytorch_model.bin").exists() and not (out / ".git").exists()
    assert "quantization_config" in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("more", [[], ["--include", "layers"]])
def test_a_head_that_is_named_is_packed(llama, tmp_path, more) -> None:
    command = ["compress", str(llama), str(tmp_path / "out"), "--method", "kmeans", "--quiet", "--include", "lm_head"]
    assert main([*command, *more]) == 0
    packed = pyllmq.from_pretrained(tmp_path / "out")
    assert isinstance(packed.lm_head, pyllmq.CodebookLinear)
    assert isinstance(packed.model.layers[0].mlp.up_proj, pyllmq.CodebookLinear) == bool(more)


def test_classifiers_and_two_rows_of_blocks_are_guided_block_by_block(tmp_path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    batches = models.token_batches(2, 12)
    source = saved(BertForSequenceClassification(BertConfig(**BERT)).eval(), tmp_path / "source", tokenizer=False)
    config = pyllmq.ColumnCodebookConfig.preset("balanced", 4.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*guidance='none'.*")
        pyllmq.compress_folder(source, tmp_path / "out", config, batches, exclude=("pooler",), progress=False)
        whole = loading.load_model(source)
        pyllmq.compress(whole, config, batches, exclude=("pooler",), progress=False)
        packed = pyllmq.from_pretrained(tmp_path / "out", fuse=False)
        with torch.no_grad():
            found, expected = (model(input_ids=batches[0]).logits for model in (packed, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        two_rows = [{"input_ids": ids, "decoder_input_ids": ids[:, :8]} for ids in batches]
        source = saved(models.tiny_t5(), tmp_path / "t5", tokenizer=False)
        pyllmq.compress_folder(source, tmp_path / "t5-out", config, two_rows, progress=False)


@pytest.mark.parametrize("method", ["mixed", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", [None, "owl"])
def test_activations_that_are_not_finite_are_said(method, allocation) -> None:
    model = models.tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    config = pyllmq.SparseConfig(0.5, method=method, allocation=allocation)
    with pytest.raises(ValueError, match="not finite"):
        pyllmq.compress(model, config, models.token_batches(1), progress=False)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("allocation", ["fisher", "hutchinson"])
def test_a_text_of_one_token(allocation) -> None:
    batches = [*models.token_batches(2), torch.tensor([[5]])]
    config = pyllmq.SparseConfig(0.5, allocation=allocation)
    report = pyllmq.compress(models.tiny_llama(), config, batches, progress=False)
    assert 0 < report.mean_error < 1


def test_linears_that_no_token_reaches_have_statistics_on_their_device() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8, device="meta")})])

        def forward(self, x):
            return self.layers[0]["a"](x)

    found = {}
    visit_groups(Routed(), [{"x": torch.randn(9, 8)}], lambda group, inputs: found.update(dict.fromkeys(group, inputs)))
    assert found["layers.0.a"].reached and not found["layers.0.b"].reached
    assert found["layers.0.b"].hessian.device.type == "meta"


def test_tuning_leaves_the_forward_of_hooks_in_its_place() -> None:
    """accelerate's hooks are an instance attribute `forward`."""
    dense = models.tiny_llama()
    model = models.tiny_llama()
    model.load_state_dict(dense.state_dict())
    pyllmq.compress(model, pyllmq.KMeansConfig(3), progress=False)
    block, calls = model.model.layers[0], []
    plain = block.forward
    block.forward = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    hooked = block.forward
    pyllmq.tune_codebooks(model, dense, models.token_batches(1), steps=1, checkpoint=True, progress=False)
    assert block.forward is hooked and calls and "forward" not in vars(model.model.layers[1])


def test_windows_fit_the_positions_of_the_model() -> None:
    tokenizer = models.tiny_tokenizer()
    (first, *_) = calibration.batches_of_text(short_bert(), tokenizer, "the word " * 100, 1, 512)
    assert first["input_ids"].shape == (1, 32)
    (first, *_) = calibration.batches_of_text(short_roberta(), tokenizer, "the word " * 100, 1, 512)
    assert first["input_ids"].shape == (1, 29)
    with pytest.raises(ValueError, match="holds no line with text"):
        calibration.batches_of_text(short_bert(), tokenizer, " \n ", 1, 8)


def test_doctor_with_a_wrong_back_end_says_all_the_rest(capsys, monkeypatch) -> None:
    monkeypatch.setenv("PYLLMQ_BACKEND", "cdua")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert (
        "PYLLMQ_BACKEND" in printed
        and "cdua" in printed
        and "kernels, in the order in which they are tried:" in printed
    )


def test_a_fault_of_ours_shows_where_it_is(monkeypatch) -> None:
    """A TypeError is no mistake of the user's, so it is not shortened to a line."""
    monkeypatch.setattr("pyllmq.cli.run_inspect", lambda given: len(None))
    with pytest.raises(TypeError):
        main(["inspect", "folder"])


def test_importing_needs_no_module_of_unix() -> None:
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import pyllmq"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_more_tokens_than_positions(tmp_path, capsys) -> None:
    """Learned positions end: the command says where, instead of an IndexError."""
    folder = str(saved(models.tiny_gpt2(), tmp_path / "source"))
    assert main(["eval", folder, "--seqlen", "300", "--max-tokens", "600"]) == 1
    assert "300 tokens were asked for, and the model has 256 positions" in capsys.readouterr().err
    assert main(["generate", folder, "--prompt", "a" * 600, "--max-new-tokens", "2"]) == 1
    assert "and the model has 256 positions" in capsys.readouterr().err
    assert main(["generate", folder, "--prompt", ""]) == 1
    assert "--prompt is '', which has no tokens; give at least one" in capsys.readouterr().err


@pytest.mark.parametrize(("make", "limit"), [(models.tiny_gpt2, 256), (short_bert, 32), (short_roberta, 29)])
def test_batches_longer_than_the_positions(tmp_path, make, limit) -> None:
    """By index (GPT-2), by the shape of a buffer (BERT), counted from the padding's id on (RoBERTa)."""
    make().save_pretrained(tmp_path / "source")
    config = pyllmq.CLAQConfig(bits=2)
    jobs = (
        lambda batches: pyllmq.compress(make(), config, batches, progress=False),
        lambda batches: pyllmq.compress_folder(tmp_path / "source", tmp_path / "out", config, batches, progress=False),
    )
    said = f"{limit + 1} tokens were asked for, and the model has {limit} positions"
    for job in jobs:
        job([torch.randint(3, 60, (1, 8)), torch.randint(3, 60, (1, limit))])
        with pytest.raises(ValueError, match=said):
            job([torch.randint(3, 60, (1, 8)), torch.randint(3, 60, (1, limit + 1))])


def test_what_cannot_work_is_refused_before_the_work(llama, tmp_path, capsys) -> None:
    assert main(["compress", str(llama), str(llama), "--method", "kmeans"]) == 1
    assert "SRC and OUT are the same folder" in capsys.readouterr().err
    assert main(["compress", str(llama), str(tmp_path / "out"), "--method", "kmeans", "--workers", "0"]) == 1
    assert "workers is 0; it must be an integer >= 1" in capsys.readouterr().err
    report = ["--report", str(tmp_path / "no folder" / "report.json")]
    assert main(["compress", str(llama), str(tmp_path / "out"), "--method", "kmeans", *report]) == 1
    assert "there is no folder" in capsys.readouterr().err and not list(tmp_path.iterdir())

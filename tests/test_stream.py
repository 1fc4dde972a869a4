"""Compression from folder to folder: the same bytes as in memory, one block at a time, resumable, whole files or none."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pyllmq
from pyllmq import CLAQConfig, ColumnCodebookConfig, SparseConfig, compress_folder, loading
from pyllmq.cli import main
from pyllmq.compression.jobs.folder import HiddenStates
from pyllmq.compression.jobs.manifest import Manifest, working_folder
from pyllmq.compression.ranks import ALONE
from pyllmq.compression.statistics.blocks import BlockLoop, find_stages
from pyllmq.compression.statistics.loss_gradients import output_gradients, output_gradients_by_block
from pyllmq.integrations.checkpoint import StreamedModel
from pyllmq.weights import OUTSIDE

from . import models
from .kill_and_resume import digests, ended_after
from .new_process import run_python

FAST = ColumnCodebookConfig.preset("fast", 3)
KILLS = int(os.environ.get("PYLLMQ_KILLS", "2"))


@pytest.fixture(autouse=True)
def _no_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()


def small_llama(**changes):
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return models.tiny_llama(**(sizes | changes))


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def small_batches(count: int = 3) -> list[torch.Tensor]:
    return models.token_batches(count, 16, 128)


def streamed(source, output, config=FAST, batches=None, **more):
    return compress_folder(
        source, output, config, small_batches() if batches is None else batches, progress=False, **more
    )


@pytest.mark.parametrize(
    ("make", "config", "more"),
    [
        (small_llama, ColumnCodebookConfig(bits=3, cycles=1), {}),
        (lambda: small_llama(tie_word_embeddings=True).bfloat16(), CLAQConfig(bits=3.12, outliers=0.005), {}),
        (lambda: small_llama(num_hidden_layers=3), SparseConfig(0.5, method="wanda", allocation="owl"), {}),
        (lambda: small_llama(num_hidden_layers=3), FAST, {"include": ["layers.1"]}),
        (models.tiny_bert, replace(FAST, guidance="rows+tokens"), {"include": ["pooler", "layer.1"]}),
        (models.tiny_gpt2, SparseConfig(pattern="2:4", method="magnitude"), {}),
        (models.tiny_t5, FAST, {}),
        (models.tiny_gemma3, FAST, {}),
        (models.tiny_mixtral, FAST, {"exclude": (*pyllmq.swap.DEFAULT_EXCLUDE, "experts")}),
    ],
)
def test_the_same_as_in_memory(tmp_path, make, config, more):
    source, output, reference = saved(make(), tmp_path / "source"), tmp_path / "output", tmp_path / "reference"
    batches = small_batches()
    if make is models.tiny_t5:
        batches = [{"input_ids": ids, "decoder_input_ids": ids[:, :8]} for ids in batches]
    model = loading.load_model(source)
    wanted = pyllmq.compress(model, config, batches, progress=False, **more)
    pyllmq.save_pretrained(model, reference)
    report = streamed(source, output, config, batches, **more)
    a, b = tensors(output), tensors(reference)
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
    assert json.loads((output / "config.json").read_text()) == json.loads((reference / "config.json").read_text())
    rows = [[replace(layer, seconds=0) for layer in r.layers] for r in (report, wanted)]
    assert rows[0] == rows[1] and report.left_dense == wanted.left_dense and report.peak_memory > 1e8
    assert {p.name for p in tmp_path.iterdir()} == {"source", "output", "reference"}
    loaded = pyllmq.from_pretrained(output)
    batch = batches[0] if isinstance(batches[0], dict) else {"input_ids": batches[0]}
    torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0])


def tiny_falcon_h1():
    from transformers import FalconH1Config, FalconH1ForCausalLM

    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return FalconH1ForCausalLM(
        FalconH1Config(**sizes, **mamba, num_key_value_heads=2, ssm_multipliers=[0.5] * 5)
    ).eval()


@pytest.mark.parametrize(
    "make", [models.tiny_llama, models.tiny_gpt2, models.tiny_gemma3, models.tiny_t5, tiny_falcon_h1]
)
def test_what_no_file_holds_is_computed(tmp_path, make):
    """The model computes some buffers by itself, in Falcon-H1 those of the modules below the one that computes."""
    model = make()
    model.save_pretrained(tmp_path)
    found = dict(StreamedModel(tmp_path).model.named_buffers())
    for name, buffer in model.named_buffers():
        if not found[name].is_meta:  # in the files
            assert torch.equal(found.pop(name), buffer), name
    assert all(buffer.is_meta for buffer in found.values())


def test_one_block_at_a_time(tmp_path, monkeypatch):
    source = saved(small_llama(num_hidden_layers=4), tmp_path / "source")
    there: list[set[str]] = []
    load = StreamedModel.load

    def spy(self, unit):
        load(self, unit)
        names = [name for name, p in self.model.named_parameters() if not p.is_meta]
        there.append({self.unit_of(name) for name in names})

    monkeypatch.setattr(StreamedModel, "load", spy)
    streamed(source, tmp_path / "output", replace(FAST, guidance="rows"))
    assert len(there) > 12 and all(len(units - {OUTSIDE}) <= 1 for units in there)
    alone = [units for units in there if OUTSIDE not in units]
    assert len(alone) >= 3 * 4, "while blocks are worked on, what is outside of them is not in memory"


@pytest.mark.parametrize("make", [small_llama, models.tiny_bert])
def test_gradients_block_by_block(tmp_path, make):
    source = saved(make(), tmp_path / "source")
    batches = [{"input_ids": ids} for ids in small_batches()]
    if make is models.tiny_bert:
        for batch in batches:
            batch["attention_mask"] = (torch.arange(16) < 11).long().expand(2, -1)
    model = loading.load_model(source)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ("layers" in n or "layer." in n)}
    wanted = output_gradients(model, linears, batches)
    streamed_model = StreamedModel(source)
    stages = find_stages(streamed_model.model, {n: streamed_model.model.get_submodule(n) for n in linears}, False)
    streamed_model.split(stage.name for stage in stages)
    loop = BlockLoop(streamed_model.model, batches[0], batches, streamed_model)
    with torch.no_grad():
        chains = loop.find_chains(stages)
        inside = {n: m for s in stages for n, m in s.linears.items()}
        found = output_gradients_by_block(loop, chains, inside, HiddenStates(tmp_path, "x", ALONE))
    assert found.row_weights.keys() == wanted.row_weights.keys() == linears.keys()
    for name in linears:
        torch.testing.assert_close(found.row_weights[name], wanted.row_weights[name], rtol=1e-4, atol=1e-5)
        for a, b in zip(found.token_weights[name], wanted.token_weights[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not loop.outputs and [p.name for p in tmp_path.iterdir()] == ["source"]


def test_killed_at_random_moments_and_resumed():
    # In a process of its own: after a backward pass here, forked children could make none.
    script = Path(__file__).with_name("kill_and_resume.py")
    done = run_python(script, "--kills", KILLS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["kills"].values()) >= KILLS and found["resumed"] and found["folders compared"]


class Stop(Exception):
    pass


def interrupted(source, output, blocks, **more):
    """A job that ends after so many finished blocks."""
    with pytest.raises(Stop), ended_after(blocks, Stop):
        streamed(source, output, **more)


def test_resume_refuses_another_job(tmp_path):
    model = small_llama()
    source, output = saved(model, tmp_path / "source"), tmp_path / "output"
    batches = small_batches()
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        streamed(source, output, resume=True)
    interrupted(source, output, 1, batches=batches)
    assert not output.exists()
    with pytest.raises(FileExistsError, match="unfinished compression.*--resume"):
        streamed(source, output, batches=batches)
    for change, message in (
        ({"config": replace(FAST, bits=3.5)}, "config.bits was 3.0, is 3.5|config.bits was 3, is 3.5"),
        ({"config": CLAQConfig(bits=3)}, "config.correct_bias was True, is missing.* and .* more"),
        ({"batches": [*batches[:-1], batches[-1].flip(0)]}, "calibration was"),
        ({"exclude": (*pyllmq.swap.DEFAULT_EXCLUDE, "o_proj")}, "linears was"),
    ):
        with pytest.raises(ValueError, match=message):
            streamed(source, output, **({"batches": batches} | change), resume=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=f"threads was {threads}, is {threads + 1}"):
            streamed(source, output, batches=batches, resume=True)
    finally:
        torch.set_num_threads(threads)
    kept = next((working_folder(output) / "folder").glob("*.safetensors"))
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match="not as it was written"):
        streamed(source, output, batches=batches, resume=True)
    kept.write_bytes(whole)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    saved(model, source)
    with pytest.raises(ValueError, match="source.model-0000.*was"):
        streamed(source, output, batches=batches, resume=True)


def test_what_a_kill_left_half_written_does_not_stay(tmp_path):
    source = saved(small_llama(), tmp_path / "source")
    whole, output = tmp_path / "whole", tmp_path / "output"
    batches = small_batches()
    streamed(source, whole, batches=batches)
    interrupted(source, output, 2, batches=batches)
    place = working_folder(output)
    for stray in ("folder/.tmpAbc123", "folder/config.json", ".tmpDef456", "hidden.model.layers.1.safetensors.part"):
        (place / stray).write_bytes(b"half")
    (place / "folder" / "additional_chat_templates").mkdir()
    with patch.object(Manifest, "remove"):  # as if killed between the last two steps
        streamed(source, output, batches=batches, resume=True)
    assert digests(output) == digests(whole)
    assert not [file.name for file in place.iterdir() if file.name.startswith(".tmp") or file.suffix == ".part"]
    with pytest.raises(FileNotFoundError, match="nothing to resume: .*output is finished; .*partial can be deleted"):
        streamed(source, output, batches=batches, resume=True)
    streamed(source, output, batches=batches)
    assert digests(output) == digests(whole) and not place.exists()


@pytest.fixture(scope="module")
def two_chains(tmp_path_factory):
    """An encoder-decoder's folder, its batches, the folder of an undisturbed run and its report."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("two-chains")
    source = saved(models.tiny_t5(), place / "source")
    batches = [{"input_ids": ids, "decoder_input_ids": ids[:, :8]} for ids in small_batches()]
    return source, batches, place / "whole", streamed(source, place / "whole", batches=batches)


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_resume_across_chains(two_chains, tmp_path, blocks):
    """An encoder's output is needed again by the decoder that is resumed; reports and warnings are those of one run."""
    source, batches, undisturbed, whole = two_chains
    interrupted(source, tmp_path / "output", blocks, batches=batches)
    resumed = streamed(source, tmp_path / "output", batches=batches, resume=True)
    assert digests(tmp_path / "output") == digests(undisturbed)
    assert [layer.name for layer in resumed.layers] == [layer.name for layer in whole.layers]
    assert resumed.seconds > 0 and not working_folder(tmp_path / "output").exists()


def test_two_at_once(tmp_path):
    source, output = saved(small_llama(), tmp_path / "source"), tmp_path / "output"
    batches = small_batches()
    interrupted(source, output, 1, batches=batches)
    with (working_folder(output) / "lock").open("w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is at work"):
            streamed(source, output, batches=batches, resume=True)


def test_damaged_and_unfit_sources(tmp_path):
    source, output = saved(small_llama(), tmp_path / "source"), tmp_path / "output"
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) >= 2
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises((pyllmq.FormatError, ValueError, OSError), match=shards[1].name):
        streamed(source, output)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        streamed(source, output)
    shards[1].write_bytes(whole)
    index = source / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text("{")
    with pytest.raises(pyllmq.FormatError, match="index.json cannot be read"):
        streamed(source, output)
    index.write_text(text)
    with pytest.raises(ValueError, match="tuning .* needs the whole model"):
        streamed(source, output, replace(FAST, tune_steps=3))
    with pytest.raises(ValueError, match="0 calibration batches|calibration is empty"):
        streamed(source, output, batches=[])
    streamed(source, output)
    with pytest.raises(ValueError, match="quantized already"):
        streamed(output, tmp_path / "again")
    assert not working_folder(tmp_path / "again").exists()
    bad = small_llama()
    bad.model.layers[1].mlp.down_proj.weight.data[2, 2] = torch.nan
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj.weight holds 1 values that are not finite"):
        streamed(saved(bad, tmp_path / "bad"), tmp_path / "again")


def limited(nbytes: int, *arguments: str) -> subprocess.CompletedProcess:
    """The command in a process that can write no file above `nbytes`: what a full disk does."""
    code = "import resource, sys; from pyllmq.cli import main; limit = int(sys.argv.pop(1)); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); sys.exit(main())"
    return run_python("-c", code, nbytes, *arguments)


def test_a_full_disk_and_then_more_room(tmp_path):
    source, output = saved(small_llama(vocab_size=512), tmp_path / "source"), tmp_path / "output"
    models.tiny_tokenizer().save_pretrained(source)
    arguments = [
        "compress",
        str(source),
        str(output),
        "--preset",
        "fast",
        "--samples",
        "2",
        "--seqlen",
        "16",
        "--quiet",
    ]
    # Blocks fit, the embeddings do not.
    done = limited(50_000, *arguments)
    assert done.returncode == 1 and "cannot be written" in done.stderr and "--resume goes on" in done.stderr, (
        done.stderr
    )
    assert "14 of 14 Linears are finished" in done.stderr and not output.exists()
    assert not list(working_folder(output).rglob("*.part"))
    assert main([*arguments, "--resume"]) == 0
    assert main([*(str(tmp_path / "whole") if a == str(output) else a for a in arguments)]) == 0
    assert digests(output) == digests(tmp_path / "whole") and not working_folder(output).exists()


def test_an_output_that_cannot_be_made(tmp_path, capsys):
    source = saved(small_llama(), tmp_path / "source")
    with pytest.raises(OSError):
        streamed(source, "/proc/pyllmq/output")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        streamed(source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_earlier_folder_is_replaced_at_the_end(tmp_path):
    source, output = saved(small_llama(), tmp_path / "source"), tmp_path / "output"
    batches = small_batches()
    streamed(source, output, batches=batches)
    before = digests(output)
    interrupted(source, output, 1, batches=batches, config=replace(FAST, bits=4))
    assert digests(output) == before
    streamed(source, output, replace(FAST, bits=4), batches, resume=True)
    assert digests(output) != before and {p.name for p in tmp_path.iterdir()} == {"source", "output"}


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    small_llama(vocab_size=512).save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


SMALL = ["--preset", "fast", "--samples", "2", "--seqlen", "16", "--quiet"]


def test_ctrl_c_says_how_to_go_on(command_source, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["compress", str(command_source), str(output), *SMALL]
    with ended_after(1, KeyboardInterrupt):
        assert main(arguments) == 130
    printed = capsys.readouterr().err
    assert "interrupted; 7 of 14 Linears are finished" in printed and "--resume goes on from there" in printed
    assert main([*arguments, "--resume"]) == 0
    assert "written to" in capsys.readouterr().out and (output / "tokenizer.json").exists()


def test_dry_run_writes_nothing(command_source, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["compress", str(command_source), str(output), *SMALL, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "14 Linears in 2 blocks" in printed and "minutes" in printed and "Nothing was written" in printed
    assert not list(tmp_path.iterdir())
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert f"{weights / 1e6:.2f} M weights: 3 bits" in printed


def test_what_needs_the_whole_model_says_so(command_source, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["compress", str(command_source), str(output), *SMALL]
    for more, message in (
        (["--tune", "1", "--resume"], "--resume goes block by block, which is not possible here: tuning"),
        (["--in-memory", "--dry-run"], "--dry-run goes block by block, which is not possible here: --in-memory"),
    ):
        assert main([*arguments, *more]) == 1
        assert message in capsys.readouterr().err
    assert main([*arguments, "--tune", "1"]) == 0
    assert "tuning (tune_steps=1) trains all layers at once" in capsys.readouterr().err
    shutil.rmtree(output)
    assert main([*arguments, "--in-memory"]) == 0
    assert "whole model" not in capsys.readouterr().err

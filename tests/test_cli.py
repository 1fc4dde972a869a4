"""The command line as a user meets it: each command on a small real folder, and errors that help."""

import json

import pytest
import torch

import pyllmq
from pyllmq import _cpu
from pyllmq.cli import main
from pyllmq.folders import PackedFolder

from . import models
from .new_process import run_python

VECTORS = {"amx": "avx512", "avx_vnni": "avx2"}
"""Of an instruction set that has none of its own for few tokens."""

SMALL = ["--samples", "4", "--seqlen", "32", "--quiet"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cli") / "dense"
    models.tiny_llama(tie_word_embeddings=False).save_pretrained(path)
    models.tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "packed"
    arguments = [
        "compress",
        str(source),
        str(path),
        "--method",
        "claq",
        "--bits",
        "3.12",
        "--samples",
        "4",
        "--seqlen",
        "32",
        "--quiet",
    ]
    assert main(arguments) == 0
    return path


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return file


def test_compress_prints_a_report_and_writes_a_folder(source, tmp_path, capsys):
    out, report = tmp_path / "out", tmp_path / "report.json"
    code = main(["compress", str(source), str(out), "--method", "claq", "--bits", "2.1", "--samples", "4", "--seqlen", "32",
                 "--report", str(report)])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0 and "model.layers.0.self_attn.q_proj" in printed and "true bits per weight" in printed
    assert len(json.loads(report.read_text())["layers"]) == 14
    model = pyllmq.from_pretrained(out)
    assert isinstance(model.model.layers[0].mlp.up_proj, pyllmq.CodebookLinear)
    structure = model.model.layers[0].mlp.up_proj.structure
    assert structure.columns[1] > structure.columns[3] > 0 == structure.outliers


def test_the_target_is_the_true_size(source, tmp_path, capsys):
    small = SMALL
    assert main(["compress", str(source), str(tmp_path / "a"), "--bits", "3.5", "--tune", "2", *small]) == 0
    weights = sum(s.out_features * s.in_features for s in PackedFolder.open(tmp_path / "a").structures.values())
    bits = 8 * sum(s.nbytes for s in PackedFolder.open(tmp_path / "a").structures.values()) / weights
    assert 3.4 < bits <= 3.5
    size = sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
    assert (
        main(["compress", str(source), str(tmp_path / "b"), "--size", f"{size / 1000}KB", "--preset", "fast", *small])
        == 0
    )
    assert sum(f.stat().st_size for f in (tmp_path / "b").iterdir()) == pytest.approx(size, rel=0.02)
    capsys.readouterr()
    for wrong, message in (
        (["--size", "2 apples"], "give a number with a unit"),
        (["--size", "1KB"], "bits per weight beside"),
        (["--size", "1MB", "--bits", "3"], "two targets"),
        (["--outliers", "0.01"], "choose --method claq or magnitude"),
        (
            ["--method", "claq", "--size", "1MB"],
            "--size 1MB does not go with --method claq; choose --method column-codebook",
        ),
    ):
        assert main(["compress", str(source), str(tmp_path / "c"), *small, *wrong]) == 1
        assert message in capsys.readouterr().err


def test_named_bits_bring_their_outliers(packed):
    structure = pyllmq.from_pretrained(packed).model.layers[0].mlp.up_proj.structure
    assert 0 < structure.outliers < 0.02 * structure.out_features * structure.in_features


def test_compress_with_own_text_and_patterns(source, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compress", str(source), str(out), "--bits", "4", "--calibration", str(text), "--samples", "2", "--seqlen", "16",
                 "--include", "layers.1", "--exclude", "down_proj", "--quiet"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    names = set(json.loads(capsys.readouterr().out))
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj")
    layer = "model.layers.1"
    assert names == {f"{layer}.self_attn.{n}" for n in attention} | {f"{layer}.mlp.{n}" for n in mlp}


def test_eval(packed, text, capsys):
    assert main(["eval", str(packed), "--text", str(text), "--seqlen", "32", "--max-tokens", "100", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    model, tokenizer = pyllmq.from_pretrained(packed), pyllmq.loading.load_tokenizer(packed)
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][0, :100]
    losses = [
        torch.nn.functional.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:], reduction="sum")
        for w in ids.split(32)
    ]
    assert row["perplexity"] == pytest.approx(float(torch.exp(sum(losses) / row["tokens"])), rel=1e-4)
    assert row["tokens"] == 96 and row["decode_tokens_per_second"] > 0
    assert main(["eval", str(packed), "--seqlen", "64", "--max-tokens", "128"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_eval_works_on_a_dense_folder_too(source, capsys):
    assert main(["eval", str(source), "--seqlen", "32", "--max-tokens", "64"]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_precision_reaches_the_packed_layers(source, packed, capsys, monkeypatch):
    asked = []
    run = pyllmq.ops.packed_linear
    monkeypatch.setattr(pyllmq.ops, "packed_linear", lambda *args: asked.append(args[3]) or run(*args))
    assert main(["generate", str(packed), "--prompt", "The", "--max-new-tokens", "2", "--precision", "exact"]) == 0
    assert main(["eval", str(packed), "--seqlen", "16", "--max-tokens", "32", "--precision", "fast"]) == 0
    assert set(asked) == {"exact", "fast"}
    capsys.readouterr()
    assert main(["generate", str(source), "--prompt", "The", "--precision", "fast"]) == 1
    assert "no packed layer" in capsys.readouterr().err


def test_generate(packed, capsys):
    arguments = ["generate", str(packed), "--prompt", "The quick brown", "--max-new-tokens", "5"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out == first and first.startswith("The quick brown")


def test_inspect(packed, capsys):
    assert main(["inspect", str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 14 + 2 and "14 packed Linears" in lines[-2]
    assert lines[-1].startswith("other files: ") and "tokenizer.json" in lines[-1]
    structures = PackedFolder.open(packed).structures
    assert f"{sum(s.nbytes for s in structures.values()) / 1e6:.2f} MB" in lines[-2]


def test_inspect_says_what_is_fused(packed, capsys):
    assert main(["inspect", str(packed), "--fused"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model.layers.0", "fused"]
    assert lines[-1] == "2 of 2 modules run as native steps"


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "torch",
        torch.__version__.split("+")[0],
        "cpu        works",
        "cuda       missing",
        "reference  works",
        "native steps (pyllmq.fuse): works: ",
        f"kernels of pyllmq._cpu on this processor ({_cpu.isa()}); faster would be ",
        f"codebook, few tokens{'':23}{VECTORS.get(_cpu.isa(), _cpu.isa().split('_')[0])}\n",
        "cpu        layout cpu.codebook\n             cpu.codebook_linear for 1, 2, 16, 64, 65, 512: tables of partial products",
        "cuda       layout checkpoint.codebook\n             reference.packed_linear for 1, 2, 16, 64, 65, 512: last row",
    ):
        assert expected in printed


def test_module_and_help(capsys):
    commands = ("compress", "eval", "generate", "inspect", "bench", "doctor")
    done = run_python("-m", "pyllmq", "--help")
    assert done.returncode == 0 and all(command in done.stdout for command in commands)
    for command in commands:
        with pytest.raises(SystemExit, match="^0$"):
            main([command, "--help"])
        assert "--help" in capsys.readouterr().out


def test_errors_are_one_line_on_stderr(source, packed, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep me")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    out = str(tmp_path / "out")
    small = ["--samples", "2", "--seqlen", "16", "--quiet"]
    for arguments, message in (
        (["compress", str(tmp_path / "none"), out], "no config.json"),
        (["compress", str(source), str(mine), *small], "is no packed folder"),
        (["compress", str(packed), str(packed), *small], "same folder"),
        (["compress", str(packed), out, *small], "already packed"),
        (["compress", str(source), out, "--bits", "9", *small], "1 to 8"),
        (["compress", str(source), out, "--calibration", str(tmp_path / "empty.txt"), *small], "tokens"),
        (["compress", str(source), out, "--calibration", str(tmp_path / "binary"), *small], "not UTF-8"),
        (["compress", str(source), out, "--calibration", str(tmp_path / "none"), *small], "No such file"),
        (["compress", str(source), out, "--include", "nothing", *small], "fits no Linear"),
        (["inspect", str(source)], "is not a pyllmq folder"),
        (["eval", str(tmp_path)], "no config.json"),
        (["bench", "--shapes", "gpt-17"], "gpt-17"),
        (["bench", "--m", "1,x"], "--m is"),
    ):
        assert main(arguments) == 1, arguments
        err = capsys.readouterr().err.strip()
        assert message in err and "Traceback" not in err, (arguments, err)
    assert not (tmp_path / "out").exists() and (mine / "notes.txt").read_text() == "keep me"
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "inspect", str(tmp_path / "none")])


def test_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pyllmq.benchmarks.run.cold_bytes_for", lambda *sizes: (100_000, ""))
    csv = tmp_path / "rows.csv"
    assert (
        main(["bench", "--op", "codebook_linear", "--shapes", "64x64", "--bits", "2", "--m", "1", "--csv", str(csv)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "torch fp32" in printed and "pyllmq" in printed and csv.stat().st_size > 100


def test_prune_and_run(source, tmp_path, capsys):
    out = tmp_path / "sparse"
    arguments = ["compress", str(source), str(out), "--method", "mixed-sparsity", "--sparsity", "0.6", "--samples", "3",
                 "--seqlen", "24", "--calibration", "self"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed and "true bits per weight" in printed
    model = pyllmq.from_pretrained(out)
    layers = [m for m in model.modules() if isinstance(m, pyllmq.SparseLinear)]
    kept, total = sum(m.structure.kept for m in layers), sum(m.in_features * m.out_features for m in layers)
    assert len(layers) == 14 and kept / total == pytest.approx(0.4, abs=0.01)
    assert main(["generate", str(out), "--prompt", "The", "--max-new-tokens", "3"]) == 0


def test_prune_and_quantize(source, tmp_path, capsys):
    out = tmp_path / "joint"
    assert main(["compress", str(source), str(out), "--method", "sparsegpt", "--pattern", "2:4", "--bits", "4", "--samples", "3",
                 "--seqlen", "24", "--quiet"]) == 0  # fmt: skip
    assert main(["inspect", str(out), "--json"]) == 0
    described = json.loads(capsys.readouterr().out.split("\n", 2)[2])
    assert {row["kind"] for row in described.values()} == {"sparse24_codebook"}


def test_a_checkpoint_pruned_elsewhere(source, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    for i, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                smallest = module.weight.abs().flatten().kthvalue(module.weight.numel() // 2).values
                mask = module.weight.abs() > smallest
                if i:
                    mask = torch.zeros_like(mask).scatter(
                        1, torch.arange(1, mask.shape[1], 2).expand(len(mask), -1), True
                    )
                if name != "self_attn.o_proj":
                    module.weight.data *= mask
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "packed"
    model.save_pretrained(elsewhere)
    AutoTokenizer.from_pretrained(source).save_pretrained(elsewhere)
    assert main(["compress", str(elsewhere), str(out), "--method", "pack"]) == 0
    assert "0 % zeros save nothing" in capsys.readouterr().out
    packed = pyllmq.from_pretrained(out)
    kinds = [type(layer.mlp.up_proj) for layer in packed.model.layers]
    assert kinds == [pyllmq.SparseLinear, pyllmq.Sparse24Linear]
    assert type(packed.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    ids = torch.randint(0, 512, (1, 9))
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    # The packed folder may not replace one that is not packed, and dense models have nothing to pack.
    assert main(["compress", str(source), str(tmp_path / "none"), "--method", "pack"]) == 1
    assert "none of 14 Linears has zeros that would save bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "0.5"], "choose --method magnitude or wanda or sparsegpt or mixed-sparsity"),
        (["--method", "wanda", "--sparsity", "1.5"], "sparsity is 1.5; allowed"),
        (["--method", "wanda", "--pattern", "2:5"], "pattern is '2:5'; allowed"),
    ],
)
def test_bad_pruning_settings(source, tmp_path, capsys, arguments, message):
    assert main(["compress", str(source), str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err

"""README.md and docs/: numbers are the CSVs', pictures the script's, sentences short, and every block runs or is named here.

docs/serving.md, docs/large-models.md and the Python of README.md have tests of their own: test_serving_docs.py,
test_large_models_docs.py, test_readme.py.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pyllmq
from pyllmq.benchmarks import tables
from pyllmq.cli import build_parser, main
from pyllmq.compression import calibration
from pyllmq.folders import is_packed

from . import models

ROOT = Path(__file__).parent.parent
if not (tables.ROOT / "README.md").exists():
    pytest.skip("pyllmq is not imported from the repository, where the pages are", allow_module_level=True)
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in tables.pages()}
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
MOST_WORDS = 45
ELSEWHERE = ("docs/serving.md", "docs/large-models.md")

NEEDS = {
    "make": "minutes and a package index; CI runs them",
    "pip install": "a package index",
    "vllm serve": "a GPU server",
    "torchrun": "tests/test_serving_docs.py runs the same command",
    "benchmarks/run_gpu.sh": "a GPU; tests/test_gpu_benchmarks.py",
    "pytest benchmarks": "a quiet machine",
    "python -m pyllmq.benchmarks": "minutes; tests/test_benchmarks.py and its neighbours run them small",
    "python examples/distill.py": "minutes; tests/test_distill.py",
    "python examples/train_tiny_lm.py": "minutes",
    "python docs/draw.py": "it would write into docs/; test_pictures",
    "pyllmq bench": "minutes; tests/test_benchmarks.py, tests/test_benchmarks_sparse.py, tests/test_benchmarks_model.py",
    "pyllmq compress my-whisper": "recordings; tests/test_media.py",
    "pyllmq compress my-model my-model-shallow": "a model of several layers; tests/test_structured.py",
    "python examples/distill_whisper.py": "minutes, a package and espeak-ng; tests/test_whisper.py",
    "pyllmq compress my-vit": "pictures; tests/test_media.py",
    "pyllmq compress my-model packed-to-size": "a model of that size; tests/test_cli.py",
}
"""Begin of a command -> what it needs, or which test runs it on something small."""

NAMES = {
    "docs/kernels-kmeans.md": lambda: {
        "pyllmq": pyllmq,
        "values": torch.randn(3, 60),
        "weights": torch.rand(3, 60) + 0.1,
    },
}
"""Page -> what its Python takes for granted."""


def blocks(page, language):
    return [code for found, code in FENCED.findall(PAGES[page]) if found == language]


def commands(page):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def needs(words):
    return [begin for begin in NEEDS if " ".join(words).startswith(begin)]


def prose(page):
    """Without blocks, tables, headings and comments, one item or paragraph each."""
    text = re.sub(r"<!--.*?-->", "", FENCED.sub("", PAGES[page]), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!\[|!!!|    \w)", line)]
    return re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", "\n".join(lines))


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_csvs(page):
    assert tables.with_tables(PAGES[page]) == PAGES[page], "run python -m pyllmq.benchmarks.tables"
    assert PAGES[page].count("<!-- table:") == len(tables.BLOCK.findall(PAGES[page]))


def test_every_table_stands_somewhere():
    assert set(tables.TABLES) == {name for text in PAGES.values() for _, name, _, _ in tables.BLOCK.findall(text)}


def test_pictures():
    pictures = runpy.run_path(str(ROOT / "docs" / "draw.py"))["PICTURES"]
    for name, picture in pictures.items():
        assert (ROOT / "docs" / "img" / f"{name}.svg").read_text(encoding="utf-8") == picture().svg(), (
            "run docs/draw.py"
        )
        assert any(f"img/{name}.svg" in text for text in PAGES.values()), name


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    for part in prose(page):
        for sentence in re.split(r"(?<=[.!?])\s+", part):
            assert len(sentence.split()) <= MOST_WORDS, sentence
        assert not re.search(r"\b(drift|twins?|damaged?)\b", part), part


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_exists(page):
    inline = re.findall(r"`((?:pip|python|pytest|make) [^`]+)`", FENCED.sub("", PAGES[page]))
    for words in [*commands(page), *(shlex.split(text) for text in inline)]:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif words[0] == "python":
            module = words[2].replace("pyllmq.benchmarks.", "benchmarks/") if words[1] == "-m" else words[1]
            if module.startswith("vllm."):  # of an extra
                continue
            assert any((ROOT / path).exists() for path in (module, f"{module}.py")), words
        elif words[:2] == ["pip", "install"] and "[" in words[-1]:
            extra = re.search(r"\[(\w+)\]", words[-1])[1]
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), words
        elif words[:2] == ["pyllmq", "bench"]:
            build_parser().parse_args(words[1:])  # SystemExit for an option or a choice that does not exist


def test_what_a_command_needs_is_true():
    everything = [" ".join(words) for page in PAGES for words in commands(page)]
    for begin, reason in NEEDS.items():
        assert any(command.startswith(begin) for command in everything), begin
        assert all((ROOT / file).exists() for file in re.findall(r"tests/\w+\.py", reason)), reason


def small():
    return models.tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with all that the pages call by name."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("my-model", "my-llama", "my-student", "pruned-elsewhere"):
        model = small()
        if name == "pruned-elsewhere":
            for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
                linear.weight.data[:, ::2] = 0
        model.save_pretrained(folder / name)
        models.tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def where_the_pages_run(dense, tmp_path, monkeypatch):
    for folder in dense.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for name in ("text.txt", "test.txt"):
        (tmp_path / name).write_text("\n".join(calibration.builtin_paragraphs()[:60]), encoding="utf-8")
    packed = small()
    pyllmq.swap_linear(packed, lambda linear: pyllmq.CodebookLinear.from_dense(linear, 4))
    pyllmq.save_pretrained(packed, tmp_path / "my-model-packed", models.tiny_tokenizer())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def little(words):
    """The same command on little text, with few steps."""
    if words[1] == "compress":
        without_text = "--workers" in words or {"pack", "vocabulary"} & set(words)
        few_steps = ["--tune", "2"] if "--tune" in words or "best" in words else []
        return ["--quiet", *few_steps, *([] if without_text else ["--samples", "2", "--seqlen", "16"])]
    return {"eval": ["--max-tokens", "60"], "generate": ["--max-new-tokens", "2"]}.get(words[1], [])


RUN_HERE = {
    page: runs
    for page in PAGES
    if page not in ELSEWHERE and (runs := [words for words in commands(page) if not needs(words)])
}


@pytest.mark.parametrize("page", RUN_HERE)
def test_commands_run(page, where_the_pages_run, capsys):
    for words in RUN_HERE[page]:
        assert words[0] == "pyllmq", f"{words} neither runs here nor is named in NEEDS"
        assert main([*words[1:], *little(words)]) == 0, (words, capsys.readouterr().err)
        if words[1] == "compress" and "--dry-run" not in words:
            load = pyllmq.from_pretrained if is_packed(words[3]) else AutoModelForCausalLM.from_pretrained
            model = load(words[3])
            assert model(torch.randint(0, 99, (1, 4))).logits.shape == (1, 4, model.config.vocab_size)


@pytest.mark.parametrize("page", [p for p in PAGES if p not in (*ELSEWHERE, "README.md") and blocks(p, "python")])
def test_python_runs(page, where_the_pages_run):
    names = NAMES.get(page, dict)()
    for block in blocks(page, "python"):
        exec(block, names)
    if "report" in names:
        assert names["report"].layers and 0 < names["report"].bits_per_weight < 32
    if "loss" in names:
        assert bool(torch.isfinite(names["loss"]))

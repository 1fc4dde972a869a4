"""The Python in README.md runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from pyllmq import CodebookWeight
from pyllmq.compression import calibration

from . import models

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def where_the_examples_run(tmp_path, monkeypatch):
    models.tiny_llama().save_pretrained(tmp_path / "my-model")
    models.tiny_tokenizer().save_pretrained(tmp_path / "my-model")
    (tmp_path / "text.txt").write_text("\n".join(calibration.builtin_paragraphs()[:60]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples_run(where_the_examples_run):
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {}
    exec(first, names)
    assert names["report"].bits_per_weight == pytest.approx(3, rel=0.02) and len(names["report"].layers) == 14
    assert type(names["model"]).__name__ == "LlamaForCausalLM" and (where_the_examples_run / "my-model-packed").is_dir()

    pyllmq = names["pyllmq"]
    names |= {
        "model": models.tiny_llama(),
        "linear": torch.nn.Linear(16, 32),
        "codes": torch.randint(0, 4, (8, 6)).to(torch.uint8),
        "codebook": torch.randn(24),
        "column_bits": torch.full((6,), 2),
        "x": torch.randn(3, 6),
        "values": torch.randn(5, 100),
        "cost": torch.rand(2, 6, 4),
        "student_logits": torch.randn(2, 5, 9),
        "teacher_logits": torch.randn(2, 5, 9),
        "labels": torch.randint(0, 9, (2, 5)),
        **dict.fromkeys("qkv", CodebookWeight.from_dense(torch.randn(8, 6), torch.full((6,), 3))),
    }
    exec(second, names)
    assert names["layer"].bits_per_weight > 3
    assert sum(isinstance(m, pyllmq.CodebookLinear) for m in names["model"].modules()) == 14
    expected = names["x"] @ names["weight"].dequantize().T
    torch.testing.assert_close(names["y"], expected, rtol=1e-3, atol=1e-3)  # the default precision
    assert names["qkv"].out_features == 24 and names["model"].model.layers[0].mlp.up_proj.precision == "fast"
    assert names["centroids"].shape == (5, 16) and names["codes"].shape == (5, 100)
    torch.testing.assert_close(names["plan"].sum(-1), torch.full((2, 6), 1 / 6), rtol=0.1, atol=0.01)
    assert names["loss"].dim() == 0 and bool(torch.isfinite(names["loss"]))


def test_each_yes_of_the_feature_table_has_its_test():
    section = README.read_text(encoding="utf-8").partition("## Beside its neighbours")[2].partition("\n## ")[0]
    head, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    columns = len(head.split("|"))
    assert len(lines) >= 10
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")]
        file, _, test = cells[-2].strip("`").partition("::")
        assert len(cells) == columns and cells[2].split(",")[0] in ("yes", "partly", "each column"), line
        assert f"def {test}(" in (README.parent / "tests" / file).read_text(encoding="utf-8"), line

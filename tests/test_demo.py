"""examples/demo.py on a tiny causal LM: what `make demo MODEL=...` does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import models

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.mark.slow
def test_demo_on_a_causal_model(tmp_path):
    models.tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    models.tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, str(DEMO), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in rows] == ["4 bits", "3 bits", "2.25 bits", "50 % kept", "2:4, 4 bits"]
    columns, kept, kept_codes = rows[:3], rows[3], rows[4]
    assert all(row["true_bits"] <= float(row["name"].split()[0]) for row in columns)
    assert all(a["true_bits"] > b["true_bits"] for a, b in zip(columns, columns[1:], strict=False))
    assert (
        9 < kept["true_bits"] < 10.5 and 3 < kept_codes["true_bits"] < 8
    )  # of small matrices codebooks are a large part
    assert all(row["packed_mb"] < row["dense_mb"] and row["fidelity"] > 1 for row in rows)
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in done.stdout and "perplexity" in table and len(table.splitlines()) == 2 + 1 + 5
    assert (tmp_path / "out" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    folders = {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()}
    assert folders == {"4-bits", "3-bits", "2.25-bits", "50-kept", "2-4-4-bits"}

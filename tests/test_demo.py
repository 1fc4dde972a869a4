"""examples/demo.py on a tiny causal LM: what `make demo MODEL=...` does."""

import json
import subprocess
import sys
from pathlib import Path

from . import models

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def test_demo_on_a_causal_model(tmp_path):
    models.tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    models.tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, str(DEMO), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["bits"] for row in rows] == [4.0, 3.0, 2.1, 2.12]
    assert rows[0]["true_bits"] > rows[1]["true_bits"] > rows[3]["true_bits"] > rows[2]["true_bits"]
    assert all(row["packed_mb"] < row["dense_mb"] and row["fidelity"] > 1 for row in rows)
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in done.stdout and "perplexity" in table and len(table.splitlines()) == 2 + 1 + 4
    assert (tmp_path / "out" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"claq-4", "claq-3", "claq-2.1", "claq-2.12"}

"""examples/distill.py, a few steps of it: what it prints and writes, and that a second run trains nothing."""

import json
from pathlib import Path

import pytest

from .new_process import run_python

DISTILL = Path(__file__).parent.parent / "examples" / "distill.py"


@pytest.mark.slow
def test_distil_with_and_without_the_term(tmp_path):
    command = [
        DISTILL,
        "--out",
        tmp_path,
        "--teacher-steps",
        "3",
        "--steps",
        "2",
        "--seeds",
        "1",
    ]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.txt").read_text()
    assert table in done.stdout
    assert [line.split("|")[1].strip() for line in table.splitlines()[3:]] == [
        "labels",
        "labels + KL",
        "labels + KL + Sinkhorn",
    ]
    results = sorted(tmp_path.glob("labels*-2-0.json"))
    found = [json.loads(path.read_text()) for path in results]
    assert len(found) == 3 and len({row["perplexity"] for row in found}) == 3
    assert all(1 < row["perplexity"] < 2000 and row["kl"] > 0 and 0 <= row["agreement"] <= 1 for row in found)
    assert (tmp_path / "teacher" / "model.safetensors").exists() and not list(tmp_path.glob("*.part"))
    written = {path: path.stat().st_mtime_ns for path in (*results, tmp_path / "teacher" / "model.safetensors")}
    again = run_python(*command)
    assert table in again.stdout and all(path.stat().st_mtime_ns == at for path, at in written.items())

"""Malformed folders and descriptions: a few here, `make fuzz` loads as many as one likes on the sanitized build."""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyllmq.formats import FormatError, structure_from_dict

from .damage import DAMAGES, damaged
from .new_process import run_python

FOLDERS = int(os.environ.get("PYLLMQ_FOLDERS", "60" if "PYLLMQ_SANITIZED" in os.environ else "150"))


@pytest.mark.kernels
def test_malformed_folders():
    # In a process of its own: its children are forked from one that has computed nothing.
    script = Path(__file__).with_name("fuzz_folders.py")
    done = run_python(script, "--folders", FOLDERS)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] + found["refused by pyllmq"] + found["refused by another"] == FOLDERS
    assert found["loaded"] > FOLDERS / 10 and found["refused by pyllmq"] > FOLDERS / 4


def test_a_number_is_always_the_same_folder():
    files = {"config.json": b'{"quantization_config": {"modules": {}}, "a": [1, 2]}', "x.safetensors": bytes(range(99))}
    made = [damaged(random.Random("1 2"), files) for _ in range(2)]
    assert made[0] == made[1] and files["x.safetensors"] == bytes(range(99))
    names = {name for seed in range(300) for name in damaged(random.Random(seed), files)[1]}
    assert names == {damage.__name__ for damage in DAMAGES}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["int8", "mask"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["1", "3", "8", "9"]), inner, max_size=3)
    ),
    max_leaves=4,
)
KEYS = {
    "codebook": {"out_features": 6, "in_features": 5, "columns": {"2": 3, "4": 2}, "segments": 1, "outliers": 2,
                 "row_scale": False},
    "bitmap": {"out_features": 6, "in_features": 5, "kept": 9, "values": "float16", "positions": "mask"},
    "sparse24": {"out_features": 6, "in_features": 5, "values": "int8"},
    "sparse24_codebook": {"out_features": 6, "in_features": 5, "bits": 3, "outliers": 0},
}  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.data())
def test_a_description_is_read_as_it_stands_or_refused(data):
    kind = data.draw(st.sampled_from(sorted(KEYS)))
    changed = data.draw(st.dictionaries(st.sampled_from([*KEYS[kind], "kind", "more"]), VALUES, max_size=2))
    described = {"kind": kind, **KEYS[kind], **changed}
    try:
        structure = structure_from_dict(described)
    except FormatError:
        return
    assert all(size > 0 for shape, _ in structure.tensors().values() for size in shape) and structure.nbytes > 0
    written = structure.to_dict()
    if kind == "codebook":  # a width with no column need not be named
        described["columns"] = {bits: count for bits, count in described["columns"].items() if count}
    assert written == described and structure_from_dict(json.loads(json.dumps(written))) == structure

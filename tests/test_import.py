"""Importing does nothing: no output, no transformers, no threads, no compiler."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(code):
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_import_is_quiet_and_light():
    code = (
        "import sys, os; import torch; before = len(os.listdir('/proc/self/task')); import pyllmq; "
        "heavy = {'transformers', 'matplotlib', 'triton'} & set(sys.modules); assert not heavy, heavy; "
        "assert len(os.listdir('/proc/self/task')) == before, 'a thread was started'"
    )
    assert run(code) == ("", "")


def test_the_folders_at_the_top_import_under_pyllmq():
    run("import pyllmq.triton_kernels, pyllmq.benchmarks")


def test_it_imports_and_computes_without_what_linux_alone_has():
    """As on Windows, or on macOS before the extension is built: the back end 'reference' serves."""
    code = (
        "import sys, mmap, torch\n"
        "for name in ('fcntl', 'resource', 'pyllmq._cpu'): sys.modules[name] = None\n"
        "for name in [n for n in vars(mmap) if n.startswith(('MADV', 'MAP_'))]: delattr(mmap, name)\n"
        "import pyllmq, pyllmq.memory, pyllmq.compression.jobs.manifest\n"
        "weight = pyllmq.Sparse24Weight.pack(torch.ones(4, 8), torch.tensor([1, 1, 0, 0] * 2).bool().expand(4, 8))\n"
        "assert float(pyllmq.functional.sparse24_linear(torch.ones(1, 8), weight)[0, 0]) == 4.0\n"
        "pyllmq.memory.return_freed(); pyllmq.memory.peak_memory()"
    )
    assert run(code) == ("", "")


def test_public_names_exist():
    run("import pyllmq; [getattr(m, name) for m in (pyllmq, pyllmq.functional) for name in m.__all__]")


def test_an_import_of_transformers_that_failed_may_be_tried_again():
    """The method is registered when it succeeds."""
    code = (
        "import sys, pyllmq; sys.modules['transformers.quantizers.auto'] = None\n"
        "try: import transformers.quantizers\n"
        "except ImportError: pass\n"
        "else: raise SystemExit('it was to fail')\n"
        "del sys.modules['transformers.quantizers.auto']; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'pyllmq' in AUTO_QUANTIZER_MAPPING"
    )
    run(code)


def test_no_extra_asks_for_what_is_installed_anyway():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", item)[0] for item in project["dependencies"]}
    for extra, items in project["optional-dependencies"].items():
        assert not names & {re.match(r"[\w-]+", item)[0] for item in items}, extra

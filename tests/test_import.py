"""Importing does nothing: no output, no transformers, no threads, no compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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


AS_ON_WINDOWS = """
import ctypes, mmap, os, pathlib, signal, sys, types, warnings
import fcntl, torch, transformers, transformers.quantizers.auto
from tests import models

folder = pathlib.Path(sys.argv[1])
ids = torch.arange(5)[None]
models.tiny_llama().save_pretrained(folder / "dense")
transformers.AutoModelForCausalLM.from_pretrained(folder / "dense")(ids)  # torch and transformers load what is theirs as it is here

def plain_file(path, flags, *more, opened=os.open, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, flags, *more, **named)

def written_file(descriptor, flags_of=fcntl.fcntl, get=fcntl.F_GETFL, fsync=os.fsync):
    if flags_of(descriptor, get) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    fsync(descriptor)

def library(name, *more, load=ctypes.CDLL, **named):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return load(name, *more, **named)

os.open, os.fsync, ctypes.CDLL = plain_file, written_file, library
for name in ("fcntl", "resource", "pwd", "grp", "termios", "triton", "pyllmq._cpu", "pyllmq._cuda"):
    sys.modules[name] = None
for module, hidden in (
    (mmap, ("MADV_", "MAP_")),
    (os, ("fork", "sched_", "getuid", "geteuid", "sysconf", "sync", "O_DIRECTORY", "register_at_fork", "kill", "uname")),
    (signal, ("SIGKILL", "SIGHUP", "SIGALRM", "pthread_", "setitimer")),
):
    for name in [n for n in vars(module) if n.startswith(hidden)]:
        delattr(module, name)
locked = []
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *call: locked.append(call[1:]))
sys.platform = "win32"
warnings.filterwarnings("error", category=EncodingWarning, module="pyllmq")  # a text file would be of another encoding there

import pyllmq, pyllmq.memory
x = torch.randn(3, 24)
for dense in (torch.nn.Linear(24, 8), torch.nn.Linear(24, 7)):
    layer = pyllmq.CodebookLinear.from_dense(dense, bits=6)
    assert (layer(x) - dense(x)).norm() < 0.1 * dense(x).norm()
pyllmq.memory.return_freed(); pyllmq.memory.peak_memory(); pyllmq.memory.page_out([x])

report = pyllmq.compress_files(folder / "dense", folder / "packed", pyllmq.KMeansConfig(bits=4), progress=False)
assert len(report.layers) == 14 and locked
report.save(folder / "report.json")
loaded = pyllmq.from_pretrained(folder / "packed")
pyllmq.save_pretrained(loaded, folder / "again")
with torch.no_grad():
    assert torch.equal(pyllmq.from_pretrained(folder / "again")(ids).logits, loaded(ids).logits)
"""


def test_it_imports_compresses_and_loads_as_on_windows(tmp_path):
    """No extension, no module, function or flag that Unix alone has, files as they behave there: the back end 'reference' serves.
    Of Windows itself nothing was run."""
    command = [sys.executable, "-X", "warn_default_encoding", "-c", AS_ON_WINDOWS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", item)[0] for item in project["dependencies"]}
    for extra, items in project["optional-dependencies"].items():
        assert not names & {re.match(r"[\w-]+", item)[0] for item in items}, extra

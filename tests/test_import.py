"""Importing does nothing: no output, no transformers, no threads, no compiler."""

import subprocess
import sys


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


def test_public_names_exist():
    run("import pyllmq; [getattr(m, name) for m in (pyllmq, pyllmq.functional) for name in m.__all__]")

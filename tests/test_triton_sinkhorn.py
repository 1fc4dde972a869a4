"""The Triton sinkhorn without a GPU: in Triton's interpreter, and compiled ahead of time."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def test_interpreter():
    file = Path(__file__).with_name("triton_interpreter_sinkhorn.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=file.parents[1], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 30 and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize(("block", "warps"), [(4, 1), (64, 8), (128, 16)])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_compiled_without_spills(name, block, warps, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pyllmq.triton_kernels import sinkhorn

    kernel = getattr(sinkhorn, name)
    constants = {"BALANCED_A": True, "BALANCED_B": True, "BLOCK_N": block, "BLOCK_M": block}
    if name == "_forward":
        constants |= {"TAPE": True, "STOPS": True}
    kinds = {"n": "i32", "m": "i32", "iterations": "i32", "tolerance": "fp32", "rho_a": "fp32", "rho_b": "fp32"}
    signature = {
        arg: "constexpr" if arg in constants else kinds.get(arg, "*i32" if arg == "count" else "*fp32")
        for arg in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    assert ".local" not in built.asm["ptx"]
    assert built.metadata.num_warps == warps and built.asm["cubin"]

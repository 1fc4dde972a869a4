"""The Triton sinkhorn without a GPU: in Triton's interpreter, and compiled ahead of time."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from .test_triton import ARCHITECTURES, assert_passes_in_the_interpreter

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
def test_interpreter():
    assert_passes_in_the_interpreter("triton_interpreter_sinkhorn.py", 38)


@pytest.mark.parametrize("block", [1, 4, 16, 32, 64])
@ARCHITECTURES
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_compiled_without_spills(name, block, arch, tmp_path, monkeypatch):
    from pyllmq.triton_kernels import sinkhorn

    constants = {"BALANCED_A": True, "BALANCED_B": True, "BLOCK_N": block, "BLOCK_M": block}
    if name == "_forward":
        constants |= {"TAPE": True, "STOPS": True}
    assert_no_spills(getattr(sinkhorn, name), constants, sinkhorn.warps(block, block), arch, tmp_path, monkeypatch)


@ARCHITECTURES
@pytest.mark.parametrize("name", ["_rows", "_columns", "_results", "_adjoint_rows", "_adjoint_columns"])
def test_tiles_compiled_without_spills(name, arch, tmp_path, monkeypatch):
    from pyllmq.triton_kernels import sinkhorn_tiles as tiles

    kernel = getattr(tiles, name)
    constants = {"BALANCED_A": False, "BALANCED_B": False, "STOPS": True, "ROWS": tiles.ROWS, "COLUMNS": tiles.COLUMNS}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    assert_no_spills(kernel, constants, tiles.WARPS, arch, tmp_path, monkeypatch)


def assert_no_spills(kernel, constants, warps, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict.fromkeys(("n", "m", "iterations", "slots", "step", "row_blocks"), "i32")
    kinds |= dict.fromkeys(("tolerance", "rho_a", "rho_b"), "fp32")
    signature = {
        arg: "constexpr" if arg in constants else kinds.get(arg, "*i32" if arg == "count" else "*fp32")
        for arg in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 SHARED:\d+ LOCAL:0", usage), usage

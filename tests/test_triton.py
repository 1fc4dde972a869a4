"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled ahead of time for GPUs that are not here.

The two need processes of their own: triton decides at its import whether it interprets. No marker `kernels`: there is no C++ of
ours in it, and sanitizers would slow the interpreter down for nothing.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pyllmq import backends
from pyllmq.backends.triton import runtime as triton_backend
from pyllmq.triton_kernels.configs import FOLDER

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install 'pyllmq-kernels[triton]', Linux x86_64)"
)


ARCHITECTURES = pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
"""One is compiled each time: it shows nearly all that goes wrong, in half of the minute."""


def assert_passes_in_the_interpreter(name, more_than):
    """In a process of its own: triton decides at its import whether it interprets."""
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=file.parents[1], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > more_than and "skipped" not in done.stdout, done.stdout[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("name", "least"),
    [
        pytest.param("triton_interpreter.py", 100, marks=pytest.mark.slow),
        pytest.param("triton_sparse_interpreter.py", 50, marks=pytest.mark.slow),
        pytest.param("triton_experts_interpreter.py", 20, marks=pytest.mark.slow),
        pytest.param("triton_sparse_experts_interpreter.py", 20, marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(name, least):
    assert_passes_in_the_interpreter(name, least)


# ---- compiled ahead of time -----------------------------------------------------------------------------------------

POINTERS = {
    "x": "*{x}", "y": "*{x}", "bias": "*{x}", "out": "*{x}", "codes": "*u8", "codebook": "*fp16", "columns_of": "*i32",
    "row_segment": "*i32", "row_scale": "*fp16", "parts": "*fp32", "row_offsets": "*i32", "outlier_columns": "*u16",
    "values": "*fp16", "replaced": "*fp16", "sums": "*fp64", "masses": "*fp64", "gain": "*fp64", "next_gain": "*fp64",
    "before": "*i32", "best": "*i32",
    "positions": "*u8", "masks": "*i32", "ranks": "*u16", "scale": "*fp32",
}  # fmt: skip
DIVISIBLE_BY_16 = ("rows", "columns", "slots")


def compiled(kernel, constants, x="bf16", arch=90, warps=4, stages=2, types=POINTERS):
    """(resources, machine code) of a kernel compiled for a GPU that need not be here. `types` of arguments, i32 without one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32").format(x=x) for name in kernel.arg_names
    }
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n in DIVISIBLE_BY_16]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    cubin = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True)), code.stdout


def assert_no_spills(kernel, constants, **options):
    resources, code = compiled(kernel, constants, **options)
    spills = re.findall(r"\b(?:LDL|STL)\b", code)
    assert resources["stack"] == resources["local"] == 0 and not spills, f"{kernel.__name__} {constants}: {resources}"
    return code


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def default_tiles(op):
    rows = json.loads((FOLDER / "default.json").read_text())
    return [(row, bits) for row in rows if row["op"] == op for bits in row["bits"]]


@needs_triton
@ARCHITECTURES
@pytest.mark.parametrize(
    ("tile", "bits"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case[1] == 2))
        for case in default_tiles("codebook_linear")
        if case[1] in (2, 3, 8)
    ],
    ids=lambda value: f"tokens{value['tokens']}" if isinstance(value, dict) else f"bits{value}",
)
def test_linear_compiles_without_spills(arch, tile, bits):
    from pyllmq.triton_kernels.codebook_linear import _multiply

    fixed = {"BITS": bits, "BLOCK_TOKENS": tile["tokens"], "BLOCK_ROWS": tile["rows"], "BLOCK_SLOTS": tile["slots"]}
    options = {"arch": arch, "warps": tile["warps"], "stages": tile["stages"]}
    # fp32 with segments and gathered columns takes the most registers; bf16 without either is the usual case
    most = {"ONE_SEGMENT": False, "CONSECUTIVE": False, "FP32_DOT": "tf32x3"}
    usual = {"ONE_SEGMENT": True, "CONSECUTIVE": True, "FP32_DOT": "tf32x3"}
    assert_no_spills(_multiply, fixed | most, x="fp32", **options)
    if arch == 80:
        return
    code = assert_no_spills(_multiply, fixed | usual, x="bf16", **options)
    assert ("HMMA" in code) == (tile["tokens"] > 1), "tokens are multiplied by tensor cores, one token is not"


@needs_triton
@ARCHITECTURES
@pytest.mark.parametrize("bits", [3, 8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (1, 4))])
def test_dequantize_compiles_without_spills(arch, bits):
    from pyllmq.triton_kernels.codebook_dequantize import _decode

    tile = next(row for row, b in default_tiles("codebook_dequantize") if b == bits)
    fixed = {"BITS": bits, "BLOCK_ROWS": tile["rows"], "BLOCK_SLOTS": tile["slots"], "HAS_ROW_SCALE": True}
    options = {"arch": arch, "warps": tile["warps"], "stages": tile["stages"]}
    assert_no_spills(_decode, fixed | {"ONE_SEGMENT": False, "CONSECUTIVE": False}, x="fp32", **options)
    code = assert_no_spills(_decode, fixed | {"ONE_SEGMENT": True, "CONSECUTIVE": True}, x="bf16", **options)
    assert "STG.E.128" in code, "neighbouring columns are stored 16 bytes at a time"


@needs_triton
@ARCHITECTURES
def test_the_small_kernels_compile_without_spills(arch):
    from pyllmq.triton_kernels.codebook_dequantize import put_outliers
    from pyllmq.triton_kernels.codebook_linear import add_parts, multiply_outliers

    assert_no_spills(put_outliers, {"BLOCK_ROWS": 8, "BLOCK": 16}, arch=arch)
    flags = {"HAS_ROW_SCALE": True, "HAS_OUTLIERS": True, "HAS_BIAS": True}
    assert_no_spills(add_parts, flags | {"BLOCK_ROWS": 256}, arch=arch)
    for tokens in (1, 16):
        fixed = {"HAS_ROW_SCALE": True, "BLOCK_TOKENS": tokens, "BLOCK_ROWS": 16, "BLOCK": 16}
        assert_no_spills(multiply_outliers, fixed, arch=arch)


@needs_triton
@ARCHITECTURES
@pytest.mark.parametrize("x", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("codes", [(3,), pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
def test_the_sparse_kernels_compile_without_spills(arch, x, codes):
    """Codes of 3 bits lie across bytes: one width stands for the others each time."""
    from pyllmq.triton_kernels import sparse_linear as sparse

    for tile, widths in (
        (sparse.ONE_TOKEN, (0, *codes)),
        (sparse.MORE_TOKENS, (0,)),
        (sparse.MORE_TOKENS_CODES, codes),
    ):
        fixed = {"BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "FP32_DOT": "tf32x3"}
        options = {"arch": arch, "x": x, "warps": tile.warps, "stages": tile.stages}
        for bits in widths:
            types = POINTERS | {"values": "*u8"} if bits else POINTERS
            sizes = {"BITS": bits, "BLOCK_SLOTS": tile.slots}
            assert_no_spills(sparse._multiply_24, fixed | sizes, types=types, **options)
        if 0 in widths:
            assert_no_spills(sparse._multiply_bitmap, fixed | {"BLOCK_SLOTS": 2 * tile.slots}, **options)
    fixed = {"BLOCK_ROWS": 32}
    assert_no_spills(sparse._spread_24, fixed | {"BITS": 0, "HAS_SCALE": True, "BLOCK_SLOTS": 32}, arch=arch, x=x)
    codes = {"BITS": 3, "HAS_SCALE": False, "BLOCK_SLOTS": 32}
    assert_no_spills(sparse._spread_24, fixed | codes, arch=arch, x=x, types=POINTERS | {"values": "*u8"})
    assert_no_spills(sparse._spread_bitmap, fixed | {"HAS_SCALE": True, "BLOCK_SLOTS": 64}, arch=arch, x=x)


SPARSE_EXPERTS = ((1, 1, "bfloat16"), (1, 1, "int8"), (1, 0b1100, "uint8"), (1, 0b10000, "uint8"), (2, 0, "bfloat16"))
"""Kind, widths, values of `Part`."""


@needs_triton
@ARCHITECTURES
@pytest.mark.parametrize(
    ("tokens", "widths", "sparse"),
    [
        (1, (3, 4), False),
        (1, (), True),
        *(pytest.param(16, *case, marks=pytest.mark.slow) for case in (((3, 4), False), ((2, 8), False), ((), True))),
    ],
)
def test_experts_compile_without_spills(arch, tokens, widths, sparse):
    import triton.language as tl

    from pyllmq.triton_kernels import routed_experts as experts

    tile = experts.ONE_TOKEN if tokens == 1 else experts.MORE_TOKENS
    types = dict.fromkeys(("tile_of", "order", "place_of"), "*i32") | {
        "table": "*i64",
        "index": "*i64",
        "x": "*{x}",
    }
    types |= dict.fromkeys(("sums", "bias", "weights"), "*fp32") | dict.fromkeys(("limit", "alpha", "offset"), "fp32")
    options = {"arch": arch, "types": types | {"out": "*{x}"}}
    fixed = {"WIDTHS": sum(1 << bits for bits in widths), "ONE_SEGMENT": True, "CONSECUTIVE": False, "WIDE": False}
    fixed |= {"BLOCK_TOKENS": tile.tokens, "BLOCK_ROWS": tile.rows, "BLOCK_SLOTS": tile.slots, "FP32_DOT": "tf32x3"}
    for x in ("bf16", "fp32"):
        for kind, width, values in SPARSE_EXPERTS if sparse else ((0, fixed["WIDTHS"], "uint8"),):
            part = experts.Part(None, kind, width, values, True, False, False)
            sizes = {"KIND": kind, "WIDTHS": width, "VALUES": getattr(tl, values), "BLOCK_SLOTS": part.slots(tokens)}
            assert_no_spills(experts._multiply, fixed | sizes, x=x, warps=tile.warps, stages=tile.stages, **options)
    if tokens == 1 and not sparse:
        gate = {"ACTIVATION": 1, "GATED": True, "INTERLEAVED": True, "HAS_BIAS": True, "BLOCK": 256}
        assert_no_spills(experts._activate, gate, **options)
        assert_no_spills(experts._combine, {"HAS_BIAS": True, "BLOCK": 256}, **options)


@needs_triton
@ARCHITECTURES
def test_kmeans_1d_compiles_without_spills(arch):
    from pyllmq.triton_kernels.kmeans_1d import _level

    for at_once, candidates, sizes in ((1, 256, {}), (32, 8, {}), (32, 8, {"stride": 1}), (1, 256, {"nodes": 1})):
        fixed = {"HAS_BEFORE": True, "NODES": at_once, "CANDIDATES": candidates}
        assert_no_spills(_level, fixed | sizes, arch=arch)


@needs_triton
def test_sizes_of_one_compile():
    """triton makes an argument that is 1 a constant of the kernel, which has other methods than a number."""
    from pyllmq.triton_kernels.codebook_dequantize import _decode
    from pyllmq.triton_kernels.codebook_linear import _multiply, add_parts
    from pyllmq.triton_kernels.sparse_linear import _multiply_24, _spread_24

    one = {"rows": 1, "columns": 1, "slots": 1, "code_bytes": 1}
    flags = {"BITS": 3, "ONE_SEGMENT": False, "CONSECUTIVE": False, "BLOCK_ROWS": 64, "BLOCK_SLOTS": 32}
    for tokens in (1, 16):
        assert_no_spills(_multiply, one | flags | {"BLOCK_TOKENS": tokens, "FP32_DOT": "tf32x3"})
    assert_no_spills(_decode, one | flags | {"HAS_ROW_SCALE": True})
    flags = {"HAS_ROW_SCALE": True, "HAS_OUTLIERS": True, "HAS_BIAS": True}
    assert_no_spills(add_parts, flags | {"BLOCK_ROWS": 256, "rows": 1})
    types = POINTERS | {"values": "*u8"}
    codes = {"BITS": 3, "BLOCK_ROWS": 64, "BLOCK_SLOTS": 16}
    linear = codes | {"FP32_DOT": "tf32x3"}
    # A single row is multiplied token by token.
    assert_no_spills(_multiply_24, linear | {"rows": 1, "columns": 1, "BLOCK_TOKENS": 1}, types=types)
    assert_no_spills(_multiply_24, linear | {"columns": 1, "BLOCK_TOKENS": 16}, types=types)
    assert_no_spills(_spread_24, codes | {"rows": 1, "columns": 1, "HAS_SCALE": False}, types=types)


# ---- grids ----------------------------------------------------------------------------------------------------------


class Launches:
    """Stands for a kernel: what grids it was given."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *_, **__: None


@needs_triton
def test_any_number_of_problems_fits_into_a_grid(monkeypatch):
    """Its second and third axis end at 65535."""
    from pyllmq.triton_kernels import softmax_cdist_l1 as kernels

    launches = Launches()
    for name in ("_row_statistics", "_distances", "_signs", "_softmax_gradient"):
        monkeypatch.setattr(kernels, name, launches)
    logits = torch.zeros(70000, 1, 4)
    distance, *statistics = kernels.softmax_cdist_l1(logits, logits, 1.0)
    kernels.softmax_cdist_l1_backward(distance, logits, logits, *statistics, 1.0)
    assert len(launches.grids) == 5 and all(size <= 65535 for grid in launches.grids for size in grid[1:])


def test_no_kernel_adds_in_an_order_that_nobody_knows():
    for file in Path(backends.__file__).parents[1].glob("triton_kernels/*.py"):
        assert "tl.atomic" not in file.read_text(), f"{file.name}: sums of atomics differ from call to call"


# ---- where it is missing --------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    assert triton_backend.available() == (False, "triton is not installed (pip install 'pyllmq-kernels[triton]')")
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend.available() == (False, "torch finds no GPU here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton_backend.available() == (False, "needs compute capability 8.0, this GPU has 7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert triton_backend.available() == (True, "kernels are compiled at their first call, for a GPU")


@needs_triton
def test_asking_which_back_ends_work_imports_no_triton():
    code = "import sys; from pyllmq import backends; backends.report(); assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert backends.report()["triton"][1]

"""The CPU kernels for 64-bit ARM, cross-compiled and run under qemu: `make arm`. tests/arm_driver.cpp runs what stands here on
each instruction set of the emulated processor; bits are compared with those of this machine's kernels too, where all
instruction sets agree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyllmq
from pyllmq import _cpu
from pyllmq.packing import mask_24

from .inner_loops import table_loops
from .oracle import assert_as_good_as_torch
from .test_cpu_layout import DTYPE_CODES, MAX_ERROR, PATHS, PRECISIONS, WIDTHS, Weight, pack_rows
from .test_fit_columns import block
from .test_fit_columns import run as fitted
from .test_sinkhorn import exact_gradients, marginal
from .test_softmax_cdist_l1 import check_gradient, exact_distance
from .test_sparse_formats import random_codes

pytestmark = pytest.mark.arm

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("PYLLMQ_ARM_CXX", "aarch64-linux-gnu-g++")
LIBRARIES = "/usr/aarch64-linux-gnu"
SANITIZED = os.environ.get("PYLLMQ_ARM_SANITIZE") == "1"
ISAS = {
    "cortex-a53": ["neon", "scalar"],
    "cortex-a76": ["neon_dotprod", "neon", "scalar"],
    "max": ["neon_i8mm", "neon_dotprod", "neon", "scalar"],
}
"""By processor as qemu names it: without dot product, with it, with byte matrix products."""


def qemu() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@cache
def driver() -> Path:
    missing = [name for name, found in ((COMPILER, shutil.which(COMPILER)), ("qemu-aarch64", qemu())) if not found]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (packages g++-aarch64-linux-gnu and qemu-user-static of Debian)")
    import fcntl

    base = ROOT / "build" / ("arm_sanitized" if SANITIZED else "arm")
    flags = "-fsanitize=address -fno-omit-frame-pointer -g1" if SANITIZED else ""
    environment = {**os.environ, "CXX": COMPILER, "CXXFLAGS": flags, "PYLLMQ_CUDA": "0"}
    base.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "setup.py", "-q", "build_driver", f"--build-base={base.relative_to(ROOT)}"]
    with open(base / "lock", "w") as lock:  # of several workers one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stdout + done.stderr
    return base / "driver"


@dataclass
class Case:
    operation: str
    numbers: dict[str, float]
    arrays: dict[str, Tensor | None]
    out: dict[str, tuple[torch.Size | tuple[int, ...], torch.dtype]]
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By instruction set, once the case has run."""

    def request(self) -> bytes:
        line = " ".join([self.operation, *(f"{name}={float(value)!r}" for name, value in self.numbers.items())])
        parts = [line.encode() + b"\n"]
        for name, tensor in self.arrays.items():
            if tensor is not None:
                data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                parts += [f"in {name} {len(data)}\n".encode(), data]
        for name, (shape, dtype) in self.out.items():
            parts.append(f"out {name} {torch.Size(shape).numel() * dtype.itemsize}\n".encode())
        return b"".join([*parts, b"run\n"])


def run(cpu: str, cases: list[Case], folder: Path) -> None:
    """Fills `found` of all cases."""
    (folder / "cases").write_bytes(b"".join(case.request() for case in cases))
    command = [qemu(), "-L", LIBRARIES, "-cpu", cpu, driver(), folder / "cases", folder / "results"]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    with open(folder / "results", "rb") as results:
        isas = results.readline().decode().split()
        assert isas == ISAS[cpu]
        for case in cases:
            for isa in isas:
                outcome = results.readline().decode()
                assert outcome == "fine\n", f"{case.operation} {case.numbers} on {isa}: {outcome}"
                case.found[isa] = {}
                for name, (shape, dtype) in case.out.items():
                    data = results.read(torch.Size(shape).numel() * dtype.itemsize)
                    case.found[isa][name] = (
                        torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape)
                    )
        assert results.read() == b""


@pytest.fixture(params=["cortex-a53", "max"])
def cpu(request):
    """The two between which all instruction sets lie."""
    return request.param


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


# --- codebook --------------------------------------------------------------------------------------------------------


def held_by(weight: Weight, prefix: str = "") -> tuple[dict[str, float], dict[str, Tensor | None]]:
    """Numbers and arrays of a checkpoint."""
    rows, columns = weight.shape
    numbers = {"rows": rows, "columns": columns, "segments": len(weight.segment_rows)}
    numbers["column_bytes"] = weight.outlier_columns.element_size()
    arrays = {
        "column_bits": weight.column_bits,
        "segment_rows": weight.segment_rows,
        "codebook": weight.codebook,
        "row_scale": weight.row_scale,
        "outlier_row_offsets": weight.outlier_offsets,
        "outlier_columns": weight.outlier_columns,
        "outlier_values": weight.outlier_values,
        **{f"codes{bits}": packed for bits, packed in weight.packed.items()},
    }
    return {prefix + name: n for name, n in numbers.items()}, {prefix + name: a for name, a in arrays.items()}


def codebook_case(weight: Weight, numbers: dict[str, float], arrays: dict[str, Tensor | None], out: dict) -> Case:
    shape, held = held_by(weight)
    return Case("codebook", {**shape, **numbers}, {**held, **arrays}, out)


def linear_case(weight: Weight, x: Tensor, bias: Tensor | None, path: str, precision: str) -> Case:
    numbers = {"path": PATHS[path], "precision": PRECISIONS[precision], "dtype": DTYPE_CODES[x.dtype], "tokens": len(x)}
    return codebook_case(weight, numbers, {"x": x, "bias": bias}, {"y": ((len(x), weight.shape[0]), x.dtype)})


def check_linear(y: Tensor, weight: Weight, x: Tensor, bias: Tensor | None, allowed: float) -> None:
    dense_bias = None if bias is None else bias.double()
    exact = nn.functional.linear(x.double(), weight.dense, dense_bias)
    torchs = nn.functional.linear(x, weight.dense.to(x.dtype), None if bias is None else bias.to(x.dtype)).double()
    size = torch.linalg.norm((x.double() ** 2 @ weight.dense.T**2).sqrt() + exact.abs())
    most = 2 * torch.linalg.norm(torchs - exact) + (torch.finfo(x.dtype).eps / 2 + allowed) * size
    error = torch.linalg.norm(y.double() - exact)
    assert error <= most, f"error {error:.3e}, allowed {most:.3e}, size {size:.3e}"


def in_this_process(weight: Weight, x: Tensor, bias: Tensor | None, path: str, precision: str) -> Tensor:
    before = _cpu.isa()
    _cpu.set_isa("scalar")
    try:
        return weight.linear(x, bias, weight.pack(), path, precision)
    finally:
        _cpu.set_isa(before)


@pytest.mark.parametrize("path", ["tables", "decode"])
def test_codebook_linear(cpu, path, tmp_path):
    """Every width, ragged shapes, segments, outliers, every dtype; the bits that x86's kernels give where all of them agree."""
    cases = []
    for i, widths in enumerate(WIDTHS):
        scaled = path == "decode"
        weight = Weight(70, 333, widths, segments=2, outlier_fraction=0.01, row_scale=scaled, int32=i % 2 == 1, seed=i)
        small = Weight(5, 11, widths, seed=i)
        for precision in PRECISIONS:
            for tokens, dtype in ((1, torch.float32), (3, torch.bfloat16), (8, torch.float32), (67, torch.float16)):
                x = torch.randn(tokens, 333).to(dtype)
                bias = torch.randn(70) if tokens > 1 else None
                cases.append((weight, x, bias, precision, linear_case(weight, x, bias, path, precision)))
            x = torch.randn(17, 11)
            cases.append((small, x, None, precision, linear_case(small, x, None, path, precision)))
    run(cpu, [case[-1] for case in cases], tmp_path)
    for weight, x, bias, precision, case in cases:
        here = in_this_process(weight, x, bias, path, precision)
        for isa, out in case.found.items():
            in_bytes = path == "decode" and precision == "fast" and isa in ("neon_dotprod", "neon_i8mm")
            check_linear(out["y"], weight, x, bias, 1.2e-2 if in_bytes else MAX_ERROR[precision])
            if path == "tables" or precision == "exact":
                assert same_bits(out["y"], here), (isa, case.numbers)


@pytest.mark.parametrize("cpu", ISAS)
def test_each_processor_gets_its_kernels(cpu, tmp_path):
    """`fast` is int8 from sdot on, and smmla gives the same bits."""
    weight, x = Weight(64, 300, [4, 3]), torch.randn(9, 300)
    case = linear_case(weight, x, None, "decode", "fast")
    run(cpu, [case], tmp_path)
    fp32 = in_this_process(weight, x, None, "decode", "exact")
    for isa in ISAS[cpu]:
        assert same_bits(case.found[isa]["y"], fp32) == (isa in ("neon", "scalar")), isa
    if cpu == "max":
        assert same_bits(case.found["neon_i8mm"]["y"], case.found["neon_dotprod"]["y"])


@pytest.mark.parametrize("path", ["tables", "decode"])
def test_codebook_with_x_of_any_size(cpu, path, tmp_path):
    """NaN and infinity stay in their token; tiny and huge x take the path that holds them."""
    cases = []
    for widths in ([4], [3], [1, 2], [6], [8]):
        weight = Weight(40, 130, widths)
        for precision in PRECISIONS:
            x = torch.randn(12, 130)
            x[1, 3], x[2, 5], x[4] = float("nan"), float("inf"), 0
            x[3] *= 1e-35
            x[5] *= 1e33
            x[6, 7] = 1e4
            cases.append((weight, x, precision, linear_case(weight, x, None, path, precision)))
    run(cpu, [case[-1] for case in cases], tmp_path)
    for weight, x, precision, case in cases:
        exact = x.double() @ weight.dense.T
        for isa, out in case.found.items():
            y = out["y"].double()
            assert bool(y[1].isnan().all()) and bool((y[4] == 0).all())
            assert bool((~y[2].isfinite()).all())
            for token in (0, 3, 5, 6, 7, 8, 9, 10, 11):
                error = (y[token] - exact[token]).norm() / exact[token].norm()
                assert error <= (2e-2 if precision == "fast" else 3e-4), (isa, precision, token, error)


def test_codebook_decoded(cpu, tmp_path):
    """W, chosen rows of it and its codes come back exactly, rounded to nearest in 16 bits."""
    cases = []
    for i, widths in enumerate(WIDTHS):
        weight = Weight(70, 333, widths, segments=3, outlier_fraction=0.02, row_scale=True, seed=i)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ids = torch.randint(70, (9,))
            out = {"dense": ((70, 333), dtype), "row_values": ((9, 333), dtype), "all_codes": ((70, 333), torch.uint8)}
            numbers = {"dtype": DTYPE_CODES[dtype], "count": 9}
            cases.append((weight, dtype, ids, codebook_case(weight, numbers, {"ids": ids}, out)))
    run(cpu, [case[-1] for case in cases], tmp_path)
    for weight, dtype, ids, case in cases:
        for out in case.found.values():
            assert same_bits(out["dense"], weight.dense.float().to(dtype))
            assert same_bits(out["row_values"], weight.dense.float().to(dtype)[ids])
            assert torch.equal(out["all_codes"], weight.all_codes)


def test_checkpoint_decoded_and_its_gradient(cpu, tmp_path):
    """What training reads: the bits of this machine."""
    weight = Weight(70, 333, [1, 2, 3, 4, 5, 6, 7, 8], segments=3)
    shape, held = held_by(weight)
    scale, centroids = torch.rand(70) + 0.5, weight.codebook.float()
    gradient = torch.randn(70, 333)
    arrays = {**held, "scale": scale, "centroids": centroids, "weight_gradient": gradient}
    shapes = {"dense": (70, 333), "gradient": tuple(centroids.shape)}
    case = Case("checkpoint", shape, arrays, {name: (size, torch.float32) for name, size in shapes.items()})
    run(cpu, [case], tmp_path)
    here = {name: torch.empty(size) for name, size in shapes.items()}
    _cpu.codebook_decode(weight.checkpoint(), scale.data_ptr(), centroids.data_ptr(), here["dense"].data_ptr())
    pointers = scale.data_ptr(), gradient.data_ptr(), here["gradient"].data_ptr()
    _cpu.codebook_gradient(weight.checkpoint(), *pointers)
    torch.testing.assert_close(here["dense"].double(), weight.dense * scale.double()[:, None])
    for isa, found in case.found.items():
        assert all(same_bits(found[name], here[name]) for name in shapes), isa


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_packed_and_unpacked(cpu, bits, tmp_path):
    codes = torch.randint(1 << bits, (33, 61), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    out = {"packed": (tuple(packed.shape), torch.uint8), "again": ((33, 61), torch.uint8)}
    case = Case("codes", {"rows": 33, "columns": 61, "bits": bits}, {"codes": codes}, out)
    run(cpu, [case], tmp_path)
    for found in case.found.values():
        assert torch.equal(found["packed"], packed) and torch.equal(found["again"], codes)


# --- sparse formats --------------------------------------------------------------------------------------------------

KINDS = {"bitmap": 0, "sparse24": 2, "sparse24_codebook": 3}


def sparse_case(packed, numbers: dict[str, float], arrays: dict[str, Tensor | None], out: dict) -> Case:
    tensors = {name: tensor for name, tensor in packed.tensors.items() if tensor is not None}
    values, codebook, outliers = (tensors.get(name) for name in ("values", "codebook", "outlier_values"))
    columns = tensors.get("columns", tensors.get("outlier_columns"))
    given = {
        "kind": KINDS[packed.kind],
        "value_type": 0
        if values is None
        else [torch.float32, torch.bfloat16, torch.float16, torch.int8].index(values.dtype),
        "rows": packed.out_features,
        "columns": packed.in_features,
        "kept": 0 if values is None else values.numel(),
        "bits": 0 if codebook is None else codebook.shape[1].bit_length() - 1,
        "outliers": 0 if outliers is None else outliers.numel(),
        "column_bytes": 0 if columns is None else columns.element_size(),
    }
    return Case("sparse", {**given, **numbers}, {**tensors, **arrays}, out)


def sparse_weights(n: int, k: int):
    """(weight, the fp64 matrix that it stands for)."""
    for values in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        weight = torch.randn(n, k)
        for packed in (
            pyllmq.BitmapWeight.pack(weight, torch.rand(n, k) < 0.5, values),
            pyllmq.Sparse24Weight.pack(weight, mask_24(weight), values),
        ):
            with pyllmq.use_backend("reference"):
                yield packed, packed.dequantize().double()
    for bits in (2, 3, 4):
        yield random_codes(n, k, bits, 0.02)


@pytest.mark.parametrize("n,k", [(5, 3), (70, 515)])
def test_sparse_linear_and_dequantize(cpu, n, k, tmp_path):
    cases = []
    for packed, dense in sparse_weights(n, k):
        for tokens, dtype, precision in (
            (1, torch.float32, "high"),
            (3, torch.bfloat16, "fast"),
            (17, torch.float32, "exact"),
        ):
            x, bias = torch.randn(tokens, k).to(dtype), torch.randn(n)
            out = {"y": ((tokens, n), dtype), "dense": ((n, k), dtype)}
            for share in (0.0, 1.0):  # of kept weights up to which a bitmap is laid out as column numbers
                numbers = {
                    "tokens": tokens,
                    "dtype": DTYPE_CODES[dtype],
                    "precision": PRECISIONS[precision],
                    "sparse_columns": share,
                }
                cases.append((dense, x, bias, precision, sparse_case(packed, numbers, {"x": x, "bias": bias}, out)))
    run(cpu, [case[-1] for case in cases], tmp_path)
    for dense, x, bias, precision, case in cases:
        truth = nn.functional.linear(x.double(), dense, bias.double())
        torchs = nn.functional.linear(x, dense.to(x.dtype), bias.to(x.dtype)).double()
        allowed = {"exact": 5e-7, "high": 2e-4, "fast": 3e-3}[precision] + (2e-3 if x.dtype == torch.bfloat16 else 0)
        for isa, out in case.found.items():
            error = (out["y"].double() - truth).norm()
            assert error <= 2 * (torchs - truth).norm() + allowed * truth.norm(), (isa, case.numbers)
            assert torch.equal(out["dense"], dense.float().to(x.dtype)), (isa, case.numbers)


# --- transport, distances, k-means -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n,m", [(3, 4), (8, 8), (20, 37)])
def test_sinkhorn(cpu, n, m, tmp_path):
    problems, epsilon, iterations = 21, 0.1, 12
    cost, a, b = torch.rand(problems, n, m), marginal(problems, n, zeros=0.2), marginal(problems, m, zeros=0.2)
    weight = torch.randn(problems, n, m)
    shapes = {"plan": (problems, n, m), "u": (problems, n), "v": (problems, m), "grad_cost": (problems, n, m)}
    out = {name: (shape, torch.float32) for name, shape in shapes.items()}
    out |= {"grad_a": ((problems, n), torch.float32), "grad_b": ((problems, m), torch.float32)}
    out |= {"count": ((problems,), torch.int32)}
    arrays = {"cost": cost, "a": a, "b": b, "epsilon": torch.full((problems,), epsilon), "grad_plan": weight}
    arrays |= {"grad_u": torch.zeros(problems, n), "grad_v": torch.zeros(problems, m)}
    case = Case("sinkhorn", {"problems": problems, "n": n, "m": m, "iterations": iterations}, arrays, out)
    run(cpu, [case], tmp_path)
    with pyllmq.use_backend("reference"):
        plan = pyllmq.sinkhorn(cost.double(), a.double(), b.double(), epsilon, iterations)
    sizes = weight.abs() * plan
    bounds = (sizes / epsilon, *(sizes.sum(over) / mass for over, mass in ((-1, a), (-2, b))))
    exact = exact_gradients(cost, a, b, weight, epsilon, iterations)
    for isa, found in case.found.items():
        assert bool((found["count"].abs() == iterations).all())
        assert (found["plan"].double() - plan).abs().max() <= 1e-5 * plan.max(), isa
        for name, true, size in zip(("grad_cost", "grad_a", "grad_b"), exact, bounds, strict=True):
            assert (found[name] - true).abs().max() <= 3e-5 * size.nan_to_num().max(), (isa, name)


@pytest.mark.parametrize("n,m,shift", [(4, 4, 1), (3, 5, 2), (8, 8, 0)])
def test_doubly_stochastic(cpu, n, m, shift, tmp_path):
    logits, gradient = torch.randn(37, n, m, requires_grad=True), torch.randn(37, n, m)
    shift_name = ("none", "line", "matrix")[shift]
    numbers = {
        "problems": 37,
        "n": n,
        "m": m,
        "iterations": 7,
        "shift": shift,
        "softmax_start": 1,
        "matrix_epsilon": 1e-6,
    }
    out = {"plan": ((37, n, m), torch.float32), "logits_gradient": ((37, n, m), torch.float32)}
    case = Case("doubly_stochastic", numbers, {"logits": logits.detach(), "gradient": gradient}, out)
    run(cpu, [case], tmp_path)
    for isa, found in case.found.items():
        exact = logits.detach().double().requires_grad_()
        plan = alternating(exact, 7, 1e-6)
        plan.backward(gradient.double())
        assert (found["plan"].double() - plan).abs().max() <= 2e-6, (isa, shift_name)
        assert (found["logits_gradient"].double() - exact.grad).abs().max() <= 2e-5, (isa, shift_name)


def alternating(logits: Tensor, iterations: int, epsilon: float) -> Tensor:
    """Softmax of the rows and the columns of that, then rows and columns in turn."""
    x = torch.softmax(logits, -1) + epsilon
    x = x / x.sum(-2, keepdim=True)
    for _ in range(iterations - 1):
        x = x / x.sum(-1, keepdim=True)
        x = x / x.sum(-2, keepdim=True)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_cdist_l1(cpu, dtype, tmp_path):
    x, y, gradient = torch.randn(2, 7, 601).to(dtype), torch.randn(2, 9, 601).to(dtype), torch.randn(2, 7, 9)
    y[0, 3] = x[0, 2]
    numbers = {"x_rows": 7, "y_rows": 9, "batch": 2, "columns": 601, "scale": 1.0, "dtype": DTYPE_CODES[dtype]}
    out = {"x_statistics": ((2, 7, 2), torch.float32), "y_statistics": ((2, 9, 2), torch.float32)}
    out |= {"distances": ((2, 7, 9), torch.float32), "x_gradient": ((2, 7, 601), dtype)}
    case = Case("softmax_cdist_l1", numbers, {"x": x, "y": y, "gradient": gradient}, out)
    run(cpu, [case], tmp_path)
    exact = exact_distance(x, y, 1.0)
    for isa, found in case.found.items():
        assert (found["distances"].double() - exact).abs().max() <= 2e-6, isa
        assert found["distances"][0, 2, 3] == 0
        check_gradient(found["x_gradient"], x, y, 1.0, gradient)


@pytest.mark.parametrize("method", [0, 1, 2], ids=["exact", "windowed", "lloyd"])
def test_kmeans_1d(cpu, method, tmp_path):
    """The same bits on every instruction set and on this machine."""
    cases = []
    for k, n, weighted in (
        (1, 5, False),
        (2, 100, True),
        (4, 517, False),
        (8, 300, True),
        (13, 300, False),
        (40, 200, False),
    ):
        values, weights = torch.randn(3, n), torch.rand(3, n) + 0.1 if weighted else None
        out = {"centroids": ((3, k), torch.float32), "codes": ((3, n), torch.uint8), "errors": ((3, 1), torch.float64)}
        numbers = {"problems": 3, "n": n, "k": k, "method": method}
        cases.append(Case("kmeans_1d", numbers, {"values": values, "weights": weights}, out))
    run(cpu, cases, tmp_path)
    for case in cases:
        here = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in case.out.items()}
        k, n = int(case.numbers["k"]), int(case.numbers["n"])
        _cpu.kmeans_1d(
            values=case.arrays["values"], weights=case.arrays["weights"], weights_stride=n, problems=3, n=n, seed=7,
            half_centroids=False, packed=False, errors=here["errors"], method=method, ks=[k],
            centroids=[here["centroids"]], codes=[here["codes"]],
        )  # fmt: skip
        values = case.arrays["values"].double()
        for isa, found in case.found.items():
            nearest = (values[:, :, None] - found["centroids"].double()[:, None]).abs().min(-1).values
            chosen = (values - found["centroids"].double().gather(1, found["codes"].long())).abs()
            assert bool((chosen <= nearest + 1e-6).all()), (isa, case.numbers)
            for name, mine in here.items():
                assert same_bits(found[name], mine), (isa, name, case.numbers)


def test_fit_columns(cpu, tmp_path):
    """The same bits on every instruction set and on this machine, sweeping and descending."""
    columns, rows = 9, 133
    start = block(columns, rows, 3, seed=0)
    state, out = ("block", "stored", "codes", "kept"), {}
    for name in (*state, "centroids"):
        dtype = torch.uint8 if name in ("codes", "kept") else torch.float32
        out[name] = (tuple(start[name].shape), dtype)
    out |= {"moves": ((columns, rows), torch.float32), "decrease": ((1,), torch.float64)}
    swept, _, _ = fitted("cpu", start)
    cases = []
    for descend, begin in ((False, start), (True, swept | {"block": start["block"].flip(0) * 0.3})):
        arrays = {f"start_{name}" if name in out else name: tensor for name, tensor in begin.items()}
        case = Case("fit_columns", {"columns": columns, "rows": rows, "descend": descend}, arrays, out)
        cases.append((case, *fitted("cpu", begin, descend=descend)))
    run(cpu, [case for case, *_ in cases], tmp_path)
    for case, here, moves, decrease in cases:
        for isa, found in case.found.items():
            assert all(same_bits(found[name], here[name]) for name in (*state, "centroids")), isa
            assert same_bits(found["moves"], moves) and found["decrease"].item() == decrease, isa


# --- decode steps ----------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("tokens", [1, 3])
def test_mlp_step(cpu, tokens, tmp_path):
    activations = (
        nn.functional.silu,
        nn.functional.gelu,
        lambda v: nn.functional.gelu(v, approximate="tanh"),
        torch.relu,
    )
    cases, hidden, units = [], 70, 101
    for i in range(len(activations)):
        x, weight = torch.randn(tokens, hidden), torch.rand(hidden) + 0.5
        up, down = torch.randn(2 * units, hidden) / 8, torch.randn(hidden, units) / 10
        numbers = {"tokens": tokens, "hidden": hidden, "units": units, "activation": i, "norm": 1}
        arrays = {"x": x, "up": up, "down": down, "norm_weight": weight}
        cases.append(Case("mlp_step", numbers, arrays, {"y": ((tokens, hidden), torch.float32)}))
    run(cpu, cases, tmp_path)
    for case, activation in zip(cases, activations, strict=True):

        def reference(dtype, case=case, activation=activation):
            x, up, down, weight = (case.arrays[name].to(dtype) for name in ("x", "up", "down", "norm_weight"))
            gate, rest = (rms_norm(x, weight) @ up.T).chunk(2, -1)
            return x + (activation(gate) * rest) @ down.T

        for out in case.found.values():
            assert_as_good_as_torch(out["y"], reference(torch.float64), reference(torch.float32), factor=3.0)


@pytest.mark.parametrize("norm_last", [False, True], ids=["decoder", "encoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_step(cpu, dtype, norm_last, tmp_path):
    """A norm before the Linears and causal, or none there and one behind the residual and all keys seen: as in BERT."""
    heads, kv_heads, size, hidden = 6, 2, 24, 70
    cases = []
    for tokens, past, soft_cap in ((1, 70, 0.0), (3, 130, 5.0)):
        x, weight = torch.randn(tokens, hidden), torch.rand(hidden) + 0.5
        qkv, back = torch.randn((heads + 2 * kv_heads) * size, hidden) / 8, torch.randn(hidden, heads * size) / 12
        keys, values = (torch.randn(kv_heads, past + tokens, size).to(dtype) for _ in range(2))
        numbers = {
            "tokens": tokens,
            "past": past,
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_size": size,
        }
        numbers |= {"norm": 1, "scale": size**-0.5, "soft_cap": soft_cap, "dtype": DTYPE_CODES[dtype]}
        numbers["norm_last"] = norm_last
        arrays = {"x": x, "qkv": qkv, "back": back, "norm_weight": weight, "keys": keys, "values": values}
        cases.append(Case("attention_step", numbers, arrays, {"y": ((tokens, hidden), torch.float32)}))
    run(cpu, cases, tmp_path)
    for case in cases:
        tokens, past, soft_cap = (case.numbers[name] for name in ("tokens", "past", "soft_cap"))

        def reference(kind, case=case, tokens=tokens, past=past, soft_cap=soft_cap):
            x, qkv, back, weight = (case.arrays[name].to(kind) for name in ("x", "qkv", "back", "norm_weight"))
            h = x if norm_last else rms_norm(x, weight)
            rows = (h @ qkv.T).view(tokens, -1, size).transpose(0, 1)
            q, *new = rows.split([heads, kv_heads, kv_heads])
            held = []
            for name, own in zip(("keys", "values"), new, strict=True):
                cached = case.arrays[name].clone()
                cached[:, past:] = own.to(dtype)
                held.append(cached.to(kind).repeat_interleave(heads // kv_heads, 0))
            scores = q @ held[0].transpose(1, 2) * size**-0.5
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            hidden_keys = torch.ones(tokens, past + tokens, dtype=torch.bool).triu(past + 1)
            if not norm_last:
                scores = scores.masked_fill(hidden_keys, float("-inf"))
            y = x + (torch.softmax(scores, -1) @ held[1]).transpose(0, 1).flatten(1) @ back.T
            return rms_norm(y, weight) if norm_last else y

        for out in case.found.values():
            exact = reference(torch.float64)
            # keys and values near the middle of two numbers of 16 bits may round either way
            slack = 1.0 if dtype == torch.float32 else 2e3
            assert_as_good_as_torch(out["y"], exact, reference(torch.float32), factor=3.0, roundings=slack)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_routed_experts(cpu, precision, tmp_path):
    """One token and many; an index may name no expert."""
    experts, hidden, units = 3, 70, 37
    up, down = (
        [Weight(*shape, [2, 3, 4], outlier_fraction=0.01, row_scale=True, seed=e) for e in range(experts)]
        for shape in ((2 * units, hidden), (hidden, units))
    )
    numbers: dict[str, float] = {"experts": experts, "units": units, "precision": PRECISIONS[precision]}
    arrays: dict[str, Tensor | None] = {"up_bias": torch.randn(experts, 2 * units) * 0.3}
    for e in range(experts):
        for name, weights in (("up", up), ("down", down)):
            shape, held = held_by(weights[e], f"{name}{e}_")
            numbers, arrays = numbers | shape, arrays | held
    cases = []
    for tokens, choices, dtype in ((1, 2, torch.float32), (41, 2, torch.bfloat16)):
        index = torch.stack([torch.randperm(experts + 1)[:choices] for _ in range(tokens)])
        given = {"x": torch.randn(tokens, hidden).to(dtype) / 8, "index": index, "weights": torch.rand(tokens, choices)}
        sizes = {"tokens": tokens, "choices": choices, "dtype": DTYPE_CODES[dtype]}
        cases.append(Case("routed_experts", numbers | sizes, arrays | given, {"y": ((tokens, hidden), dtype)}))
    run(cpu, cases, tmp_path)
    for case in cases:
        x, index, weights = (case.arrays[name] for name in ("x", "index", "weights"))
        exact = torch.zeros(x.shape, dtype=torch.float64)
        for e in range(experts):
            gate, rest = (x.double() @ up[e].dense.T + arrays["up_bias"][e]).chunk(2, -1)
            y = (nn.functional.silu(gate) * rest) @ down[e].dense.T
            exact += y * torch.where(index == e, weights, 0).sum(1, keepdim=True)
        for isa, out in case.found.items():
            rounding = torch.finfo(x.dtype).eps / 2
            in_bytes = precision == "fast" and isa in ("neon_dotprod", "neon_i8mm")
            allowed = rounding + 1e-6 + 2 * (1.2e-2 if in_bytes else MAX_ERROR[precision])
            assert (out["y"].double() - exact).norm() <= allowed * exact.norm(), (isa, case.numbers)


# --- thread pool -----------------------------------------------------------------------------------------------------


def test_thread_pool(tmp_path):
    """Each task runs once in each round, and each of the tasks within it, whatever the number of threads."""
    case = Case("thread_pool", {"tasks": 37, "nested": 9, "rounds": 80}, {}, {"visits": ((37,), torch.int64)})
    run("max", [case], tmp_path)
    for found in case.found.values():
        assert found["visits"].tolist() == [80 * (1 + 9)] * 37


# --- instructions ----------------------------------------------------------------------------------------------------


def test_inner_loops_need_few_instructions():
    """Lookups at 1 to 4 bits: for each byte of register at most 1.3 times AVX2's instructions (docs/kernels-arm.md)."""
    theirs = next(iter(ROOT.glob("build/*/pyllmq._cpu/csrc/codebook/cpu/linear_avx2.cpp.o")), None)
    objdump = COMPILER.replace("g++", "objdump")
    if SANITIZED or theirs is None or shutil.which(objdump) is None:
        pytest.skip(f"needs {objdump}, the AVX2 kernels built in this folder, and no sanitizer")
    neon = table_loops(objdump, str(driver().parent / "objects/csrc/codebook/cpu/linear_neon.cpp.o"), rows=16)
    avx2 = table_loops("objdump", str(theirs), rows=32)
    compared = neon.keys() & avx2.keys()
    bits16 = 2  # TableKind of the default precision
    assert {(bits16, of_3_bits, tokens) for of_3_bits in (False, True) for tokens in (1, 2)} <= compared
    ratios = {key: neon[key] * 16 / (avx2[key] * 32) for key in compared}
    assert max(ratios.values()) <= 1.3, ratios

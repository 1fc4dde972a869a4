"""The `cuda` back end above its kernels: why it is not there, what it does without a driver, what nvcc makes of the sources."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyllmq
from pyllmq import backends, dispatch
from pyllmq.backends import cuda

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("80", "90a")


@pytest.fixture
def extension(monkeypatch):
    """A pretended pyllmq._cuda; tests set what its driver says."""
    pretended = SimpleNamespace(runtime_version=lambda: 13000, device_problem=lambda: "")
    monkeypatch.setitem(sys.modules, "pyllmq._cuda", pretended)
    monkeypatch.setattr(pyllmq, "_cuda", pretended, raising=False)
    return pretended


def test_not_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyllmq._cuda", None)
    monkeypatch.delattr(pyllmq, "_cuda", raising=False)
    ok, why = cuda.available()
    assert not ok and "was not built" in why and "PYLLMQ_CUDA=1" in why


def test_torch_for_cpus_only(extension, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    ok, why = cuda.available()
    assert not ok and "built for CPUs only" in why


@pytest.mark.parametrize(
    "problem",
    [
        "CUDA driver version is insufficient for CUDA runtime version",
        "no kernel image is available for execution on the device",
        "the driver sees no device",
    ],
)
def test_the_driver_refuses(extension, monkeypatch, problem):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    extension.device_problem = lambda: problem
    ok, why = cuda.available()
    assert not ok and problem in why and "built with CUDA 13.0" in why
    with pytest.raises(pyllmq.NoKernelError, match=re.escape(problem)):
        dispatch.choose(dispatch.Problem("codebook_linear", "cuda", "cuda", torch.float16, 1))


def test_available(extension, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda.available() == (True, "a GPU, compute capability 9.0, built with CUDA 13.0")
    assert backends.machine_layout("cuda") == "cuda"
    with pyllmq.use_backend("reference"):
        assert backends.machine_layout("cuda") == "checkpoint"


def test_a_layout_without_a_back_end_is_named():
    with pytest.raises(ValueError, match="from the layout 'checkpoint'; allowed: 'cpu', 'cuda'"):
        backends.layout_codes(dispatch.WeightOperand("checkpoint", (torch.empty(0),), 1, 1))


def test_counters_are_shared_by_a_stream_and_not_by_a_graph(monkeypatch):
    capturing = False
    monkeypatch.setattr(cuda, "_capturing", lambda: capturing)
    monkeypatch.setattr(cuda, "_counters", {})
    cpu = torch.device("cpu")
    first = cuda._zero_counters(10, cpu, 1)
    assert cuda._zero_counters(5, cpu, 1) is first and cuda._zero_counters(10, cpu, 2) is not first
    assert cuda._zero_counters(11, cpu, 1).numel() == 11
    capturing = True
    graphs = [cuda._zero_counters(5, cpu, 1) for _ in range(2)]
    assert graphs[0] is not graphs[1] and not graphs[0].any() and graphs[0] is not cuda._zero_counters(5, cpu, 1)


def test_the_built_extension_without_a_driver():
    try:
        from pyllmq import _cuda
    except ImportError:
        pytest.skip("pyllmq._cuda was not built: no nvcc, or PYLLMQ_CUDA=0")
    assert _cuda.runtime_version() >= 12000
    problem = _cuda.device_problem()
    if not problem:
        pytest.skip("a device is here: the driver refuses nothing")
    codes = torch.zeros(4, dtype=torch.uint8)
    for _ in range(2):  # an error is taken by whom it befell: the process stays usable
        with pytest.raises(RuntimeError, match=re.escape(problem)):
            _cuda.codebook_dequantize(codes.data_ptr(), 4096, 8, 8, codes.data_ptr(), 0, 0)
        assert _cuda.device_problem() == problem


def assert_no_local_memory(cubin):
    """By what cuobjdump says, if it is here: on PATH, or beside triton."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))
    if cuobjdump is None:
        return
    used, code = (
        subprocess.run([cuobjdump, option, str(cubin)], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    kernels = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", used)
    assert kernels and all(amounts == ("0", "0") for amounts in kernels), used
    assert "EXIT" in code and not re.search(r"\b(LDL|STL)\b", code), cubin.name


def test_no_kernel_spills_or_uses_local_memory(tmp_path):
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        pytest.skip("no nvcc on PATH")

    def compile_kernels(source, architecture):
        done = subprocess.run(
            [
                nvcc,
                "-O3",
                "-std=c++17",
                "-Xptxas=-v",
                f"-I{CSRC}",
                f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
                "-cubin",
                str(source),
                "-o",
                str(tmp_path / f"{source.stem}_{architecture}.cubin"),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return source.name, architecture, done.stderr

    tasks = [(source, a) for source in sorted((CSRC / "cuda").glob("*.cu")) for a in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda task: compile_kernels(*task), tasks))
    kernels = 0
    for name, architecture, report in reports:
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = re.findall(r"Used (\d+) registers", report)
        assert len(memory) == len(registers) == report.count("Compiling entry function"), report
        assert all(amounts == ("0", "0", "0") for amounts in memory), f"{name} for sm_{architecture}:\n{report}"
        if name == "codebook_linear.cu":  # two blocks of 256 threads share 65536 registers
            assert len(registers) == 3 and all(int(count) <= 128 for count in registers), report
        if name == "codebook_linear_tables.cu":  # one block of 768 threads
            assert len(registers) == 1 and int(registers[0]) <= 80, report
        if name == "sparse_linear.cu":  # four blocks of 128 threads, of bitmaps three
            assert len(registers) == 16 and all(int(count) <= 168 for count in registers), report
        if name == "sparse_columns.cu":  # two blocks of 256
            assert len(registers) == 12 and all(int(count) <= 128 for count in registers), report
        kernels += len(registers)
    assert kernels >= 8 * len(ARCHITECTURES)
    for cubin in sorted(tmp_path.glob("*.cubin")):
        assert_no_local_memory(cubin)

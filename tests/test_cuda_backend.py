"""The `cuda` back end above its kernels: why it is not there, what it does without a driver, what nvcc makes of the sources."""

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyllmq
from pyllmq import dispatch, layouts
from pyllmq.backends import cuda
from pyllmq.backends.cuda import runtime
from pyllmq.backends.triton import runtime as triton_runtime
from pyllmq.dispatch import Problem
from pyllmq.operations import SOFTMAX_CDIST_L1, SinkhornProblem, WeightProblem

from .oracle import built_in_kinds

CSRC = Path(__file__).resolve().parents[1] / "csrc"


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
        dispatch.choose(WeightProblem("packed_linear", "cuda", torch.float16, "cuda.codebook", 1))


def test_available(extension, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda.available() == (True, "a GPU, compute capability 9.0, built with CUDA 13.0")
    assert all(layouts.layout_for(kind, "cuda").name == f"cuda.{kind}" for kind in built_in_kinds())
    with pyllmq.use_backend("reference"):
        assert layouts.layout_for("codebook", "cuda") is None


def test_a_layout_without_a_back_end_is_named():
    with pytest.raises(ValueError, match="no machine layout 'checkpoint.codebook'; allowed: 'cpu.codebook'"):
        layouts.machine_layout("checkpoint.codebook")


class TwoGpus:
    """cuda:0 is what every kernel was built for, cuda:1 is not: what is asked of the current device depends on which that is."""

    def __init__(self, monkeypatch):
        self.current, self.asked = 0, []
        monkeypatch.setattr(torch.cuda, "device", self.made_current)
        monkeypatch.setattr(runtime, "current", self.made_current)

    @contextlib.contextmanager
    def made_current(self, device):
        before, self.current = self.current, torch.device(device).index
        yield
        self.current = before

    def answer(self, *_):
        self.asked.append(self.current)
        return self.current == 0


@pytest.fixture
def two_gpus(monkeypatch):
    gpus = TwoGpus(monkeypatch)
    dispatch.clear_cache()
    yield gpus
    dispatch.clear_cache()
    assert gpus.current == 0


def test_what_does_not_run_on_one_gpu_runs_on_the_other(two_gpus, monkeypatch):
    monkeypatch.setattr(runtime, "available", lambda: (two_gpus.answer(), "this GPU is too old"))
    monkeypatch.setattr(triton_runtime, "available", lambda: (not two_gpus.answer(), "this GPU is too new"))
    problem = partial(Problem, "softmax_cdist_l1", dtype=torch.float16)
    assert dispatch.choose(problem("cuda:0")).name == "cuda.softmax_cdist_l1"
    assert dispatch.choose(problem("cuda:1")).name == "triton.softmax_cdist_l1"
    kernels = [SOFTMAX_CDIST_L1.kernel_for(torch.device("cuda", index), torch.float16) for index in (0, 1)]
    assert kernels[0] is not kernels[1], "what was chosen for one GPU served the other"
    assert layouts.layout_for("codebook", "cuda:0").name == "cuda.codebook"
    assert layouts.layout_for("codebook", "cuda:1").name == "triton.codebook"


def test_shared_memory_is_asked_of_the_tensors_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(runtime, "available", lambda: (True, ""))
    monkeypatch.setattr(triton_runtime, "available", lambda: (True, ""))
    monkeypatch.setattr(cuda.sinkhorn, "has_room", two_gpus.answer)
    for index, name in enumerate(("cuda.sinkhorn", "triton.sinkhorn")):
        transport = SinkhornProblem("sinkhorn", f"cuda:{index}", torch.float32, 64, 64)
        assert dispatch.choose(transport).name == name
    assert two_gpus.asked == [0, 1]


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
            _cuda.CodebookOperand(codes.data_ptr(), 4096, 8, 8).dequantize(codes.data_ptr(), 0, 0)
        assert _cuda.device_problem() == problem


# Bytes of a thread, all of them spills; two rows at once in place of four spill as well. What they cost a GPU must tell.
LARGEST_STACK = {"sinkhorn/cuda/sinkhorn.cu": 224, "sinkhorn/cuda/sinkhorn_small.cu": 8}


def built_kernels():
    """What ptxas gave every kernel of the built extension: {(source, architecture): [(registers, stack, local memory)]}."""
    extension = pytest.importorskip("pyllmq._cuda", reason="built without nvcc")
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH or beside triton")
    command = [cuobjdump, "-res-usage", extension.__file__]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {}
    for code in printed.split("Fatbin elf code:")[1:]:
        used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", code)
        sources = [source for source, names in mangled_kernels().items() if any(name in code for name in names)]
        if sources:  # else no kernel of ours, such as the runtime's probe
            (source,) = sources
            kernels[source, re.search(r"arch = sm_(\w+)", code)[1]] = [tuple(map(int, amounts)) for amounts in used]
    return kernels


def mangled_kernels():
    """Source -> its kernels as they stand in machine code, a name behind its length; no kernel's name occurs in two sources."""
    texts = {str(path.relative_to(CSRC)): path.read_text() for path in CSRC.glob("*/cuda/*.cu")}
    found = {
        source: set(re.findall(r"\b(\w+_kernel)\(", text)) for source, text in texts.items() if "PYLLMQ_KERNEL" in text
    }
    return {source: {f"{len(name)}{name}" for name in names} for source, names in found.items()}


def test_no_kernel_spills_or_uses_local_memory():
    kernels = built_kernels()
    sources = {source for source, _ in kernels}
    assert sources >= {
        str(source.relative_to(CSRC)) for source in CSRC.glob("*/cuda/*.cu") if "PYLLMQ_KERNEL" in source.read_text()
    }
    architectures = {architecture for _, architecture in kernels}
    assert architectures and len(kernels) == len(sources) * len(architectures)
    for (name, architecture), used in kernels.items():
        registers = [amounts[0] for amounts in used]
        report = f"{name} for sm_{architecture}: {used}"
        assert all(stack <= LARGEST_STACK.get(name, 0) and local == 0 for _, stack, local in used), report
        if name == "codebook/cuda/linear.cu":  # two blocks of 256 threads share 65536 registers
            assert len(registers) == 3 and max(registers) <= 128, report
        if name == "codebook/cuda/linear_byte_planes.cu":  # the same; for 2, 3 and 4 bits, one and two tokens
            assert len(registers) == 6 and max(registers) <= 128, report
        if name == "experts/cuda/routed_experts.cu":
            assert len(registers) == 3 and max(registers) <= 128, report
        if name == "experts/cuda/multiply_codebook.cu":  # two blocks of 256
            assert len(registers) == 3 and max(registers) <= 128, report
        if name == "experts/cuda/multiply_cells.cu":  # three blocks of 128 threads
            assert len(registers) == 16 and max(registers) <= 168, report
        if name == "experts/cuda/multiply_columns.cu":  # two blocks of 256
            assert len(registers) == 8 and max(registers) <= 128, report
        if (
            name == "codebook/cuda/linear_wgmma.cu" and architecture == "90a"
        ):  # of 512 threads, or of 384; and one for x
            assert len(registers) == 6 and max(registers) <= 168, report
        if name == "codebook/cuda/linear_wgmma_registers.cu" and architecture == "90a":
            # of 512 threads, of 32 tokens 256; and one for x
            assert len(registers) == 4 and max(registers) <= 255 and sorted(registers)[2] <= 128, report
        if name == "sparse/cuda/linear_tables.cu":  # two blocks of 512
            assert len(registers) == 1 and max(registers) <= 64, report
        if name == "sparse/cuda/linear_products.cu":  # two blocks of 256
            assert len(registers) == 1 and max(registers) <= 128, report
        if name == "sparse/cuda/linear.cu":  # three blocks of 128 threads
            assert len(registers) == 16 and max(registers) <= 168, report
        if name == "sparse/cuda/columns.cu":  # two blocks of 256
            assert len(registers) == 12 and max(registers) <= 128, report

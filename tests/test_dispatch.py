"""The table of kernels: every row is reachable, every refusal is explained."""

import re
from contextlib import nullcontext

import pytest
import torch

import pyllmq
from pyllmq import NoKernelError, _cpu, backends, dispatch
from pyllmq.backends.cpu import instruction_sets
from pyllmq.backends.cpu import runtime as cpu_runtime
from pyllmq.backends.cuda import codebook as cuda_codebook
from pyllmq.backends.cuda import runtime as cuda_runtime
from pyllmq.backends.cuda import sinkhorn as cuda_sinkhorn
from pyllmq.dispatch import Operation, Problem, choose
from pyllmq.operations import ClusterProblem, ExpertsProblem, SinkhornProblem, WeightProblem

F32, F16, BF16, U8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8
SPARSE = ("bitmap", "sparse24", "sparse24_codebook")


def linear(layout, device, dtype, tokens=1, meta=()):
    return WeightProblem("packed_linear", device, dtype, layout, tokens, meta)


def dequantize(layout, device, dtype):
    return WeightProblem("packed_dequantize", device, dtype, layout)


def rows(layout, device):
    return WeightProblem("packed_rows", device, BF16, layout)


def gradient(device):
    return WeightProblem("codebook_gradient", device, F32, "checkpoint.codebook")


def kmeans(op, device, method):
    return ClusterProblem(op, device, F32, method)


CELLS, COLUMNS, TWO_BITS, FOUR_BITS = (0, 1, 0, 256), (1, 1, 0, 0), (0, 1, 2, 256), (0, 1, 4, 768)
PROBLEMS = {
    "cpu.codebook_linear": linear("cpu.codebook", "cpu", F32),
    "cpu.codebook_dequantize": dequantize("cpu.codebook", "cpu", F16),
    "cpu.decode_checkpoint_and_matmul": linear("checkpoint.codebook", "cpu", F32),
    "cpu.decode_checkpoint": dequantize("checkpoint.codebook", "cpu", F32),
    "cuda.byte_planes": linear("cuda.codebook", "cuda", F32, 2, (4,)),
    "cuda.fused": linear("cuda.codebook", "cuda", F32, 2, (5,)),
    "cuda.wgmma": linear("cuda.codebook", "cuda", BF16, 65, (4, True)),
    "cuda.wgmma_registers": linear("cuda.codebook", "cuda", BF16, 32, (3, False)),
    "cuda.dequantize_matmul": linear("cuda.codebook", "cuda", BF16, 65, (4, False)),
    "cuda.dequantize": dequantize("cuda.codebook", "cuda", F16),
    "triton.fused": linear("triton.codebook", "cuda", F16, 64),
    "triton.decode_and_matmul": linear("triton.codebook", "cuda", BF16, 65),
    "triton.dequantize": dequantize("triton.codebook", "cuda", BF16),
    "cpu.codebook_rows": rows("cpu.codebook", "cpu"),
    "cuda.rows": rows("cuda.codebook", "cuda"),
    "triton.rows": rows("triton.codebook", "cuda"),
    "reference.packed_rows": rows("checkpoint.sparse24", "meta"),
    "reference.packed_linear": linear("checkpoint.codebook", "meta", F32),
    "reference.packed_dequantize": dequantize("checkpoint.bitmap", "meta", F32),
    **{f"cpu.{kind}_linear": linear(f"cpu.{kind}", "cpu", F32) for kind in SPARSE},
    **{f"cpu.{kind}_dequantize": dequantize(f"cpu.{kind}", "cpu", F32) for kind in SPARSE},
    **{f"cuda.{kind}_fused": linear(f"cuda.{kind}", "cuda", BF16, 64, CELLS) for kind in SPARSE},
    "cuda.sparse24_codebook_products": linear("cuda.sparse24_codebook", "cuda", BF16, 1, TWO_BITS),
    "cuda.sparse24_codebook_tables": linear("cuda.sparse24_codebook", "cuda", BF16, 1, FOUR_BITS),
    **{f"cuda.{kind}_columns": linear(f"cuda.{kind}", "cuda", BF16, 16, COLUMNS) for kind in SPARSE[:2]},
    **{f"cuda.{kind}_matmul": linear(f"cuda.{kind}", "cuda", BF16, 65, CELLS) for kind in SPARSE},
    **{f"cuda.{kind}_dequantize": dequantize(f"cuda.{kind}", "cuda", BF16) for kind in SPARSE},
    **{f"triton.{kind}_fused": linear(f"triton.{kind}", "cuda", BF16, 64) for kind in SPARSE},
    **{f"triton.{kind}_matmul": linear(f"triton.{kind}", "cuda", BF16, 65) for kind in SPARSE},
    **{f"triton.{kind}_dequantize": dequantize(f"triton.{kind}", "cuda", BF16) for kind in SPARSE},
    "cpu.routed_experts": ExpertsProblem("routed_experts", "cpu", F32, ("cpu.bitmap", "cpu.codebook")),
    "cuda.routed_experts": ExpertsProblem("routed_experts", "cuda", BF16, ("cuda.bitmap", "cuda.codebook")),
    "triton.routed_experts": ExpertsProblem("routed_experts", "cuda", BF16, ("triton.codebook", "triton.sparse24")),
    "reference.routed_experts": ExpertsProblem("routed_experts", "meta", F32, ("checkpoint.codebook",)),
    "cpu.codebook_gradient": gradient("cpu"),
    "cuda.codebook_gradient": gradient("cuda"),
    "triton.codebook_gradient": gradient("cuda"),
    "reference.codebook_gradient": gradient("meta"),
    "cpu.fit_columns": kmeans("fit_columns", "cpu", "lloyd"),
    "reference.fit_columns": kmeans("fit_columns", "meta", "exact"),
    **{f"{backend}.{op}": Problem(op, device, U8)
       for backend, device in (("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda"), ("reference", "meta"))
       for op in ("pack_codes", "unpack_codes")},
    "cpu.softmax_cdist_l1": Problem("softmax_cdist_l1", "cpu", F16),
    "cpu.softmax_cdist_l1_backward": Problem("softmax_cdist_l1_backward", "cpu", F32),
    "cuda.softmax_cdist_l1": Problem("softmax_cdist_l1", "cuda", BF16),
    "cuda.softmax_cdist_l1_backward": Problem("softmax_cdist_l1_backward", "cuda", F16),
    "triton.softmax_cdist_l1": Problem("softmax_cdist_l1", "cuda", BF16),
    "triton.softmax_cdist_l1_backward": Problem("softmax_cdist_l1_backward", "cuda", F16),
    "reference.softmax_cdist_l1": Problem("softmax_cdist_l1", "cpu", torch.float64),
    "reference.softmax_cdist_l1_backward": Problem("softmax_cdist_l1_backward", "meta", F32),
    "cpu.kmeans_1d": kmeans("kmeans_1d", "cpu", "lloyd"),
    "cpu.kmeans_1d_errors": kmeans("kmeans_1d_errors", "cpu", "windowed"),
    "cuda.kmeans_1d": kmeans("kmeans_1d", "cuda", "exact"),
    "cuda.kmeans_1d_errors": kmeans("kmeans_1d_errors", "cuda", "exact"),
    "triton.kmeans_1d": kmeans("kmeans_1d", "cuda", "windowed"),
    "triton.kmeans_1d_errors": kmeans("kmeans_1d_errors", "cuda", "exact"),
    "cpu.kmeans_1d_moved": kmeans("kmeans_1d", "xpu", "lloyd"),
    "cpu.kmeans_1d_errors_moved": kmeans("kmeans_1d_errors", "xpu", "windowed"),
    "reference.kmeans_1d": kmeans("kmeans_1d", "meta", "exact"),
    "reference.kmeans_1d_errors": kmeans("kmeans_1d_errors", "meta", "exact"),
    **{f"{row}{way}": SinkhornProblem(f"sinkhorn{way}", device, dtype, 64, m)
       for row, device, dtype, m in (("cpu.sinkhorn", "cpu", F32, 64), ("cuda.sinkhorn", "cuda", F32, 64),
                                     ("triton.sinkhorn", "cuda", F32, 64), ("triton.sinkhorn_tiles", "cuda", F32, 65),
                                     ("reference.sinkhorn", "cpu", torch.float64, 64))
       for way in ("", "_backward")},
    **{f"{backend}.doubly_stochastic{way}": SinkhornProblem(f"doubly_stochastic{way}", "cpu", dtype, 4, 4)
       for backend, dtype in (("cpu", F32), ("reference", torch.float64)) for way in ("", "_backward")},
}  # fmt: skip


def test_doctor_knows_each_cpu_row_on_each_instruction_set():
    named = {f"cpu.{row}" for rows_of in instruction_sets.ROWS_OF.values() for row in rows_of}
    assert named == {row.name for row in dispatch.rows() if row.backend == "cpu"}
    isas = {"amx", "avx512", "avx_vnni", "avx2", "neon_i8mm", "neon_dotprod", "neon", "scalar"}
    assert set(_cpu.supported_isas()) <= isas == instruction_sets.SERVED.keys() == instruction_sets.FASTER.keys()
    assert all(lines.keys() == instruction_sets.ROWS_OF.keys() for lines in instruction_sets.SERVED.values())


def test_every_row_is_reachable(monkeypatch):
    for module in (backends.cuda, cuda_runtime):
        monkeypatch.setattr(module, "available", lambda: (True, "a GPU is pretended"))
    monkeypatch.setattr(cuda_sinkhorn, "has_room", lambda n, m: True)
    monkeypatch.setattr(cuda_codebook, "has_wgmma", lambda device: True)
    assert {row.name for row in dispatch.rows()} == set(PROBLEMS)
    for name, problem in PROBLEMS.items():
        backend = name.split(".")[0]
        works, why = backends.report()[backend]
        # codes can be packed on a GPU by each of its back ends, so the one in question is asked for
        with pyllmq.use_backend(backend) if problem.device == "cuda" else nullcontext():
            if works:
                assert choose(problem).name == name
            else:
                with pytest.raises(NoKernelError, match=f"{name}: {re.escape(why)}"):
                    choose(problem)
    assert all(row.because for row in dispatch.rows())


@pytest.mark.parametrize(
    ("problem", "reasons"),
    [
        (linear("cpu.codebook", "cpu", torch.float64), ("not torch.float64", "prepacked as 'cpu.codebook'")),
        (linear("cpu.codebook", "meta", F32), ("these are on meta", "prepacked as 'cpu.codebook'")),
        (
            linear("cuda.codebook", "cuda", torch.float64, 70),
            (
                "this weight is 'cuda.codebook'",
                "up to 2 tokens, here 70",
                "up to 64 tokens, here 70",
                "not torch.float64",
                "prepacked as 'cuda.codebook'",
            ),
        ),
        (linear("cuda.codebook", "cpu", F32), ("on a cuda device, these are on cpu",)),
    ],
)
def test_a_refusal_lists_every_row_with_its_reason(problem, reasons):
    with pytest.raises(NoKernelError) as refusal:
        choose(problem)
    text = str(refusal.value)
    for row in dispatch.rows(problem.op):
        assert row.name in text
    for reason in reasons:
        assert reason in text
    assert "pyllmq doctor" in text


def test_an_operation_that_does_not_exist():
    with pytest.raises(NoKernelError, match="no operation 'no_such_op'; there are: packed_linear"):
        choose(Problem("no_such_op", "cpu", F32))


def test_the_order_of_rows_is_a_number_and_not_that_of_registration():
    operation = Operation("test_order", Problem)
    try:
        for name, order in (("b.second", 2), ("a.first", 1), ("c.third", 3)):
            operation.register(name, order, lambda problem: (True, ""), lambda: None, "a test")
        assert [row.name for row in dispatch.rows("test_order")] == ["a.first", "b.second", "c.third"]
        assert choose(Problem("test_order", "cpu", F32)).name == "a.first"
    finally:
        del dispatch._TABLE["test_order"]


def test_a_forced_back_end(monkeypatch):
    problem = PROBLEMS["cpu.pack_codes"]
    with pyllmq.use_backend("reference"):
        assert choose(problem).name == "reference.pack_codes"
    assert choose(problem).name == "cpu.pack_codes"
    monkeypatch.setenv("PYLLMQ_BACKEND", "reference")
    dispatch.clear_cache()
    try:
        assert choose(problem).name == "reference.pack_codes"
    finally:
        monkeypatch.delenv("PYLLMQ_BACKEND")
        dispatch.clear_cache()


def test_an_unknown_back_end_in_the_environment_is_explained(monkeypatch):
    monkeypatch.setenv("PYLLMQ_BACKEND", "gpu")
    dispatch.clear_cache()
    try:
        with pytest.raises(NoKernelError, match="back end 'gpu' was asked for"):
            choose(PROBLEMS["cpu.pack_codes"])
    finally:
        monkeypatch.delenv("PYLLMQ_BACKEND")
        dispatch.clear_cache()


def test_the_environment_holds_kernels_to_an_instruction_set(monkeypatch):
    """As the extension does in a new process; afterwards it is what it was."""
    before, load = _cpu.isa(), cpu_runtime.extension.__wrapped__
    try:
        for name in _cpu.supported_isas():
            monkeypatch.setenv("PYLLMQ_ISA", name)
            assert load() is _cpu and _cpu.isa() == name
        monkeypatch.setenv("PYLLMQ_ISA", "avx9")
        with pytest.raises(ValueError, match="PYLLMQ_ISA=avx9: .*allowed on this machine: .*scalar"):
            load()
        assert _cpu.isa() == name
        monkeypatch.setenv("PYLLMQ_ISA", "")
        assert load().isa() == name
    finally:
        _cpu.set_isa(before)


def test_report_says_why_a_back_end_is_missing():
    report = backends.report()
    assert report["cpu"][0] and report["reference"][0]
    assert all(why for _, why in report.values())

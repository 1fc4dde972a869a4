"""The table of kernels: every row is reachable, every refusal is explained."""

import re
from contextlib import nullcontext

import pytest
import torch

import pyllmq
from pyllmq import NoKernelError, backends, dispatch
from pyllmq.backends import cuda_sinkhorn
from pyllmq.dispatch import Problem, choose

PROBLEMS = {
    "cpu.codebook_linear": Problem("codebook_linear", "cpu", "cpu", torch.float32, 1),
    "cpu.dequantize": Problem("codebook_dequantize", "cpu", "cpu", torch.float16),
    "cpu.pack_codes": Problem("pack_codes", "", "cpu", torch.uint8),
    "cpu.unpack_codes": Problem("unpack_codes", "", "cpu", torch.uint8),
    "cuda.tables": Problem("codebook_linear", "cuda", "cuda", torch.float32, 1),
    "cuda.fused": Problem("codebook_linear", "cuda", "cuda", torch.float32, 2),
    "cpu.kmeans_1d": Problem("kmeans_1d", "lloyd", "cpu", torch.float32),
    "cpu.kmeans_1d_errors": Problem("kmeans_1d_errors", "windowed", "cpu", torch.float32),
    "cuda.dequantize_matmul": Problem("codebook_linear", "cuda", "cuda", torch.bfloat16, 65),
    "cuda.dequantize": Problem("codebook_dequantize", "cuda", "cuda", torch.float16),
    "cuda.pack_codes": Problem("pack_codes", "", "cuda", torch.uint8),
    "cuda.unpack_codes": Problem("unpack_codes", "", "cuda", torch.uint8),
    "triton.fused": Problem("codebook_linear", "triton", "cuda", torch.float16, 64),
    "triton.decode_and_matmul": Problem("codebook_linear", "triton", "cuda", torch.bfloat16, 65),
    "triton.dequantize": Problem("codebook_dequantize", "triton", "cuda", torch.bfloat16),
    "cpu.softmax_cdist_l1": Problem("softmax_cdist_l1", "", "cpu", torch.float16),
    "cpu.softmax_cdist_l1_backward": Problem("softmax_cdist_l1_backward", "", "cpu", torch.float32),
    "cuda.softmax_cdist_l1": Problem("softmax_cdist_l1", "", "cuda", torch.bfloat16),
    "cuda.softmax_cdist_l1_backward": Problem("softmax_cdist_l1_backward", "", "cuda", torch.float16),
    "triton.softmax_cdist_l1": Problem("softmax_cdist_l1", "", "cuda", torch.bfloat16),
    "triton.softmax_cdist_l1_backward": Problem("softmax_cdist_l1_backward", "", "cuda", torch.float16),
    "reference.softmax_cdist_l1": Problem("softmax_cdist_l1", "", "cpu", torch.float64),
    "reference.softmax_cdist_l1_backward": Problem("softmax_cdist_l1_backward", "", "meta", torch.float32),
    "triton.pack_codes": Problem("pack_codes", "", "cuda", torch.uint8),
    "triton.unpack_codes": Problem("unpack_codes", "", "cuda", torch.uint8),
    "reference.codebook_linear": Problem("codebook_linear", "checkpoint", "meta", torch.float32, 1),
    "reference.codebook_dequantize": Problem("codebook_dequantize", "checkpoint", "meta", torch.float32),
    "cpu.decode_checkpoint_and_matmul": Problem("codebook_linear", "checkpoint", "cpu", torch.float32, 1),
    "cpu.decode_checkpoint": Problem("codebook_dequantize", "checkpoint", "cpu", torch.float32),
    "cpu.codebook_gradient": Problem("codebook_gradient", "checkpoint", "cpu", torch.float32),
    "cuda.codebook_gradient": Problem("codebook_gradient", "checkpoint", "cuda", torch.float32),
    "triton.codebook_gradient": Problem("codebook_gradient", "checkpoint", "cuda", torch.float32),
    "reference.codebook_gradient": Problem("codebook_gradient", "checkpoint", "meta", torch.float32),
    "cpu.fit_columns": Problem("fit_columns", "", "cpu", torch.float32),
    **{
        f"cpu.{format}_{op}": Problem(f"{format}_{op}", f"cpu.{format}", "cpu", torch.float32, 1)
        for format in ("bitmap", "sparse24", "sparse24_codebook")
        for op in ("linear", "dequantize")
    },
    **{
        f"cuda.{layout}_{way}": Problem(f"{format}_{op}", f"cuda.{layout}", "cuda", torch.bfloat16, tokens)
        for format, layout in (
            ("bitmap", "bitmap"),
            ("bitmap", "columns"),
            ("sparse24", "sparse24"),
            ("sparse24", "columns"),
            ("sparse24_codebook", "sparse24_codebook"),
        )
        for way, op, tokens in (("fused", "linear", 16), ("matmul", "linear", 65), ("dequantize", "dequantize", 0))
    },
    **{
        f"triton.{format}_{way}": Problem(f"{format}_{op}", f"triton.{format}", "cuda", torch.bfloat16, tokens)
        for format in ("bitmap", "sparse24", "sparse24_codebook")
        for way, op, tokens in (("fused", "linear", 64), ("matmul", "linear", 65), ("dequantize", "dequantize", 0))
    },
    **{
        f"reference.{format}_{op}": Problem(f"{format}_{op}", format, "meta", torch.float32, 1)
        for format in ("bitmap", "sparse24", "sparse24_codebook")
        for op in ("linear", "dequantize")
    },
    "reference.pack_codes": Problem("pack_codes", "", "meta", torch.uint8),
    "reference.unpack_codes": Problem("unpack_codes", "", "meta", torch.uint8),
    "triton.kmeans_1d": Problem("kmeans_1d", "windowed", "cuda", torch.float32),
    "triton.kmeans_1d_errors": Problem("kmeans_1d_errors", "exact", "cuda", torch.float32),
    "cuda.kmeans_1d": Problem("kmeans_1d", "exact", "cuda", torch.float32),
    "cuda.kmeans_1d_errors": Problem("kmeans_1d_errors", "exact", "cuda", torch.float32),
    "cpu.kmeans_1d_moved": Problem("kmeans_1d", "lloyd", "xpu", torch.float32),
    "cpu.kmeans_1d_errors_moved": Problem("kmeans_1d_errors", "windowed", "xpu", torch.float32),
    "reference.kmeans_1d": Problem("kmeans_1d", "exact", "meta", torch.float32),
    "reference.kmeans_1d_errors": Problem("kmeans_1d_errors", "exact", "meta", torch.float32),
    "cpu.sinkhorn": Problem("sinkhorn", "64x64", "cpu", torch.float32),
    "cpu.sinkhorn_backward": Problem("sinkhorn_backward", "64x64", "cpu", torch.float32),
    "cuda.sinkhorn": Problem("sinkhorn", "64x64", "cuda", torch.float32, 4096),
    "cuda.sinkhorn_backward": Problem("sinkhorn_backward", "64x64", "cuda", torch.float32, 4096),
    "triton.sinkhorn": Problem("sinkhorn", "64x64", "cuda", torch.float32, 4096),
    "triton.sinkhorn_backward": Problem("sinkhorn_backward", "64x64", "cuda", torch.float32, 4096),
    "triton.sinkhorn_tiles": Problem("sinkhorn", "64x65", "cuda", torch.float32, 8192),
    "triton.sinkhorn_tiles_backward": Problem("sinkhorn_backward", "64x65", "cuda", torch.float32, 8192),
    "reference.sinkhorn": Problem("sinkhorn", "64x64", "cpu", torch.float64),
    "reference.sinkhorn_backward": Problem("sinkhorn_backward", "64x64", "cpu", torch.float64),
    "cpu.doubly_stochastic": Problem("doubly_stochastic", "", "cpu", torch.float32, 16),
    "cpu.doubly_stochastic_backward": Problem("doubly_stochastic_backward", "", "cpu", torch.float32, 16),
    "reference.doubly_stochastic": Problem("doubly_stochastic", "", "cpu", torch.float64),
    "reference.doubly_stochastic_backward": Problem("doubly_stochastic_backward", "", "cpu", torch.float64),
}


def test_every_row_is_reachable(monkeypatch):
    monkeypatch.setattr(backends.cuda, "available", lambda: (True, "a GPU is pretended"))
    monkeypatch.setattr(backends.cuda, "_tables_fit", lambda: True)
    monkeypatch.setattr(cuda_sinkhorn, "_has_room", lambda n, m: True)
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
        (Problem("codebook_linear", "cpu", "cpu", torch.float64, 1), ("not torch.float64", "prepacked as 'cpu'")),
        (Problem("codebook_linear", "cpu", "meta", torch.float32, 1), ("these are on meta", "prepacked as 'cpu'")),
        (
            Problem("codebook_linear", "cuda", "cuda", torch.float64, 70),
            (
                "this weight is 'cuda'",
                "one token, here 70",
                "up to 64 tokens, here 70",
                "not torch.float64",
                "prepacked as 'cuda'",
            ),
        ),
        (Problem("codebook_linear", "cuda", "cpu", torch.float32, 1), ("on a cuda device, these are on cpu",)),
        (Problem("no_such_op", "", "cpu", torch.float32), ("no kernel of that name",)),
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


def test_a_forced_back_end(monkeypatch):
    problem = PROBLEMS["cpu.pack_codes"]
    with pyllmq.use_backend("reference"):
        assert choose(problem).name == "reference.pack_codes"
    assert choose(problem).name == "cpu.pack_codes"
    monkeypatch.setenv("PYLLMQ_BACKEND", "reference")
    dispatch.kernel_for.cache_clear()
    try:
        assert choose(problem).name == "reference.pack_codes"
    finally:
        monkeypatch.delenv("PYLLMQ_BACKEND")
        dispatch.kernel_for.cache_clear()


def test_an_unknown_back_end_in_the_environment_is_explained(monkeypatch):
    monkeypatch.setenv("PYLLMQ_BACKEND", "gpu")
    dispatch.kernel_for.cache_clear()
    try:
        with pytest.raises(NoKernelError, match="back end 'gpu' was asked for"):
            choose(PROBLEMS["cpu.pack_codes"])
    finally:
        monkeypatch.delenv("PYLLMQ_BACKEND")
        dispatch.kernel_for.cache_clear()


def test_report_says_why_a_back_end_is_missing():
    report = backends.report()
    assert report["cpu"][0] and report["reference"][0]
    assert all(why for _, why in report.values())

"""softmax_cdist_l1 of the Triton back end without a GPU: in the interpreter, and compiled ahead of time."""

import re

import pytest

from .test_triton import ARCHITECTURES, assert_passes_in_the_interpreter, compiled, needs_triton


@needs_triton
def test_in_the_interpreter():
    assert_passes_in_the_interpreter("triton_softmax_cdist_l1.py", 10)


@needs_triton
@ARCHITECTURES
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_without_spills(arch, dtype, tmp_path, monkeypatch):
    from pyllmq.triton_kernels import softmax_cdist_l1 as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    logits, others = (
        ("x", "y", "logits", "out"),
        ("x_statistics", "y_statistics", "statistics", "parts", "gradient", "h", "dots"),
    )
    types = dict.fromkeys(logits, "*{x}") | dict.fromkeys(others, "*fp32") | {"scale": "fp32"}
    sign = {"IN_PLACE": dtype == "fp32", "ROWS": kernels.SIGN_ROWS, "COLUMNS": kernels.SIGN_COLUMNS}
    for kernel, constants in (
        (kernels._row_statistics, {"BLOCK": kernels.STATISTICS_BLOCK}),
        (
            kernels._distances,
            {"ROWS": kernels.ROWS, "OTHER_ROWS": kernels.OTHER_ROWS, "COLUMNS": kernels.COLUMNS},
        ),
        (kernels._signs, sign | {"OTHER_ROWS": kernels.SIGN_OTHER_ROWS}),
        (kernels._softmax_gradient, sign),
    ):
        resources, code = compiled(kernel, constants, x=dtype, arch=arch, stages=3, types=types)
        assert resources["stack"] == resources["local"] == 0, f"{kernel.__name__}: {resources}"
        assert not re.findall(r"\b(?:LDL|STL)\b", code), kernel.__name__

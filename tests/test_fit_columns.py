"""fit_columns: the reference row against the C++ one and against the definition, its refusals, and compress without C++ kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyllmq
from pyllmq import functional

pytestmark = pytest.mark.kernels


def block(columns: int, rows: int, kept: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "block": normal(columns, rows),
        "coupling": normal(columns, columns) * 0.2,
        "pivot": normal(columns).abs() + 0.5,
        "row_weights": normal(rows).abs() + 0.1,
        "row_scale": normal(rows).abs() + 0.5,
        "bits": torch.randint(1, 5, (columns,), generator=generator).to(torch.uint8),
        "kept_counts": torch.full((columns,), kept, dtype=torch.int32),
        "stored": torch.zeros(columns, rows),
        "codes": torch.zeros(columns, rows, dtype=torch.uint8),
        "kept": torch.zeros(columns, rows, dtype=torch.bool),
        "centroids": torch.zeros(columns, 256),
    }


def run(backend: str, state: dict[str, torch.Tensor], **how) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    state = {name: tensor.clone() for name, tensor in state.items()}
    with pyllmq.use_backend(backend):
        moves, decrease = functional.fit_columns(**state, **how)
    return state, moves, decrease


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (1, 40), (7, 33), (12, 200)])
def test_the_reference_row_does_what_the_kernel_does(columns, rows, kept):
    kept = min(kept, rows - 1)
    for seed in range(3):
        start = block(columns, rows, kept, seed)
        ours, moves, _ = run("cpu", start)
        theirs, their_moves, _ = run("reference", start)
        for name in ("stored", "block"):
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(their_moves, moves, rtol=1e-4, atol=1e-4)
        assert torch.equal(theirs["codes"], ours["codes"]) and torch.equal(theirs["kept"], ours["kept"])
        assert int(ours["kept"].sum()) == columns * kept
        # A descent from there, towards other values.
        again = ours | {"block": start["block"].flip(0) * 0.3, "centroids": ours["centroids"]}
        ours, moves, decrease = run("cpu", again, descend=True)
        theirs, their_moves, their_decrease = run("reference", again, descend=True)
        torch.testing.assert_close(theirs["stored"], ours["stored"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(their_moves, moves, rtol=1e-4, atol=1e-4)
        assert their_decrease == pytest.approx(decrease, rel=1e-4, abs=1e-6) and decrease >= 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_errors_name_what_was_given(backend):
    start = block(4, 9, 0, 0)
    for name, wrong, message in (
        ("bits", start["bits"] * 0, "allowed: 1 to 8"),
        ("kept_counts", start["kept_counts"] + 9, "allowed: 0 to 8"),
        ("pivot", start["pivot"].double(), "pivot is torch.float64"),
        ("stored", start["stored"].T.contiguous().T, "stored is torch.float32"),
        ("codes", start["codes"][:3], r"codes is torch.uint8 \(3, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(backend, start | {name: wrong})
    with pytest.raises(ValueError, match="method is 'best'"):
        run(backend, start, method="best")
    start["block"][2, 5] = torch.inf
    with pytest.raises(OverflowError, match="^2$"):
        run(backend, start)


def test_lloyd_is_not_what_the_reference_row_finds():
    with pytest.raises(pyllmq.NoKernelError, match="finds the optimum"):
        run("reference", block(2, 9, 0, 0), method="lloyd")


def test_compress_with_the_reference_back_end(monkeypatch):
    """The back end that an error recommends serves all of compress."""
    from . import models

    monkeypatch.setenv("PYLLMQ_BACKEND", "reference")
    pyllmq.dispatch.clear_cache()
    try:
        model = models.tiny_llama(num_hidden_layers=1, hidden_size=32, intermediate_size=48)
        report = pyllmq.compress(model, pyllmq.ColumnCodebookConfig(bits=7), calibration=models.token_batches(2, 16))
        assert len(report.layers) == 7
        layer = model.model.layers[0].mlp.up_proj
        assert layer.operand().layout == "checkpoint.codebook" and isinstance(layer, nn.Module)
    finally:
        monkeypatch.delenv("PYLLMQ_BACKEND")
        pyllmq.dispatch.clear_cache()

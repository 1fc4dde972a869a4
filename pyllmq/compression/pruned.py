"""Checkpoints that were pruned elsewhere: zeros in ordinary weights become bytes saved."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..formats import BitmapStructure, BitmapWeight, Sparse24Structure, Sparse24Weight, layer_type
from ..linears import (
    DEFAULT_EXCLUDE,
    LeftDense,
    dense_weight,
    left_dense,
    replace_module,
    select_linears,
    tied_weights,
)
from .pruning import least_of_groups
from .report import CompressionReport, LayerReport

KEPT, GROUP = 2, 4


def pack_pruned(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    values: str | None = None,
) -> CompressionReport:
    """Replace in place the Linears whose zeros save bytes by sparse layers that compute the same.

    A weight with at most two of each four neighbours kept becomes a `Sparse24Linear`, another a `SparseLinear`; one that would
    not shrink stays dense, and the report says so. No calibration, and no weight changes unless `values` rounds it.

    Args:
        model: any module tree.
        include, exclude: name patterns, as for `compress`.
        values: "float16", "bfloat16", "float32" or "int8"; None is each weight's own dtype.

    Raises:
        ValueError: no Linear would shrink.
    """
    started = time.perf_counter()
    if values not in (None, "float16", "bfloat16", "float32", "int8"):
        raise ValueError(f"values is {values!r}; allowed: None, 'float16', 'bfloat16', 'float32', 'int8'")
    chosen = select_linears(model, include, exclude)
    tied = tied_weights(model, chosen)
    made: dict[str, nn.Module] = {}
    stay: dict[str, str] = {}
    report = CompressionReport("pack", {"values": values})
    for name, module in chosen.items():
        layer_started = time.perf_counter()
        dense = dense_weight(module)
        zeros = float((dense == 0).float().mean())
        packed = None if name in tied else _packed(dense, values)
        if packed is None:
            stay[name] = (
                f"shares its weight with {tied[name]}" if name in tied else f"{100 * zeros:.0f} % zeros save nothing"
            )
            continue
        bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
        layer = layer_type(packed.kind).from_weight(packed, bias, dense.dtype)
        made[name] = layer
        # Without calibration the inputs are taken as independent: the error is that of the weights.
        lost = (packed.dequantize() - dense.float()).double().square().sum()
        report.layers.append(
            LayerReport(
                name=name,
                out_features=layer.out_features,
                in_features=layer.in_features,
                bits_per_weight=layer.bits_per_weight,
                paper_bits=8 * (getattr(torch, values).itemsize if values else dense.element_size()) * (1 - zeros),
                nbytes=layer.nbytes,
                dense_nbytes=dense.numel() * dense.element_size(),
                error=float(lost / dense.double().square().sum().clamp_min(1e-300)),
                seconds=time.perf_counter() - layer_started,
                pruned=zeros,
            )
        )
    if not made:
        raise ValueError(
            f"none of {len(chosen)} Linears has zeros that would save bytes ({next(iter(stay.items()), None)}); prune the model "
            "first (pyllmq.SparseConfig), or check that this checkpoint is the pruned one"
        )
    for name, replacement in made.items():
        replace_module(model, name, replacement)
    from ..integrations.transformers import mark_packed

    mark_packed(model)
    others, _ = left_dense(model, chosen, include, exclude)
    report.left_dense = others + [
        LeftDense(name, dense_weight(chosen[name]).numel(), why, False) for name, why in stay.items()
    ]
    report.seconds = time.perf_counter() - started
    return report


def _packed(dense: Tensor, values: str | None) -> BitmapWeight | Sparse24Weight | None:
    """The smaller format for a weight [N, K]; None where neither saves bytes."""
    dtype = dense.dtype if values is None else getattr(torch, values)
    name = str(dtype).removeprefix("torch.")
    n, k = dense.shape
    kept = max(int(dense.count_nonzero()), 1)
    if not dense.isfinite().all() or dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
        return None
    places = ~least_of_groups(dense.abs().float(), KEPT, GROUP)
    by_group = Sparse24Structure(n, k, name).nbytes if int(dense[~places].count_nonzero()) == 0 else None
    bitmaps = [BitmapStructure(n, k, kept, name, positions).nbytes for positions in ("mask", "columns")]
    dense_bytes = dense.numel() * dense.element_size()
    if by_group is not None and by_group <= min(bitmaps) and by_group < dense_bytes:
        return Sparse24Weight.pack(dense, places, dtype)
    return BitmapWeight.pack(dense, None, dtype) if min(bitmaps) < dense_bytes else None

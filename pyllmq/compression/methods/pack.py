"""Checkpoints that were pruned elsewhere: zeros in ordinary weights become bytes saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...config import MethodConfig
from ...formats import BitmapStructure, BitmapWeight, PackedWeight, Sparse24Structure, Sparse24Weight
from ...packing import count_not_finite, mask_24
from .method import CompressedLinear, Method, Needs, StaysDenseError


@dataclass(frozen=True)
class PackConfig(MethodConfig):
    """Pack the zeros that a model has: a weight with at most two of each four neighbours kept becomes a `Sparse24Linear`, another a
    `SparseLinear`; one that would not shrink stays dense. No weight changes unless `values` rounds it."""

    values: Literal["float16", "bfloat16", "float32", "int8"] | None = None
    """What kept weights are stored in: "float16", "bfloat16", "float32" or "int8"; None is the weight's own dtype."""


class Pack(Method[PackConfig]):
    config_type = PackConfig
    outside_blocks = True
    nothing_packed = (
        "has zeros that would save bytes; prune the model first (pyllmq.SparseConfig), or check that this checkpoint is the "
        "pruned one"
    )

    @property
    def needs(self) -> Needs:
        return Needs(calibration=False)

    def pack(self, weight: Tensor) -> PackedWeight:
        """The smaller of two formats. Raises StaysDenseError where neither saves bytes."""
        n, k = weight.shape
        kept = max(int(weight.count_nonzero()), 1)
        dtype = weight.dtype if self.config.values is None else getattr(torch, self.config.values)
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
            raise StaysDenseError(f"{dtype} is no dtype of values")
        name = str(dtype).removeprefix("torch.")
        places = mask_24(weight.float())
        by_group = Sparse24Structure(n, k, name).nbytes if int(weight[~places].count_nonzero()) == 0 else None
        bitmaps = [BitmapStructure(n, k, kept, name, positions).nbytes for positions in ("mask", "columns")]
        dense_bytes = weight.numel() * weight.element_size()
        if by_group is not None and by_group <= min(bitmaps) and by_group < dense_bytes:
            return Sparse24Weight.pack(weight, places, dtype)
        if min(bitmaps) < dense_bytes:
            return BitmapWeight.pack(weight, None, dtype)
        raise StaysDenseError(f"{100 * float((weight == 0).float().mean()):.0f} % zeros save nothing")

    def compress_weight(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> CompressedLinear:
        if count_not_finite(weight):
            raise StaysDenseError("holds values that are not finite")
        return super().compress_weight(name, weight, hessian)

    def paper_bits(self, packed: PackedWeight, pruned: float) -> float:
        return 8.0 * getattr(torch, packed.structure.values).itemsize * (1 - pruned)

"""Exact one-dimensional k-means in every input column, by the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ...config import Between, MethodConfig
from ...formats import CodebookWeight, PackedWeight
from .method import Method, Needs


@dataclass(frozen=True)
class KMeansConfig(MethodConfig):
    """Exact k-means in every input column, by the weights alone: no calibration data, minutes instead of hours."""

    bits: Annotated[int, Between(1, 8)]
    """Width of the codes, 1 to 8; all columns have one width."""
    row_scale: bool = False
    """One fp16 factor per row, its root mean square."""


class KMeans(Method[KMeansConfig]):
    config_type = KMeansConfig
    defaults = {"bits": 3}

    @property
    def needs(self) -> Needs:
        return Needs(calibration=False)

    def summary(self) -> str:
        return f"{self.config.bits} bits"

    def pack(self, weight: Tensor) -> PackedWeight:
        widths = torch.full((weight.shape[1],), self.config.bits)
        return CodebookWeight.from_dense(weight, widths, row_scale=self.config.row_scale)

"""A method from outside the package: 8 bits in every column, their codebook a line from the least to the largest weight."""

from dataclasses import dataclass
from typing import Annotated

import torch

from pyllmq.compression.methods import Method, Needs, register
from pyllmq.config import Between, MethodConfig
from pyllmq.formats import CodebookWeight


@dataclass(frozen=True)
class GridConfig(MethodConfig):
    """Evenly spaced values in every column."""

    bits: Annotated[int, Between(1, 8)] = 4
    """Width of the codes."""
    shrink: Annotated[float, Between(0.5, 1)] = 1.0
    """Share of the range of a column that the values span."""


class Grid(Method[GridConfig]):
    config_type = GridConfig

    @property
    def needs(self):
        return Needs(calibration=False)

    def pack(self, weight):
        steps = (1 << self.config.bits) - 1
        low, high = (extreme * self.config.shrink for extreme in weight.float().aminmax(dim=0))
        line = low + (high - low) * torch.linspace(0, 1, steps + 1)[:, None]
        codes = ((weight.float() - low) / (high - low) * steps).round().clamp(0, steps).to(torch.uint8)
        return CodebookWeight.pack(codes, line.T.flatten(), torch.full((weight.shape[1],), self.config.bits))


register("grid", Grid)

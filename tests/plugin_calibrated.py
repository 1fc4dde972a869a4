"""A calibrated method from outside the package: rows are cut to sums of the loudest inputs, as many as `keep` says."""

from dataclasses import dataclass
from typing import Annotated

import torch

from pyllmq.compression.methods import CompressedLinear, Method, register
from pyllmq.compression.solver.hessian import output_error
from pyllmq.config import Between, MethodConfig
from pyllmq.formats import BitmapWeight


@dataclass(frozen=True)
class LoudestConfig(MethodConfig):
    """Keep the columns whose inputs are loudest."""

    keep: Annotated[float, Between(0, 1)] = 0.5
    """Share of the columns to keep."""


class Loudest(Method[LoudestConfig]):
    config_type = LoudestConfig

    def compress_group(self, weights, inputs, run):
        count = round(self.config.keep * len(inputs.hessian))
        mask = torch.zeros(len(inputs.hessian)).index_fill(0, inputs.hessian.diagonal().topk(count).indices, 1.0)
        found = {}
        for name, weight in run.ranks.mine(weights).items():
            packed = BitmapWeight.pack(weight * mask.to(weight), None, weight.dtype)
            error = output_error(weight, packed.dequantize(), inputs.hessian)
            found[name] = CompressedLinear(packed, error, 0.0, packed.bits_per_weight, pruned=1 - self.config.keep)
        return run.ranks.merge(found, list(weights))


register("loudest", Loudest)

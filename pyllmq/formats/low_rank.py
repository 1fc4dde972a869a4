"""Low rank: a Linear as the product of two thin ones, each dense or packed.

y = outer (inner x) + bias,   inner [r, K], outer [N, r]
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..layers.lazy_weight import LazyWeight
from ..layers.linear import PackedComposite, PackedModule
from ..layouts import Shapes, for_kernels
from ..operations import ACTIVATION_DTYPES
from ..structure import CompositeStructure, FormatError, OfStructure, PackedWeight, Structure, register_format

if TYPE_CHECKING:
    from typing_extensions import Self

INNER, OUTER = "inner", "outer"

# ---- a dense factor ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseStructure(Structure):
    """Of a matrix as it is: what a composite holds beside packed weights."""

    values: str
    """Its dtype: "float32", "bfloat16" or "float16"."""

    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = [str(dtype).removeprefix("torch.") for dtype in ACTIVATION_DTYPES]
        if self.values not in allowed:
            raise FormatError(f"values is {self.values!r}; allowed: {', '.join(map(repr, allowed))}")

    def tensors(self) -> Shapes:
        return {"weight": ((self.out_features, self.in_features), getattr(torch, self.values))}

    def describe(self) -> str:
        return f"values={self.values}"


class DenseFactor(PackedModule):
    """y = x W^T with W as it is, a parameter that can be trained and takes whatever dtype the model is given."""

    _structure: DenseStructure

    def __init__(self, structure: DenseStructure, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(structure, bias, dtype)
        shape = structure.out_features, structure.in_features
        self.weight = nn.Parameter(torch.empty(shape, dtype=_factor_dtype(dtype), device="meta"))

    @property
    def structure(self) -> DenseStructure:
        return replace(self._structure, values=str(self.weight.dtype).removeprefix("torch."))

    def prepare(self) -> None:
        self.weight.data = for_kernels(self.weight.data)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.detach().to(dtype or self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the factors of a layer that stands for a dense one of this dtype."""
    return dtype if dtype in ACTIVATION_DTYPES else torch.float32


# ---- two factors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRankStructure(CompositeStructure):
    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        inner, outer = self.children.get(INNER), self.children.get(OUTER)
        shapes = {name: [child.out_features, child.in_features] for name, child in self.children.items()}
        n, k = self.out_features, self.in_features
        if inner is None or outer is None or len(shapes) != 2 or inner.out_features != outer.in_features:
            raise FormatError(f"a low_rank has two children, inner [r, K] and outer [N, r]; given: {shapes}")
        if (outer.out_features, inner.in_features) != (n, k):
            raise FormatError(f"a low_rank [{n}, {k}] has children inner [r, {k}] and outer [{n}, r]; given: {shapes}")
        if any(isinstance(child, CompositeStructure) for child in self.children.values()):
            raise FormatError("a child of a low_rank is dense or one packed weight, and no composite")

    @property
    def rank(self) -> int:
        return self.children[INNER].out_features

    def describe(self) -> str:
        return f"rank={self.rank}, {super().describe()}"


@dataclass(frozen=True, eq=False)
class LowRankWeight(OfStructure):
    """outer [N, r] times inner [r, K], in checkpoint form. Make it with `of`."""

    structure: LowRankStructure
    tensors: Mapping[str, Tensor]

    kind: ClassVar[str] = LowRankStructure.kind

    @classmethod
    def of(cls, inner: Tensor | PackedWeight, outer: Tensor | PackedWeight) -> LowRankWeight:
        """Raises FormatError where the factors do not fit each other, or hold values that are not finite."""
        children: dict[str, Structure] = {}
        tensors: dict[str, Tensor] = {}
        for name, factor in ((INNER, inner), (OUTER, outer)):
            if isinstance(factor, PackedWeight):
                children[name], held = factor.structure, factor.tensors
            else:
                children[name], held = _dense(name, factor), {"weight": factor.detach().contiguous()}
            tensors |= {f"{name}.{key}": tensor for key, tensor in held.items()}
        structure = LowRankStructure(children[OUTER].out_features, children[INNER].in_features, children)
        return cls(structure, tensors)

    def to(self, device: torch.device | str) -> LowRankWeight:
        return replace(self, tensors={key: tensor.to(device) for key, tensor in self.tensors.items()})


def _dense(name: str, factor: Tensor) -> DenseStructure:
    if not isinstance(factor, Tensor) or factor.dim() != 2 or factor.dtype not in ACTIVATION_DTYPES:
        given = f"{factor.dtype} {list(factor.shape)}" if isinstance(factor, Tensor) else type(factor).__name__
        raise FormatError(f"{name} is {given}; it must be a matrix of float32, bfloat16 or float16, or a packed weight")
    if not bool(torch.isfinite(factor).all()):
        raise FormatError(f"{name} holds values that are not finite; repair the factors first")
    return DenseStructure(factor.shape[0], factor.shape[1], str(factor.dtype).removeprefix("torch."))


class LowRankLinear(PackedComposite):
    """y = outer (inner x) + bias: a Linear of r (N + K) numbers in place of N K.

    Its factors are modules: `DenseFactor`s, which can be trained, or packed layers. Make one with `from_factors`, by
    `LowRankConfig`, or by loading a checkpoint.
    """

    inner: PackedModule
    outer: PackedModule
    _whole = False
    """All tensors are there."""

    @classmethod
    def from_factors(
        cls,
        inner: Tensor | PackedWeight,
        outer: Tensor | PackedWeight,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer of factors made by any method: those of SVD-LLM, ASVD or Bolaco as they are.

        Args:
            inner: [r, K], what the input meets first: float32, bfloat16, float16, or a packed weight.
            outer: [N, r].
            bias: [N], copied.
            dtype: of the dense layer it stands for; None: that of the bias, else of `outer`.

        Raises FormatError where the factors do not fit each other, or hold values that are not finite.
        """
        if dtype is None and bias is None and isinstance(outer, Tensor):
            dtype = outer.dtype
        return cls.from_weight(LowRankWeight.of(inner, outer), bias, dtype)

    @classmethod
    def from_weight(cls, weight: LowRankWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Self:
        """As `PackedLayer.from_weight`; dense factors take the dtype."""
        if bias is not None and tuple(bias.shape) != (weight.out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [out_features] = [{weight.out_features}]")
        dtype = dtype or (bias.dtype if bias is not None else torch.float32)
        layer = cls(weight.structure, bias is not None, dtype)
        state = {key: tensor.clone() for key, tensor in weight.tensors.items()}
        for name, child in weight.structure.children.items():
            if isinstance(child, DenseStructure):
                state[f"{name}.weight"] = state[f"{name}.weight"].to(_factor_dtype(dtype))
        if bias is not None:
            state["bias"] = bias.detach().clone().to(next(iter(state.values())).device, dtype)
        layer.load_state_dict(state, assign=True)
        layer.prepare()
        return layer

    def prepare(self) -> None:
        super().prepare()
        self._whole = True

    @property
    def rank(self) -> int:
        return self.inner.out_features

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix [N, K] that this layer multiplies with; the product in float32."""
        inner, outer = (factor.dequantize(torch.float32) for factor in (self.inner, self.outer))  # type: ignore[operator]
        return (outer @ inner).to(dtype or self._dtype)

    @property
    def weight(self) -> Tensor:
        """As `PackedLayer.weight`: decoded when values are read, and empty while a checkpoint is being loaded."""
        if not self._whole:
            return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")
        if torch.compiler.is_compiling():
            return self.dequantize()
        device = next(itertools.chain(self.outer.parameters(), self.outer.buffers())).device
        return LazyWeight(self.dequantize, (self.out_features, self.in_features), self._dtype, device)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the dense layer it stands for."""
        if self.bias is not None:
            return self.bias.dtype
        return self.outer.weight.dtype  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(self.inner(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)


register_format(DenseStructure, DenseFactor)
register_format(LowRankStructure, LowRankLinear)

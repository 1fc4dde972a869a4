"""Packed embeddings: drop-in replacements for `torch.nn.Embedding`, and what else in a model shares an embedding's weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..linears import replace_module, sharing_weight
from ..operations import ACTIVATION_DTYPES
from ..structure import FormatError, Structure, format_of
from .linear import PackedLayer, TiedLinear

if TYPE_CHECKING:
    from typing_extensions import Self


class LooksUp(nn.Module):
    """Rows of a packed weight by id, with what a dense embedding does to them."""

    padding_idx: int | None = None
    scale = 1.0
    """What rows are multiplied by, as in Gemma and BART."""
    round_scale = False
    """The scale has the dtype of the rows."""

    def take_over(self, dense: nn.Embedding) -> Self:
        """All of a dense embedding but its weight. Raises ValueError for one that does more than look up and scale."""
        if dense.max_norm is not None or dense.sparse:
            given = f"max_norm={dense.max_norm}" if dense.max_norm is not None else "sparse gradients"
            raise ValueError(f"an embedding with {given} changes while it is used and cannot be packed; leave it dense")
        own = type(dense).forward is not nn.Embedding.forward
        scale: Any = getattr(dense, "embed_scale", None) if own else 1.0
        self.round_scale = isinstance(scale, Tensor)
        if isinstance(scale, Tensor):
            scale = getattr(dense, "scalar_embed_scale", None if scale.is_meta else float(scale))
        if not isinstance(scale, int | float):
            raise ValueError(
                f"{type(dense).__name__} looks its rows up in a way of its own, which no packed embedding knows; leave it dense"
            )
        self.scale, self.padding_idx = float(scale), dense.padding_idx
        return self

    def rows_of(self, owner: PackedLayer, ids: Tensor) -> Tensor:
        dtype = owner.dense_dtype
        rows = ops.packed_rows(owner.operand(), ids, dtype if dtype in ACTIVATION_DTYPES else torch.float32).to(dtype)
        if self.scale == 1.0:
            return rows
        return rows * (torch.tensor(self.scale, dtype=dtype) if self.round_scale else self.scale)


class PackedEmbedding(LooksUp, PackedLayer):
    """Rows of a packed weight [vocabulary, hidden] by token id; each format that serves for it has a class of its own. Frozen.

    The row of `padding_idx` is looked up like any other, as torch.nn.Embedding does. Ids out of range are an IndexError on a CPU
    and rows of NaN on a GPU.
    """

    def __init__(self, structure: Structure, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(structure, bias, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows_of(self, ids)

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", padding_idx={self.padding_idx}" if self.padding_idx is not None else "")


class TiedEmbedding(LooksUp):
    """An embedding with the weight of another: those of T5's encoder and decoder, say. It has no tensor of its own."""

    owner: PackedEmbedding

    def __init__(self, owner: PackedEmbedding) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not as a child, which would give the tensors a second name

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows_of(self.owner, ids)

    @property
    def weight(self) -> Tensor:
        return self.owner.weight

    @property
    def num_embeddings(self) -> int:
        return self.owner.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.owner.embedding_dim


def embedding_type(kind: str) -> type[PackedEmbedding]:
    """The embedding of a format. Raises FormatError for a format that has none."""
    found = format_of(kind).embedding
    if found is None:
        raise FormatError(f"the format {kind!r} holds no embeddings; pack them as 'codebook'")
    return found


def put_embedding(
    model: nn.Module, name: str, packed: PackedEmbedding, tied: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Put `packed` in the place of the embedding `name`; what shares its weight shares the packed one from now on, and so do the
    modules `tied`, which are only going to share it.

    Returns name -> dense module of all that was replaced, the embedding first. Raises ValueError, with nothing replaced, where one
    of them is neither an embedding nor a Linear, or does more than look up and scale.
    """
    dense = model.get_submodule(name)
    assert isinstance(dense, nn.Embedding)
    sharing = {name: dense} | sharing_weight(model, dense) | {other: model.get_submodule(other) for other in tied}
    new: dict[str, nn.Module] = {name: packed.take_over(dense)}
    for other, module in sharing.items():
        if module is dense:
            new[other] = packed
        elif isinstance(module, nn.Embedding):
            new[other] = TiedEmbedding(packed).take_over(module)
        elif isinstance(module, nn.Linear):
            new[other] = TiedLinear(packed, module.bias)
        else:
            raise ValueError(
                f"{name} shares its weight with {other}, a {type(module).__name__}, which cannot run on a packed one; leave it "
                "dense"
            )
    for other, module in new.items():
        replace_module(model, other, module)
    return sharing

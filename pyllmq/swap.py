"""Putting packed layers in the place of a model's Linears and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .experts import apart
from .integrations.transformers import mark_packed
from .layers.embedding import PackedEmbedding, put_embedding
from .linears import DEFAULT_EXCLUDE, as_linear, input_embeddings, replace_module, select_linears


def swap_linear(
    model: nn.Module,
    make_layer: Callable[[nn.Linear], nn.Module],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> list[str]:
    """Replace Linears in place by `make_layer(linear)`, for example ``lambda l: CodebookLinear.from_dense(l, bits=3)``.

    Stacked experts are taken apart: each projection of each is a Linear (`pyllmq.experts`). All new layers are made before the
    first is put in: if one fails, the model is as it was. Returns the names swapped.
    """
    with apart(model):
        made = {name: make_layer(as_linear(module)) for name, module in select_linears(model, include, exclude).items()}
        for name, layer in made.items():
            replace_module(model, name, layer)
    mark_packed(model)
    return list(made)


def swap_embedding(model: nn.Module, make_embedding: Callable[[nn.Embedding], PackedEmbedding]) -> list[str]:
    """Replace a model's input embeddings in place by `make_embedding(embedding)`, for example
    ``lambda e: CodebookEmbedding.from_dense(e, bits=4)``. A tied output head, and other embeddings of the same weight, run on the
    packed one from then on.

    Returns the names of all that was replaced. Raises ValueError if there is no embedding, or one that cannot be packed.
    """
    found = input_embeddings(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no embedding of token ids")
    made = {name: make_embedding(module) for name, module in found.items()}
    replaced = [other for name, packed in made.items() for other in put_embedding(model, name, packed)]
    mark_packed(model)
    return replaced

"""Packed layers: drop-in replacements for `torch.nn.Linear` and `torch.nn.Embedding`; each format's stand in formats/."""

from .formats.bitmap import SparseLinear
from .formats.codebook import CodebookEmbedding, CodebookLinear
from .formats.sparse24 import Sparse24Linear
from .formats.sparse24_codebook import Sparse24CodebookLinear
from .layers.embedding import PackedEmbedding
from .layers.linear import PackedComposite, PackedLinear, PackedModule, packed_modules, set_precision

__all__ = [
    "CodebookEmbedding",
    "CodebookLinear",
    "PackedComposite",
    "PackedEmbedding",
    "PackedLinear",
    "PackedModule",
    "Sparse24CodebookLinear",
    "Sparse24Linear",
    "SparseLinear",
    "packed_modules",
    "set_precision",
]

"""Packed layers: drop-in replacements for `torch.nn.Linear` and `torch.nn.Embedding`; each format's stand in formats/."""

from .formats.bitmap import SparseLinear as SparseLinear
from .formats.codebook import CodebookEmbedding as CodebookEmbedding
from .formats.codebook import CodebookLinear as CodebookLinear
from .formats.low_rank import LowRankLinear as LowRankLinear
from .formats.sparse24 import Sparse24Linear as Sparse24Linear
from .formats.sparse24_codebook import Sparse24CodebookLinear as Sparse24CodebookLinear
from .layers.embedding import PackedEmbedding as PackedEmbedding
from .layers.linear import PackedComposite as PackedComposite
from .layers.linear import PackedLinear as PackedLinear
from .layers.linear import PackedModule as PackedModule
from .layers.linear import packed_modules as packed_modules
from .layers.linear import set_precision as set_precision

"""Packed layers and kernels for compressed language models: per-column k-means codebooks with mixed bit widths.

    import pyllmq
    report = pyllmq.compress(model, pyllmq.ColumnCodebookConfig(bits=2.5), calibration=batches)
    pyllmq.save_pretrained(model, "packed"); model = pyllmq.from_pretrained("packed")

Importing this package also lets transformers' auto classes load packed folders. See docs/index.md.
"""

from . import backends as backends
from . import functional as functional
from . import losses as losses
from . import parallel as parallel
from .compression.jobs.files import compress_files
from .compression.jobs.folder import compress_folder
from .compression.jobs.in_memory import compress, pack_pruned
from .compression.jobs.pruned_folder import prune_folder
from .compression.methods.claq import CLAQConfig
from .compression.methods.column_codebook import ColumnCodebookConfig
from .compression.methods.kmeans import KMeansConfig
from .compression.methods.low_rank import LowRankConfig
from .compression.methods.pack import PackConfig
from .compression.methods.sparse import SparseConfig
from .compression.methods.structured import StructuredConfig, StructuredReport, prune_structured
from .compression.methods.vocabulary import VocabularyConfig, VocabularyReport, prune_vocabulary
from .compression.report import CompressionReport, LayerReport
from .compression.tune import tune_blocks, tune_codebooks
from .dispatch import NoKernelError, use_backend
from .formats import (
    BitmapWeight,
    CodebookStructure,
    CodebookWeight,
    FormatError,
    Sparse24CodebookWeight,
    Sparse24Weight,
)
from .fusion import fuse, unfuse
from .integrations.transformers import from_pretrained, on_import, save_pretrained
from .kmeans import kmeans_1d, kmeans_1d_errors
from .nn import (
    CodebookEmbedding,
    CodebookLinear,
    LowRankLinear,
    Sparse24CodebookLinear,
    Sparse24Linear,
    SparseLinear,
    set_precision,
)
from .ops import softmax_cdist_l1
from .swap import swap_embedding, swap_linear
from .transport import doubly_stochastic, sinkhorn
from .version import __version__ as __version__

__all__ = [
    "BitmapWeight",
    "CLAQConfig",
    "CodebookEmbedding",
    "CodebookLinear",
    "CodebookStructure",
    "CodebookWeight",
    "ColumnCodebookConfig",
    "CompressionReport",
    "FormatError",
    "KMeansConfig",
    "LayerReport",
    "LowRankConfig",
    "LowRankLinear",
    "NoKernelError",
    "PackConfig",
    "Sparse24CodebookLinear",
    "Sparse24CodebookWeight",
    "Sparse24Linear",
    "Sparse24Weight",
    "SparseConfig",
    "SparseLinear",
    "StructuredConfig",
    "StructuredReport",
    "VocabularyConfig",
    "VocabularyReport",
    "compress",
    "compress_files",
    "compress_folder",
    "doubly_stochastic",
    "from_pretrained",
    "functional",
    "fuse",
    "kmeans_1d",
    "kmeans_1d_errors",
    "losses",
    "pack_pruned",
    "parallel",
    "prune_folder",
    "prune_structured",
    "prune_vocabulary",
    "save_pretrained",
    "set_precision",
    "sinkhorn",
    "softmax_cdist_l1",
    "swap_embedding",
    "swap_linear",
    "tune_blocks",
    "tune_codebooks",
    "unfuse",
    "use_backend",
]

on_import()

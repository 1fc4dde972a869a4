"""The compression methods: one file each, and one line here."""

from .claq import CLAQ
from .column_codebook import ColumnCodebook
from .kmeans import KMeans
from .method import METHODS, CompressedLinear, Method, Needs, Registered, StaysDenseError, method_of, register
from .pack import Pack
from .sparse import Sparse

__all__ = [
    "METHODS",
    "CompressedLinear",
    "Method",
    "Needs",
    "Registered",
    "StaysDenseError",
    "method_of",
    "register",
]

register("column-codebook", ColumnCodebook)
register("claq", CLAQ)
register("kmeans", KMeans)
register("magnitude", Sparse, method="magnitude")
register("wanda", Sparse, method="wanda")
register("sparsegpt", Sparse, method="sparsegpt")
register("mixed-sparsity", Sparse, method="mixed")
register("pack", Pack)

"""The compression methods: one file each, and one line here.

One from outside the package calls `register` when its module is imported. The command imports it by `--plugin MODULE`, or because
an installed package names it as an entry point of the group `pyllmq.methods`, such as `grid = "my_package.grid"`.
"""

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

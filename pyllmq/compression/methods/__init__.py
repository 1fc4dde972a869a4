"""The compression methods: one file each, and one line here.

One from outside the package calls `register` when its module is imported. The command imports it by `--plugin MODULE`, or because
an installed package names it as an entry point of the group `pyllmq.methods`, such as `grid = "my_package.grid"`.
"""

from .claq import CLAQ
from .column_codebook import ColumnCodebook
from .kmeans import KMeans
from .low_rank import LowRank
from .method import METHODS as METHODS
from .method import CompressedLinear as CompressedLinear
from .method import Method as Method
from .method import Needs as Needs
from .method import Registered as Registered
from .method import StaysDenseError as StaysDenseError
from .method import method_of as method_of
from .method import register as register
from .pack import Pack
from .sparse import Sparse
from .structured import Structured
from .vocabulary import Vocabulary

register("column-codebook", ColumnCodebook)
register("claq", CLAQ)
register("kmeans", KMeans)
register("magnitude", Sparse, method="magnitude")
register("wanda", Sparse, method="wanda")
register("sparsegpt", Sparse, method="sparsegpt")
register("mixed-sparsity", Sparse, method="mixed")
register("low-rank", LowRank)
register("pack", Pack)
register("structured", Structured)
register("vocabulary", Vocabulary)

"""Checkpoint formats: what stands in a safetensors file, byte by byte. No machine layout is ever part of one."""

from ..layers.linear import layer_type as layer_type
from ..structure import CompositeStructure as CompositeStructure
from ..structure import FormatError as FormatError
from ..structure import PackedWeight as PackedWeight
from ..structure import Structure as Structure
from ..structure import kinds as kinds
from ..structure import register_format as register_format
from ..structure import structure_from_dict as structure_from_dict
from ..structure import weight_type as weight_type
from .bitmap import BitmapStructure as BitmapStructure
from .bitmap import BitmapWeight as BitmapWeight
from .codebook import CodebookStructure as CodebookStructure
from .codebook import CodebookWeight as CodebookWeight
from .low_rank import LowRankStructure as LowRankStructure
from .low_rank import LowRankWeight as LowRankWeight
from .sparse24 import Sparse24Structure as Sparse24Structure
from .sparse24 import Sparse24Weight as Sparse24Weight
from .sparse24_codebook import Sparse24CodebookStructure as Sparse24CodebookStructure
from .sparse24_codebook import Sparse24CodebookWeight as Sparse24CodebookWeight

FORMAT_VERSION = 1
"""Of all of them: what `config.json` says."""

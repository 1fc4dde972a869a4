"""Checkpoint formats: what stands in a safetensors file, byte by byte. No machine layout is ever part of one."""

from __future__ import annotations

from ..layers.linear import layer_type
from ..structure import (
    CompositeStructure,
    FormatError,
    PackedWeight,
    Structure,
    kinds,
    register_format,
    structure_from_dict,
    weight_type,
)
from .bitmap import BitmapStructure, BitmapWeight
from .codebook import CodebookStructure, CodebookWeight
from .sparse24 import Sparse24Structure, Sparse24Weight
from .sparse24_codebook import Sparse24CodebookStructure, Sparse24CodebookWeight

__all__ = [
    "FORMAT_VERSION",
    "BitmapStructure",
    "BitmapWeight",
    "CodebookStructure",
    "CodebookWeight",
    "CompositeStructure",
    "FormatError",
    "PackedWeight",
    "Sparse24CodebookStructure",
    "Sparse24CodebookWeight",
    "Sparse24Structure",
    "Sparse24Weight",
    "Structure",
    "kinds",
    "layer_type",
    "register_format",
    "structure_from_dict",
    "weight_type",
]

FORMAT_VERSION = 1
"""Of all of them: what `config.json` says."""

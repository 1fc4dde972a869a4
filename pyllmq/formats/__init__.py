"""Checkpoint formats: what stands in a safetensors file, byte by byte. No machine layout is ever part of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .bitmap import BitmapStructure, BitmapWeight
from .codebook import CodebookStructure, CodebookWeight
from .sparse24 import Sparse24Structure, Sparse24Weight
from .sparse24_codebook import Sparse24CodebookStructure, Sparse24CodebookWeight
from .structure import FormatError, PackedWeight, Structure

__all__ = [
    "FORMAT_VERSION",
    "BitmapStructure",
    "BitmapWeight",
    "CodebookStructure",
    "CodebookWeight",
    "FormatError",
    "PackedWeight",
    "Sparse24CodebookStructure",
    "Sparse24CodebookWeight",
    "Sparse24Structure",
    "Sparse24Weight",
    "Structure",
    "structure_from_dict",
]

FORMAT_VERSION = 1
"""Of all of them: what `config.json` says."""

_STRUCTURES = {
    structure.kind: structure
    for structure in (CodebookStructure, BitmapStructure, Sparse24Structure, Sparse24CodebookStructure)
}


def structure_from_dict(values: Mapping[str, Any]) -> Structure:
    """The structure that `to_dict` described. Raises FormatError for anything else."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in _STRUCTURES:
        raise FormatError(f"kind is {kind!r}; this version of pyllmq reads: {', '.join(map(repr, _STRUCTURES))}")
    return _STRUCTURES[kind].from_dict(values)

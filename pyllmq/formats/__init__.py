"""Checkpoint formats: what stands in a safetensors file, byte by byte. No machine layout is ever part of one."""

from .codebook import CodebookStructure, CodebookWeight, FormatError

__all__ = ["CodebookStructure", "CodebookWeight", "FormatError"]

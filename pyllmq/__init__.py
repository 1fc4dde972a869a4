"""Packed layers and kernels for compressed language models."""

__version__ = "0.1.0"

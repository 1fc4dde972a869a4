"""Compressors: calibration text in, packed weights out. They know formats and layers, never kernels."""

"""Compressors: calibration text in, packed weights out. They know formats and layers, never kernels.

Floors, the upper ones import the lower: jobs, methods, statistics (with tune), solver; calibration, ranks and report are the ground.
"""

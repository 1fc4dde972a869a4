"""Compressors: calibration text in, packed weights out. They know formats and layers, never kernels.

Floors, upper ones import lower ones: jobs, methods, tune, statistics, solver; objective and media; calibration, ranks, report and
model_state are the ground.
"""

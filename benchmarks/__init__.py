"""Benchmarks: rivals side by side in one run; imported as ``pyllmq.benchmarks`` so that ``pyllmq bench`` shares the harness."""

"""Benchmarks: rivals side by side in one run. Imported as ``pyllmq.benchmarks``; `pyllmq bench` calls `run.run`."""

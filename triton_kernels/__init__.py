"""Triton kernels, one file per operation; imported as ``pyllmq.triton_kernels``. Importing this package imports no triton."""

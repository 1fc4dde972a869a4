"""Triton kernels, one file per operation; imported as ``pyllmq.triton_kernels``. None yet."""

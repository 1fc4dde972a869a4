"""How the C++ and CUDA kernels of sinkhorn read a batch: in place where its problems share one tensor."""

from __future__ import annotations

from torch import Tensor


def laid_out(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """The tensors as the kernel reads them, and how far their problems lie apart: 0 where all share one."""
    read, strides = [], []
    for tensor in tensors:
        if tensor.is_contiguous():
            read.append(tensor)
            strides.append(tensor.stride(0))
        elif tensor.shape[0] > 1 and tensor.stride(0) == 0:
            read.append(tensor if tensor.dim() == 2 and tensor.stride(1) == 1 else tensor[0].contiguous())
            strides.append(0)
        else:
            read.append(tensor.contiguous())
            strides.append(read[-1].stride(0))
    return read, strides

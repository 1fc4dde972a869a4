"""Matrix products of bf16 and fp16 on a processor that has none of its own, in fp32.

torch runs them there by loops of its own: against fp32, x W^T takes 4 times as long, and dy W, which a backward pass consists of,
27 times (1500 x 384 by 384 x 1536 on one thread held to AVX2). Operands are widened, and what comes out is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_SLICE = 1 << 23
"""Numbers that are widened at once, 32 MB: a head may be one of half a billion, and scores of attention as many."""


def _operations(*names: str) -> set[Any]:
    """Those of them that this torch has."""
    return {getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)}


_ATTENTION = _operations("_scaled_dot_product_flash_attention_for_cpu")
_BY_COLUMNS, _BY_MATRICES = _operations("mm", "addmm"), _operations("bmm", "baddbmm")
_PRODUCTS = _operations(
    *("convolution", "convolution_backward", "_scaled_dot_product_flash_attention_for_cpu_backward")
)


class WideProducts(TorchDispatchMode):
    """While it is open, products of tensors of these dtypes on the CPU are those of fp32."""

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = tuple(dtypes)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(op in some for some in (_BY_COLUMNS, _BY_MATRICES, _PRODUCTS, _ATTENTION)):
            return op(*args, **kwargs)
        dtype, device = args[0].dtype, args[0].device
        if dtype not in self.dtypes or device.type != "cpu":
            return op(*args, **kwargs)
        if op in _BY_COLUMNS:
            return _by_columns(op, args, kwargs)
        if op in _BY_MATRICES:
            return _by_matrices(op, args, kwargs)
        found = op(*tree_map(_widened, args), **tree_map(_widened, kwargs))
        if op in _ATTENTION:  # beside it stands the logarithm of its sums, fp32 for every dtype
            return found[0].to(dtype), *found[1:]
        return tree_map(lambda value: value.to(dtype) if isinstance(value, Tensor) else value, found)


def widened_products(*models: torch.nn.Module) -> AbstractContextManager[Any]:
    """`WideProducts` for those of the models' dtypes that need it."""
    parameters = (parameter for model in models for parameter in model.parameters())
    used = {parameter.dtype for parameter in parameters if parameter.device.type in ("cpu", "meta")}
    dtypes = [dtype for dtype in dtypes_without_products() if dtype in used]
    return WideProducts(dtypes) if dtypes else nullcontext()


def dtypes_without_products() -> list[torch.dtype]:
    """Those of which this processor multiplies no matrices, as oneDNN says, which multiplies them for torch."""
    found = []
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        supported: Callable[[], bool] | None = getattr(torch.ops.mkldnn, name, None)
        if supported is None or not supported():
            found.append(dtype)
    return found


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _by_columns(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """a b or c + a b, some columns of b after the other."""
    *added, a, b = args
    dtype, wide, out = a.dtype, a.float(), a.new_empty(a.shape[0], b.shape[1])
    step = max(1, _SLICE // max(1, b.shape[0]))
    for begin in range(0, b.shape[1], step):
        columns = slice(begin, begin + step)
        part = [c[..., columns].float() if c.dim() and c.shape[-1] > 1 else c.float() for c in added]
        out[:, columns] = op(*part, wide, b[:, columns].float(), **kwargs).to(dtype)
    return out


def _by_matrices(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """a b or c + a b for a batch of matrices, some of them after the others."""
    *added, a, b = args
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    step = max(1, _SLICE // max(1, a.shape[1] * a.shape[2] + b.shape[1] * b.shape[2]))
    for begin in range(0, len(a), step):
        some = slice(begin, begin + step)
        part = [c[some].float() if c.dim() == 3 and len(c) > 1 else c.float() for c in added]
        out[some] = op(*part, a[some].float(), b[some].float(), **kwargs).to(a.dtype)
    return out

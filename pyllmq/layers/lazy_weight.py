"""The dense weight of a packed layer, for code that asks a Linear for it: dtype, shape and device are free, values are decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LazyWeight(Tensor):
    """A tensor [N, K] that is decoded when an operation first reads its values, and kept as long as this object lives.

    Results of operations are plain tensors. Writing to it raises RuntimeError: the change would be lost.
    """

    decode: Callable[[], Tensor]
    dense: Tensor | None

    @staticmethod
    def __new__(
        cls, decode: Callable[[], Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Any:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, decode: Callable[[], Tensor], *_: Any) -> None:
        self.decode, self.dense = decode, None

    def decoded(self) -> Tensor:
        if self.dense is None:
            with torch.no_grad():
                self.dense = self.decode()
        return self.dense

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does nothing of its own. That there is one keeps torch's encoder and attention layers off their fast path, which takes
        the weights of their Linears and never calls these: packed layers would be decoded at each call."""
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        schema = function._schema.arguments
        for argument, value in (*zip(schema, args, strict=False), *_named(schema, kwargs or {})):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, LazyWeight):
                _refuse_write()
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.decoded, (args, kwargs or {}))
        return function(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        return self.decoded()

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse_write()

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse_write()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.decoded().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decoded().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        return self.decoded().numpy(force=force)

    def tolist(self) -> Any:
        return self.decoded().tolist()

    def data_ptr(self) -> int:
        return self.decoded().data_ptr()

    def untyped_storage(self) -> Any:
        return self.decoded().untyped_storage()


def _named(schema: Any, values: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(argument, values[argument.name]) for argument in schema if argument.name in values]


def _refuse_write() -> None:
    raise RuntimeError(
        "the weight of a packed layer cannot be written to: its codes cannot hold the change. Change the dense model and compress "
        "that, or put a new layer in its place"
    )

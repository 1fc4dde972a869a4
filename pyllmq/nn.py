"""Packed layers: drop-in replacements for `torch.nn.Linear`. They know operations and formats, never pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import ops
from .backends import operand_from_layout, prepack, unpack_layout
from .compression import data_free, magnitude
from .dispatch import DEFAULT_PRECISION, WeightOperand, check_precision
from .formats import (
    BitmapWeight,
    CodebookWeight,
    FormatError,
    PackedWeight,
    Sparse24CodebookWeight,
    Sparse24Weight,
    Structure,
)
from .formats.codebook import codes_from_operand
from .formats.structure import for_kernels
from .layers.lazy_weight import LazyWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedLinear(nn.Module):
    """y = x W^T + bias with W packed in one of the formats; each format has a class of its own below.

    The packed tensors are in memory once: where the back end has a machine layout, that takes their place, and `state_dict()`
    rebuilds the checkpoint form from it. The packed weight is frozen; gradients flow to x and to the bias. Packed tensors keep
    their dtype whatever `.to(dtype)` says.

    Make one with `from_dense`, `from_weight` or by loading a checkpoint.

    Args:
        structure: sizes of the packed weight. The constructor makes a skeleton on the meta device, for a checkpoint to fill.
        bias: whether the layer has a bias.
        dtype: of the bias; also what `weight` decodes to.
    """

    weight_type: ClassVar[type[PackedWeight]]
    op: ClassVar[str]
    """Name of the operation y = x W^T + bias in `ops`."""
    dequantize_op: ClassVar[str]
    """And of the one that gives W."""

    def __init__(self, structure: Structure, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features = structure.in_features, structure.out_features
        self.dense_dtype = dtype
        self._precision = DEFAULT_PRECISION
        self._structure = structure
        self._operand: WeightOperand | None = None
        for key, (shape, key_dtype) in structure.tensors().items():
            self.register_buffer(key, torch.empty(shape, dtype=key_dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device="meta")) if bias else None

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_weight(cls, weight: PackedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Self:
        """A layer around a packed weight; `bias` [N] is copied. `dtype` is that of the dense layer it stands for."""
        if bias is not None and tuple(bias.shape) != (weight.out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [out_features] = [{weight.out_features}]")
        dtype = dtype or (bias.dtype if bias is not None else torch.float32)
        layer = cls(weight.structure, bias is not None, dtype)
        layer._set_weight(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(weight.device, dtype))
        layer._make_layout(weight)
        return layer

    # ---- using it ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        return getattr(ops, self.op)(x, self._operand or self.operand(), self.bias, self._precision)

    @property
    def precision(self) -> str:
        """What the arithmetic may cost in accuracy: "exact", "high" (the default) or "fast", see `ops.codebook_linear`.

        A choice of whoever runs the layer: copies and moves keep it, checkpoints do not hold it.
        """
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        check_precision(precision)
        self._precision = precision

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix [N, K] that this layer multiplies with."""
        dtype = dtype or self.dense_dtype
        decoded = dtype if dtype in ops.ACTIVATION_DTYPES else torch.float32
        return getattr(ops, self.dequantize_op)(self.operand(), decoded).to(dtype)

    @property
    def weight(self) -> Tensor:
        """`dequantize()`, decoded when values are read: for code that asks a Linear for its weight's dtype, shape or values.

        While a checkpoint is still being loaded it is an empty tensor on the meta device: models' weight initialisation looks
        at it, and must not freeze half-loaded codes into a layout.
        """
        if self._operand is None:
            return torch.empty(self.out_features, self.in_features, dtype=self.dense_dtype, device="meta")
        if torch.compiler.is_compiling():
            return self.dequantize()
        return LazyWeight(self.dequantize, (self.out_features, self.in_features), self.dense_dtype, self._device())

    @property
    def structure(self) -> Any:
        return self._structure

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the weight (values or codes, positions, codebooks, scales); bias not counted."""
        return self._structure.bits_per_weight

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in a checkpoint; bias not counted."""
        return self._structure.nbytes

    def packed_weight(self) -> Any:
        """The weight in checkpoint form, rebuilt from the machine layout where that replaced it."""
        return self.weight_type.from_tensors(self._checkpoint_tensors(), self.out_features, self.in_features)

    def operand(self) -> WeightOperand:
        """What kernels read; the operation takes it."""
        self.prepare()
        assert self._operand is not None
        return self._operand

    def prepare(self) -> None:
        """Check the tensors and make the machine layout for the device where they lie. Called at load and after moves."""
        if self._operand is not None:
            return
        if self._device().type == "meta":
            raise RuntimeError(
                f"this {type(self).__name__} has no weights yet (it is on the meta device); load a checkpoint first"
            )
        if self.bias is not None:
            self.bias.data = for_kernels(self.bias.data)
        self._make_layout(self.packed_weight())

    def _make_layout(self, weight: PackedWeight) -> None:
        """`weight` is what the buffers hold, already checked; most of it leaves the buffers for the machine layout."""
        operand = prepack(weight.checkpoint_operand())
        if operand.layout != weight.layout:
            for key in [key for key in self._buffers if self._is_in_layout(key)]:
                delattr(self, key)
            self.register_buffer("layout", operand.tensors[0], persistent=False)
        self._operand = operand

    def _is_in_layout(self, key: str) -> bool:
        """Does a machine layout hold this tensor, so that it can be rebuilt from there?"""
        return True

    def extra_repr(self) -> str:
        precision = "" if self._precision == DEFAULT_PRECISION else f", precision={self._precision!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits_per_weight={self.bits_per_weight:.3f}, {self._structure.describe()}{precision}"
        )

    # ---- tensors in memory, tensors in a checkpoint -----------------------------------------------------------------

    def _set_weight(self, weight: PackedWeight) -> None:
        """Replace all weight tensors, whatever was there before, by those of `weight`."""
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()
        for key, tensor in weight.tensors.items():
            # q, k and v may come with one column_bits; safetensors wants three
            self.register_buffer(key, tensor.clone())
        self._structure, self._operand = weight.structure, None

    def _checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = {key: tensor for key, tensor in self._buffers.items() if key != "layout" and tensor is not None}
        if "layout" in self._buffers:
            assert self._operand is not None
            tensors |= self._tensors_of_layout(self._operand)
        return {key: tensors[key] for key in self._structure.tensors()}

    def _tensors_of_layout(self, operand: WeightOperand) -> dict[str, Tensor]:
        """What `_is_in_layout` says, rebuilt."""
        return unpack_layout(operand, self._structure.tensors())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        for key, tensor in self._checkpoint_tensors().items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes any valid packed weight of this layer's shape and format: other widths or outliers than before are fine."""
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        bias = given.pop("bias", None)
        if self.bias is None and bias is not None:
            unexpected_keys.append(prefix + "bias")
        elif self.bias is not None and bias is None:
            missing_keys.append(prefix + "bias")
        if not given:
            missing_keys.extend(prefix + key for key in self._structure.tensors())
            return
        try:
            weight = self.weight_type.from_tensors(given, self.out_features, self.in_features)
        except FormatError as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        if self.bias is not None and bias is not None:
            if bias.shape != self.bias.shape:
                error_msgs.append(f"{prefix}bias has shape {tuple(bias.shape)}; it must be {tuple(self.bias.shape)}")
                return
            target = weight.device if self.bias.device.type == "meta" else self.bias.device
            self.bias = nn.Parameter(bias.detach().to(target, self.bias.dtype, copy=True))
        self._set_weight(weight)
        self._make_layout(weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves between devices; every packed tensor keeps its dtype, since a codebook cast to bf16 would lose 3 of its bits."""
        device = self._device()
        moves = fn(torch.empty(0, dtype=torch.uint8, device=device)).device != device
        if moves and self._operand is not None:
            self._set_weight(self.packed_weight())  # a machine layout belongs to one device
        floats = {
            key: buffer.dtype
            for key, buffer in self._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        }
        for key, dtype in floats.items():
            self._buffers[key] = self._buffers[key].view(_INTEGER_OF_SIZE[dtype.itemsize])  # type: ignore[union-attr]
        super()._apply(fn, recurse)
        for key, dtype in floats.items():
            self._buffers[key] = self._buffers[key].view(dtype)  # type: ignore[union-attr]
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=device)).dtype
        before, self._operand = self._operand, None
        layout = self._buffers.get("layout")
        if before is not None and layout is not None:
            self._operand = operand_from_layout(before.layout, layout, self.out_features, self.in_features)
        elif moves and self._device().type != "meta" and device.type != "meta":
            self.prepare()
        return self

    def _device(self) -> torch.device:
        return next(buffer.device for buffer in self._buffers.values() if buffer is not None)


_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32}


class CodebookLinear(PackedLinear):
    """y = x W^T + bias with W packed as codes and one codebook per input column (format `codebook`).

    Make one with `from_dense` (data-free), `from_weight` (from a `CodebookWeight`) or by loading a checkpoint.
    """

    weight_type = CodebookWeight
    op = "codebook_linear"
    dequantize_op = "codebook_dequantize"

    @classmethod
    def from_dense(
        cls,
        linear_or_weight: nn.Linear | Tensor,
        bits: int | None = None,
        *,
        column_bits: Sequence[int] | Tensor | None = None,
        outlier_fraction: float = 0.0,
        row_scale: bool = False,
    ) -> CodebookLinear:
        """Pack a dense layer or matrix [N, K] without calibration data: exact 1-D k-means in every column.

        Args:
            bits: one width for all columns, 1..8; or give
            column_bits: a width for each column, [K].
            outlier_fraction: share of the weights kept in fp16, those farthest from the middle of their column, 0..0.5.
            row_scale: divide each row by its root mean square first and store that as fp16.

        Raises ValueError for anything out of range, weights that are not finite, or weights beyond fp16.
        """
        dense, bias = dense_and_bias(linear_or_weight)
        if (bits is None) == (column_bits is None):
            raise ValueError(
                f"give either bits or column_bits, not both or neither; given bits={bits}, column_bits={column_bits}"
            )
        widths = torch.as_tensor([bits] * dense.shape[1] if column_bits is None else column_bits)
        packed = data_free.pack_columns(dense, widths, outlier_fraction=outlier_fraction, row_scale=row_scale)
        return cls.from_weight(packed, bias, dense.dtype)

    def _is_in_layout(self, key: str) -> bool:
        return key.startswith("codes_b")

    def _tensors_of_layout(self, operand: WeightOperand) -> dict[str, Tensor]:
        bits = self._buffers["column_bits"]
        assert bits is not None
        return codes_from_operand(operand, bits)


class SparseLinear(PackedLinear):
    """y = x W^T + bias with any weights of W kept (format `bitmap`), as values in fp16, bf16, fp32 or int8.

    Make one with `from_dense` (of a pruned layer, or by magnitude), `from_weight` (from a `BitmapWeight`) or by loading a
    checkpoint.
    """

    weight_type = BitmapWeight
    op = "bitmap_linear"
    dequantize_op = "bitmap_dequantize"

    @classmethod
    def from_dense(
        cls,
        linear_or_weight: nn.Linear | Tensor,
        sparsity: float | None = None,
        *,
        value_dtype: torch.dtype | None = None,
    ) -> SparseLinear:
        """Pack a layer or matrix [N, K], already pruned or not.

        Args:
            sparsity: share of the weights of each row to drop, the smallest ones, 0 to 1 exclusive; None keeps the weight's own
                zeros, and only those: somebody else's pruning.
            value_dtype: torch.float16, bfloat16, float32 or int8 (one scale per row); None is the weight's dtype.
        """
        dense, bias = dense_and_bias(linear_or_weight)
        mask = None if sparsity is None else magnitude.unstructured_mask(dense, sparsity)
        packed = BitmapWeight.pack(dense, mask, value_dtype)
        return cls.from_weight(packed, bias, dense.dtype)

    @property
    def sparsity(self) -> float:
        """Share of the weights that are not stored."""
        return self.structure.sparsity


class Sparse24Linear(PackedLinear):
    """y = x W^T + bias with two of every four neighbouring weights of W kept (format `sparse24`).

    Make one with `from_dense` (of a layer pruned to 2:4, or by magnitude), `from_weight` (from a `Sparse24Weight`) or by
    loading a checkpoint.
    """

    weight_type = Sparse24Weight
    op = "sparse24_linear"
    dequantize_op = "sparse24_dequantize"

    @classmethod
    def from_dense(
        cls, linear_or_weight: nn.Linear | Tensor, *, value_dtype: torch.dtype | None = None
    ) -> Sparse24Linear:
        """Pack a layer or matrix [N, K]: the two weights of the largest magnitude of each four, so a 2:4 pruned one as it is.

        Args:
            value_dtype: torch.float16, bfloat16, float32 or int8 (one scale per row); None is the weight's dtype.
        """
        dense, bias = dense_and_bias(linear_or_weight)
        packed = Sparse24Weight.pack(dense, magnitude.mask_24(dense), value_dtype)
        return cls.from_weight(packed, bias, dense.dtype)


class Sparse24CodebookLinear(PackedLinear):
    """y = x W^T + bias with two of every four neighbouring weights of W kept, as codes (format `sparse24_codebook`).

    Make one with `from_dense` (data-free), `from_weight` (from a `Sparse24CodebookWeight`) or by loading a checkpoint.
    """

    weight_type = Sparse24CodebookWeight
    op = "sparse24_codebook_linear"
    dequantize_op = "sparse24_codebook_dequantize"

    @classmethod
    def from_dense(
        cls, linear_or_weight: nn.Linear | Tensor, bits: int = 4, *, outlier_fraction: float = 0.0
    ) -> Sparse24CodebookLinear:
        """Pack a layer or matrix [N, K] without calibration data: the two largest weights of each four, so a 2:4 pruned one's
        own, and exact 1-D k-means over what each column keeps.

        Args:
            bits: 2, 3 or 4.
            outlier_fraction: share of the kept weights of each column kept in fp16, those farthest out, 0 to 0.5.
        """
        dense, bias = dense_and_bias(linear_or_weight)
        packed = data_free.pack_columns_24(dense, magnitude.mask_24(dense), bits, outlier_fraction=outlier_fraction)
        return cls.from_weight(packed, bias, dense.dtype)


def dense_and_bias(linear_or_weight: nn.Linear | Tensor) -> tuple[Tensor, Tensor | None]:
    """(W [N, K], bias) of a layer or a matrix, detached."""
    if isinstance(linear_or_weight, nn.Linear):
        bias = linear_or_weight.bias
        return linear_or_weight.weight.detach(), None if bias is None else bias.detach()
    if not isinstance(linear_or_weight, Tensor) or linear_or_weight.dim() != 2:
        raise ValueError(f"from_dense takes an nn.Linear or a matrix [N, K], not {type(linear_or_weight).__name__}")
    return linear_or_weight.detach(), None


LAYER_OF_KIND: dict[str, type[PackedLinear]] = {
    "codebook": CodebookLinear,
    "bitmap": SparseLinear,
    "sparse24": Sparse24Linear,
    "sparse24_codebook": Sparse24CodebookLinear,
}
"""By the `kind` of a structure."""


def set_precision(model: nn.Module, precision: str) -> int:
    """Set `PackedLinear.precision` of every packed layer in `model`, itself included; returns how many there are.

    Raises ValueError for another precision than "exact", "high" and "fast", or if the model has no packed layer.
    """
    check_precision(precision)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no packed layer whose precision could be set; compress it first "
            "(pyllmq.compress, pyllmq.swap_linear)"
        )
    for layer in layers:
        layer.precision = precision
    return len(layers)

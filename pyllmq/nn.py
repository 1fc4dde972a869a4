"""Packed layers: drop-in replacements for `torch.nn.Linear`. They know operations and formats, never pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .backends import operand_from_layout, prepack
from .compression import data_free
from .dispatch import CHECKPOINT, DEFAULT_PRECISION, WeightOperand, check_precision
from .formats.codebook import CodebookStructure, CodebookWeight, FormatError, codes_from_operand


class CodebookLinear(nn.Module):
    """y = x W^T + bias with W packed as codes and one codebook per input column (format `codebook`).

    The codes are in memory once: as the back end's machine layout, from which `state_dict()` rebuilds the checkpoint form.
    The packed weight is frozen; gradients flow to x and to the bias. fp16 codebooks stay fp16 whatever `.to(dtype)` says.

    Make one with `from_dense` (data-free), `from_weight` (from a `CodebookWeight`) or by loading a checkpoint.

    Args:
        structure: sizes of the packed weight. The constructor makes a skeleton on the meta device, for a checkpoint to fill.
        bias: whether the layer has a bias.
        dtype: of the bias; also what `weight` decodes to.
    """

    def __init__(self, structure: CodebookStructure, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
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
    def from_weight(
        cls, weight: CodebookWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> CodebookLinear:
        """A layer around a packed weight; `bias` [N] is copied. `dtype` is that of the dense layer it stands for."""
        if bias is not None and tuple(bias.shape) != (weight.out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [out_features] = [{weight.out_features}]")
        dtype = dtype or (bias.dtype if bias is not None else torch.float32)
        layer = cls(weight.structure, bias is not None, dtype)
        layer._set_weight(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(weight.column_bits.device, dtype))
        layer._make_layout(weight)
        return layer

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
        dense = linear_or_weight.weight if isinstance(linear_or_weight, nn.Linear) else linear_or_weight
        bias = linear_or_weight.bias if isinstance(linear_or_weight, nn.Linear) else None
        if not isinstance(dense, Tensor) or dense.dim() != 2:
            raise ValueError(f"from_dense takes an nn.Linear or a matrix [N, K], not {type(linear_or_weight).__name__}")
        if (bits is None) == (column_bits is None):
            raise ValueError(
                f"give either bits or column_bits, not both or neither; given bits={bits}, column_bits={column_bits}"
            )
        widths = torch.as_tensor([bits] * dense.shape[1] if column_bits is None else column_bits)
        packed = data_free.pack_columns(dense.detach(), widths, outlier_fraction=outlier_fraction, row_scale=row_scale)
        return cls.from_weight(packed, None if bias is None else bias.detach(), dense.dtype)

    # ---- using it ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        return ops.codebook_linear(x, self._operand or self.operand(), self.bias, self._precision)

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
        return ops.codebook_dequantize(self.operand(), dtype if dtype in ops.ACTIVATION_DTYPES else torch.float32).to(
            dtype
        )

    @property
    def weight(self) -> Tensor:
        """`dequantize()`, decoded anew at each access: for code that asks a Linear for its weight's dtype, shape or values.

        While a checkpoint is still being loaded it is an empty tensor on the meta device: models' weight initialisation looks
        at it, and must not freeze half-loaded codes into a layout.
        """
        if self._operand is None:
            return torch.empty(self.out_features, self.in_features, dtype=self.dense_dtype, device="meta")
        return self.dequantize()

    @property
    def structure(self) -> CodebookStructure:
        return self._structure

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the weight (codes, codebooks, widths, outliers with positions, scales); bias not counted."""
        return self._structure.bits_per_weight

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in a checkpoint; bias not counted."""
        return self._structure.nbytes

    def packed_weight(self) -> CodebookWeight:
        """The weight in checkpoint form; its codes are rebuilt from the machine layout if that replaced them."""
        return CodebookWeight.from_tensors(self._checkpoint_tensors(), self.out_features, self.in_features)

    def operand(self) -> WeightOperand:
        """What kernels read; `codebook_linear` takes it."""
        self.prepare()
        assert self._operand is not None
        return self._operand

    def prepare(self) -> None:
        """Check the tensors and make the machine layout for the device where they lie. Called at load and after moves."""
        if self._operand is not None:
            return
        if self._column_bits().device.type == "meta":
            raise RuntimeError(
                "this CodebookLinear has no weights yet (it is on the meta device); load a checkpoint first"
            )
        self._make_layout(self.packed_weight())

    def _make_layout(self, weight: CodebookWeight) -> None:
        """`weight` is what the buffers hold, already checked; its codes leave the buffers for the machine layout."""
        operand = prepack(weight.checkpoint_operand())
        if operand.layout != CHECKPOINT:
            for key in [key for key in self._buffers if key.startswith("codes_b")]:
                delattr(self, key)
            self.register_buffer("layout", operand.tensors[0], persistent=False)
        self._operand = operand

    def extra_repr(self) -> str:
        widths = {bits: count for bits, count in enumerate(self._structure.columns, 1) if count}
        precision = "" if self._precision == DEFAULT_PRECISION else f", precision={self._precision!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits_per_weight={self.bits_per_weight:.3f}, columns_per_width={widths}, outliers={self._structure.outliers}"
            + precision
        )

    # ---- tensors in memory, tensors in a checkpoint -----------------------------------------------------------------

    def _set_weight(self, weight: CodebookWeight) -> None:
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
            tensors |= codes_from_operand(self._operand, tensors["column_bits"])
        return {key: tensors[key] for key in self._structure.tensors()}

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
        """Takes any valid packed weight of this layer's shape: other widths, outliers or segments than before are fine."""
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
            weight = CodebookWeight.from_tensors(given, self.out_features, self.in_features)
        except FormatError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'CodebookLinear'}: {error}")
            return
        if self.bias is not None and bias is not None:
            if bias.shape != self.bias.shape:
                error_msgs.append(f"{prefix}bias has shape {tuple(bias.shape)}; it must be {tuple(self.bias.shape)}")
                return
            target = weight.column_bits.device if self.bias.device.type == "meta" else self.bias.device
            self.bias = nn.Parameter(bias.detach().to(target, self.bias.dtype, copy=True))
        self._set_weight(weight)
        self._make_layout(weight)

    def _apply(self, fn: Any, recurse: bool = True) -> CodebookLinear:
        """Moves between devices; every packed tensor keeps its dtype, since a codebook cast to bf16 would lose 3 of its bits."""
        bits = self._column_bits()
        moves = fn(bits).device != bits.device
        if moves and self._operand is not None:
            self._set_weight(self.packed_weight())  # a machine layout belongs to one device
        halves = [key for key, buffer in self._buffers.items() if buffer is not None and buffer.dtype == torch.float16]
        for key in halves:
            self._buffers[key] = self._buffers[key].view(torch.int16)  # type: ignore[union-attr]
        super()._apply(fn, recurse)
        for key in halves:
            self._buffers[key] = self._buffers[key].view(torch.float16)  # type: ignore[union-attr]
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=bits.device)).dtype
        before, self._operand = self._operand, None
        layout = self._buffers.get("layout")
        if before is not None and layout is not None:
            self._operand = operand_from_layout(before.layout, layout, self.out_features, self.in_features)
        elif moves and self._column_bits().device.type != "meta" and bits.device.type != "meta":
            self.prepare()
        return self

    def _column_bits(self) -> Tensor:
        bits = self._buffers["column_bits"]
        assert bits is not None
        return bits


def set_precision(model: nn.Module, precision: str) -> int:
    """Set `CodebookLinear.precision` of every packed layer in `model`, itself included; returns how many there are.

    Raises ValueError for another precision than "exact", "high" and "fast", or if the model has no packed layer.
    """
    check_precision(precision)
    layers = [module for module in model.modules() if isinstance(module, CodebookLinear)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no packed layer whose precision could be set; compress it first "
            "(pyllmq.compress, pyllmq.swap_linear)"
        )
    for layer in layers:
        layer.precision = precision
    return len(layers)

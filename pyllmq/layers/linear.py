"""Packed layers: drop-in replacements for `torch.nn.Linear`. They know operations and formats, never pointers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..layouts import CHECKPOINT, WeightOperand, for_kernels, machine_layout
from ..operations import ACTIVATION_DTYPES, DEFAULT_PRECISION, check_precision
from ..structure import CompositeStructure, FormatError, PackedWeight, Structure, format_of, of_module
from .lazy_weight import LazyWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedModule(nn.Module):
    """What takes the place of a Linear and stands in config.json by its structure: one packed weight, or a composite of several.

    The constructor makes a skeleton on the meta device, for a checkpoint to fill.

    Args:
        structure: what fixes the shapes of everything packed.
        bias: whether the module has a bias [N].
        dtype: of the bias.
    """

    def __init__(self, structure: Structure, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features = structure.in_features, structure.out_features
        self._structure = structure
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device="meta")) if bias else None

    @property
    def structure(self) -> Any:
        return self._structure

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the weight (values or codes, positions, codebooks, scales); bias not counted."""
        return self.structure.bits_per_weight

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in a checkpoint; bias not counted."""
        return self.structure.nbytes

    def prepare(self) -> None:
        """Check the tensors and make the machine layout for the device where they lie. Called at load and after moves."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits_per_weight={self.bits_per_weight:.3f}, {self.structure.describe()}"
        )


class PackedComposite(PackedModule):
    """A module made of packed children, which its `CompositeStructure` names; a subclass says in `forward` what they make.

    Its tensors in a checkpoint are the children's, each under the child's name; the children have no bias of their own.
    """

    _structure: CompositeStructure

    def __init__(self, structure: CompositeStructure, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(structure, bias, dtype)
        for name, child in structure.children.items():
            self.add_module(name, layer_type(child.kind)(child, False, dtype))

    @property
    def structure(self) -> Any:
        """Of the children as they are: a checkpoint with other widths may have been loaded since."""
        children: dict[str, Any] = {name: self.get_submodule(name).structure for name in self._structure.children}
        return replace(self._structure, children=children)

    def prepare(self) -> None:
        for name in self._structure.children:
            with of_module(name):
                self.get_submodule(name).prepare()  # type: ignore[operator]


class PackedLayer(PackedModule):
    """A module of one packed weight: where its tensors are, in memory and in a checkpoint.

    The packed tensors are in memory once: where the back end has a machine layout, that takes their place, and `state_dict()`
    rebuilds the checkpoint form from it. Packed tensors keep their dtype whatever `.to(dtype)` says. `dtype` is also what `weight`
    decodes to.
    """

    weight_type: ClassVar[type[PackedWeight]]

    def __init__(self, structure: Structure, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(structure, bias, dtype)
        self.dense_dtype = dtype
        self._operand: WeightOperand | None = None
        for key, (shape, key_dtype) in structure.tensors().items():
            self.register_buffer(key, torch.empty(shape, dtype=key_dtype, device="meta"))

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

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix [N, K] that this layer multiplies with."""
        dtype = dtype or self.dense_dtype
        decoded = dtype if dtype in ACTIVATION_DTYPES else torch.float32
        return ops.packed_dequantize(self.operand(), decoded).to(dtype)

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

    def packed_weight(self) -> Any:
        """The weight in checkpoint form, rebuilt from the machine layout where that replaced it."""
        return self.weight_type.from_tensors(self._checkpoint_tensors(), self.out_features, self.in_features)

    def operand(self) -> WeightOperand:
        """What kernels read; the operation takes it."""
        self.prepare()
        assert self._operand is not None
        return self._operand

    def operand_state(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Where this layer keeps what `operand()` returns and its precision, with what is there (Ellipsis: nothing)."""
        state = self.__dict__
        return [(state, name, state.get(name, ...)) for name in ("_operand", "_precision")]

    def prepare(self) -> None:
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
        """`weight` is what the buffers hold, already checked; what the machine layout holds leaves the buffers."""
        operand = weight.prepack()
        if not operand.layout.startswith(CHECKPOINT):
            for key in machine_layout(operand.layout).holds:
                self._buffers.pop(key, None)
            self.register_buffer("layout", operand.tensors[0], persistent=False)
        self._operand = operand

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
        shapes = self._structure.tensors()
        if "layout" in self._buffers:
            assert self._operand is not None
            tensors |= machine_layout(self._operand.layout).unpack(self._operand, shapes, tensors)
        return {key: tensors[key] for key in shapes}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        for key, tensor in self._checkpoint_tensors().items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """Takes any valid packed weight of this layer's shape and format: other widths or outliers than before are fine."""
        _, _, missing_keys, unexpected_keys, error_msgs = more
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
        buffers = self._buffers.items()
        floats = {key: buffer.dtype for key, buffer in buffers if buffer is not None and buffer.is_floating_point()}
        for key, dtype in floats.items():
            self._buffers[key] = self._buffers[key].view(_INTEGER_OF_SIZE[dtype.itemsize])  # type: ignore[union-attr]
        super()._apply(fn, recurse)
        for key, dtype in floats.items():
            self._buffers[key] = self._buffers[key].view(dtype)  # type: ignore[union-attr]
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype, device=device)).dtype
        before, self._operand = self._operand, None
        layout = self._buffers.get("layout")
        if before is not None and layout is not None:
            self._operand = machine_layout(before.layout).from_blob(layout, before.shape)
        elif moves and self._device().type != "meta" and device.type != "meta":
            self.prepare()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After a copy or a pickle, which may come from another machine."""
        super().__setstate__(state)
        if self._operand is None or self._operand.layout.startswith(CHECKPOINT):
            return
        settled = machine_layout(self._operand.layout).settle(self._operand)
        if settled is None:
            self._set_weight(self.packed_weight())  # laid out anew at the first call
        else:
            self._operand = settled
            self.register_buffer("layout", settled.tensors[0], persistent=False)

    def _device(self) -> torch.device:
        return next(buffer.device for buffer in self._buffers.values() if buffer is not None)


class _Precision:
    """Of a module that multiplies."""

    _precision = DEFAULT_PRECISION

    @property
    def precision(self) -> str:
        """What the arithmetic may cost in accuracy: "exact", "high" (the default) or "fast", see `ops.packed_linear`.

        A choice of whoever runs the layer: copies and moves keep it, checkpoints do not hold it.
        """
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        check_precision(precision)
        self._precision = precision

    def chosen_precision(self) -> str:
        """What a layer's repr says of it."""
        return "" if self._precision == DEFAULT_PRECISION else f", precision={self._precision!r}"


class PackedLinear(_Precision, PackedLayer):
    """y = x W^T + bias with W packed; each format has a class of its own. W is frozen; gradients flow to x and to the bias.

    Make one with `from_dense`, `from_weight` or by loading a checkpoint.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.packed_linear(x, self._operand or self.operand(), self.bias, self._precision)

    def extra_repr(self) -> str:
        return super().extra_repr() + self.chosen_precision()


class TiedLinear(_Precision, nn.Module):
    """y = x W^T + bias with the weight of another packed layer: an output head that is tied to an embedding.

    Nothing of the weight is its own: `state_dict()` holds the bias alone, and moving the model moves the weight once.
    """

    owner: PackedLayer
    bias: Tensor | None

    def __init__(self, owner: PackedLayer, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not as a child, which would give the tensors a second name
        self.in_features, self.out_features = owner.in_features, owner.out_features
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return ops.packed_linear(x, self.owner.operand(), self.bias, self._precision)

    @property
    def weight(self) -> Tensor:
        return self.owner.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied{self.chosen_precision()}"


_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32}


WEIGHT_DTYPES = (*ACTIVATION_DTYPES, torch.float64)
"""Of dense weights that are packed."""


def dense_and_bias(linear_or_weight: nn.Linear | Tensor) -> tuple[Tensor, Tensor | None]:
    """(W [N, K], bias) of a layer or a matrix, detached."""
    weight: Any = linear_or_weight
    bias: Tensor | None = None
    if isinstance(linear_or_weight, nn.Linear):
        weight, bias = linear_or_weight.weight, linear_or_weight.bias
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.numel():
        given = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"from_dense takes an nn.Linear or a matrix [N, K] that is not empty, not {given}")
    if weight.dtype not in WEIGHT_DTYPES or weight.is_meta:
        allowed = ", ".join(map(str, WEIGHT_DTYPES))
        raise ValueError(f"the weight is {weight.dtype} on {weight.device}; allowed: {allowed}, with values")
    return weight.detach(), None if bias is None else bias.detach()


def layer_type(kind: str) -> type[Any]:
    """The layer of a format: a `PackedLinear`, or a `PackedComposite`. Raises FormatError for a kind that nobody registered."""
    return format_of(kind).layer


def packed_modules(model: nn.Module) -> list[tuple[str, PackedModule]]:
    """(name, module) of everything packed in `model`; of a composite the module itself, not its children."""
    found: list[tuple[str, PackedModule]] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and module not in inside:
            found.append((name, module))
            inside |= set(module.modules())
    return found


def set_precision(model: nn.Module, precision: str) -> int:
    """Set `PackedLinear.precision` of every packed layer in `model`, itself included; returns how many there are.

    Raises ValueError for another precision than "exact", "high" and "fast", or if the model has no packed layer.
    """
    check_precision(precision)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear | TiedLinear)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no packed layer whose precision could be set; compress it first "
            "(pyllmq.compress, pyllmq.swap_linear)"
        )
    for layer in layers:
        layer.precision = precision
    return len(layers)

"""How the kept weights of a sparse matrix are stored: fp16, bf16 or fp32, or int8 with one fp32 scale per row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..structure import FormatError, require_fp16

VALUE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}


def value_dtype(name: object) -> torch.dtype:
    """The dtype that config.json names."""
    if not isinstance(name, str) or name not in VALUE_DTYPES:
        raise FormatError(f"values is {name!r}; allowed: {', '.join(map(repr, VALUE_DTYPES))}")
    return VALUE_DTYPES[name]


def value_name(dtype: torch.dtype) -> str:
    """Its inverse."""
    name = str(dtype).removeprefix("torch.")
    if name not in VALUE_DTYPES:
        raise FormatError(f"value_dtype is {dtype}; allowed: {', '.join(f'torch.{n}' for n in VALUE_DTYPES)}")
    return name


def checked_weight(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(weight, mask of what is kept); without a mask everything but zero is kept."""
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise FormatError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be a non-empty float matrix [N, K]")
    if mask is None:
        mask = weight != 0
    elif mask.shape != weight.shape or mask.dtype != torch.bool:
        raise FormatError(f"mask is {mask.dtype} {tuple(mask.shape)}; it must be torch.bool {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise FormatError(f"the weight {tuple(weight.shape)} holds {bad} values that are not finite; repair the model")
    return weight, mask.to(weight.device)


def stored_values(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(a matrix [N, K] in the form in which its kept values are stored, scale fp32 [N] for int8)."""
    if dtype == torch.int8:
        largest = weight.float().abs().amax(1)
        scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale
    values = weight.to(dtype)
    if not bool(torch.isfinite(values).all()):
        reached = float(weight.float().abs().max())
        raise FormatError(f"the weight reaches {reached:g}, beyond {dtype}; choose torch.bfloat16 or torch.float32")
    if dtype == torch.float16:
        require_fp16(
            "the weight", weight, "give value_dtype=torch.bfloat16, torch.float32 or torch.int8, or rescale it"
        )
    return values, None


def scaled(weight: Tensor, field: Mapping[str, Tensor]) -> Tensor:
    """Stored values in their places, fp32 [N, K] -> the weight."""
    scale = field.get("scale")
    return weight if scale is None or not scale.numel() else weight * scale[:, None]

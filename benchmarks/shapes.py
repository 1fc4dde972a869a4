"""The layers people run: name of a model -> its Linear shapes [out_features, in_features]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MODEL_SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "llama-2-7b": {"q/k/v/o": (4096, 4096), "gate/up": (11008, 4096), "down": (4096, 11008)},
    "llama-2-13b": {"q/k/v/o": (5120, 5120), "gate/up": (13824, 5120), "down": (5120, 13824)},
    "llama-3-8b": {"q/o": (4096, 4096), "k/v": (1024, 4096), "gate/up": (14336, 4096), "down": (4096, 14336)},
    "llama-3.2-1b": {"q/o": (2048, 2048), "k/v": (512, 2048), "gate/up": (8192, 2048), "down": (2048, 8192)},
    "qwen2.5-7b": {"q/o": (3584, 3584), "k/v": (512, 3584), "gate/up": (18944, 3584), "down": (3584, 18944)},
    "qwen2.5-0.5b": {"q/o": (896, 896), "k/v": (128, 896), "gate/up": (4864, 896), "down": (896, 4864)},
    "minilm": {"q/k/v/o": (384, 384), "up": (1536, 384), "down": (384, 1536)},
    "square-1024": {"square": (1024, 1024)},
    "square-2048": {"square": (2048, 2048)},
    "square-4096": {"square": (4096, 4096)},
    "square-8192": {"square": (8192, 8192)},
}
"""From the models' own config.json: hidden_size, intermediate_size, heads. Layers of one shape stand in one entry."""

_EXPLICIT = re.compile(r"([1-9]\d*)[xX]([1-9]\d*)")


@dataclass(frozen=True)
class Shape:
    """A weight [n, k]: n = out_features, k = in_features."""

    name: str
    n: int
    k: int


def resolve(names: Sequence[str]) -> list[Shape]:
    """Model names and explicit `NxK` -> shapes, each (N, K) once, under the name that asked for it first.

    Raises ValueError for an unknown name; the message lists the known ones.
    """
    found: dict[tuple[int, int], Shape] = {}
    for name in names:
        explicit = _EXPLICIT.fullmatch(name)
        if explicit:
            n, k = int(explicit[1]), int(explicit[2])
            found.setdefault((n, k), Shape(f"{n}x{k}", n, k))
        elif name in MODEL_SHAPES:
            for layer, (n, k) in MODEL_SHAPES[name].items():
                found.setdefault((n, k), Shape(f"{name} {layer}", n, k))
        else:
            known = ", ".join(MODEL_SHAPES)
            raise ValueError(f"shape {name!r} is not known; known: {known}; or give NxK, such as 11008x4096")
    if not found:
        raise ValueError(f"no shape was given; known: {', '.join(MODEL_SHAPES)}; or NxK")
    return list(found.values())

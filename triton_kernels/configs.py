"""Tile sizes as data: `configs/<device class>.json`, else `configs/default.json`. Nothing is searched at run time.

A file is a list of rows; the first whose operation, widths and number of tokens fit is taken. `benchmarks/tune_triton.py` measures
candidates on a GPU and writes such a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Tile:
    """How one program works: a tile of `rows` x `slots` of the weight, times `tokens`."""

    rows: int
    slots: int
    tokens: int
    warps: int
    stages: int
    programs: int
    """Split the slots until there are about this many programs."""


def device_class(device: torch.device) -> str:
    """The name of the file of tiles: sm_90, gfx942, ...; "cpu" in the interpreter."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache(maxsize=16)
def rows_of(name: str) -> list[dict]:
    file = FOLDER / f"{name}.json"
    return json.loads((file if file.exists() else FOLDER / "default.json").read_text())


@lru_cache(maxsize=1024)
def tile_for(op: str, bits: int, tokens: int, device: torch.device) -> Tile:
    name = device_class(device)
    for row in rows_of(name):
        if row["op"] == op and bits in row["bits"] and tokens <= row.get("max_tokens", tokens):
            return Tile(**{field.name: row[field.name] for field in fields(Tile)})
    raise LookupError(
        f"no row of triton_kernels/configs for {op} at {bits} bits and {tokens} tokens (device class {name}); "
        "the last row of each operation must take any number of tokens"
    )

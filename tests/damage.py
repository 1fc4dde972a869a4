"""Ways to damage a packed folder, held as {file name: bytes}: its bytes, JSON values, safetensors headers and tensors."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pyllmq.folders import PackedFolder
from pyllmq.formats import FormatError, layer_type, structure_from_dict

Files = dict[str, bytes]
INDEX = "model.safetensors.index.json"
INTEGERS = (0, 1, -1, 2, 3, 7, 8, 255, 65537, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30)
JUNK: tuple[Any, ...] = (
    *INTEGERS, None, True, False, 0.5, -0.0, 1e308, math.nan, math.inf, "", "1", "\0", "x" * 5000, "../..", "/", "codebook", "int8",
    "F16", "U8", "I64", "float64", "columns", "LlamaModel", "logging", "GPT2Config", "pipeline", "gpt2", [], [0], [[]], ["x"], {},
    {"": 0}, {"kind": "bitmap"}, {"9": 1}, {"modules": {}},
)  # fmt: skip
STORED = ("U8", "I8", "F16", "BF16", "I16", "U16", "I32", "F32", "F64", "BOOL", "F4")
DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float64)
ADDED: tuple[tuple[str, Any], ...] = (
    ("auto_map", {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}),
    ("part_of_ranks", 2), ("dtype", "float16"), ("quantization_config", {}), ("kind", "codebook"), ("unknown", 1),
    ("shapes", {"model.layers.0.mlp.up_proj": [29, 18]}), ("shapes", {"model.norm": [1, 18]}),
)  # fmt: skip


def refused_of(folder: Path, count: int, place: Path) -> int:
    """How many of so many damaged copies of a packed folder are refused, rather than become layers; nothing else happens."""
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = 0
    for seed in range(count):
        files, _ = damaged(random.Random(seed), whole)
        copy = place / f"damaged{seed}"
        copy.mkdir()
        for name, content in files.items():
            (copy / name).write_bytes(content)
        try:
            for structure in PackedFolder.open(copy).structures.values():
                layer_type(structure.kind)(structure)
        except (ValueError, OSError):
            refused += 1
    return refused


def damaged(chance: random.Random, files: Files) -> tuple[Files, list[str]]:
    """A copy with one to three damages, and their names."""
    files, names = dict(files), []
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3))):
        damage = chance.choice(DAMAGES)
        names.append(damage.__name__)
        try:
            damage(chance, files)
        except Exception:
            continue  # what an earlier damage left cannot be parsed
    return files, names


# ---- bytes ---------------------------------------------------------------------------------------------------------------


def bytes_of_a_file(chance: random.Random, files: Files) -> None:
    name = chance.choice(sorted(files))
    files[name] = other_bytes(chance, files[name])


def other_bytes(chance: random.Random, content: bytes) -> bytes:
    data, place, length = bytearray(content), chance.randrange(len(content) + 1), chance.choice((1, 2, 8, 64))
    kind = chance.randrange(7)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content + chance.choice((b"\0" * length, chance.randbytes(length)))
    if kind == 2:
        data[place : place + length] = b""
    elif kind == 3:
        data[place:place] = chance.randbytes(length)
    elif kind == 4:
        data[place : place + length] = bytes(len(data[place : place + length]))
    else:
        for _ in range(length if data else 0):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def files_missing_or_swapped(chance: random.Random, files: Files) -> None:
    one, other = chance.choice(sorted(files)), chance.choice(sorted(files))
    kind = chance.randrange(3)
    if kind == 0:
        del files[one]
    elif kind == 1:
        files[one] = files[other]
    else:
        files[other + chance.choice((".safetensors", "x"))] = files[one]


# ---- JSON ----------------------------------------------------------------------------------------------------------------


def settings(chance: random.Random, files: Files) -> None:
    config = json.loads(files["config.json"])
    change_json(chance, config)
    files["config.json"] = json.dumps(config).encode()


def description(chance: random.Random, files: Files) -> None:
    config = json.loads(files["config.json"])
    change_json(chance, config["quantization_config"])
    files["config.json"] = json.dumps(config).encode()


def index(chance: random.Random, files: Files) -> None:
    if INDEX not in files:
        return settings(chance, files)
    content = json.loads(files[INDEX])
    change_json(chance, content)
    files[INDEX] = json.dumps(content).encode()


def change_json(chance: random.Random, value: Any) -> None:
    """One entry somewhere in nested dicts and lists: replaced, removed, doubled, renamed, counted up or down."""
    inside = [value]
    while chance.random() < 0.8:
        deeper = [entry for entry in _entries(inside[-1]).values() if isinstance(entry, dict | list) and entry]
        if not deeper:
            break
        inside.append(chance.choice(deeper))
    place = inside[-1]
    key = chance.choice(list(_entries(place)))
    kind = chance.randrange(8)
    if kind < 3:
        place[key] = chance.choice(JUNK)
    elif kind == 3:
        del place[key]
    elif kind == 4:
        other = chance.choice(inside)
        place[key] = json.loads(json.dumps(other[chance.choice(list(_entries(other)))]))
    elif kind == 5 and isinstance(place, dict):
        name, added = chance.choice((*ADDED, (key + chance.choice(("x", ".", " ", "\n")), place[key])))
        place[name] = added
    elif kind == 6 and isinstance(place, dict):
        renamed = chance.choice(("", key[:-1], key.upper(), key.partition(".")[2], str(chance.choice(JUNK))))
        place[renamed] = place.pop(key)
    else:
        place[key] += chance.choice((1, -1, place[key], 256))


def _entries(place: Any) -> dict[Any, Any]:
    return dict(place.items() if isinstance(place, dict) else enumerate(place))


# ---- safetensors ---------------------------------------------------------------------------------------------------------


def header(chance: random.Random, files: Files) -> None:
    """What safetensors itself must notice, or what no longer agrees with config.json."""
    name = _a_safetensors_file(chance, files)
    size = int.from_bytes(files[name][:8], "little")
    described, body = json.loads(files[name][8 : 8 + size]), files[name][8 + size :]
    entry = described[chance.choice([key for key in described if key != "__metadata__"])]
    kind = chance.randrange(6)
    if kind == 0:
        change_json(chance, described)
    elif kind == 1:
        entry["dtype"] = chance.choice((*STORED, *JUNK))
    elif kind == 2:
        place = chance.randrange(len(entry["shape"]))
        entry["shape"][place] = chance.choice((*INTEGERS, entry["shape"][place] + 1, entry["shape"][place] - 1))
    elif kind == 3:
        shape = entry["shape"]
        entry["shape"] = chance.choice((shape[::-1], [*shape, 1], [math.prod(shape)], [], [0]))
    elif kind == 4:
        place = chance.randrange(2)
        moved = entry["data_offsets"][place] + chance.choice((-2, 2, 64))
        entry["data_offsets"][place] = chance.choice((*INTEGERS, moved))
    else:
        other = described[chance.choice([key for key in described if key != "__metadata__"])]
        part = chance.choice(("dtype", "shape", "data_offsets"))
        entry[part], other[part] = other[part], entry[part]
    text = json.dumps(described).encode()
    length = len(text)
    if chance.random() < 0.1:
        length = chance.choice((length - 1, length + 1, 0, 2**32, 2**63, 2**64 - 1))
    files[name] = length.to_bytes(8, "little") + text + body


def tensors(chance: random.Random, files: Files) -> None:
    """A valid file whose tensors have another shape, dtype, name or content."""
    name = _a_safetensors_file(chance, files)
    held = safetensors.torch.load(files[name])
    key = chance.choice(sorted(held))
    tensor = held[key]
    kind = chance.randrange(9)
    if kind == 0:
        del held[key]
    elif kind == 1:
        held[chance.choice((key + "x", key.partition(".")[2], "x"))] = held.pop(key)
    elif kind == 2:
        held[key] = tensor.to(chance.choice(DTYPES))
    elif kind == 3:
        held[key] = torch.cat([tensor, tensor[:1]]) if chance.random() < 0.5 else tensor[1:].clone()
    elif kind == 4:
        shape = chance.choice(((-1,), (1, *tensor.shape), (*tensor.shape, 1), tensor.shape[::-1]))
        held[key] = tensor.reshape(shape).contiguous()
    elif kind == 5:
        held[key] = random_content(chance, tensor)
    else:
        change_elements(chance, tensor)
    files[name] = safetensors.torch.save(held, {"format": "pt"})


def agreeing(chance: random.Random, files: Files) -> None:
    """Another description of a module in config.json, with tensors of the dtypes and shapes that it asks for."""
    config = json.loads(files["config.json"])
    modules = config["quantization_config"]["modules"]
    name = chance.choice(sorted(modules))
    change_json(chance, modules[name])
    try:
        structure = structure_from_dict(modules[name])
    except FormatError:
        return settings(chance, files)
    if structure.nbytes > 1 << 16:
        return
    file = next(file for file in sorted(files) if file.endswith(".safetensors") and f'"{name}.'.encode() in files[file])
    held = safetensors.torch.load(files[file])
    for key, (shape, dtype) in structure.tensors().items():
        before = held.get(f"{name}.{key}")
        if before is None or before.shape != shape or before.dtype != dtype:
            held[f"{name}.{key}"] = plausible(chance, key, shape, dtype, structure)
    files["config.json"] = json.dumps(config).encode()
    files[file] = safetensors.torch.save(held, {"format": "pt"})


def plausible(chance: random.Random, key: str, shape: tuple[int, ...], dtype: torch.dtype, structure: Any) -> Tensor:
    """Content that gets past the first checks more often than random bytes."""
    if key.endswith("offsets"):
        count = getattr(structure, "kept", getattr(structure, "outliers", 0))
        steps = sorted(chance.randint(0, count) for _ in range(shape[0] - 2))
        return torch.tensor([0, *steps, count], dtype=dtype)
    if key == "segment_rows":
        return torch.full(shape, structure.out_features // structure.segments, dtype=dtype)
    if key == "column_bits":
        widths = [bits for bits, count in enumerate(structure.columns, 1) for _ in range(count)]
        return torch.tensor(chance.sample(widths, len(widths)), dtype=dtype)
    if key == "positions":
        return torch.full(shape, chance.choice((0b1110, 0b01000100, 0b11101110)), dtype=dtype)
    if dtype.is_floating_point:
        return torch.full(shape, chance.choice((0.0, 1.5, -65504.0, 6e-8)), dtype=dtype)
    return random_content(chance, torch.empty(shape, dtype=dtype))


def random_content(chance: random.Random, tensor: Tensor) -> Tensor:
    content = bytearray(chance.randbytes(tensor.numel() * tensor.itemsize))
    return torch.frombuffer(content, dtype=tensor.dtype).reshape(tensor.shape) if content else tensor


def change_elements(chance: random.Random, tensor: Tensor) -> None:
    """Of the flat tensor: one set to an extreme, or two swapped, or all shifted by one."""
    flat, kind = tensor.view(-1), chance.randrange(3)
    one, other = chance.randrange(flat.numel()), chance.randrange(flat.numel())
    if kind == 0:
        flat[one], flat[other] = flat[other].clone(), flat[one].clone()
    elif kind == 1:
        flat.copy_(flat.roll(1))
    elif tensor.is_floating_point():
        flat[one] = chance.choice((math.nan, math.inf, -math.inf, -0.0, 65504.0))
    else:
        limits = torch.iinfo(tensor.dtype)
        flat[one] = chance.choice((limits.min, limits.max, 0, 1, 8, 9, 18, 29, min(54, limits.max)))


def _a_safetensors_file(chance: random.Random, files: Files) -> str:
    return chance.choice(sorted(name for name in files if name.endswith(".safetensors")))


DAMAGES: tuple[Callable[[random.Random, Files], None], ...] = (
    bytes_of_a_file, bytes_of_a_file, files_missing_or_swapped, settings, description, description, index, header, header, tensors,
    tensors, tensors, agreeing, agreeing,
)  # fmt: skip

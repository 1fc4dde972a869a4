"""Instructions of the loops of a CUDA kernel, from its machine code as nvdisasm prints it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

ALU = re.compile(r"PRMT|LOP3?|SHF|IADD3?|VIADD|ISETP|SEL|LEA|PLOP3|MOV|IMNMX|VIMNMX|SGXT|BMSK")
"""What the integer pipe runs, at half the rate of issue; IMAD, in whose place the compiler writes many moves, is another's."""


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or beside triton."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    return shutil.which(name) or shutil.which(name, path=str(beside))


def kernels(nvdisasm: str, cubin: Path) -> dict[str, list[str]]:
    """Mangled name -> lines: instructions without their operands' comments, and labels that end in a colon."""
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            name = section[1]
            found[name] = []
        elif not name:
            continue
        elif label := re.match(r"\s*(\.L_\w+):", line):
            found[name].append(label[1] + ":")
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found[name].append(instruction[1])
    return found


def word(instruction: str) -> str:
    """PRMT of `@!P0 PRMT R1, R2, 0x7632, R3`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split(" ")[0].split(".")[0]


def ranges(lines: list[str]) -> list[tuple[int, int]]:
    """From a label to the branch back to it."""
    place = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    found = []
    for i, line in enumerate(lines):
        target = re.search(r"\(?(\.L_\w+)\)?", line)
        if not line.endswith(":") and word(line) == "BRA" and target and place.get(target[1], i) < i:
            found.append((place[target[1]], i))
    return found


def instructions(lines: list[str]) -> list[str]:
    """Without what BRA.CONV jumps over where the lanes of a warp are together, as they are here: a call that joins them."""
    found, joined_at = [], ""
    for line in lines:
        if not joined_at and not line.endswith(":"):
            found.append(line)
        if line.startswith("BRA.CONV"):
            joined_at = re.search(r"\.L_\w+", line)[0] + ":"
        elif line == joined_at:
            joined_at = ""
    return found


def every_loop(lines: list[str]) -> list[list[str]]:
    """Instructions of all loops, with those of the loops within."""
    return [instructions(lines[begin : end + 1]) for begin, end in ranges(lines)]


def loops(lines: list[str]) -> list[list[str]]:
    """Instructions of those loops that hold no other."""
    found = ranges(lines)
    inner = [r for r in found if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in found)]
    return [instructions(lines[begin : end + 1]) for begin, end in inner]


def counts(loop: list[str]) -> Counter[str]:
    """By word; `ALU` and `issued` are sums."""
    found = Counter(map(word, loop))
    found["issued"] = len(loop)
    found["ALU"] = sum(count for name, count in found.items() if ALU.fullmatch(name))
    return found

"""Instructions of inner loops, from the disassembly: the tables of docs/kernels-arm.md.

python tests/inner_loops.py OBJDUMP OBJECT WORD...   of each function whose name has all words the innermost loop with most work
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

LOOKUPS = re.compile(r"^(v?pshufb|vpermb|tbl|tbx)$")
PRODUCTS = re.compile(r"^(vfmadd\w+|fmla|sdot|smmla|vpmaddwd|vpdpbusd)$")


def functions(objdump: str, path: str) -> dict[str, list[tuple[int, str, str]]]:
    text = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[tuple[int, str, str]]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            name = match[1]
            found[name] = []
        elif match := re.match(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
            found[name].append((int(match[1], 16), match[2], match[3]))
    return found


def loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """Those that hold no other loop."""
    ranges = []
    for at, word, operands in code:
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if (
            target
            and (word.startswith(("j", "b.", "cb", "tb")) or word == "b")
            and int(target[1], 16) < at
            and word != "tbl"
        ):
            ranges.append((int(target[1], 16), at))
    inner = [r for r in ranges if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in ranges)]
    return [[one for one in code if begin <= one[0] <= end] for begin, end in inner]


def main(objdump: str, path: str, *words: str) -> None:
    for name, code in functions(objdump, path).items():
        if not all(word in name for word in words):
            continue
        work = [(sum(bool(LOOKUPS.match(w) or PRODUCTS.match(w)) for _, w, _ in loop), loop) for loop in loops(code)]
        if not work:
            continue
        most, loop = max(work, key=lambda pair: pair[0])
        kinds = Counter(word for _, word, _ in loop)
        print(f"{len(loop):4d} instructions, {most:3d} lookups or products  {name.split('::')[-1][:70]} {name[-120:]}")
        print("     " + ", ".join(f"{word} {count}" for word, count in kinds.most_common(12)))


if __name__ == "__main__":
    main(*sys.argv[1:])

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


def densest(objdump: str, path: str) -> dict[str, tuple[int, list[tuple[int, str, str]]]]:
    """Of each function with loops, the innermost loop with most lookups or products: how many, and its instructions."""
    found = {}
    for name, code in functions(objdump, path).items():
        work = [(sum(bool(LOOKUPS.match(w) or PRODUCTS.match(w)) for _, w, _ in loop), loop) for loop in loops(code)]
        if work:
            found[name] = max(work, key=lambda pair: pair[0])
    return found


PLANES = (4, 3, 2, 2)
"""Of the tables, by TableKind."""


def table_loops(objdump: str, path: str, rows: int) -> dict[tuple[int, bool, int], float]:
    """Instructions per 32 lookups of the few-token kernels: (TableKind, of 3 bits, tokens) -> number. A lookup instruction reads
    one plane for `rows` rows. A loop that was inlined into its caller is missing."""
    found = {}
    for name, (lookups, loop) in densest(objdump, path).items():
        match = re.search(r"(\w+)_of_tokens<\(pyllmq::cpu::TableKind\)(\d), (\d+)(?:, (\d))?", name)
        if match and lookups:
            kind = int(match[2])
            key = kind, match[4] == "3" or match[1] == "lookups_3bit", int(match[3])
            found[key] = len(loop) * PLANES[kind] * 32 / (lookups * rows)
    return found


def main(objdump: str, path: str, *words: str) -> None:
    for name, (most, loop) in densest(objdump, path).items():
        if all(word in name for word in words):
            kinds = Counter(word for _, word, _ in loop)
            print(
                f"{len(loop):4d} instructions, {most:3d} lookups or products  {name.split('::')[-1][:70]} {name[-120:]}"
            )
            print("     " + ", ".join(f"{word} {count}" for word, count in kinds.most_common(12)))


if __name__ == "__main__":
    main(*sys.argv[1:])

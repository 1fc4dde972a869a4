"""Imports of pyllmq/ against the picture of docs/design.md: no circle, none that points up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyllmq"

FLOORS = (
    ("dispatch", "linears", "memory", "version", "weights", "integrations.transformers_internals", "_cpu", "_cuda"),
    ("layouts",),
    ("operations",),
    ("ops",),
    ("structure", "kmeans", "transport"),
    ("packing", "losses"),
    ("layers",),
    ("formats", "experts"),
    ("triton_kernels",),
    ("backends",),
    ("functional", "nn", "config", "folders", "tensor_parallel", "fusion"),
    ("integrations",),
    ("swap", "loading", "parallel"),
    ("compression",),
    ("evaluate",),
    ("",),
    ("benchmarks",),
    ("cli",),
    ("__main__",),
)
"""Rooms from the ground up, as docs/design.md draws them. A module stands in the room with the longest name that begins its own;
it may import its own room and rooms on floors below it."""

EXCEPTIONS: set[tuple[str, str]] = set()
"""Arrows that point up all the same. One that is not there any more fails the test."""

Arrow = tuple[str, str]


def modules() -> dict[str, Path]:
    """Dotted name without `pyllmq.` -> file; the package itself is "". Folders at the top that install under pyllmq included."""
    named = {}
    for top in (PACKAGE, ROOT / "triton_kernels", ROOT / "benchmarks"):
        base = PACKAGE if top == PACKAGE else ROOT
        for path in top.rglob("*.py"):
            if "__pycache__" not in path.parts:
                named[".".join(path.relative_to(base).with_suffix("").parts)] = path
    return {"" if n == "__init__" else n.removesuffix(".__init__"): path for n, path in named.items()}


def imported(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Modules of pyllmq that a file imports when it is imported or run; not those for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    only_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                base = ".".join(parts[: len(parts) - node.level + 1])
                target = f"{base}.{node.module}".strip(".") if node.module else base
            elif node.module and re.match(r"pyllmq(\.|$)", node.module):
                target = node.module.removeprefix("pyllmq").strip(".")
            else:
                continue
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                yield inner if inner in known else target
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if re.match(r"pyllmq(\.|$)", alias.name):
                    yield alias.name.removeprefix("pyllmq").strip(".")


def arrows() -> set[Arrow]:
    known = modules()
    found = {
        (name, target)
        for name, path in known.items()
        for target in imported(name, path, {*known, "_cpu", "_cuda"})
        if target != name
    }
    assert len(found) > 150 and ("backends.cpu.codebook", "formats.codebook") in found, "the walk finds too little"
    return found


def room(module: str) -> str:
    rooms = [room for floor in FLOORS for room in floor]
    return max((r for r in rooms if r == module or (r and module.startswith(f"{r}."))), key=len, default="?")


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def points_up(arrow: Arrow) -> bool:
    source, target = arrow
    return room(source) != room(target) and floor(target) >= floor(source)


def circles(found: set[Arrow]) -> list[str]:
    graph: dict[str, set[str]] = {}
    for source, target in found:
        if source.rpartition(".")[0] != target:  # a file may import its own package
            graph.setdefault(source, set()).add(target)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_every_module_has_a_room():
    assert [name for name in modules() if room(name) == "?"] == []


def test_no_arrow_points_up():
    up = {arrow for arrow in arrows() if points_up(arrow)}
    assert sorted(up - EXCEPTIONS) == []
    assert sorted(EXCEPTIONS - up) == [], "these exceptions are not needed any more"


def test_no_circle():
    assert circles({arrow for arrow in arrows() if arrow not in EXCEPTIONS}) == []


@pytest.mark.parametrize(
    "arrow",
    [
        ("structure", "formats.codebook"),
        ("ops", "backends"),
        ("formats.bitmap", "backends.cpu"),
        ("kmeans", "transport"),
    ],
)
def test_an_arrow_that_points_up_is_seen(arrow):
    assert points_up(arrow)


def test_a_circle_is_seen():
    assert circles({("a", "b"), ("b", "c"), ("c", "a")})


def test_the_picture_of_the_design_is_this_one():
    """docs/design.md has the floors as a table, the ground floor last."""
    text = (ROOT / "docs/design.md").read_text()
    table = text.split("<!-- floors -->")[1].split("<!-- end of floors -->")[0]
    drawn = [
        tuple(re.findall(r"`([^`]*)`", line.split("|")[1])) for line in table.splitlines() if line.startswith("| `")
    ]
    assert [tuple(r or "pyllmq" for r in rooms if not r.startswith("_c")) for rooms in FLOORS[::-1]] == drawn

"""Modules import from the layers below their own alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import farpage

ROOT = Path(farpage.__file__).parent

LAYERS = (
    ("errors",),
    ("address", "blockio", "handover", "log", "message"),
    ("kernel", "definition"),
    ("daemon", "api", "terminal"),
    ("nbd",),
    ("device", "volume", "attach"),
    ("pager",),
    ("vios", "guest"),
    ("hypervisor", "intermediary"),
    ("embedded",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
"""From the lowest up; what stands side by side does not import each other."""

LEVELS = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return the line and the part of farpage of every import from it, also of those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole way"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "farpage" and rest != "__version__":
                yield node.lineno, rest.partition(".")[0]


def test_nothing_is_imported_from_a_layer_above_or_beside() -> None:
    upwards = []
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        if part == "__init__":  # the face of the library, which imports when it is asked
            continue
        upwards += [
            f"{path.relative_to(ROOT)}:{line} imports from {other}"
            for line, other in imported(ast.parse(path.read_text()))
            if other != part and LEVELS[other] >= LEVELS[part]
        ]
    assert upwards == []


def test_every_part_has_its_layer() -> None:
    parts = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/__init__.py")
    }
    assert parts - {"__init__"} == LEVELS.keys()

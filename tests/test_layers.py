"""Imports run one way.

cli → commands → engines, checks → containers, models, checkpoint, core, report →
schema, starts, formats, errors
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loftq_cli

ROOT = Path(loftq_cli.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Who may import whom. A room may always import from itself; nobody may import `cli`.
MAY_IMPORT = {
    "__init__": "",
    "__main__": "cli",
    "cli": "commands console errors",
    "commands": (
        "engines checks containers models checkpoint core report hardware console "
        "schema starts formats errors"
    ),
    "checks": "engines containers models checkpoint core starts formats errors",
    "engines": "containers models checkpoint core starts formats errors",
    "containers": "checkpoint core starts formats errors",
    "models": "checkpoint core starts formats errors",
    "checkpoint": "core starts formats errors",
    "core": "starts formats errors",
    "hardware": "errors",
    "console": "report.escape errors",
    "report": "schema starts formats errors",
    "schema": "starts formats errors",
    "starts": "formats errors",
    "formats": "errors",
    "errors": "",
}
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "numba",
    "numpy",
    "peft",
    "safetensors",
    "torch",
    "transformers",
}
# What a room must not even import late. `core` knows nothing of files, `checkpoint` nothing of
# transformers, `report` only documents.
NEVER = {
    "core": {"transformers", "peft", "safetensors", "huggingface_hub", "pathlib", "os", "io"},
    "checkpoint": {"transformers", "peft", "accelerate"},
    "report": HEAVY,
    "schema": HEAVY,
    "starts": HEAVY,
    "formats": HEAVY,
    "console": HEAVY,
}


def imports(node: ast.AST, *, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Every import below a node and whether it runs late; those for type checkers do not run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name the whole path"
            yield from ((f"{child.module}.{alias.name}", late) for alias in child.names)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, late=late or inside)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = {room, "__version__", *MAY_IMPORT.get(room, "").split()}
    tree = ast.parse(path.read_text("utf-8"))
    for name, late in imports(tree):
        top, _, ours = name.partition(".")
        assert top not in NEVER.get(room, ()), f"{name} in {room}"
        assert late or room == "core" or top not in HEAVY, f"{name} at the top of the module"
        assert late or top != "rich", name
        assert late or top != "pydantic" or room == "schema", name
        if top == "loftq_cli":
            assert any(f"{ours}.".startswith(f"{each}.") for each in allowed), f"{name} in {room}"
    if room == "core":
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"open", "print"}


def test_every_room_is_in_the_table() -> None:
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms - {"demo"} <= set(MAY_IMPORT)


def test_no_module_is_longer_than_400_lines() -> None:
    long = [path.name for path in MODULES if len(path.read_text("utf-8").splitlines()) > 400]
    assert long == []

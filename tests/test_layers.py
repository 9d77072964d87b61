"""Imports run one way.

cli → commands → api → engines, checks → models → containers → checkpoint, core, report, record →
schema, options, starts, formats, errors
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import loftq_cli

ROOT = Path(loftq_cli.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Who may import whom. A room may always import from itself; nobody may import `cli`.
MAY_IMPORT = {
    "__init__": "api",
    "__main__": "cli",
    "cli": "commands console signals errors",
    "api": "record engines checks models hardware schema options formats libraries errors",
    "commands": (
        "api record engines checks containers models checkpoint core report hardware console "
        "schema options starts formats libraries errors"
    ),
    "checks": (
        "record engines containers models checkpoint core report hardware "
        "schema options starts formats errors"
    ),
    "engines": (
        "record containers models checkpoint core report hardware "
        "schema options starts formats libraries errors"
    ),
    "containers": "checkpoint core starts formats errors",
    "models": "containers checkpoint core schema starts formats libraries errors",
    "checkpoint": "core starts formats errors",
    "core": "starts formats errors",
    "record": "hardware schema errors",
    "hardware": "errors",
    "libraries": "errors",
    "console": "record report.escape errors",
    "signals": "",
    "report": "schema options starts formats errors",
    "schema": "starts formats errors",
    "options": "formats errors",
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


def files_and_imports(root: Path) -> dict[str, set[str]]:
    """Which files of the package at ``root`` each of them imports, early or late."""
    files = {
        ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in root.rglob("*.py")
    }
    graph: dict[str, set[str]] = {file: set() for file in files}
    for file, path in files.items():
        for name, _ in imports(ast.parse(path.read_text("utf-8"))):
            while name and name not in files:  # what is imported from a file is no file
                name = name.rpartition(".")[0]
            if name not in ("", root.name):  # a package is imported with whatever is in it
                graph[file].add(name)
    return graph


def between_rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    def room(file: str) -> str:
        return ".".join(file.split(".")[:2])

    rooms: dict[str, set[str]] = {room(file): set() for file in graph}
    for file, imported in graph.items():
        rooms[room(file)] |= {room(other) for other in imported} - {room(file)}
    return rooms


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Some circle of imports, its first member repeated at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1][::-1]
        return found
    return []


def test_no_circle_of_imports_between_files_nor_between_rooms() -> None:
    """An import inside a function counts: it only hides a circle."""
    graph = files_and_imports(ROOT)
    assert circle(graph) == []
    assert circle(between_rooms(graph)) == []


def test_circles_are_found(tmp_path: Path) -> None:
    """Late imports count, those for type checkers do not; rooms may make one that files do not."""
    package = tmp_path / "package"
    for path, text in {
        "__init__.py": "",
        "a/__init__.py": "",
        "a/one.py": "from package.b import two",
        "a/other.py": "",
        "b/__init__.py": "",
        "b/two.py": "if TYPE_CHECKING:\n    from package.a.one import name",
        "b/three.py": "def f():\n    from package.a.other import name",
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    graph = files_and_imports(package)
    assert circle(graph) == []
    assert set(circle(between_rooms(graph))) == {"package.a", "package.b"}
    (package / "b/two.py").write_text("def f():\n    from package.a.one import name")
    found = circle(files_and_imports(package))
    assert found in (
        ["package.a.one", "package.b.two", "package.a.one"],
        ["package.b.two", "package.a.one", "package.b.two"],
    )


def test_every_room_is_in_the_table() -> None:
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms - {"demo"} <= set(MAY_IMPORT)


def test_no_module_is_longer_than_400_lines() -> None:
    long = [path.name for path in MODULES if len(path.read_text("utf-8").splitlines()) > 400]
    assert long == []


def test_the_readme_maps_every_room() -> None:
    readme = (ROOT.parent / "README.md").read_text("utf-8")
    block = readme.partition("```\nloftq_cli/\n")[2].partition("```")[0]
    mapped = [line.split()[0] for line in block.splitlines()]
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in ROOT.iterdir()
        if path.is_dir() or path.suffix == ".py"
    }
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == rooms - {"__init__.py", "__main__.py", "__pycache__/"}

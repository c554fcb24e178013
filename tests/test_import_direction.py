"""Imports run one way through the house: a reader can follow the data, and a part can be used alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import clipgraft

SOURCE = Path(clipgraft.__file__).parent
LAYERS = (
    ("shown", "processes", "process_memory"),
    ("errors",),
    ("writing", "progress", "text_tables"),
    ("locks",),
    ("files", "readers"),
    ("stored_images",),
    ("records", "ours", "emoji", "pictures", "cluster"),
    ("options", "notebook_tables"),
    ("models",),
    ("results",),
    ("lora",),
    ("engine",),
    ("adapters",),
    ("data",),
    ("evaluate", "compact"),
    ("search",),
    ("train", "serve", "profile"),
    ("report",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The package itself names its public members lazily, and __main__ is the command line's door.
DOORS = {"__init__", "__main__"}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[1] for name in modules if name.startswith("clipgraft.")}


def test_imports_run_one_way() -> None:
    """A cycle or a back edge makes `import clipgraft` slow or impossible, and the parts inseparable."""
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        part = part_of(path)
        if part in DOORS or part == "assets":
            continue
        back = [other for other in imported_parts(path) - {part} if LEVEL[other] >= LEVEL[part]]
        wrong += [f"{path.relative_to(SOURCE)} imports {other}" for other in back]
    assert wrong == []


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of ours that a file needs when it runs, those imported inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_circles() -> None:
    """Two modules that need each other are read, tested and moved only together."""
    modules = {
        ".".join(["clipgraft", *path.relative_to(SOURCE).with_suffix("").parts]): path
        for path in SOURCE.rglob("*.py")
        if path.name != "__init__.py"
    }
    needs = {name: set(imported_modules(path)) & modules.keys() for name, path in modules.items()}
    TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle


def test_every_part_has_a_level() -> None:
    """A new folder that no rule covers would be free to import anything."""
    parts = {part_of(path) for path in SOURCE.rglob("*.py")} - DOORS - {"assets"}
    assert parts <= set(LEVEL)


def test_flags_stay_in_the_command_line() -> None:
    """A library that speaks of flags, or knows them, cannot be used from Python alone."""
    users = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if "clipgraft.cli" in path.read_text(encoding="utf-8") and part_of(path) not in ("cli", "options")
    }
    assert users <= {"__main__.py"}


def test_files_fit_in_one_sitting() -> None:
    """Files over 600 lines stop being read, and faults in them stop being found."""
    long = {
        str(p.relative_to(SOURCE)): n
        for p in SOURCE.rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 600
    }
    assert long == {}

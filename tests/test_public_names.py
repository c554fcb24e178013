"""What `import clipgraft as cg` offers, flat and in namespaces."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import clipgraft as cg

SOURCE = Path(cg.__file__).parent
STUBS = sorted(SOURCE.rglob("__init__.pyi"))
NAMESPACES = [".".join(("clipgraft", *stub.parent.relative_to(SOURCE).parts)) for stub in STUBS]
HEAVY = ("torch", "numpy", "transformers", "open_clip", "pydantic", "PIL", "yaml", "tqdm", "asyncio")


def listed(stub: Path) -> set[str]:
    """The names that a stub imports or declares."""
    body = ast.parse(stub.read_text(encoding="utf-8")).body
    declared = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    return declared | {alias.name for node in body for alias in getattr(node, "names", [])}


@pytest.mark.parametrize("name", NAMESPACES)
def test_every_public_name_exists(name: str) -> None:
    """`cg.NAME` from the README would raise AttributeError."""
    namespace = importlib.import_module(name)
    assert [public for public in namespace.__all__ if getattr(namespace, public) is None] == []


@pytest.mark.parametrize("stub", STUBS, ids=NAMESPACES)
def test_the_stub_is_the_list(stub: Path) -> None:
    """An editor would not complete, or would reject, a name that works at run time."""
    namespace = importlib.import_module(NAMESPACES[STUBS.index(stub)])
    assert listed(stub) == set(namespace.__all__)


@pytest.mark.parametrize("stub", STUBS, ids=NAMESPACES)
def test_no_module_has_the_name_of_a_function(stub: Path) -> None:
    """`cg.search.query` would be the module or the function, whichever was imported last."""
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    members = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert members & {path.stem for path in stub.parent.iterdir()} == set()


def test_unknown_names_are_attribute_errors() -> None:
    """`hasattr` and `from clipgraft import x` would misbehave for names that do not exist."""
    with pytest.raises(AttributeError, match="nothing"):
        _ = cg.nothing


def test_dir_lists_public_names() -> None:
    """Tab completion in a notebook would show nothing."""
    assert set(cg.__all__) <= set(dir(cg))
    assert "query" in dir(cg.search)


@pytest.mark.parametrize("name", NAMESPACES)
def test_import_is_light(name: str) -> None:
    """`import clipgraft` in a script would cost seconds before anything is asked of it."""
    code = f"import sys, {name}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_loads_none_of_the_rest() -> None:
    """`import clipgraft` would grow slower with every module that is added."""
    code = "import sys, clipgraft; print([m for m in sys.modules if m.startswith('clipgraft.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("before", "now"), sorted(cg._NOW.items()))
def test_names_of_before_still_work(before: str, now: str) -> None:
    """A script of last month ends in an AttributeError, or nobody says what to write in its place."""
    space, member = now.split(".")
    with pytest.warns(DeprecationWarning, match=f"clipgraft.{before} is clipgraft.{now} now"):
        found = getattr(cg, before)
    assert found is getattr(importlib.import_module(f"clipgraft.{space}"), member)
    assert before not in cg.__all__

"""What `import clipgraft as cg` offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clipgraft as cg


@pytest.mark.parametrize("name", cg.__all__)
def test_every_public_name_exists(name: str) -> None:
    """`cg.NAME` from the README would raise AttributeError."""
    assert getattr(cg, name) is not None


def test_type_checkers_see_the_same_names() -> None:
    """An editor would not complete, or would reject, a name that works at run time."""
    tree = ast.parse(Path(cg.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    listed = {alias.name for block in blocks for node in block.body for alias in getattr(node, "names", [])}
    assert listed | {"__version__"} == set(cg.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    """`hasattr` and `from clipgraft import x` would misbehave for names that do not exist."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cg.nothing


def test_dir_lists_public_names() -> None:
    """Tab completion in a notebook would show nothing."""
    assert set(cg.__all__) <= set(dir(cg))


def test_import_is_light() -> None:
    """`import clipgraft` in a script would cost seconds before anything is asked of it."""
    heavy = ("torch", "numpy", "transformers", "open_clip", "pydantic", "PIL", "yaml", "tqdm", "asyncio")
    code = f"import sys, clipgraft; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_loads_none_of_the_rest() -> None:
    """`import clipgraft` would grow slower with every module that is added."""
    code = "import sys, clipgraft; print([m for m in sys.modules if m.startswith('clipgraft.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

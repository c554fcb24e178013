"""`python scripts/notebook.py`: write examples/adapt_and_evaluate.ipynb from the program of the same name.

The body of its function `compare` becomes the notebook: a cell wherever a line says `# %% Title`, with the
comment below that line as text. The function's parameters become a cell of settings, tagged `parameters` as
papermill has it. The flags and the return, for which a notebook has no use, are left out.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

PROGRAM = Path(__file__).parents[1] / "examples" / "adapt_and_evaluate.py"
STORY = "compare"  # the function whose body is told
_MARK = "# %% "
_NEVER = ("argparse", "__future__")  # imports that the notebook has no use for


def notebook(source: str) -> dict[str, Any]:
    """Turn a program into a notebook of nbformat 4.5.

    Raises:
        ValueError: the program has no docstring, or no function `compare`.
    """
    tree = ast.parse(source)
    text = ast.get_docstring(tree)
    stories = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == STORY]
    if text is None or not stories:
        raise ValueError(f"the program needs a docstring and a function {STORY}")
    story, lines = stories[0], source.splitlines()
    parts = [
        ("markdown", _introduction(text), False),
        ("code", _head(tree, story, lines), False),
        ("code", _settings(story, source), True),
        *((kind, body, False) for kind, body in _sections(story, lines)),
    ]
    return {
        "cells": [_cell(number, *part) for number, part in enumerate(parts)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _introduction(text: str) -> str:
    """Take the docstring, its first line as the title, without the line that runs the program."""
    first, *rest = text.splitlines()
    kept = "\n".join(line for line in rest if not line.startswith("    ")).strip()
    return f"# {first.rstrip('.')}\n\n{kept}"


def _head(tree: ast.Module, story: ast.FunctionDef, lines: list[str]) -> str:
    """Take the imports and constants above the function."""
    unwanted = {
        number
        for node in tree.body
        if (isinstance(node, ast.Import) and node.names[0].name in _NEVER)
        or (isinstance(node, ast.ImportFrom) and node.module in _NEVER)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    start = (tree.body[0].end_lineno or 0) + 1  # after the docstring
    kept = [lines[n - 1] for n in range(start, story.lineno) if n not in unwanted]
    return "\n".join(kept).strip()


def _settings(story: ast.FunctionDef, source: str) -> str:
    """Turn the parameters and their defaults into assignments."""
    pairs = zip(story.args.args, story.args.defaults, strict=True)
    return "\n".join(
        f"{argument.arg} = {ast.get_source_segment(source, default)}" for argument, default in pairs
    )


def _sections(story: ast.FunctionDef, lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield text and code of each part of the body, in order."""
    first, last = story.body[0], story.body[-1]  # the docstring, and perhaps the return
    end = last.lineno - 1 if isinstance(last, ast.Return) else last.end_lineno
    body = dedent("\n".join(lines[first.end_lineno : end]))
    _, *sections = f"\n{body}".split(f"\n{_MARK}")
    for section in sections:
        title, *rest = section.splitlines()
        remark = 0
        while remark < len(rest) and rest[remark].startswith("# "):
            remark += 1
        text = "\n".join(line.removeprefix("# ") for line in rest[:remark])
        yield "markdown", f"## {title}\n\n{text}".strip()
        yield "code", "\n".join(rest[remark:]).strip()


def _cell(number: int, kind: str, text: str, settings: bool) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "cell_type": kind,
        "id": f"cell-{number:02d}",
        "metadata": {"tags": ["parameters"]} if settings else {},
        "source": text.splitlines(keepends=True),
    }
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}


def main() -> None:
    """Write the notebook next to the program."""
    made = json.dumps(notebook(PROGRAM.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
    PROGRAM.with_suffix(".ipynb").write_text(made + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

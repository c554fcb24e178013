"""YAML of strangers: read into plain values, within bounds, or refused in one line.

Some lines of YAML stand for gigabytes: aliases of aliases double with each line. Deep nesting ends in a
RecursionError, and the library's constructors of numbers and dates raise whatever Python raises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipgraft.errors import ClipgraftError
from clipgraft.readers import reason

_MOST_BYTES = 4_000_000
_MOST_VALUES = 200_000  # with what aliases stand for
_DEEPEST = 20


def load_yaml(path: Path, loader: type[Any], error: type[ClipgraftError], label: str) -> Any:
    """The one document of a file, by a PyYAML loader class.

    Raises:
        error: the file cannot be read, is no YAML, or is larger or deeper than settings are; it begins with
            `label`.
    """
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as cause:
        raise error(f"{label}: cannot be read: {cause.strerror}; check the path") from cause
    try:
        text = content.decode("utf-8-sig")
        fault = _too_large(content) or _too_deep(yaml.parse(text, loader))
        if not fault:
            node = yaml.compose(text, loader)
            fault = _expands(node)
        if not fault:
            return yaml.load(text, loader)
    except ClipgraftError:
        raise
    except Exception as cause:  # ValueError, OverflowError, KeyError, … of constructors, beside YAMLError
        raise error(f"{label} is not YAML: {reason(cause)}; correct it") from cause
    raise error(f"{label}: {fault}; write it out in plain lines")


def _too_large(content: bytes) -> str:
    return f"is larger than {_MOST_BYTES:,} bytes" if len(content) > _MOST_BYTES else ""


def _too_deep(events: Any) -> str:
    """Looked for among the parser's events, which come without recursion."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            return f"has more than {_DEEPEST} levels"
    return ""


def _expands(root: Any) -> str:
    """Whether aliases stand for too much, or for what they are in."""
    import yaml

    sizes: dict[int, int] = {}

    def size(node: Any, above: frozenset[int]) -> int:
        if id(node) in above:
            return _MOST_VALUES + 1
        if id(node) not in sizes:
            parts: list[Any] = []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            below = above | {id(node)} if parts else above
            sizes[id(node)] = 1 + sum(size(part, below) for part in parts)
        return sizes[id(node)]

    most = 0 if root is None else size(root, frozenset())
    return f"has more than {_MOST_VALUES:,} values, aliases (*name) counted" if most > _MOST_VALUES else ""

"""Examples of requests for the schema; a test sends each of them."""

from __future__ import annotations

from typing import Any

BASE_NAME = "emoji"
"""What the examples call the base; `/openapi.json` has the name of the one that is served."""

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mO8IyfHgA0w"
    "MeAAg1MCAOBWAShOAhDlAAAAAElFTkSuQmCC"
)
"""A red PNG of 8×8 pixels."""


def named(**values: Any) -> dict[str, Any]:
    """Return examples as OpenAPI wants them: by name, each with its value."""
    return {name: {"summary": name.replace("_", " "), "value": value} for name, value in values.items()}

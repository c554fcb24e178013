"""The pages of the documentation, as Markdown in the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in (
        "*.md",
        "changelog.d/README.md",
        "docs/**/*.md",
        "examples/*.md",
        "benchmarks/results/*.md",
    )
    for page in ROOT.glob(pattern)
)

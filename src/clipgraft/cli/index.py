"""`clipgraft index`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from clipgraft.cli import checks
from clipgraft.cli.flags.search import IndexFlags
from clipgraft.cli.parser import parse

log = logging.getLogger("clipgraft")
_SUMMARY = "Build a FAISS index over the vectors of an encoded folder, beside them."


def run(argv: Sequence[str]) -> None:
    """Parse, build, and print how much the index finds."""
    (spec,) = parse("index", _SUMMARY, [IndexFlags], argv)
    if spec.out.is_dir():
        checks.refuse(checks.output_faults("OUT", spec.out, folder=True))
    from clipgraft.search.index import build_index

    for place, record in build_index(spec.out, spec.factory):
        if record.recall is None:
            found = "exact"
        else:
            found = f"recall@10 {record.recall:.3f} of exact search on stored vectors"
            found += "".join(f", {name} {value}" for name, value in (record.settings or {}).items())
        log.info("%s: %s, %s vectors of %d, %s", place, record.factory, f"{record.rows:,}", record.dim, found)

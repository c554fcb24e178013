"""`python -m benchmarks.search`: exact search in mapped files beside FAISS indexes, over made-up vectors.

Vectors lie around centres, as those of a model do, and queries beside stored vectors. They lie in one file of
fp16, as an encoded folder has them. Recall is the share of the 10 nearest that a way finds, by products with
all of them that numpy makes. Each way has a process of its own. Memory is what is resident after searching;
that of mapped files can be taken away from a process at any time, and is counted apart.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe, usable_cores
from benchmarks.measure import Contestant, Values, measure, run_contestant, spread
from benchmarks.noise import Watch, noise
from benchmarks.probe import Probe
from benchmarks.report import Table, machine, markdown_table, short, with_spread

EXACT = "clipgraft without an index, mapped fp16"
_FACTORIES = ("Flat", "SQfp16", "IVF{cells},SQ8", "IVF{cells},PQ64x4fs", "HNSW32,SQ8")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the page, and write it to `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=200_000, help="vectors; 10,000,000 take 10 GB of disk")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--factories", nargs="+", default=list(_FACTORIES), help="of FAISS")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--retries", type=int, default=1, help="of a measurement that the machine disturbed")
    parser.add_argument("--folder", type=Path, help="where the vectors are written and removed again")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, Probe(args.threads) as probe:
        watch = Watch(probe, args.retries, _tell)
        run = functools.partial(run_contestant, threads=args.threads)
        given: Values = {"folder": folder, "rows": args.rows, "dim": args.dim, "queries": args.queries}
        run(Contestant("vectors", "contestants.search:prepare", given))
        contestants = [Contestant(EXACT, "contestants.search:exact", given)]
        for factory in args.factories:
            name = factory.format(cells=cells_of(args.rows))
            contestants.append(Contestant(name, "contestants.search:by_faiss", {**given, "factory": name}))
        found, failures = measure(contestants, args.rounds, run, watch, _tell)
    parts = [
        "# Search at scale",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        f"{args.rows:,} vectors of {args.dim}, {args.queries} queries, 10 results each; one query at a time, "
        "and all at once.",
        machine({**describe(), "threads": args.threads}),
        noise(watch.seen),
        markdown_table(table(found)),
        *(f"Did not run: {line}" for line in failures),
    ]
    page = "\n\n".join(parts) + "\n"
    print(page)
    if args.out is not None:
        args.out.write_text(page, encoding="utf-8")


def cells_of(rows: int) -> int:
    """The cells of an inverted file: about four times the root of its vectors, a power of two."""
    power = math.isqrt(16 * rows).bit_length() - 1
    return 1 << max(4, power)


def table(found: dict[str, list[Values]]) -> Table:
    """Tabulate recall, times and memory of every way."""
    rows = []
    for name, runs in found.items():
        one, all_ = (
            with_spread(spread([run[key] for run in runs])) for key in ("one_per_second", "all_per_second")
        )
        build = "" if runs[0]["build_seconds"] is None else _column(runs, "build_seconds")
        rows.append(
            (
                name,
                f"{100 * runs[0]['recall']:.1f}",
                build,
                f"{runs[0]['file_bytes'] / 1e6:,.0f}",
                f"{max(run['anonymous_bytes'] for run in runs) / 1e6:,.0f}",
                f"{max(run['mapped_bytes'] for run in runs) / 1e6:,.0f}",
                one,
                all_,
            )
        )
    header = (
        "",
        "recall@10, %",
        "build, s",
        "file MB",
        "MB while searching",
        "of mapped files, MB",
        "queries/s, one by one",
        "together",
    )
    return Table(header, tuple(rows))


def _column(runs: Sequence[dict[str, Any]], key: str) -> str:
    return with_spread(spread([run[key] for run in runs]), short)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

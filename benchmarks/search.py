"""`python -m benchmarks.search`: exact search in mapped files beside FAISS and USearch, over made-up vectors.

Vectors lie around 4,096 centres, as those of a model do, and queries beside stored vectors. They lie in one
file of fp16, as an encoded folder has them. Recall is the share of the 10 nearest that a way finds, known by
products with all of them. An approximate index searches with the least effort, doubled from step to step,
that finds 95 %, or after which twice the effort finds less than half a percent more. Each way has a process
of its own. Memory is resident, while an index is built (its most) and while it is searched; that of mapped
files can be taken away from a process at any time, and is counted apart.
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
_FACTORIES = ("Flat", "SQfp16", "IVF{cells}_HNSW32,SQ8", "IVF{cells}_HNSW32,PQ64x4fs", "HNSW32,SQ8")
_USEARCH = ("f16", "i8")
_GRAPH_ROWS, _WIDE_ROWS = 2_000_000, 6_000_000
_HOURS = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the page, and write it to `--out` after each number of rows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1_000_000],
        help="vectors, one table for each number; 10000000 take 10 GB of disk, twice that for an index",
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--factories", nargs="*", help="of FAISS, in place of those that fit the rows")
    parser.add_argument("--usearch", nargs="*", choices=["f16", "i8", "f32"], help="types, likewise")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--retries", type=int, default=1, help="of a measurement that the machine disturbed")
    parser.add_argument("--folder", type=Path, help="where the vectors are written and removed again")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    parts = [
        "# Search at scale",
        (__doc__ or "").split("\n\n", 1)[1].strip().replace("\n", " "),
        f"{args.queries} queries, 10 results each; one at a time, and 64 at once.",
        machine({**describe(), "threads": args.threads}),
    ]
    for rows in args.rows:
        parts += _section(args, rows)
        page = "\n\n".join(parts) + "\n"
        if args.out is not None:
            args.out.write_text(page, encoding="utf-8")
    print(page)


def _section(args: argparse.Namespace, rows: int) -> list[str]:
    """Measure all ways of one number of rows."""
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, Probe(args.threads) as probe:
        watch = Watch(probe, args.retries, _tell)
        run = functools.partial(run_contestant, threads=args.threads, timeout=_HOURS * 3600)
        given: Values = {"folder": folder, "rows": rows, "dim": args.dim, "queries": args.queries}
        run(Contestant("vectors", "contestants.search:prepare", given))
        contestants = [Contestant(EXACT, "contestants.search:exact", given)]
        for factory in default_factories(rows) if args.factories is None else args.factories:
            name = factory.format(cells=cells_of(rows))
            options = {**given, "factory": name}
            contestants.append(Contestant(f"FAISS {name}", "contestants.search:by_faiss", options))
        for kind in (_USEARCH if rows <= _GRAPH_ROWS else ()) if args.usearch is None else args.usearch:
            options = {**given, "dtype": kind}
            contestants.append(Contestant(f"USearch {kind}", "contestants.search:by_usearch", options))
        found, failures = measure(contestants, args.rounds, run, watch, _tell)
    left_out = "" if rows <= _GRAPH_ROWS else "Not built: graphs of neighbours (HNSW, USearch), for hours."
    if rows > _WIDE_ROWS:
        left_out += f" FAISS Flat would hold {4 * args.dim * rows / 1e9:.0f} GB."
    return [
        f"## {rows:,} vectors of {args.dim}",
        noise(watch.seen),
        markdown_table(table(found)),
        *([left_out] if left_out else []),
        *(f"Did not run: {line}" for line in failures),
    ]


def default_factories(rows: int) -> list[str]:
    """The kinds of FAISS index that so many vectors can be built into in an hour, and in a few GB."""
    found = [name for name in _FACTORIES if rows <= _GRAPH_ROWS or not name.startswith("HNSW")]
    return [name for name in found if rows <= _WIDE_ROWS or name != "Flat"]


def cells_of(rows: int) -> int:
    """The cells of an inverted file: about four times the root of its vectors, a power of two."""
    power = math.isqrt(16 * rows).bit_length() - 1
    return 1 << max(4, power)


def table(found: dict[str, list[Values]]) -> Table:
    """Tabulate recall, times and memory of every way."""
    rows = []
    for name, runs in found.items():
        one, all_ = (
            with_spread(spread([run[key] for run in runs])) for key in ("one_per_second", "batch_per_second")
        )
        built = runs[0]["build_seconds"] is not None
        rows.append(
            (
                name,
                f"{100 * runs[0]['recall']:.1f}",
                runs[0]["effort"],
                _column(runs, "build_seconds") if built else "",
                f"{max(run['build_bytes'] for run in runs) / 1e6:,.0f}" if built else "",
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
        "effort",
        "build, s",
        "MB while building",
        "file MB",
        "MB while searching",
        "of mapped files, MB",
        "queries/s, one by one",
        "64 at once",
    )
    return Table(header, tuple(rows))


def _column(runs: Sequence[dict[str, Any]], key: str) -> str:
    return with_spread(spread([run[key] for run in runs]), short)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

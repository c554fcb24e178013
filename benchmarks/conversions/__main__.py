"""`python -m benchmarks.conversions`: print the tables, and write them to `--out`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.conversions import file_rows, model_rows, peft_rows
from benchmarks.conversions.refused import attempts
from benchmarks.conversions.sizes import sizes
from benchmarks.conversions.world import Outcome, Row, World, make_world
from benchmarks.environment import describe
from benchmarks.report import Table, machine, markdown_table

LARGE = 1e-5
# PEFT reads an attribute that transformers renames, takes the bias of B for a weight of a wrong shape, and
# says itself that disabling leaves biases.
_KNOWN_WARNINGS = (".is_gradient_checkpointing.", "Adapter 'default'", "Careful, disabling")
_ABOUT = (
    "One base in both families: random weights from a seed, biases and norms moved off their defaults, "
    "random adapters. Each row compares image and text features of four random inputs at the two ends of one "
    "direction of a conversion; where another library stands at one end, it runs that end itself. "
    "`difference` is the largest absolute one; `share` is the largest over the largest feature of its tower, "
    "the worse of both, bold above 1e-5; `moved` is how far the adapter moves the base's features, in the "
    "same unit."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page; returns 0. A row that fails ends the run with its traceback."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversions", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of ViT-B-32")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose group or name holds this text")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the page there too")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    text = measure(arguments.tiny, arguments.only)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)
    _tell(f"{time.perf_counter() - started:.0f} s")
    return 0


def measure(tiny: bool = False, only: str = "") -> str:
    """Return the page; with `only`, the matching rows alone."""
    environment = {**describe(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        world = make_world(Path(folder), tiny)
        outcomes = {row: run(row, world) for row in all_rows() if only in f"{row.group} {row.name}"}
        parts = [markdown_table(differences_table(outcomes))]
        if not only:
            _tell("what PEFT cannot hold")
            refused = tuple((what, attempt(world)) for what, attempt in attempts().items())
            _tell("sizes")
            parts += [
                "## What stock PEFT does not take over",
                markdown_table(Table(("what", "what happens"), refused)),
                "## Size of each artefact",
                markdown_table(sizes_table(sizes(world))),
            ]
        intro = ["# Conversions", f"{world.arch}. {_ABOUT}", machine(environment)]
    return "\n\n".join([*intro, *parts]) + "\n"


def all_rows() -> list[Row]:
    return [*peft_rows.rows(), *file_rows.rows(), *model_rows.rows()]


def run(row: Row, world: World) -> Outcome:
    _tell(f"{row.group}: {row.name}")
    return row.run(world)


def differences_table(outcomes: Mapping[Row, Outcome]) -> Table:
    """Format one line a row, with the group before its first."""
    lines, group = [], ""
    for row, found in outcomes.items():
        share = f"{found.share:.1e}" if found.share else "0"
        lines.append(
            (
                f"{'**' + row.group + '** ' if row.group != group else ''}{row.name}",
                f"{found.absolute:.1e}" if found.absolute else "0",
                f"**{share}**" if found.share > LARGE else share,
                "" if found.moved is None else f"{found.moved:.2f}",
                found.note,
            )
        )
        group = row.group
    return Table(("conversion", "difference", "share", "moved", ""), tuple(lines))


def sizes_table(found: Mapping[str, int]) -> Table:
    """Format bytes, and how often each fits into the largest file of weights."""
    whole = found["whole model, open_clip checkpoint, .pt"]
    rows = (
        (name, f"{size:,}", f"{size / 1e6:.1f}", f"{100 * size / whole:.2f} %")
        for name, size in found.items()
    )
    return Table(("artefact", "bytes", "MB", "of the checkpoint"), tuple(rows))


def _tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

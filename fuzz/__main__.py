"""`python -m fuzz [READER …] [--inputs N] [--seed S]`: print how readers took damaged files; 1 for faults."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fuzz.run import Count, child, fuzz_apart

HEAD = (
    *("reader", "inputs", "refused in one line", "accepted", "tracebacks", "name no file", "several lines"),
    *("hangs", "crashes", "touched outside", "seconds"),
)


def main() -> int:
    """Fuzz the named readers, by default all."""
    if sys.argv[1:2] == ["--child"]:
        name, inputs, seed, first, place = sys.argv[2:]
        child(name, int(inputs), int(seed), int(first), Path(place))
        return 0
    from fuzz.readers import READERS

    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--inputs", type=int, default=20_000, help="broken files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = [name for name in options.readers if name not in READERS]
    if unknown:
        parser.error(f"no reader {unknown[0]!r}; there are {', '.join(READERS)}")
    counts = []
    print(" | ".join(HEAD), flush=True)
    for name in options.readers or READERS:
        counts.append(fuzz_apart(name, options.inputs, options.seed))
        print(_line(counts[-1]), flush=True)
        for example in counts[-1].examples:
            print(f"    {example!a}", flush=True)
    faults = sum(count.faults for count in counts)
    print(f"{sum(count.inputs for count in counts):,} inputs, {faults} faults")
    return 1 if faults else 0


def _line(c: Count) -> str:
    cells = (c.inputs, c.refused, c.accepted, c.tracebacks, c.nameless, c.not_one_line, c.hangs, c.crashes)
    return " | ".join([f"{c.reader:24}", *(f"{n:6}" for n in (*cells, c.touched)), f"{c.seconds:7.1f}"])


sys.exit(main())

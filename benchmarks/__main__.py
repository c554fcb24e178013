"""`python -m benchmarks`: measure, and write the page, the numbers and the plots."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.cases import CASES
from benchmarks.data import about_data
from benchmarks.environment import describe, usable_cores
from benchmarks.measure import Contestant, measure, run_contestant
from benchmarks.noise import Watch
from benchmarks.probe import Probe
from benchmarks.report import page
from benchmarks.settings import FULL, QUICK, RESULTS, WORK, Settings

_NUMBERS, _PAGE, _LENGTHS = "results.json", "README.md", "captions.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 1 if a contestant failed, else 0."""
    arguments = _parse(argv)
    if arguments.render is not None:
        found = json.loads((arguments.render / _NUMBERS).read_text(encoding="utf-8"))
        write(arguments.render, found)
        return 0
    settings = _settings(arguments)
    out = arguments.out or (WORK / "quick" if arguments.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found = run(settings, arguments.only, arguments.threads, out)
    print((out / _PAGE).read_text(encoding="utf-8"))
    print(f"{time.perf_counter() - started:.0f} s; page, numbers and pictures are in {out}")
    return 1 if found["failures"] else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="clipgraft beside its peers.")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, under five minutes")
    parser.add_argument(
        "--only", nargs="+", choices=[case.name for case in CASES], metavar="CASE", help="of %(choices)s"
    )
    parser.add_argument("--rounds", type=int, help="in each of which every contestant runs once")
    parser.add_argument(
        "--retries", type=int, help="of a measurement during which the machine's speed moved by over a tenth"
    )
    parser.add_argument("--threads", type=int, default=usable_cores(), help="for every contestant")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--render", type=Path, metavar="FOLDER", help="make the page of earlier numbers again"
    )
    return parser.parse_args(argv)


def _settings(arguments: argparse.Namespace) -> Settings:
    given = {"repeats": arguments.rounds, "retries": arguments.retries}
    chosen = {name: number for name, number in given.items() if number is not None}
    return dataclasses.replace(QUICK if arguments.quick else FULL, **chosen)


def run(settings: Settings, only: Sequence[str] | None, threads: int, out: Path) -> dict[str, Any]:
    """Measure the cases, and write the results so far after each."""
    environment = {**describe(), "threads": threads}
    _tell("preparing data and base")
    options = {"photos": str(settings.data), "images": settings.images, "seed": settings.seed}
    run_contestant(Contestant("preparation", "prepare:prepare", options), threads)
    found: dict[str, Any] = {
        "environment": environment,
        "settings": settings.as_dict(),
        "data": about_data(settings.data),
        "failures": [],
        "cases": {},
        "seen": [],
    }
    with Probe(threads) as probe:
        watch = Watch(probe, settings.retries, _tell)
        for case in CASES:
            contestants = case.contestants(settings)
            if not contestants or (only and case.name not in only):
                continue
            _tell(case.name)
            one = functools.partial(run_contestant, threads=threads)
            runs, failures = measure(contestants, settings.repeats, one, watch, _tell)
            found["cases"][case.name] = runs
            found["failures"] += failures
            found["seen"] = watch.seen
            (out / _NUMBERS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write(out, found)
    return found


def write(out: Path, found: dict[str, Any]) -> None:
    """Write the page and the plots from the numbers in `found`."""
    settings = Settings(**found["settings"])
    chapters = [
        case.report(settings, found["cases"][case.name]) for case in CASES if case.name in found["cases"]
    ]
    for chapter in chapters:
        for bars in chapter.plots:
            plots.draw(out, bars)
    plots.draw_lengths(out / _LENGTHS, found["data"]["captions"])
    text = page(chapters, found["environment"], found["settings"], found["failures"], found.get("seen", ()))
    (out / _PAGE).write_text(text, encoding="utf-8")


def _tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

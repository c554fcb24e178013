"""`python -m benchmarks.engines`: image towers in torch, ONNX Runtime, OpenVINO and clipgraft's own engine.

Towers of ViT-B-32 and ViT-L-14 have their true size and random weights, and normalised noise as input: their
speed and cosines are what is measured. Recall is measured on the embedded base, which is trained, over unseen
scenes with a caption each; what an engine loses is the worst of recall@1, @5 and @10 in both directions,
against fp32 in torch. Rounds are interleaved: each engine has a turn in each. Static int8 has its scales from
the first batches; clipgraft's int8 and the dynamic one measure them as they go. All engines have the same
threads, and none of them a thread that spins while another has its turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestants.engines import ENGINES, REFERENCE
from benchmarks.environment import describe, usable_cores
from benchmarks.measure import Contestant, ContestantError, Values, run_contestant, spread
from benchmarks.noise import noise
from benchmarks.report import Table, machine, markdown_table, short, with_spread
from benchmarks.settings import RESULTS

_BATCHES = {"ViT-B-32": 32, "ViT-L-14": 2, "emoji": 50}
_BATCHES_COMPARED = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the page, and write it to `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", nargs="+", default=list(_BATCHES), choices=list(_BATCHES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn of an engine lasts at least")
    parser.add_argument("--scenes", type=int, default=1000, help="of the embedded base")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile: it takes minutes")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else was running")
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.md", metavar="FILE.md")
    args = parser.parse_args(argv)
    found: dict[str, Values] = {}
    failures = []
    for model in args.models:
        options = {
            "model": model,
            "batch": _BATCHES[model],
            "images": args.scenes if model == "emoji" else _BATCHES_COMPARED * _BATCHES[model],
            "rounds": 1 if model == "emoji" else args.rounds,
            "threads": args.threads,
            "seconds": 0.3 if model == "emoji" else args.seconds,
            "compiled": model != "emoji" and not args.no_compile,
        }
        try:
            found[model] = run_contestant(
                Contestant(model, "contestants.engines:compare", options), args.threads
            )
            _tell(f"{model}: {found[model]['process_seconds']:.0f} s")
        except ContestantError as error:
            failures.append(str(error))
            _tell(f"FAILED {error}")
    page = _page(found, failures, {**describe(), "threads": args.threads}, args.note)
    print(page)
    args.out.write_text(page, encoding="utf-8")


def _page(found: dict[str, Values], failures: Sequence[str], about: Values, note: str) -> str:
    parts = ["# Engines for image towers", (__doc__ or "").split("\n\n", 1)[1].strip(), machine(about), note]
    parts.append(noise([one for values in found.values() for one in values["seen"]]))
    for model, values in found.items():
        parts.append(f"## {model}")
        parts.append(markdown_table(recall_table(values) if model == "emoji" else speed_table(values)))
        parts += [f"{name} did not run: {reason}." for name, reason in values["absent"].items()]
    parts += [f"Did not run: {line}." for line in failures]
    return "\n\n".join(part for part in parts if part) + "\n"


def speed_table(values: Values) -> Table:
    """Tabulate images a second, of fp32 in torch, and cosines with its features."""
    spreads = {name: spread(one["rates"]) for name, one in values["engines"].items()}
    base = spreads[REFERENCE]
    rows = []
    for name in _listed(values):
        one, own = values["engines"][name], spreads[name]
        cosines = (f"{one['least']:.5f}", f"{one['mean']:.5f}")
        rows.append(
            (
                name,
                with_spread(own),
                f"{own.high:.3g}",
                f"{short(own.median / base.median)}x",
                f"{max(one['cpu_rates']):.3g}",
                *cosines,
            )
        )
    header = (
        "engine",
        "images/s",
        "best",
        "of torch fp32",
        "best a core-second",
        "least cosine",
        "mean cosine",
    )
    return Table(header, tuple(rows))


def recall_table(values: Values) -> Table:
    """Tabulate recall of the embedded base and what each engine loses of it."""
    rows = []
    for name in _listed(values):
        one = values["engines"][name]
        rows.append(
            (
                name,
                f"{one['least']:.5f}",
                f"{one['mean']:.5f}",
                f"{100 * one['recall']:.1f}",
                f"{one['points']:.2f}",
            )
        )
    header = ("engine", "least cosine", "mean cosine", "text to image R@1, %", "points lost at most")
    return Table(header, tuple(rows))


def _listed(values: Values) -> list[str]:
    return [name for name in ENGINES if name in values["engines"]]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

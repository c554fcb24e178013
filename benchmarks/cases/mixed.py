"""Time and memory of several adapters in one batch, compared with the base alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from benchmarks.measure import Contestant, Runs, Spread, Values, peak, spread
from benchmarks.report import Chapter, Goal, Table, with_spread
from benchmarks.settings import Settings

TEXT, IMAGES, DORA = "text tower", "image tower", "text tower, DoRA"
OURS, PEFT = "clipgraft", "PEFT"
_ROWS, _IMAGES, _MOST = 64, 32, 32
Seconds: TypeAlias = Mapping[str, Sequence[float]]
_GOALS = {8: 0.9, 32: 0.85}


def contestants(settings: Settings) -> list[Contestant]:
    """List the contestants; each compares clipgraft and PEFT in turns, memory has one process for each."""
    text = {"tower": "text", "rows": _ROWS, "times": 10, "adapters": [1, 2, 8, _MOST]}
    images = {"tower": "vision", "rows": _IMAGES, "times": 5, "adapters": [8]}
    dora = {**text, "adapters": [8], "use_dora": True, "peer": False}
    if settings.quick:
        return [_contestant(TEXT, {**text, "adapters": [8], "times": 3})]
    timed = [_contestant(name, found) for name, found in ((TEXT, text), (IMAGES, images), (DORA, dora))]
    return [
        *timed,
        *(
            _contestant(_memory(library, n), {"library": library, "adapters": n, "rows": _ROWS}, "memory")
            for library in (OURS, PEFT)
            for n in (1, _MOST)
        ),
    ]


def _contestant(name: str, options: Values, function: str = "side_by_side") -> Contestant:
    return Contestant(name, f"contestants.mixed:{function}", options)


def _memory(library: str, adapters: int) -> str:
    return f"{library}, memory with {adapters}"


def report(settings: Settings, runs: Runs) -> Chapter:
    timed = {name: _seconds(runs[name]) for name in (TEXT, IMAGES, DORA) if name in runs}
    rows = [row for name, seconds in timed.items() for row in _rows(name, seconds)]
    columns = (
        "batch",
        "adapters",
        "ms",
        "of its own base's speed",
        "of the stock tower's",
        "of clipgraft's base's",
    )
    tables = [Table(columns, tuple(rows))] if rows else []
    if all(_memory(library, n) in runs for library in (OURS, PEFT) for n in (1, _MOST)):
        tables.append(_memory_table(runs))
    return Chapter(
        "Rows of several adapters in one batch",
        f"fp32, r=16 on the attention of one tower: {_ROWS} captions of 16 tokens that share only their "
        f"first, or {_IMAGES} images of 224x224, dealt to the adapters row by row. The base alone is "
        "`encode_text(ids, adapters=[None, …])` for clipgraft and the stock tower of transformers, without "
        f"PEFT, for PEFT's `adapter_names`. All take turns in one process; a speed is of both in the same "
        f"turn. {_checks(runs)}",
        tuple(tables),
        tuple(_goal(timed[TEXT], n, wanted) for n, wanted in _GOALS.items() if f"{OURS} {n}" in timed[TEXT])
        if TEXT in timed
        else (),
    )


def _seconds(values: Sequence[Values]) -> Seconds:
    """Return the seconds of every round, by `library adapters`."""
    names = values[0]["seconds"]
    return {name: [second for v in values for second in v["seconds"][name]] for name in names}


def _rows(batch: str, seconds: Seconds) -> list[tuple[str, ...]]:
    rows = []
    for name, own in seconds.items():
        library, number = name.split()
        bases = (seconds[f"{library} 0"], seconds.get(f"{PEFT} 0"), seconds[f"{OURS} 0"])
        shares = ("" if base is None else _share(base, own) for base in bases)
        time = with_spread(spread([1e3 * second for second in own]), lambda number: f"{number:.0f}")
        rows.append((f"{batch}, {library}", "none" if number == "0" else number, time, *shares))
    return rows


def _share(base: Sequence[float], own: Sequence[float]) -> str:
    return with_spread(_ratios(base, own), lambda number: f"{number:.2f}x")


def _ratios(base: Sequence[float], own: Sequence[float]) -> Spread:
    """Summarise the ratio of each turn."""
    return spread([one / other for one, other in zip(base, own, strict=True)])


def _memory_table(runs: Runs) -> Table:
    rows = []
    for library in (OURS, PEFT):
        one, most = runs[_memory(library, 1)], runs[_memory(library, _MOST)]
        grown = (peak(most) - peak(one)) / (_MOST - 1)
        rows.append((library, f"{most[0]['weights_an_adapter'] / 1e6:.2f}", f"{grown / 1e6:.2f}"))
    return Table(("memory", "weights of an adapter, MB", "what one more adds to the peak, MB"), tuple(rows))


def _checks(runs: Runs) -> str:
    """Describe how far the timed features differ."""
    found = [v for name in (TEXT, IMAGES, DORA) if name in runs for v in runs[name]]
    if not found:
        return ""
    alone, base = max(v["from_one_by_one"] for v in found), min(v["from_base"] for v in found)
    peers = [v["from_peer"] for v in found if v["from_peer"] is not None]
    words = (
        f"Mixed rows differ from those of each adapter alone by at most {alone:.1e} of the largest feature"
    )
    if peers:
        words += f", from PEFT's by {max(peers):.1e}"
    return f"{words}, and from the base's by {base:.2f} or more."


def _goal(seconds: Seconds, adapters: int, wanted: float) -> Goal:
    ratio = _ratios(seconds[f"{OURS} 0"], seconds[f"{OURS} {adapters}"]).median
    what = f"{adapters} adapters in one batch, speed as a share of the base alone"
    return Goal(what, f">= {wanted:g}x", f"{ratio:.2f}x", ratio >= wanted)

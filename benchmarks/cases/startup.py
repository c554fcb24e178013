"""Time from the command to its first answer."""

from __future__ import annotations

from benchmarks.measure import Contestant, Runs, spread
from benchmarks.report import Chapter, Goal, Table, at_most, megabytes, with_spread
from benchmarks.settings import Settings

BARE = "python, nothing imported"
COMMANDS = {
    BARE: ["-c", "pass"],
    "import clipgraft": ["-c", "import clipgraft"],
    "clipgraft --help": ["-m", "clipgraft", "--help"],
    "import open_clip": ["-c", "import open_clip"],
    "import peft": ["-c", "import peft"],
    "import sentence_transformers": ["-c", "import sentence_transformers"],
}
_LIMITS = {"import clipgraft": 50.0, "clipgraft --help": 300.0}


def contestants(settings: Settings) -> list[Contestant]:
    return [
        Contestant(
            name,
            "contestants.startup:run",
            {"arguments": arguments, "times": 1 if settings.quick else 5},
            repeats=1,
        )
        for name, arguments in COMMANDS.items()
    ]


def report(settings: Settings, runs: Runs) -> Chapter:
    rows, found = [], {}
    for name, values in runs.items():
        taken = spread([1000 * second for v in values for second in v["seconds"]])
        found[name] = taken.median
        shown = with_spread(taken, lambda number: f"{number:.0f}")
        rows.append((name, shown, megabytes(values[0]["command_peak_bytes"])))
    return Chapter(
        "Start-up",
        "A fresh process to its end. What an import costs is what it takes beyond the bare interpreter.",
        (Table(("command", "ms", "peak MB"), tuple(rows)),),
        tuple(_goal(name, limit, found) for name, limit in _LIMITS.items()),
    )


def _goal(name: str, limit: float, found: dict[str, float]) -> Goal:
    taken = found[name] - found.get(BARE, 0.0) if name in found else None
    text = None if taken is None else f"{taken:.0f} ms"
    goal = at_most(f"start-up beyond the interpreter's: {name}", limit, taken, unit=" ms")
    return Goal(goal.what, f"< {limit:.0f} ms", text, goal.met)

"""`python -m benchmarks.serve --infinity PYTHON`: clipgraft's server beside infinity, and its adapters.

Both serve the same local folder, a random ViT-B-32 of true size, on the same cores, which the clients share.
They take turns by rounds, and answer one text or one image a request. Then clipgraft serves 1 to 1,024
adapters, asked for by Zipf's law, with room in memory for an eighth of them; infinity serves merged copies.

PYTHON is that of an environment of infinity's own, since it wants other versions than clipgraft:

    python -m venv ENV && ENV/bin/pip install 'infinity-emb[server,torch,vision]' aiohttp
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import describe, usable_cores
from benchmarks.measure import Contestant, run_contestant, spread
from benchmarks.noise import Watch, noise
from benchmarks.prepare import HF_BASE
from benchmarks.probe import Probe
from benchmarks.report import Table, machine, markdown_table, with_spread
from benchmarks.serve import servers
from benchmarks.serve.load import Measured, run_clients
from benchmarks.serve.servers import Server
from benchmarks.serve.workload import captions, image_requests, photographs, text_requests, zipf_names
from benchmarks.settings import WORK

_LOGS = WORK / "serve"
_OURS, _THEIRS = "clipgraft", "infinity"
_SENT = ("texts", "images", "both")
_INFINITY_FLAGS = {
    "fp32": ("--engine", "torch", "--dtype", "float32", "--no-bettertransformer"),
    "bf16": ("--engine", "torch", "--dtype", "bfloat16", "--no-bettertransformer"),
}
_COPIES = 4
_DIFFERENT = 512
_MEGABYTES = 3.2  # of one adapter


@dataclass(frozen=True)
class Plan:
    """How long and how often.

    Attributes:
        seconds: of one measurement.
        rounds: of all, in turns.
        clients: numbers of clients.
        adapters: numbers of adapters.
    """

    seconds: float
    rounds: int
    clients: tuple[int, ...]
    adapters: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the page, and write it to `--out`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--infinity", type=Path, metavar="PYTHON", help="of infinity's environment")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--retries", type=int, default=2, help="of a measurement that the machine disturbed")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    plan = Plan(args.seconds, args.rounds, tuple(args.clients), tuple(args.adapters))
    _LOGS.mkdir(parents=True, exist_ok=True)
    run_contestant(Contestant("base", "serve.prepare:prepare", {"adapters": max(plan.adapters)}), 2)
    parts = [
        "# Serving",
        (__doc__ or "").split("\n\n")[1].strip(),
        machine({**describe(), "threads": usable_cores()}),
    ]
    with Probe(usable_cores()) as probe:
        watch = Watch(probe, args.retries, lambda line: print(line, file=sys.stderr, flush=True))
        parts += _beside_infinity(plan, args.infinity, watch)
        parts += _adapters(plan, args.infinity, watch)
    parts.insert(3, noise(watch.seen))
    page = "\n\n".join(parts) + "\n"
    print(page)
    if args.out is not None:
        args.out.write_text(page, encoding="utf-8")


def _beside_infinity(plan: Plan, python: Path | None, watch: Watch) -> list[str]:
    texts, files = captions(_DIFFERENT), photographs(64)
    found: dict[tuple[str, str, int], list[Measured]] = {}
    starts, memory = {}, {}
    with contextlib.ExitStack() as stack:
        running: dict[str, Server] = {}
        for precision in ("fp32", "bf16"):
            log = _LOGS / f"clipgraft-{precision}.log"
            flags = ("--precision", precision)
            running[f"{_OURS} {precision}"] = stack.enter_context(
                servers.clipgraft(HF_BASE, flags, HF_BASE.name, log)
            )
            if python is not None:
                log = _LOGS / f"infinity-{precision}.log"
                running[f"{_THEIRS} {precision}"] = stack.enter_context(
                    servers.infinity(python, [HF_BASE], _INFINITY_FLAGS[precision], log)
                )
        idle = {name: server.memory for name, server in running.items()}
        requests = {}
        for name, server in running.items():
            starts[name] = server.start_seconds
            written = text_requests(server.path, [HF_BASE.name] * len(texts), texts)
            shown = image_requests(server.path, [HF_BASE.name] * len(files), files)
            both = [each for pair in zip(written, shown * 8, strict=True) for each in pair]
            requests[name] = {"texts": written, "images": shown, "both": both}
            for sent in requests[name].values():
                run_clients(server.port, sent, 16, 2.0)
        for number in range(plan.rounds):
            for kind in _SENT:
                for clients in plan.clients:
                    for name, server in running.items():
                        what = f"{name}, {kind}, {clients} clients"
                        asked = requests[name][kind]
                        run = functools.partial(run_clients, server.port, asked, clients, plan.seconds)
                        measured = watch.run(what, run)
                        found.setdefault((kind, name, clients), []).append(measured)
                        _tell(f"round {number + 1}: {what}", measured)
        memory = {name: server.memory for name, server in running.items()}
    rows = [
        (name, f"{starts[name]:.1f}", f"{idle[name] / 1e6:.0f}", f"{memory[name] / 1e6:.0f}")
        for name in starts
    ]
    header = ("", "start to first answer, s", "idle MB", "MB at the end")
    parts = ["## Beside infinity", markdown_table(Table(header, tuple(rows)))]
    for kind in _SENT:
        parts += [f"**{kind.capitalize()}**", markdown_table(_peers(found, kind, plan, list(starts)))]
    return parts


def _peers(
    found: dict[tuple[str, str, int], list[Measured]], kind: str, plan: Plan, names: Sequence[str]
) -> Table:
    rows = []
    for clients in plan.clients:
        theirs = [_rate(found[kind, name, clients]) for name in names if name.startswith(_THEIRS)]
        for name in names:
            runs = found[kind, name, clients]
            ratio = f"{_rate(runs) / max(theirs):.2f}" if any(theirs) else ""
            rows.append((str(clients), name, *_numbers(runs), ratio))
    header = ("clients", "", "requests/s", "p50 ms", "p95 ms", "p99 ms", "failed", "of infinity's best")
    return Table(header, tuple(rows))


def _numbers(runs: Sequence[Measured]) -> tuple[str, ...]:
    """Medians over the rounds; of the rate also the lowest and the highest."""
    latencies = [f"{statistics.median(r.percentile(share) for r in runs):.0f}" for share in (0.5, 0.95, 0.99)]
    failed = sum(sum(run.failures.values()) for run in runs)
    rate = with_spread(spread([run.rate for run in runs]), lambda number: f"{number:.1f}")
    return (rate, *latencies, str(failed))


def _rate(runs: Sequence[Measured]) -> float:
    return statistics.median(run.rate for run in runs)


def _adapters(plan: Plan, python: Path | None, watch: Watch) -> list[str]:
    folder = WORK / "serve" / "adapters"
    names = sorted(place.name for place in folder.iterdir())[: max(plan.adapters)]
    texts = captions(_DIFFERENT * 4)
    room = max(plan.adapters) * _MEGABYTES / 8
    flags = ("--adapters", str(folder), "--adapter-memory-mb", f"{room:.0f}")
    found: dict[str, list[Measured]] = {}
    with servers.clipgraft(HF_BASE, flags, HF_BASE.name, _LOGS / "clipgraft-adapters.log") as server:
        kinds = {"the base alone": [HF_BASE.name] * len(texts)}
        kinds |= {f"{count:,} adapters": zipf_names(names[:count], len(texts)) for count in plan.adapters}
        requests = {kind: text_requests(server.path, models, texts) for kind, models in kinds.items()}
        for each in requests.values():
            run_clients(server.port, each, 16, 3.0)
        for number in range(plan.rounds):
            for kind, each in requests.items():
                run = functools.partial(run_clients, server.port, each, 16, plan.seconds)
                measured = watch.run(kind, run)
                found.setdefault(kind, []).append(measured)
                _tell(f"round {number + 1}: {kind}", measured)
        memory, started = server.memory, server.start_seconds
    alone = _rate(found["the base alone"])
    rows = [(kind, *_numbers(runs), f"{_rate(runs) / alone:.2f}") for kind, runs in found.items()]
    header = ("", "requests/s", "p50 ms", "p95 ms", "p99 ms", "failed", "of the base alone")
    parts = [
        "## Many adapters over one base",
        f"Texts, 16 clients, fp32, r=16 on the text tower's attention. clipgraft holds {room:.0f} MB of "
        f"adapters at most; at the end it takes {memory / 1e6:.0f} MB, and it started in {started:.1f} s "
        "with all registered.",
        markdown_table(Table(header, tuple(rows))),
    ]
    if python is not None:
        parts.append(_copies(plan, python, texts))
    return parts


def _copies(plan: Plan, python: Path, texts: Sequence[str]) -> str:
    """Infinity with merged copies beside each other, and started again for each adapter."""
    copies = sorted((WORK / "serve" / "merged").iterdir())[:_COPIES]
    flags = _INFINITY_FLAGS["fp32"]
    with servers.infinity(python, copies[:1], flags, _LOGS / "infinity-one.log") as server:
        alone, restart = server.memory, server.start_seconds
    with servers.infinity(python, copies, flags, _LOGS / "infinity-copies.log") as server:
        requests = text_requests(server.path, zipf_names([c.name for c in copies], len(texts)), texts)
        run_clients(server.port, requests, 16, 3.0)
        runs = [run_clients(server.port, requests, 16, plan.seconds) for _ in range(plan.rounds)]
        together = server.memory
    rate = f"{_rate(runs):.1f}"
    return (
        f"Infinity with {_COPIES} merged copies answers {rate} requests/s and takes {together / 1e6:.0f} MB, "
        f"{(together - alone) / 1e6 / (_COPIES - 1):.0f} MB for each copy beside the first; started again "
        f"for another adapter it is away for {restart:.1f} s."
    )


def _tell(what: str, measured: Measured) -> None:
    line = (
        f"{what}: {measured.rate:.1f}/s, p95 {measured.percentile(0.95):.0f} ms, failed {measured.failures}"
    )
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

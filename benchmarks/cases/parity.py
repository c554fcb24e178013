"""Check that all contestants train the same thing: losses of every step, without dropout, in fp32."""

from __future__ import annotations

from benchmarks.measure import Contestant, Runs
from benchmarks.report import Chapter, Goal, Table, at_most
from benchmarks.settings import Settings

OURS, PEFT, GUIDE = "clipgraft", "PEFT", "guide"

_LIKE_PEERS = {"negatives": "batch", "exact_preprocess": True}


def contestants(settings: Settings) -> list[Contestant]:
    """Use as many pairs as a batch holds, so that each epoch is one step on the same batch in any order.

    Left out of the quick run: it says nothing about speed.
    """
    if settings.quick:
        return []
    size, steps = settings.parity_batch, settings.parity_steps
    common = {
        "table": str(settings.data / "natural.csv"),
        "batch_size": size,
        "rows": size,
        "dropout": 0.0,
    }
    peer = {**common, "warmup": 0, "steps": steps}
    listed = [
        (OURS, "ours:train", {**common, "epochs": steps, "targets": "text-attention", "fit": _LIKE_PEERS}),
        (PEFT, "hf_peft:train", {**peer, "targets": "text-attention"}),
        (GUIDE, "guide:train_text", peer),
    ]
    return [
        Contestant(name, f"contestants.{function}", options, repeats=1) for name, function, options in listed
    ]


def report(settings: Settings, runs: Runs) -> Chapter:
    losses = {name: values[0]["losses"] for name, values in runs.items()}
    rows = tuple((name, *(f"{loss:.6f}" for loss in found)) for name, found in losses.items())
    columns = ("contestant", *(f"step {step + 1}" for step in range(settings.parity_steps)))
    return Chapter(
        "The same training",
        "Loss at every step, fp32, no dropout, the same adapter to start from and the same "
        f"{settings.parity_batch} pairs in every step. PEFT's images come from the processor of "
        "transformers, whose resizing rounds a little differently.",
        (Table(columns, rows),),
        tuple(_goal(losses, peer) for peer in (PEFT, GUIDE)),
    )


def _goal(losses: dict[str, list[float]], peer: str) -> Goal:
    difference = None
    if OURS in losses and peer in losses:
        difference = max(abs(a - b) for a, b in zip(losses[OURS], losses[peer], strict=True))
    return at_most(f"loss after the same steps differs from: {peer}", 1e-4, difference, unit="")

"""The page of a run on a GPU, in Markdown."""

from __future__ import annotations

import statistics

from benchmarks.gpu.bench import Bench, Values

_HEADS = {
    "epochs": ["first epoch, s", "a later epoch, s"],
    "images_per_second": ["images/s", "least cosine to fp32"],
    "step_seconds": ["ms a step"],
}


def page(bench: Bench, found: dict[str, dict[str, Values]], about: Values) -> str:
    """Format the tables of all chapters."""
    lines = [
        "# On a GPU",
        "",
        f"`python -m benchmarks.gpu` on {about['date']}: {about['gpu']}, {about['cores']} cores, torch "
        f"{about['versions']['torch']}, transformers {about['versions']['transformers']}, PEFT "
        f"{about['versions']['peft']}, open_clip {about['versions']['open_clip_torch']}. ViT-B-32, r=16 on "
        f"q, k, v and out, dropout 0.1; from files in batches of {bench.batch}, {bench.images:,} JPEGs of "
        "500x375, captions of a median 16 tokens, padded by PEFT to the longest of the batch, by "
        "open_clip to 77. One run, a process for each chapter. open_clip has no LoRA: it trains all weights "
        "of the same towers.",
    ]
    for chapter, runs in found.items():
        lines += ["", f"## {chapter[0].upper()}{chapter[1:]}", "", *_table(bench, runs)]
    return "\n".join(lines) + "\n"


def _table(bench: Bench, runs: dict[str, Values]) -> list[str]:
    mixed = next((values for values in runs.values() if "seconds" in values), None)
    if mixed is not None:
        return _mixed_table(bench, mixed)
    measured = [values for values in runs.values() if "error" not in values]
    if not measured:
        return [f"- {name}: {values['error']}" for name, values in runs.items()]
    ours = next((v for name, v in runs.items() if name == "clipgraft, bf16" and "error" not in v), None)
    head = next(names for key, names in _HEADS.items() if key in measured[0])
    columns = ["", *head, "ours is", "peak GPU MB"]
    rows = []
    for name, values in runs.items():
        if "error" in values:
            rows.append(f"| {name} | {values['error']} |{' |' * (len(columns) - 2)}")
            continue
        share = f"{_speed(ours) / _speed(values):.2f}x" if ours is not None else "–"
        cells = [name, *_cells(values), share, f"{values['peak_bytes'] / 1e6:,.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}", *rows]


def _cells(values: Values) -> list[str]:
    if "epochs" in values:
        return [f"{values['epochs'][0]:.2f}", f"{statistics.median(values['epochs'][1:]):.2f}"]
    if "images_per_second" in values:
        return [f"{values['images_per_second']:,.0f}", f"{values['cosine']:.5f}"]
    return [f"{1e3 * statistics.median(values['step_seconds']):.1f}"]


def _speed(values: Values) -> float:
    """Return a number that is higher where more is done in a second."""
    if "epochs" in values:
        return 1 / float(statistics.median(values["epochs"][1:]))
    if "images_per_second" in values:
        return float(values["images_per_second"])
    return 1 / float(statistics.median(values["step_seconds"]))


def _mixed_table(bench: Bench, values: Values) -> list[str]:
    seconds = values["seconds"]
    rows = [
        "| adapters | clipgraft, ms | speed of its base | PEFT, ms | speed of its base |",
        "|---:|---:|---:|---:|---:|",
    ]
    for count in (0, *bench.adapters):
        cells = [str(count or "none")]
        for library in ("clipgraft", "PEFT"):
            own = seconds.get(f"{library} {count}")
            cells += (
                ["–", "–"] if own is None else [f"{1e3 * own:.2f}", f"{seconds[f'{library} 0'] / own:.2f}"]
            )
        rows.append(f"| {' | '.join(cells)} |")
    return [
        *rows,
        "",
        f"{bench.mixed_rows:,} captions of 16 tokens. Features differ from PEFT's by at most "
        f"{values['from_peft']:.1e} of the largest.",
    ]

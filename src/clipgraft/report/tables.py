"""Make the rows of the report's tables, and format the numbers, settings and names in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from clipgraft.evaluate.metrics import DECISIVE, HEADLINE, TaskName
from clipgraft.lora.variants import VARIANTS
from clipgraft.report.examples import Examples
from clipgraft.report.runs import Run, Sweep
from clipgraft.text_tables import NOTHING, signed
from clipgraft.train.sweep import Row
from clipgraft.train.validation import BASE
from clipgraft.train.verdict import Verdict


@dataclass(frozen=True)
class ResultRow:
    """One row: its name, its metrics as fractions, and its costs; None where a value is not known.

    Attributes:
        label: what is shown for its name.
        seeds: how many runs it is the mean of.
        best: names of metrics in which no other trained row of its group is better.
        note: what a reader must know to read it right.
        how: learning rate, alpha, epochs, data and machine, as text by name of a column; none for a base.
    """

    kind: Literal["base", "full", "lora"]
    label: str
    targets: str
    r: int | None
    seeds: int
    mean: Mapping[str, float]
    deviation: Mapping[str, float]
    trained: int | None
    bytes: float | None
    seconds: float | None
    peak_mb: float | None
    note: str = ""
    best: frozenset[str] = frozenset()
    how: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultGroup:
    """The rows of a sweep, or of runs that share base and validation data."""

    name: str
    task: TaskName
    lines: tuple[ResultRow, ...]
    is_sweep: bool


def make_groups(sources: Sequence[Run | Sweep], examples: Mapping[str, Examples]) -> list[ResultGroup]:
    """Make one group per sweep, and one for all single runs that share a base and validation data.

    `examples`, by the folder of a run as text, say what the base of plain runs reaches.
    """
    groups: list[ResultGroup] = []
    places: dict[Any, int] = {}
    for source in sources:
        if isinstance(source, Sweep):
            lines = [_sweep_line(row, source) for row in source.rows]
            groups.append(ResultGroup(source.name, source.task, _with_best(lines), True))
            continue
        key = _comparable(source)
        if key not in places:
            places[key] = len(groups)
            groups.append(ResultGroup(source.name, source.task, (), False))
        group = groups[places[key]]
        own = [*group.lines, _run_line(source)]
        known = examples.get(str(source.path))
        base = known.base if known is not None else _measured_base(source)
        if base and not any(line.kind == "base" for line in own):
            own.insert(0, _base_line(base))
        name = group.name if len(group.lines) == 0 else f"{group.name}, {source.name}"
        groups[places[key]] = ResultGroup(name, group.task, _with_best(own), False)
    return groups


def charted(task: TaskName) -> tuple[str, ...]:
    """The two metrics of a task that charts show."""
    return (*DECISIVE[task], "mean_per_class_recall")[:2]


def _lora_option(params: Mapping[str, Any], name: str) -> Any:
    """Look up an option of a run's adapter: recorded as a group, or as a flag by earlier versions."""
    recorded = params.get("lora")
    group: Mapping[str, Any] = recorded if isinstance(recorded, Mapping) else {}
    return group.get(name, params.get(f"lora_{name}"))


def adapter_title(params: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return (target set, rank) of a run's adapter, as far as they are recorded."""
    rank = _lora_option(params, "r")
    targets = _lora_option(params, "targets") or params.get("lora_targets") or "text-attention"
    return str(targets), rank if isinstance(rank, int) else None


def on_test_data(sweep: Sweep) -> dict[str, Any] | None:
    """Make the table of a sweep on its test data, with differences to the base; None without test data."""
    names = [name for name in HEADLINE[sweep.task] if all(f"test_{name}" in row.mean for row in sweep.rows)]
    if not names or not sweep.rows:
        return None
    base = next((row for row in sweep.rows if row.kind == "base"), None)
    lines = []
    for row in sweep.rows:
        line = _sweep_line(row, sweep)
        mean, deviation = ({name: of[f"test_{name}"] for name in names} for of in (row.mean, row.deviation))
        gain = {name: mean[name] - base.mean[f"test_{name}"] for name in names} if base else {}
        shown = {"label": line.label, "r": line.r, "seeds": row.seeds, "mean": mean, "deviation": deviation}
        lines.append({**shown, "gain": {} if row is base else gain})
    return {"path": sweep.settings.get("test_data"), "metrics": names, "lines": lines}


def _comparable(run: Run) -> tuple[str, ...]:
    names = ("model", "pretrained", "val_data", "val_size", "csv_caption_key", "base")
    return (run.task, *(str(run.params.get(name)) for name in names))


def _sweep_line(row: Row, sweep: Sweep) -> ResultRow:
    trains = row.kind != "base"
    label = {"base": "base", "full": "full fine-tuning", "lora": row.targets}[row.kind]
    runs = [
        sweep.runs[done.cell.name]
        for done in sweep.cells
        if done.cell.row == (row.kind, row.targets, row.r) and done.cell.name in sweep.runs
    ]
    return ResultRow(
        kind=row.kind,
        label=label,
        targets=row.targets,
        r=row.r if row.kind == "lora" else None,
        seeds=row.seeds,
        mean=row.mean,
        deviation=row.deviation,
        trained=row.trained,
        bytes=row.bytes if trains else None,
        seconds=row.seconds if trains else None,
        peak_mb=row.peak_mb,
        how=how_trained(runs[0], row) if runs else {},
    )


def _run_line(run: Run) -> ResultRow:
    targets, rank = adapter_title(run.params) if run.kind == "lora" else ("", None)
    what = f"{targets}" if run.kind == "lora" else "full fine-tuning"
    head = run.params.get("head")
    if head in ("linear", "cosine"):
        what += f" + {head} head"
    return ResultRow(
        kind=run.kind,
        label=f"{run.name}: {what}",
        targets=targets,
        r=rank,
        seeds=1,
        mean=run.metrics,
        deviation={},
        trained=run.trained,
        bytes=run.bytes,
        seconds=run.seconds,
        peak_mb=None,
        note="" if run.finished else progress_of(run),
        how=how_trained(run),
    )


def progress_of(run: Run) -> str:
    """Say how far an unfinished run has come."""
    epochs, reached = run.params.get("epochs"), len(run.evaluations)
    steps = f"step {run.losses[-1][0]:,}" if run.losses else "no step"
    if reached and isinstance(epochs, int):
        last = run.evaluations[-1].get("epoch", reached)
        return f"unfinished: {steps}, epoch {last:.0f} of {epochs}"
    return f"unfinished: {steps}"


def _measured_base(run: Run) -> Mapping[str, float]:
    """Return the metrics of the base as the run measured them before its first step."""
    began_with_base = run.verdict is not None and run.verdict.than == BASE
    return run.base if run.base is not None and began_with_base else {}


def _base_line(metrics: Mapping[str, float]) -> ResultRow:
    return ResultRow("base", "base", "", None, 1, metrics, {}, 0, None, None, None)


def how_trained(run: Run, row: Row | None = None) -> dict[str, str]:
    """Describe how a run was trained and its gain, as text by column; empty where nothing is recorded."""
    params = run.params
    alpha = _lora_option(params, "alpha") if run.kind == "lora" else None
    epochs = params.get("epochs")
    kept = "" if run.best_epoch in (None, epochs) else f", kept {run.best_epoch}"
    versions = [f"{name} {value}" for name, value in run.made_with.items() if name != "machine"]
    return {
        "learning rate": _number(params.get("lr")),
        "alpha": _number(alpha),
        "epochs": f"{_number(epochs)}{kept}",
        "images" if run.task == "classification" else "pairs": "" if run.rows is None else f"{run.rows:,}",
        "against the start": _gain(run, row),
        "machine": run.made_with.get("machine", ""),
        "versions": ", ".join(versions),
    }


def _gain(run: Run, row: Row | None) -> str:
    """The verdict of a run, or of several seeds their mean gain."""
    if row is None or row.seeds == 1:
        return "" if run.verdict is None else _told(run.verdict)
    return "" if row.gain is None else str(row.gain).replace("-", "−")


def _told(verdict: Verdict) -> str:
    """Write a verdict as its word, and the gain of each metric in points with its interval."""
    gains = (str(gain).replace("-", "−") for gain in verdict.by_metric.values())
    start = "" if verdict.than == BASE else f" than {verdict.than}"
    return f"{verdict.word}{start}: {'; '.join(gains)}"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _with_best(lines: Sequence[ResultRow]) -> tuple[ResultRow, ...]:
    """Mark the highest number of each column among the rows that trained, where there are several."""
    trained = [line for line in lines if line.kind != "base" and line.mean]
    names = {name for names in HEADLINE.values() for name in names}
    top = {n: max((line.mean.get(n, 0.0) for line in trained), default=0.0) for n in names}
    marked = []
    for line in lines:
        wins = line in trained and len(trained) > 1
        best = frozenset(n for n in names if wins and line.mean.get(n) == top[n])
        marked.append(replace(line, best=best))
    return tuple(marked)


METRIC_WORDS = {
    "image_to_text_R@1": "image → text R@1",
    "image_to_text_R@5": "image → text R@5",
    "image_to_text_R@10": "image → text R@10",
    "text_to_image_R@1": "text → image R@1",
    "text_to_image_R@5": "text → image R@5",
    "text_to_image_R@10": "text → image R@10",
    "acc1": "accuracy",
    "acc5": "accuracy in first 5",
    "mean_per_class_recall": "mean recall of classes",
    "source_to_target_R@1": "source → target R@1",
    "target_to_source_R@1": "target → source R@1",
    "teacher_cosine": "cosine to the teacher",
}


def percent(value: float | None) -> str:
    """Write a fraction in percent: 0.536 -> 53.6."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def change(value: float) -> str:
    """Write a difference of fractions in points with its sign: +1.2, −3.4, 0.0."""
    return signed(100 * value).replace("-", "−")


def whole(value: float | None) -> str:
    """Write a whole number: 12288 -> 12,288."""
    return NOTHING if value is None else f"{value:,.0f}"


def megabytes(value: float | None) -> str:
    """Write bytes in MB."""
    return NOTHING if value is None else f"{value / 1e6:.2f}"


def duration(seconds: float | None) -> str:
    """Write a duration: 95 -> 1 min 35 s."""
    if seconds is None:
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def dates(started: datetime | None, ended: datetime | None) -> str:
    """Write when something ran, with the day once."""
    if started is None or ended is None:
        return "not recorded"
    last = f"{ended:%H:%M}" if ended.date() == started.date() else f"{ended:%Y-%m-%d %H:%M}"
    return f"{started:%Y-%m-%d %H:%M} to {last}"


def facts(source: Run | Sweep) -> list[tuple[str, str]]:
    """Describe a run or sweep as terms and values, the most important first."""
    return _sweep_facts(source) if isinstance(source, Sweep) else _run_facts(source)


def settings(source: Run | Sweep) -> list[tuple[str, str]]:
    """List every recorded setting as text, by name."""
    recorded = source.settings if isinstance(source, Sweep) else source.params
    return [(name, _shown(value)) for name, value in sorted(recorded.items())]


def _run_facts(run: Run) -> list[tuple[str, str]]:
    params = run.params
    made = [("Model", _model(params)), ("Task", _task(run.task, params)), *_data(params)]
    if run.kind == "lora":
        targets, rank = adapter_title(params)
        made.append(("Adapter", _adapter(params, targets, str(rank or params.get("lora_r", "?")))))
    else:
        made.append(("Adapter", "none: full fine-tuning"))
    made += [("Training", _training(params)), ("When", dates(run.started, run.ended))]
    if run.finished:
        made.append(("Took", duration(run.seconds)))
    return [(term, value) for term, value in made if value]


def _sweep_facts(sweep: Sweep) -> list[tuple[str, str]]:
    params = sweep.settings
    lora = [row for row in sweep.rows if row.kind == "lora"]
    targets = list(dict.fromkeys(row.targets for row in lora))
    ranks = sorted({row.r for row in lora})
    seeds = max((row.seeds for row in sweep.rows), default=0)
    starts = [run.started for run in sweep.runs.values() if run.started]
    ends = [run.ended for run in sweep.runs.values() if run.ended]
    grid = f"{', '.join(targets)}; ranks {', '.join(map(str, ranks))}; seeds {seeds}"
    made = [
        ("Model", _model(params)),
        ("Task", _task(sweep.task, params)),
        *_data(params),
        ("Grid", grid if lora else ""),
        ("Training", _training(params)),
        ("When", dates(min(starts, default=None), max(ends, default=None))),
        ("Took", duration(sum(cell.seconds for cell in sweep.cells)) if sweep.cells else ""),
    ]
    return [(term, value) for term, value in made if value]


def _model(params: Mapping[str, Any]) -> str:
    name, tag = params.get("model"), params.get("pretrained")
    if not name:
        return f"not recorded (fingerprint {params['base']})" if params.get("base") else "not recorded"
    return f"{name}, {tag}" if tag else str(name)


def _task(task: str, params: Mapping[str, Any]) -> str:
    head = params.get("head")
    return f"{task}, {head} head" if task == "classification" and head in ("linear", "cosine") else task


def _data(params: Mapping[str, Any]) -> list[tuple[str, str]]:
    val = params.get("val_data")
    if not val and params.get("val_size"):
        val = f"{100 * float(params['val_size']):g} % of each class, held out"
    shots = f", {params['shots']} images a class" if params.get("shots") else ""
    return [
        ("Training data", f"{params.get('train_data') or 'not recorded'}{shots}"),
        ("Validation data", str(val or "none recorded")),
    ]


def _adapter(params: Mapping[str, Any], targets: str, rank: str) -> str:
    is_dora = _lora_option(params, "use_dora") or params.get("lora_dora")
    variant = "dora" if is_dora else str(_lora_option(params, "variant") or "lora")
    kind = VARIANTS[variant].label if variant in VARIANTS else "LoRA"
    alpha = _lora_option(params, "alpha")
    dropout = _lora_option(params, "dropout")
    parts = [f"{kind} r={rank} on {targets}"]
    if alpha is not None:
        parts.append(f"alpha {alpha:g}")
    if dropout:
        parts.append(f"dropout {dropout:g}")
    return ", ".join(parts)


def _training(params: Mapping[str, Any]) -> str:
    words = {"epochs": "{} epochs", "batch_size": "batches of {}", "lr": "learning rate {:g}"}
    words |= {"wd": "weight decay {:g}", "seed": "seed {}"}
    if params.get("epochs") == 1:
        words["epochs"] = "1 epoch"
    known = [
        text.format(params[name]) for name, text in words.items() if isinstance(params.get(name), int | float)
    ]
    if isinstance(params.get("autocast"), bool):
        known.append("bf16" if params["autocast"] else "fp32")
    return ", ".join(known)


def _shown(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) or NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def in_short(group: ResultGroup) -> tuple[str, str] | None:
    """Say in a sentence what the best adapter of a group reaches, and its size; None if none."""
    names = charted(group.task)
    measured = [line for line in group.lines if set(names) <= line.mean.keys()]
    adapters = [line for line in measured if line.kind == "lora"]
    if not adapters:
        return None

    def total(line: ResultRow) -> float:
        return sum(line.mean[metric] for metric in names)

    best = max(adapters, key=total)
    others = [line for line in measured if line.kind != "lora"]
    rank = f" r={best.r}" if best.r else ""
    name = f"{group.name}: {best.label}{rank}" if group.is_sweep else f"{best.label}{rank}"
    parts = []
    for metric in names:
        known = ", ".join(f"{line.label.split(': ')[-1]} {100 * line.mean[metric]:.1f}" for line in others)
        reached = f"{METRIC_WORDS[metric]} {100 * best.mean[metric]:.1f} %"
        parts.append(f"{reached} ({known})" if known else reached)
    cost = (
        f", with {best.trained:,} trained weights in {(best.bytes or 0) / 1e6:.2f} MB" if best.trained else ""
    )
    return name, f"reaches {' and '.join(parts)}{cost}."

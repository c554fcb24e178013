"""Numbers and names as the report's readers see them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from clipgraft.report.runs import Run, Sweep
from clipgraft.report.table import adapter_title

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
}
NOTHING = "–"


def percent(value: float | None) -> str:
    """0.536 -> 53.6"""
    return NOTHING if value is None else f"{100 * value:.1f}"


def change(value: float) -> str:
    """A difference of shares in points, with its sign: +1.2, −3.4, 0.0."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def whole(value: float | None) -> str:
    """12288 -> 12,288"""
    return NOTHING if value is None else f"{value:,.0f}"


def megabytes(value: float | None) -> str:
    """Bytes -> MB."""
    return NOTHING if value is None else f"{value / 1e6:.2f}"


def duration(seconds: float | None) -> str:
    """95 -> 1 min 35 s"""
    if seconds is None:
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def dates(started: datetime | None, ended: datetime | None) -> str:
    """When something ran, the day said once."""
    if started is None or ended is None:
        return "not recorded"
    last = f"{ended:%H:%M}" if ended.date() == started.date() else f"{ended:%Y-%m-%d %H:%M}"
    return f"{started:%Y-%m-%d %H:%M} to {last}"


def facts(source: Run | Sweep) -> list[tuple[str, str]]:
    """What ran, as terms and values, in the order that people ask."""
    return _sweep_facts(source) if isinstance(source, Sweep) else _run_facts(source)


def settings(source: Run | Sweep) -> list[tuple[str, str]]:
    """Every recorded setting as text, by name."""
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
    recorded = params.get("lora")
    lora: Mapping[str, Any] = recorded if isinstance(recorded, Mapping) else {}
    kind = "DoRA" if lora.get("use_dora") or params.get("lora_dora") else "LoRA"
    alpha = lora.get("alpha", params.get("lora_alpha"))
    dropout = lora.get("dropout", params.get("lora_dropout"))
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

"""The model card of an adapter, made from its run: what it bought and cost, and how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from clipgraft.adapters.adapter_file import AdapterFile
from clipgraft.evaluate.metrics import HEADLINE, task_of
from clipgraft.report.runs import Run
from clipgraft.train.strength import StrengthCurve

_WIDGET = {
    "src": "https://huggingface.co/datasets/mishig/sample_images/resolve/main/cat-dog-music.png",
    "candidate_labels": "playing music, playing sports",
    "example_title": "Cat & Dog",
}
"""The example that the hub shows on the pages of CLIP itself."""
_TASKS = {
    "retrieval": "image-text-retrieval",
    "classification": "zero-shot-image-classification",
    "translation": "sentence-similarity",
}


@dataclass(frozen=True)
class Published:
    """What a card is about.

    Attributes:
        repository: OWNER/NAME on the hub.
        adapter: what is published.
        run: what made it; None for an adapter folder alone.
        full: a run that fine-tuned all weights on the same data, to compare with.
        license: of the adapter, as the hub spells it; None where nobody said.
        bytes: size of the adapter's files.
    """

    repository: str
    adapter: AdapterFile
    run: Run | None
    full: Run | None
    license: str | None
    bytes: int


def base_on_hub(base: dict[str, str]) -> str | None:
    """Return OWNER/NAME of an adapter's base on the hub; None where its record names no such place."""
    name, pretrained = base.get("name", ""), base.get("pretrained", "")
    for prefix in ("hf:", "hf-hub:"):
        place = name.removeprefix(prefix)
        if name.startswith(prefix):
            return place if place.count("/") == 1 and not Path(place).exists() else None
    import open_clip

    config = open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained) if pretrained else None
    return str(config["hf_hub"]).strip("/") or None if config and config.get("hf_hub") else None


def make_card(what: Published) -> str:
    """Write the card in Markdown, its metadata in YAML first."""
    from huggingface_hub import ModelCardData

    hub = base_on_hub(what.adapter.base)
    options: dict[str, Any] = {"license": what.license} if what.license else {}
    if hub is not None:
        options["base_model"] = hub
    if what.run is not None and what.run.metrics:
        options |= {"model_name": what.repository.rpartition("/")[2], "eval_results": _results(what.run)}
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "lora", "clipgraft", *([f"base_model:adapter:{hub}"] if hub else [])],
        widget=[_WIDGET],
        **options,
    )
    parts = [
        _title(what, hub),
        _measured(what),
        _kept(what.run.strength if what.run else None),
        _use(what, hub),
        _training(what),
        _license(what.license),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(part for part in parts if part)


def _results(run: Run) -> list[Any]:
    from huggingface_hub import EvalResult

    task, name = _TASKS[run.task], _data_name(run, "val_data") or "validation data"
    return [
        EvalResult(
            task_type=task,
            dataset_type="image-folder",
            dataset_name=name,
            metric_type=metric,
            metric_value=round(run.metrics[metric], 5),
        )
        for metric in HEADLINE[run.task]
        if metric in run.metrics
    ]


def _title(what: Published, hub: str | None) -> str:
    name, base = what.repository.rpartition("/")[2], _base_name(what.adapter.base)
    linked = f"[{base}](https://huggingface.co/{hub})" if hub else f"`{base}`"
    settings, sites = what.adapter.settings, len(what.adapter.sites)
    lines = [
        f"# {name}",
        "",
        f"A LoRA adapter of {what.bytes / 1e6:.2f} MB for the CLIP model {linked}: rank {settings.r}, alpha "
        f"{settings.alpha:g}, {sites} sites (`{settings.targets}`).",
    ]
    if hub is None:
        lines += [
            "",
            f"Its base is not on the hub by that name. It has the fingerprint `{what.adapter.fingerprint}`, "
            "which is checked when the adapter is loaded on it.",
        ]
    return "\n".join([*lines, ""])


def _measured(what: Published) -> str:
    run = what.run
    if run is None or not run.metrics:
        return "## What it bought\n\nNot measured: the run had no validation data.\n"
    columns: list[tuple[str, dict[str, float]]] = [("this adapter", run.metrics)]
    if run.base is not None:
        columns.insert(0, ("base", run.base))
    if what.full is not None:
        columns.append(("all weights fine-tuned", what.full.metrics))
    data = _data_name(run, "val_data")
    lines = ["## What it bought", "", f"On {f'`{data}`' if data else 'the validation data'}, in percent:", ""]
    lines += [f"| | {' | '.join(name for name, _ in columns)} |", f"|---|{'---:|' * len(columns)}"]
    for metric in HEADLINE[task_of(run.metrics)]:
        cells = [f"{100 * values[metric]:.1f}" if metric in values else "–" for _, values in columns]
        lines.append(f"| `{metric}` | {' | '.join(cells)} |")
    if run.verdict is not None:
        lines += ["", f"{str(run.verdict).splitlines()[0]}."]
    return "\n".join([*lines, ""])


def _kept(curve: StrengthCurve | None) -> str:
    if curve is None:
        return ""
    rows = [
        f"| {point.strength:g} | {100 * point.gained:.1f} | {100 * point.kept:.1f} |"
        for point in curve.points
    ]
    applied = (
        f"Saved with strength {curve.recommended:g}." if curve.applied else "Saved as trained, strength 1."
    )
    return "\n".join(
        [
            "## What it gained, and what it kept",
            "",
            f"Its {curve.of} times a strength. Kept: first answers that are the base's, between the "
            f"validation images and {curve.texts:,} texts ({curve.source}) on which nothing was trained. "
            f"{applied}",
            "",
            "| strength | gained, % | kept, % |",
            "|---:|---:|---:|",
            *rows,
            "",
        ]
    )


def _use(what: Published, hub: str | None) -> str:
    base, repository = what.adapter.base, what.repository
    name, pretrained = base.get("name", ""), base.get("pretrained", "")
    loaded = f'cg.load("{repository}")'
    lines = ["## Use", "", "With [clipgraft](https://pypi.org/project/clipgraft/)", ""]
    if hub is None and name != "emoji":
        lines += _block(
            "import clipgraft as cg",
            "",
            f"clip = cg.load(BASE)  # {_base_name(base)}, wherever it is",
            f'cg.load_adapter(clip, "hf:{repository}")',
        )
        return "\n".join([*lines, ""])
    lines += _block(
        "import clipgraft as cg",
        "",
        f"clip = {loaded}  # with its base",
        'texts = clip.encode_text(["a photo of a cat", "a photo of a dog"], normalize=True)',
    )
    if what.adapter.twin.library.startswith("transformers") and hub and name.startswith("hf:"):
        kind = what.adapter.twin.name
        lines += ["", "With transformers and PEFT", ""]
        lines += _block(
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f'model = PeftModel.from_pretrained({kind}.from_pretrained("{hub}"), "{repository}")',
        )
    if base.get("family") == "open_clip":
        lines += ["", "With open_clip: the model stays open_clip's own", ""]
        made = f'"{name}", pretrained="{pretrained}"' if pretrained else f'"{name}"'
        lines += _block(
            "import clipgraft as cg",
            "import open_clip",
            "",
            f"model, _, preprocess = open_clip.create_model_and_transforms({made})",
            f'cg.load_adapter(model, "hf:{repository}")',
        )
    else:
        lines += ["", "As an open_clip model without clipgraft at run time", "", "```"]
        lines += [f"clipgraft merge hf:{repository} merged --to open_clip", "```"]
    return "\n".join([*lines, ""])


def _block(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def _training(what: Published) -> str:
    run = what.run
    if run is None:
        return ""
    params, made = run.params, run.made_with
    data = _data_name(run, "train_data")
    rows = f", {run.rows:,} {'images' if run.task == 'classification' else 'pairs'}" if run.rows else ""
    facts = [
        ("data", f"`{data}`{rows}" if data else rows.removeprefix(", ")),
        ("learning rate", _number(params.get("lr"))),
        ("batch size", _number(params.get("batch_size"))),
        (
            "epochs",
            f"{params.get('epochs')}, kept {run.best_epoch}" if run.best_epoch else params.get("epochs"),
        ),
        ("seed", params.get("seed")),
        ("trained weights", f"{run.trained:,}" if run.trained else None),
        ("time", f"{run.seconds:,.0f} s, evaluation included" if run.seconds else None),
        ("machine", made.get("machine")),
        ("made with", ", ".join(f"{name} {v}" for name, v in made.items() if name != "machine")),
    ]
    lines = ["## How it was made", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in facts if value), ""])


def _number(value: Any) -> str | None:
    return f"{value:g}" if isinstance(value, int | float) else None if value is None else str(value)


def _license(name: str | None) -> str:
    told = f"`{name}`" if name else "Not stated by whoever published it."
    return f"## Licence\n\nOf the adapter: {told} The base has its own, which holds for both together.\n"


def _data_name(run: Run, key: str) -> str:
    """Return the last part of a path that the run recorded: folders of a machine are nobody's business."""
    value = run.params.get(key)
    return PurePath(value).name if isinstance(value, str) else ""


def _base_name(base: dict[str, str]) -> str:
    parts = [base.get("name", "").removeprefix("hf:").removeprefix("hf-hub:"), base.get("pretrained", "")]
    return " / ".join(PurePath(part).name if PurePath(part).is_absolute() else part for part in parts if part)

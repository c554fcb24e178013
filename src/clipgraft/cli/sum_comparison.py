"""`clipgraft merge --eval`: measure adapters one by one, and what was made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from clipgraft.cli import checks
from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.shared import ClassFlags, PromptFlags
from clipgraft.cli.flags.tools import MergeFlags
from clipgraft.cli.pretty import show
from clipgraft.evaluate.metrics import HEADLINE, REPORTED, is_share
from clipgraft.text_tables import Table

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip

log = logging.getLogger("clipgraft")


def eval_faults(spec: MergeFlags, prompts: PromptFlags) -> list[str]:
    """List flags of `--eval` that are wrong, or given without it."""
    given = [*(name for name in ("eval_task",) if name in spec.model_fields_set), *prompts.model_fields_set]
    if spec.eval is None:
        return [f"{', '.join(map(flag, given))} given without --eval: name the data too"] if given else []
    faults = checks.missing_data("--eval", spec.eval)
    if spec.to != "adapter":
        faults.append("--eval compares adapters with what is made of them: add --to adapter")
    task = ClassFlags(**prompts.model_dump(exclude_unset=True), task=spec.eval_task)
    return faults + checks.prompt_faults(task)


def compare_sum(
    clip: Clip, single: Sequence[str], made: Mapping[str, str], spec: MergeFlags, prompts: PromptFlags
) -> None:
    """Measure adapters of a model and print a table: the base, the mean of some, and what was made of them.

    Args:
        clip: the base with all of them; the active one is active again afterwards.
        single: names of the adapters that were merged.
        made: name of each adapter made of them, and what it is called in the table.
        spec: names the data.
        prompts: of the classes in them.
    """
    from clipgraft.lora.control import set_adapter
    from clipgraft.lora.state import require_lora

    measure, state = _measure(clip, spec, prompts), require_lora(clip)
    active = state.active

    def measured(name: str | None) -> Mapping[str, float]:
        set_adapter(clip, name)
        return measure()

    ones = [measured(name) for name in single]
    columns: dict[str, Mapping[str, float]] = {
        "base": measured(None),
        f"mean of the {len(ones)}": {name: fmean(one[name] for one in ones) for name in ones[0]},
        "best of them": max(ones, key=lambda one: _headline(one, spec)),
        **{title: measured(name) for name, title in made.items()},
    }
    set_adapter(clip, active)
    show(_table(columns, spec))
    for title in made.values():
        gains = [
            f"{name} {100 * (columns[title][name] - columns[f'mean of the {len(ones)}'][name]):+.1f}"
            for name in HEADLINE[spec.eval_task]
        ]
        log.info("%s, beside the mean of the %d, in points: %s", title, len(ones), ", ".join(gains))


def _headline(metrics: Mapping[str, float], spec: MergeFlags) -> float:
    return fmean(metrics[name] for name in HEADLINE[spec.eval_task])


def _table(columns: Mapping[str, Mapping[str, float]], spec: MergeFlags) -> Table:
    def shown(name: str, value: float) -> str:
        digits = 2 if spec.eval_task == "classification" else 1
        return f"{100 * value if is_share(name) else value:.{digits}f}"

    rows = tuple(
        (name, *(shown(name, column[name]) for column in columns.values()))
        for name in REPORTED[spec.eval_task]
    )
    return Table("", ("", *columns), rows)


def _measure(clip: Clip, spec: MergeFlags, prompts: PromptFlags) -> Callable[[], Mapping[str, float]]:
    """What measures the model as it is at the moment."""
    from clipgraft.data.args import FeatureArgs, LabelArgs
    from clipgraft.data.feature_cache import default_folder
    from clipgraft.data.prompts import class_prompts, find_templates, read_prompts
    from clipgraft.data.reader import read_labelled, read_pairs
    from clipgraft.evaluate.classification import evaluate_classification
    from clipgraft.evaluate.retrieval import evaluate_retrieval

    assert spec.eval is not None
    features = FeatureArgs(feature_cache=default_folder())
    if spec.eval_task == "retrieval":
        pairs = read_pairs(spec.eval)
        return lambda: evaluate_retrieval(clip, pairs, features)
    images = read_labelled(spec.eval, LabelArgs(csv_label_key=prompts.csv_label_key))
    given = None if prompts.prompts is None else read_prompts(prompts.prompts)
    texts: Any = class_prompts(images.classes, given, find_templates(prompts.templates))
    return lambda: evaluate_classification(clip, images, texts, features).metrics

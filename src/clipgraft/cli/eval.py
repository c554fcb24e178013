"""`clipgraft eval`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clipgraft.cli import checks
from clipgraft.cli.flags.shared import ClassFlags, DataFlags, ModelFlags
from clipgraft.cli.flags.training import EvalFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.train import class_faults
from clipgraft.errors import ConfigError
from clipgraft.options import Options
from clipgraft.ours import refuse_foreign
from clipgraft.text_tables import Table, terminal_width

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.adapters.run_folder import RunModel
    from clipgraft.data.pairs import Pairs
    from clipgraft.evaluate.bootstrap import Measured
    from clipgraft.models.clip import Clip
    from clipgraft.train.verdict import Verdict

log = logging.getLogger("clipgraft")
_SUMMARY = "Measure retrieval or classification: a base; an adapter, or what a run made, beside its base."
_SHOWN = (
    "image_to_text_R@1",
    "image_to_text_R@5",
    "image_to_text_R@10",
    "image_to_text_mean_rank",
    "image_to_text_median_rank",
    "text_to_image_R@1",
    "text_to_image_R@5",
    "text_to_image_R@10",
    "text_to_image_mean_rank",
    "text_to_image_median_rank",
)


def run(argv: Sequence[str]) -> None:
    """Parse, load, evaluate, print a table and optionally write JSON."""
    kinds: list[type[Options]] = [ModelFlags, DataFlags, ClassFlags, EvalFlags]
    model_spec, data, classes, spec = parse("eval", _SUMMARY, kinds, argv)
    checks.refuse(_faults(model_spec, data, classes, spec))
    from clipgraft.adapters.attach import load_adapter
    from clipgraft.adapters.run_folder import find_run_model
    from clipgraft.cli.common import load_model, open_cache, read_table
    from clipgraft.files import write_json
    from clipgraft.models.device import use_autocast

    models = {"base": load_model(model_spec)}
    clip = models["base"]
    whole = find_run_model(model_spec.model)
    if spec.adapter is not None:
        load_adapter(clip, spec.adapter, force=spec.force, peft_out_proj=spec.peft_out_proj)
    elif whole is not None and whole.kind != "adapter":
        models = {**_beginning(whole, model_spec), whole.kind: clip}
    options = {
        "batch_size": spec.batch_size,
        "workers": data.workers,
        "autocast": use_autocast(model_spec.autocast, clip.device),
        "cache": open_cache(data),
        "exact_preprocess": data.exact_preprocess,
    }
    if classes.task == "classification":
        from clipgraft.cli.classify import class_table, measure_classes

        classifier = spec.classifier or (whole.head if whole is not None and spec.adapter is None else None)
        results = measure_classes(models, data, classes, classifier, **options)
        measured = {name: result.measured for name, result in results.items()}
        print(class_table(results))
    else:
        pairs = read_table(clip, data.val_data, data.for_validation(), "validation data")
        measured = measure_all(models, pairs, **options)
        columns = {name: found.metrics for name, found in measured.items()}
        print(metrics_table(columns).text(terminal_width()))
    verdicts = judge_all(measured)
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    if spec.out is not None:
        numbers = {name: found.metrics for name, found in measured.items()}
        told = {name: verdict.to_dict() for name, verdict in verdicts.items()}
        write_json(spec.out, numbers | ({"verdict": told} if told else {}))
        log.info("wrote %s", spec.out)


def _faults(model: ModelFlags, data: DataFlags, classes: ClassFlags, spec: EvalFlags) -> list[str]:
    """All that is wrong and can be known without weights or pixels."""
    faults = class_faults(classes, data)
    if data.val_data is None:
        faults.append("--val-data is missing: a table of images and captions, or a folder of both")
    else:
        faults += checks.missing_data("--val-data", data.val_data)
    if spec.classifier is not None and classes.task == "retrieval":
        faults.append("--classifier given without --task classification: add it")
    faults += checks.table_faults(
        "--val-data", data.val_data, data.for_validation(), classes.for_validation()
    )
    faults += checks.output_faults("--out", spec.out) + checks.prompt_faults(classes)
    if spec.out is not None and not spec.out.is_dir():
        faults += checks.fault_of(partial(refuse_foreign, spec.out, spec.overwrite, ConfigError, "--out"))
    faults += checks.device_faults(model.device)
    clip, wrong = checks.structure_of(model)
    faults += wrong
    if spec.adapter is not None:
        faults += checks.adapter_faults("--adapter", spec.adapter, clip, spec.peft_out_proj)
    return faults


def _beginning(whole: RunModel, spec: ModelFlags) -> dict[str, Clip]:
    """What a run of all weights began with, to be measured beside it; nothing where it cannot be had."""
    from clipgraft.cli.common import load_model
    from clipgraft.errors import ClipgraftError

    base = whole.base
    if not base.name:
        log.warning("%s does not record its base: it is measured alone", whole.run)
        return {}
    try:
        return {
            "base": load_model(
                spec.model_copy(update={"model": base.name, "pretrained": base.pretrained or None})
            )
        }
    except ClipgraftError as error:
        log.warning("the base that %s began with cannot be measured beside it: %s", whole.run, error)
        return {}


def judge_all(measured: Mapping[str, Measured]) -> dict[str, Verdict]:
    """Whether each model is better than the base, where that was measured too."""
    from clipgraft.train.verdict import judge

    base = measured.get("base")
    if base is None:
        return {}
    return {
        name: judge(base, found, than="the base") for name, found in measured.items() if found is not base
    }


def measure_all(models: Mapping[str, Clip], pairs: Pairs, **options: Any) -> dict[str, Measured]:
    """What each model reaches under its name, and an adapter beside its base."""
    return {
        ("adapter" if name == "adapter" else heading): found
        for heading, clip in models.items()
        for name, found in measure(clip, pairs, **options).items()
    }


def measure(clip: Clip, pairs: Pairs, **options: Any) -> dict[str, Measured]:
    """What the base reaches and, where the model carries one, its adapter.

    `options` are what `encode_images` and `evaluate_retrieval` both take.
    """
    from clipgraft.engine.encoder import Encoder
    from clipgraft.evaluate.retrieval import measure_retrieval

    autocast = bool(options.get("autocast"))
    return side_by_side(
        clip,
        pairs.images,
        lambda images: measure_retrieval(Encoder(clip, autocast), pairs, images),
        **options,
    )


_R = TypeVar("_R")


def side_by_side(
    clip: Clip, files: Sequence[Path], evaluate: Callable[[Tensor], _R], **options: Any
) -> dict[str, _R]:
    """What `evaluate` makes of unit-norm image features with the base and, if there is one, the adapter."""
    from clipgraft.lora.control import lora_disabled
    from clipgraft.lora.state import lora_state

    state = lora_state(clip)
    if state is None:
        return {"base": evaluate(_images(clip, files, **options))}
    with lora_disabled(clip):
        images = _images(clip, files, **options)
        base = evaluate(images)
    if state.chosen().touches("vision"):
        images = _images(clip, files, **options)
    return {"base": base, "adapter": evaluate(images)}


def _images(clip: Clip, files: Sequence[Path], **options: Any) -> Tensor:
    from clipgraft.data.features import encode_images

    return encode_images(clip, files, **options)


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Metrics with one column a model; recalls in percent."""
    factors = {metric: 100 if "_R@" in metric else 1 for metric in _SHOWN}
    rows = [
        (metric, *(f"{factor * column[metric]:.1f}" for column in columns.values()))
        for metric, factor in factors.items()
    ]
    return Table("", ("", *columns), tuple(rows))

"""`clipgraft eval`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli import checks
from clipgraft.cli.flags.shared import ClassFlags, DataFlags, ModelFlags, features_of
from clipgraft.cli.flags.training import EvalFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.pretty import show
from clipgraft.cli.prompt_ensemble import learn_prompts, learn_prompts_faults
from clipgraft.errors import CheckpointError, ConfigError
from clipgraft.evaluate.metrics import REPORTED
from clipgraft.options import Options
from clipgraft.ours import refuse_foreign
from clipgraft.text_tables import NOTHING, Table

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.adapters.run_folder import RunModel
    from clipgraft.data.args import FeatureArgs
    from clipgraft.data.datasets import Labelled
    from clipgraft.evaluate.answers import CaptionAnswers
    from clipgraft.evaluate.bootstrap import Measured
    from clipgraft.evaluate.classification import ClassificationResult
    from clipgraft.models.clip import Clip
    from clipgraft.train.fewshot.prompt_weights import PromptEnsemble
    from clipgraft.train.verdict import Verdict

log = logging.getLogger("clipgraft")
_SUMMARY = "Measure retrieval or classification of a base, or of an adapter or run beside its base."


def run_eval(argv: Sequence[str]) -> None:
    """Parse, load, evaluate, print a table and optionally write JSON."""
    kinds: list[type[Options]] = [ModelFlags, DataFlags, ClassFlags, EvalFlags]
    model_spec, data, classes, spec = parse("eval", _SUMMARY, kinds, argv)
    checks.refuse(_faults(model_spec, data, classes, spec))
    from clipgraft.adapters.attach import load_adapter
    from clipgraft.adapters.run_folder import find_run_model
    from clipgraft.cli.common import load_model
    from clipgraft.cli.read_data import read_table
    from clipgraft.evaluate.compare import compare_retrieval
    from clipgraft.files import write_json
    from clipgraft.models.device import use_autocast
    from clipgraft.report.fiftyone import classification_answers, retrieval_answers, write_fiftyone

    models = {"base": load_model(model_spec)}
    clip = models["base"]
    whole = find_run_model(model_spec.model)
    if spec.adapter is not None:
        load_adapter(clip, spec.adapter, force=spec.force, peft_out_proj=spec.peft_out_proj)
    elif whole is not None and whole.kind != "adapter":
        models = {**_beginning(whole, model_spec), whole.kind: clip}
    features = features_of(data, use_autocast(model_spec.autocast, clip.device))
    learnt = None if spec.learn_prompts is None else learn_prompts(clip, data, classes, features, spec)
    if data.val_data is None:
        return
    if classes.task == "classification":
        classifier = spec.classifier or (whole.head if whole is not None and spec.adapter is None else None)
        images, results = _classified(models, data, classes, classifier, features, spec.batch_size, learnt)
        answers = partial(classification_answers, images, results)
        measured = {name: result.measured for name, result in results.items()}
        show(*class_tables(results))
    else:
        pairs = read_table(clip, data.val_data, data.for_validation(), "validation data")
        nearest: dict[str, CaptionAnswers] | None = None if spec.fiftyone is None else {}
        measured = compare_retrieval(models, pairs, features, spec.batch_size, nearest)
        answers = partial(retrieval_answers, pairs, nearest or {})
        columns = {name: found.metrics for name, found in measured.items()}
        show(metrics_table(columns))
    verdicts = _verdicts(measured)
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    if spec.out is not None:
        numbers = {name: found.metrics for name, found in measured.items()}
        told = {name: verdict.to_dict() for name, verdict in verdicts.items()}
        write_json(spec.out, numbers | ({"verdict": told} if told else {}))
        log.info("wrote %s", spec.out)
    if spec.fiftyone is not None:
        log.info("wrote %s", write_fiftyone(spec.fiftyone, answers(), overwrite=spec.overwrite))


def _faults(model: ModelFlags, data: DataFlags, classes: ClassFlags, spec: EvalFlags) -> list[str]:
    """List everything that is wrong and known without weights or pixels."""
    faults = checks.class_faults(classes, data)
    faults += learn_prompts_faults(data, classes, spec)
    if data.val_data is None and spec.learn_prompts is None:
        faults.append("--val-data is missing: a table of images and captions, or a folder of both")
    elif data.val_data is not None:
        faults += checks.missing_data("--val-data", data.val_data)
    if spec.classifier is not None and classes.task == "retrieval":
        faults.append("--classifier given without --task classification: add it")
    faults += checks.table_faults(
        "--val-data", data.val_data, data.for_validation(), classes.for_validation()
    )
    faults += checks.output_faults("--out", spec.out) + checks.prompt_faults(classes)
    if spec.out is not None and not spec.out.is_dir():
        faults += checks.fault_of(partial(refuse_foreign, spec.out, spec.overwrite, ConfigError, "--out"))
    if spec.fiftyone is not None:
        from clipgraft.report.fiftyone import check_folder

        faults += checks.output_faults("--fiftyone", spec.fiftyone, folder=True)
        faults += checks.fault_of(partial(check_folder, spec.fiftyone, spec.overwrite))
    faults += checks.device_faults(model.device)
    clip, wrong = checks.structure_of(model)
    faults += wrong
    if spec.adapter is not None:
        faults += checks.adapter_faults("--adapter", spec.adapter, clip, spec.peft_out_proj)
    return faults


def _beginning(whole: RunModel, spec: ModelFlags) -> dict[str, Clip]:
    """Load what a full fine-tuning run began with, to measure it too; nothing if it cannot be loaded."""
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


def _classified(
    models: Mapping[str, Clip],
    data: DataFlags,
    classes: ClassFlags,
    classifier: Path | None,
    features: FeatureArgs,
    batch_size: int,
    learnt: tuple[tuple[str, ...], PromptEnsemble] | None = None,
) -> tuple[Labelled, dict[str, ClassificationResult]]:
    """Measure the prompts of the classes with each model, and a saved classifier with the last one.

    Prompts with `learnt` weights take the place of the classifier, under the name "learnt prompts".

    Raises:
        CheckpointError: no classifier in that folder, or one for features of another size.
        DataError: images that cannot be used, or of classes that the classifier does not know.
    """
    from clipgraft.cli.read_data import prompts_of, read_images
    from clipgraft.data.datasets import match_classes
    from clipgraft.evaluate.classification import evaluate_classification
    from clipgraft.evaluate.compare import compare_classification
    from clipgraft.evaluate.head import load_head

    assert data.val_data is not None
    images = read_images(data.val_data, data, classes, "images", validation=True)
    if learnt is not None:
        if classifier is not None:
            log.info("%s is not measured: --learn-prompts weighs prompts", classifier)
        names, made = learnt
        images = match_classes(images, names)
        results = compare_classification(models, images, prompts_of(names, classes), features, batch_size)
        last = [*models.values()][-1]
        results["learnt prompts"] = evaluate_classification(
            last, images, made.prompts, features, batch_size=batch_size
        )
        return images, results
    if classifier is None:
        prompts = prompts_of(images.classes, classes)
        return images, compare_classification(models, images, prompts, features, batch_size)
    head, names = load_head(classifier)
    images = match_classes(images, names)
    prompts = prompts_of(images.classes, classes)

    def logits(encoded: Tensor) -> Tensor:
        if encoded.shape[1] != head.weight.shape[1]:
            raise CheckpointError(
                f"--classifier {classifier} takes features of {head.weight.shape[1]} numbers, the model "
                f"gives {encoded.shape[1]}: give the --model and --adapter that it was trained with"
            )
        found: Tensor = head(encoded)
        return found

    results = compare_classification(models, images, prompts, features, batch_size, logits)
    results[head.kind] = results.pop("head")
    return images, results


def _verdicts(measured: Mapping[str, Measured]) -> dict[str, Verdict]:
    """Judge whether each model is better than the base, if that was measured too."""
    from clipgraft.train.verdict import judge

    base = measured.get("base")
    if base is None:
        return {}
    return {
        name: judge(base, found, than="the base") for name, found in measured.items() if found is not base
    }


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Make the table of retrieval metrics, a column per model; recalls in percent."""
    factors = {metric: 100 if "_R@" in metric else 1 for metric in REPORTED["retrieval"]}
    rows = [
        (metric, *(f"{factor * column[metric]:.1f}" for column in columns.values()))
        for metric, factor in factors.items()
    ]
    return Table("", ("", *columns), tuple(rows))


def class_tables(columns: Mapping[str, ClassificationResult]) -> tuple[Table, Table]:
    """Make the tables of classification metrics and of recall per class, in percent, a column per model."""
    factors = {metric: 1 if metric == "loss" else 100 for metric in REPORTED["classification"]}
    metrics = [
        (metric, *(f"{factor * result.metrics[metric]:.2f}" for result in columns.values()))
        for metric, factor in factors.items()
    ]
    recalls = [
        (
            rows[0].name,
            *(NOTHING if r.recall is None else f"{100 * r.recall:.1f}" for r in rows),
            f"{rows[0].count:,}",
        )
        for rows in zip(*(result.per_class for result in columns.values()), strict=True)
    ]
    return (
        Table("", ("", *columns), tuple(metrics)),
        Table("", ("recall of", *columns, "images"), tuple(recalls)),
    )

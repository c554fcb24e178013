"""`clipgraft eval --learn-prompts`: learn the weights of prompts, and write them as a file of prompts."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from clipgraft.cli import checks
from clipgraft.cli.flags.shared import ClassFlags, DataFlags
from clipgraft.cli.flags.training import EvalFlags
from clipgraft.cli.pretty import show
from clipgraft.errors import ConfigError
from clipgraft.ours import refuse_foreign
from clipgraft.text_tables import Table

if TYPE_CHECKING:
    from clipgraft.data.args import FeatureArgs
    from clipgraft.models.clip import Clip
    from clipgraft.train.fewshot.prompt_weights import PromptEnsemble

log = logging.getLogger("clipgraft")


def learn_prompts_faults(data: DataFlags, classes: ClassFlags, spec: EvalFlags) -> list[str]:
    """List what is wrong with `--learn-prompts` and the training data it needs."""
    if spec.learn_prompts is None:
        return []
    faults = []
    if classes.task != "classification":
        faults.append("--learn-prompts given without --task classification: add it")
    if spec.classifier is not None:
        faults.append("--learn-prompts weighs prompts, and --classifier has none: give one of them")
    if data.train_data is None:
        faults.append("--learn-prompts needs --train-data: the labelled images to learn from")
    else:
        faults += checks.missing_data("--train-data", data.train_data)
    needless = [name for name in ("out", "fiftyone") if getattr(spec, name) is not None]
    if data.val_data is None and needless:
        faults.append(f"--{needless[0]} given without --val-data: there is nothing to write")
    faults += checks.output_faults("--learn-prompts", spec.learn_prompts)
    return faults + checks.fault_of(
        partial(refuse_foreign, spec.learn_prompts, spec.overwrite, ConfigError, "--learn-prompts")
    )


def learn_prompts(
    clip: Clip, data: DataFlags, classes: ClassFlags, features: FeatureArgs, spec: EvalFlags
) -> tuple[tuple[str, ...], PromptEnsemble]:
    """Learn the weights, print what they gain on the training data, and write the file.

    Returns:
        The classes, and the prompts with their weights.
    """
    from clipgraft.cli.read_data import prompts_of, read_images
    from clipgraft.data.features import encode_images
    from clipgraft.data.prompts import write_prompts
    from clipgraft.engine.encoder import Encoder
    from clipgraft.train.fewshot.prompt_weights import learn_prompt_weights

    assert data.train_data is not None
    assert spec.learn_prompts is not None
    images = read_images(data.train_data, data, classes, "training images")
    encoder = Encoder(clip, bool(features.autocast))
    encoded = encode_images(clip, images.images, features, batch_size=spec.batch_size, encoder=encoder)
    prompts = prompts_of(images.classes, classes)
    made = learn_prompt_weights(encoder, images, prompts, encoded, shared=classes.prompts is None)
    show(_gain(made, len(images)))
    if classes.prompts is None:
        told = ", ".join(f"{weight:.2f} {text!r}" for text, weight in _templates(made))
        log.info("weights as in class %s, 1 each before: %s", images.classes[0], told)
    write_prompts(dict(zip(images.classes, made.prompts, strict=True)), spec.learn_prompts)
    log.info("wrote %s: use it with --prompts", spec.learn_prompts)
    return images.classes, made


def _templates(made: PromptEnsemble) -> list[tuple[str, float]]:
    """The prompts of the first class by weight, the ten heaviest."""
    first = made.prompts[0]
    found = sorted(zip(first.texts, first.weights, strict=True), key=lambda pair: -pair[1])
    return found[:10]


def _gain(made: PromptEnsemble, images: int) -> Table:
    rows = tuple(
        (name, *(f"{factor * result.metrics[name]:.2f}" for result in (made.uniform, made.learnt)))
        for name, factor in (("acc1", 100), ("mean_per_class_recall", 100), ("loss", 1))
    )
    return Table("", (f"on the {images:,} training images", "plain mean", "learnt weights"), rows)

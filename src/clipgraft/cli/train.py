"""`clipgraft train`."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli import checks
from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.shared import DataFlags, ModelFlags
from clipgraft.cli.flags.training import ClassTrainFlags, LoraFlags, RunFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.start import (
    carries_adapter,
    contradictions,
    graft,
    read_start,
    resolve_start,
    starts_from_adapter,
)
from clipgraft.cli.together import launcher, run_together
from clipgraft.errors import ClipgraftError
from clipgraft.options import Options
from clipgraft.train.args import TrainArgs

if TYPE_CHECKING:
    from clipgraft.data.datasets import Pairs
    from clipgraft.models.clip import Clip
    from clipgraft.train.distributed import World

log = logging.getLogger("clipgraft")
_SUMMARY = "Train a LoRA adapter (--use-lora), or fine-tune the model, on images with captions."


def run_train(argv: Sequence[str]) -> None:
    """Parse, train, and say how to go on with a run that is interrupted; under torchrun in all processes."""
    run_together(_run, argv)


def _run(argv: Sequence[str], several: World | None) -> None:
    kinds: list[type[Options]] = [ModelFlags, DataFlags, ClassTrainFlags, LoraFlags, TrainArgs, RunFlags]
    specs = parse("train", _SUMMARY, kinds, argv)
    _, data, classes, lora, train, where = specs
    faults = check_together(data, classes, lora, train, where)
    try:
        model_spec, lora, _ = resolve_start(specs[0], lora, where)
    except ClipgraftError as error:
        checks.refuse([*faults, *error.lines])
        raise
    specs = [model_spec, data, classes, lora, train, where]
    checks.refuse([*faults, *cheap_faults(specs, several)])
    from clipgraft.train.distributed import ALONE
    from clipgraft.train.interrupt import Interrupted
    from clipgraft.train.run_folder import early_lines, refuse_used

    def choose_folder() -> Path:
        chosen: Path = where.logs / (where.name or default_name(model_spec, lora, train))
        refuse_used(chosen, where.resume is not None)
        return chosen

    world = several or ALONE
    world.require_same({name: value for spec in specs for name, value in spec.model_dump().items()})
    folder = world.on_rank0(choose_folder)
    go_on = f"go on with: {continuation(argv, where.name or folder.name)}"
    world.advise(go_on)
    try:
        with early_lines():
            if classes.task == "classification":
                train_classifier(specs, folder, world)
            else:
                train_model(specs, folder, world)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; {go_on}") from None


def train_model(specs: Sequence[Any], folder: Path, world: World) -> None:
    """Load what the specs name, and train it into `folder`; rank 0 reads the tables."""
    from clipgraft.cli.common import fit_options, hand_over, load_own_model
    from clipgraft.cli.read_data import read_table
    from clipgraft.lora.config import auto_rank
    from clipgraft.train.fit import fit

    model_spec, data, _, lora, train, where = specs
    clip = load_own_model(model_spec, world)

    def read(path: Path, spec: DataFlags, what: str) -> Pairs:
        return world.on_rank0(lambda: read_table(clip, path, spec, what))

    train_pairs = read(data.train_data, data, "training data")
    val_spec = data.for_validation()
    val_pairs = read(data.val_data, val_spec, "validation data") if data.val_data else None
    pairs = sum(len(captions) for captions in train_pairs.captions)
    if lora.use_lora:
        graft(clip, lora, where, train.seed, lambda: auto_rank(pairs, "retrieval"))
    announce(clip, pairs, "pairs", train, world.world_size)
    done = fit(
        clip,
        train_pairs,
        val_pairs,
        out=folder,
        world=world,
        **fit_options(specs),
    )
    if world.is_rank0:
        hand_over(clip, folder, done.metrics or None, done.base)


def train_classifier(specs: Sequence[Any], folder: Path, world: World) -> None:
    """Load what the specs name, and train it into `folder` to tell classes apart; rank 0 reads the data."""
    from clipgraft.cli.common import fit_options, hand_over, load_own_model
    from clipgraft.cli.read_data import read_class_data
    from clipgraft.data.datasets import class_weights
    from clipgraft.lora.config import auto_rank
    from clipgraft.train.fit_classes import fit_classifier

    model_spec, data, classes, lora, train, where = specs
    clip = load_own_model(model_spec, world)
    read = world.on_rank0(lambda: read_class_data(data, classes, train.seed))
    if lora.use_lora:
        graft(clip, lora, where, train.seed, lambda: auto_rank(len(read.train), "classification"))
    announce(clip, len(read.train), "images", train, world.world_size)
    done = fit_classifier(
        clip,
        read.train,
        read.val,
        prompts=read.prompts,
        out=folder,
        head=classes.head,
        weights=class_weights(read.train) if classes.class_weights else None,
        world=world,
        **fit_options(specs),
    )
    if world.is_rank0:
        hand_over(clip, folder, done.metrics or None, done.base)


def cheap_faults(specs: Sequence[Any], several: World | None) -> list[str]:
    """What is wrong with paths, tables, model, targets, prompts, device and resume; no image is opened."""
    model_spec, data, classes, lora, train, where = specs
    name = where.name or default_name(model_spec, lora, train)
    faults = checks.output_faults("--logs", where.logs / name, folder=True)
    faults += checks.table_faults("--train-data", data.train_data, data, classes)
    faults += checks.table_faults(
        "--val-data", data.val_data, data.for_validation(), classes.for_validation()
    )
    if classes.task == "retrieval":
        faults += checks.batch_faults(data.train_data, data, train, several.world_size if several else 1)
    faults += checks.prompt_faults(classes)
    if several is None:
        faults += checks.device_faults(model_spec.device)
    clip, wrong = checks.structure_of(model_spec)
    faults += wrong
    if where.from_ is not None and starts_from_adapter(where.from_):
        faults += checks.adapter_faults("--from", where.from_, clip, where.peft_out_proj)
        if clip is not None and not faults:
            faults += contradictions(clip, read_start(clip, where.from_, where), lora)
    elif lora.use_lora:
        faults += checks.target_faults(clip, lora)
    elif _all_locked(train) and classes.head == "prompts" and not carries_adapter(model_spec):
        faults.append("nothing to train: both towers are frozen; drop a --lock flag or add --use-lora")
    return faults + checks.resume_faults(where.logs / name, lora, train, where)


def _all_locked(train: TrainArgs) -> bool:
    """Whether the lock flags leave nothing of the model to train."""
    unlocked = train.lock_image_unlocked_groups or train.lock_text_unlocked_layers
    return train.lock_image and train.lock_text and not unlocked


def check_together(
    data: DataFlags, classes: ClassTrainFlags, lora: LoraFlags, train: TrainArgs, where: RunFlags
) -> list[str]:
    """Faults that each spec alone cannot see."""
    faults = [*_data_faults(data), *checks.class_faults(classes, data)]
    faults += [*_lora_faults(lora, train, where), *_lock_faults(lora, train), *train.epoch_faults()]
    if train.cache_views is not None and not train.augment:
        faults.append("--cache-views given without --augment: add --augment, or drop --cache-views")
    if where.resume is not None and where.name is None:
        faults.append("--resume latest needs --name: the name of the run to continue")
    return faults


def _data_faults(data: DataFlags) -> list[str]:
    faults = []
    if data.train_data is None:
        faults.append("--train-data is missing: a table of images and captions, or a folder of both")
    for name, path in (("--train-data", data.train_data), ("--val-data", data.val_data)):
        if path is not None:
            faults += checks.missing_data(name, path)
    return faults


def _lora_faults(lora: LoraFlags, train: TrainArgs, where: RunFlags) -> list[str]:
    faults = []
    given = sorted(name for name in lora.model_fields_set if name != "use_lora")
    given += [name for name in ("lora_plus_ratio",) if name in train.model_fields_set]
    if where.peft_out_proj is not None and where.from_ is None:
        faults.append("--peft-out-proj given without --from, whose adapter it is about: drop it")
    if given and not lora.use_lora and (where.from_ is None or not starts_from_adapter(where.from_)):
        faults.append(
            f"{', '.join(map(flag, given))} given without --use-lora: add --use-lora to train an adapter"
        )
    if lora.use_lora and lora.model_fields_set & {"lora_variant", "lora_variant_options", "lora_dora"}:
        faults += checks.variant_faults(lora)
    if lora.lora_targets and lora.lora_target_modules:
        faults.append("--lora-targets and --lora-target-modules both choose sites: give one of them")
    if "save_lora_only" in where.model_fields_set and not (lora.use_lora or where.from_ is not None):
        keeping = "--save-lora-only" if where.save_lora_only else "--no-save-lora-only"
        faults.append(f"{keeping} given without --use-lora: there is no adapter to save")
    return faults


def _lock_faults(lora: LoraFlags, train: TrainArgs) -> list[str]:
    faults = []
    unlocked = (
        ("--lock-image", "--lock-image-unlocked-groups", train.lock_image, train.lock_image_unlocked_groups),
        ("--lock-text", "--lock-text-unlocked-layers", train.lock_text, train.lock_text_unlocked_layers),
    )
    for lock, groups, locked, number in unlocked:
        if number and lora.use_lora:
            faults.append(f"{groups} given with --use-lora, which freezes the whole base: drop one of them")
        elif number and not locked:
            faults.append(f"{groups} given without {lock}: add {lock}")
    return faults


def continuation(argv: Sequence[str], name: str) -> str:
    """The command that goes on with an interrupted run, to be pasted into a shell.

    Where torchrun started processes on several machines, its own flags are the user's to repeat.
    """
    given = {argument.partition("=")[0] for argument in argv}
    wanted = {"--name": name, "--resume": "latest"}
    added = [word for option, value in wanted.items() if option not in given for word in (option, value)]
    return f"{launcher()} {shlex.join(['train', *argv, *added])}"


def default_name(model: ModelFlags, lora: LoraFlags, train: TrainArgs) -> str:
    """Date, model and the settings that differ most between runs, as open_clip names its runs."""
    stem = Path(model.model.removeprefix("hf:")).stem.replace("/", "-")
    kind = f"lora_r{lora.lora_r}" if lora.use_lora else "full"
    return f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{stem}-{kind}-lr_{train.lr:g}-b_{train.batch_size}"


def announce(clip: Clip, rows: int, unit: str, train: TrainArgs, processes: int = 1) -> None:
    """One line on what is about to train; `unit` is what the rows are: pairs, or images."""
    import torch

    from clipgraft.lora.parameters import count_parameters
    from clipgraft.lora.state import lora_state

    count = count_parameters(clip)
    if lora_state(clip) is not None:
        share = 100 * count.trainable / count.total
        log.info("training %s of %s weights (%.2f %%)", f"{count.trainable:,}", f"{count.total:,}", share)
    elif clip.dtype == torch.bfloat16:
        log.info("--precision bf16 rounds small updates of the model away; --precision amp_bf16 keeps them")
    batch, epochs = train.batch_size * train.accum_freq * processes, train.epochs
    shared = f" in {processes} processes" if processes > 1 else ""
    plural = "s" if epochs > 1 else ""
    log.info("%d %s, batches of %d%s, %d epoch%s", rows, unit, batch, shared, epochs, plural)

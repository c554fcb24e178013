"""`clipgraft train`."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli import checks
from clipgraft.cli.common import (
    base_below,
    contradictions,
    graft,
    read_start,
    resolve_start,
    starts_from_adapter,
)
from clipgraft.cli.flags.groups import AnyGroup, flag, recorded
from clipgraft.cli.flags.shared import DataFlags, ModelFlags, features_of
from clipgraft.cli.flags.training import (
    RUN,
    ClassTrainFlags,
    LoraFlags,
    RetainFlags,
    RunFlags,
    TranslateFlags,
)
from clipgraft.cli.parser import parse
from clipgraft.cli.terminal import silence
from clipgraft.data.args import FeatureArgs
from clipgraft.errors import ClipgraftError, HubError
from clipgraft.train.args import RunArgs, TrainArgs
from clipgraft.train.launch import several

if TYPE_CHECKING:
    from clipgraft.cli.training_data import ClassData, PairData, TranslationData
    from clipgraft.data.retained import Retained
    from clipgraft.lora.config import Task
    from clipgraft.models.clip import Clip
    from clipgraft.train.distributed import World

log = logging.getLogger("clipgraft")
_SUMMARY = "Train a LoRA adapter (--use-lora), or fine-tune the model, on images with captions."


_KINDS: list[AnyGroup] = [
    *(
        ModelFlags,
        DataFlags,
        ClassTrainFlags,
        LoraFlags,
        TrainArgs,
        RetainFlags,
        TranslateFlags,
        RUN,
        RunFlags,
    )
]


@dataclass(frozen=True)
class TrainCommand:
    """What `clipgraft train` was asked for.

    Attributes:
        keep: what the run keeps; `place` says where, and what it goes on from.
    """

    model: ModelFlags
    data: DataFlags
    classes: ClassTrainFlags
    lora: LoraFlags
    train: TrainArgs
    retain: RetainFlags
    translate: TranslateFlags
    keep: RunArgs
    place: RunFlags

    @property
    def name(self) -> str:
        return self.place.name or default_name(self.model, self.lora, self.train)

    @property
    def retains(self) -> str:
        """What the model is held to: a path, auto or none; a run whose rate is given is run as it is told.

        Translations hold it by themselves: to their source texts.
        """
        if self.retain.retain is not None:
            return self.retain.retain
        if self.translates:
            return "none"
        trains = self.lora.use_lora or self.place.from_ is not None or not _all_locked(self.train)
        return "auto" if self.train.lr == "auto" and trains else "none"

    def record(self) -> dict[str, Any]:
        """All flags by their names."""
        return recorded(_KINDS, [getattr(self, part.name) for part in fields(self)])

    def run(self, folder: Path) -> RunArgs:
        return self.keep.replace(out=folder, resume=self.place.resume is not None, params=self.record())

    @property
    def translates(self) -> bool:
        """Whether it learns from translations."""
        return self.translate.recipe == "translate"

    @property
    def features(self) -> FeatureArgs:
        return features_of(self.data, self.model.autocast)


def run_train(argv: Sequence[str]) -> None:
    """Parse, train, and say how to go on with a run that is interrupted; under torchrun in all processes.

    Only rank 0 writes to the terminal, but for the one process whose error ends the run.
    """
    if not several():
        _run(argv, None)
        return
    from clipgraft.train.launch import joined

    with joined(_exit) as world, contextlib.nullcontext() if world.is_rank0 else silence():
        _run(argv, world)


def _exit(code: int, told: str | None) -> None:
    """End the process of a command, whatever it is doing: in a collective on a GPU it hears nothing else."""
    if told is not None:
        os.write(2, f"clipgraft: {told}\n".encode())
    os._exit(code)


def _run(argv: Sequence[str], started: World | None) -> None:
    command = TrainCommand(*parse("train", _SUMMARY, _KINDS, argv))
    faults = check_together(command)
    try:
        model, lora, _ = resolve_start(command.model, command.lora, command.place)
    except ClipgraftError as error:
        checks.refuse([*faults, *error.lines])
        raise
    command = replace(command, model=model, lora=lora)
    checks.refuse([*faults, *cheap_faults(command, started)])
    from clipgraft.train.distributed import ALONE
    from clipgraft.train.loop import Interrupted
    from clipgraft.train.run_folder import early_lines, refuse_used

    def choose_folder() -> Path:
        chosen = command.place.logs / command.name
        refuse_used(chosen, command.place.resume is not None)
        return chosen

    world = started or ALONE
    world.require_same(command.record())
    folder = world.on_rank0(choose_folder)
    go_on = f"go on with: {continuation(argv, command.place.name or folder.name)}"
    world.advise(go_on)
    try:
        with early_lines():
            _train(command, folder, world)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; {go_on}") from None


def _train(command: TrainCommand, folder: Path, world: World) -> None:
    """Load what the command names, and train it into `folder`; rank 0 reads the data."""
    from clipgraft.cli.common import hand_over, load_own_model
    from clipgraft.lora.config import auto_rank
    from clipgraft.train.run import run_recipe

    lora, train = command.lora, command.train
    clip = load_own_model(command.model, world)
    data = world.on_rank0(lambda: _read(command, clip))
    if lora.use_lora:
        task: Task = "classification" if data.task == "classification" else "retrieval"
        graft(clip, lora, command.place, train.seed, lambda: auto_rank(data.rows, task))
    retained = world.on_rank0(lambda: retained_by(command, clip))
    announce(clip, data.rows, data.unit, train, world.world_size)
    done = run_recipe(clip, data.recipe(retained), train, command.run(folder), command.features, world)
    if world.is_rank0:
        hand_over(clip, folder, done.metrics or None, done.base)
        if command.place.push_to_hub is not None:
            _push(folder, command.place.push_to_hub)


def _read(command: TrainCommand, clip: Clip) -> PairData | ClassData | TranslationData:
    from clipgraft.cli.training_data import read_training_data, read_translation_data

    data, classes, seed = command.data, command.classes, command.train.seed
    if command.translates:
        return read_translation_data(clip, data, command.translate, classes.val_size, seed)
    return read_training_data(clip, data, classes, seed)


def _push(folder: Path, repository: str) -> None:
    """Publish what was trained; where that fails, say that the run is whole, and how to push it."""
    from clipgraft.cli.push import publish
    from clipgraft.report.args import PushArgs

    try:
        publish(folder, repository, PushArgs())
    except ClipgraftError as error:
        again = shlex.join(["clipgraft", "push", str(folder), repository])
        raise HubError(f"{error}; the run in {folder} is whole, push it with: {again}") from error


def retained_by(command: TrainCommand, clip: Clip) -> Retained | None:
    """Make what the model is not to forget; None for nothing. Pictures are read if they hold something."""
    from clipgraft.cli.training_data import read_what_to_retain
    from clipgraft.data.retained import retained_texts
    from clipgraft.train.feed import trains

    flags = command.retain
    if command.retains == "none":
        return None
    if command.retains == "auto":
        return retained_texts(clip, flags.retain_weight)
    frozen = command.train.lock_image and not command.train.lock_image_unlocked_groups
    images = trains(clip, "vision") and not (frozen and not command.lora.use_lora)
    return read_what_to_retain(flags, command.data, images)


def _unreadable_texts(command: TrainCommand) -> list[str]:
    """Find texts to retain that are none, or too few; a path at which nothing is, is told elsewhere."""
    from clipgraft.cli.training_data import read_what_to_retain

    given = command.retain
    if given.retain in (None, "none", "auto") or not Path(str(given.retain)).exists():
        return []
    return checks.fault_of(lambda: read_what_to_retain(given, command.data), "--retain")


def cheap_faults(command: TrainCommand, started: World | None) -> list[str]:
    """Find faults of paths, tables, model, targets, prompts, device and resume; no image is opened."""
    data, classes, lora, train = command.data, command.classes, command.lora, command.train
    where, name = command.place, command.name
    faults = checks.output_faults("--logs", where.logs / name, folder=True)
    if command.translates:
        faults += checks.translation_faults(data, command.translate)
    else:
        faults += checks.table_faults("--train-data", data.train_data, data, classes)
        faults += checks.table_faults(
            "--val-data", data.val_data, data.for_validation(), classes.for_validation()
        )
    if classes.task == "retrieval" and not command.translates:
        faults += checks.batch_faults(data.train_data, data, train, started.world_size if started else 1)
    faults += checks.prompt_faults(classes)
    faults += _unreadable_texts(command)
    if started is None:
        faults += checks.device_faults(command.model.device)
    clip, wrong = checks.structure_of(command.model)
    faults += wrong + checks.loss_faults(clip, classes, train)
    if where.from_ is not None and starts_from_adapter(where.from_):
        faults += checks.adapter_faults("--from", where.from_, clip, where.peft_out_proj)
        if clip is not None and not faults:
            faults += contradictions(clip, read_start(clip, where.from_, where), lora)
    elif lora.use_lora:
        faults += checks.target_faults(clip, lora)
    elif _all_locked(train) and classes.head == "prompts" and base_below(command.model) is None:
        faults.append("nothing to train: both towers are frozen; drop a --lock flag or add --use-lora")
    return faults + checks.resume_faults(where.logs / name, lora, train, where)


def _all_locked(train: TrainArgs) -> bool:
    """Whether the lock flags leave nothing of the model to train."""
    unlocked = train.lock_image_unlocked_groups or train.lock_text_unlocked_layers
    return train.lock_image and train.lock_text and not unlocked


def check_together(command: TrainCommand) -> list[str]:
    """Find faults that no group of flags alone shows."""
    data, lora, train, where = command.data, command.lora, command.train, command.place
    faults = [*_data_faults(data), *_translate_faults(command)]
    faults += checks.class_faults(command.classes, data, val_size=command.translates)
    faults += [
        *_retain_faults(command),
        *_patience_faults(command),
        *_lora_faults(command),
        *_lock_faults(lora, train),
        *train.epoch_faults(),
    ]
    if train.cache_views is not None and not train.augment:
        faults.append("--cache-views given without --augment: add --augment, or drop --cache-views")
    if where.push_to_hub is not None and not lora.use_lora and where.from_ is None:
        faults.append("--push-to-hub publishes an adapter: add --use-lora, or drop it")
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


def _translate_faults(command: TrainCommand) -> list[str]:
    given = command.translate
    if not command.translates:
        named = sorted(name for name in given.model_fields_set if getattr(given, name) is not None)
        return [f"{', '.join(map(flag, named))} given without --recipe translate: add it"] if named else []
    faults = []
    if command.classes.task == "classification":
        faults.append(
            "--recipe translate and --task classification are two things to learn: drop one of them"
        )
    if "translation_weight" in given.model_fields_set and given.pairs is None:
        faults.append("--translation-weight counts beside --pairs: add them, or drop it")
    for name, path in (("--pairs", given.pairs), ("--val-pairs", given.val_pairs)):
        if path is not None:
            faults += checks.missing_data(name, path)
    return faults


def _retain_faults(command: TrainCommand) -> list[str]:
    given = command.retain
    if command.retains == "none" and "retain_weight" in given.model_fields_set:
        return ["--retain-weight given without --retain: say what to retain, or drop it"]
    if command.retains in ("none", "auto"):
        return []
    assert given.retain is not None
    return checks.missing_data("--retain", Path(given.retain))


def _patience_faults(command: TrainCommand) -> list[str]:
    validated = command.data.val_data or command.classes.val_size or command.translates
    if command.keep.patience in (None, "auto") or validated:
        return []
    return ["--patience needs validation data, by which the best epoch is known: add --val-data"]


def _lora_faults(command: TrainCommand) -> list[str]:
    lora, where, keep, faults = command.lora, command.place, command.keep, []
    given = sorted(name for name in lora.model_fields_set if name != "use_lora")
    given += [name for name in ("lora_plus_ratio",) if name in command.train.model_fields_set]
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
    if "save_lora_only" in keep.model_fields_set and not (lora.use_lora or where.from_ is not None):
        keeping = "--save-lora-only" if keep.save_lora_only else "--no-save-lora-only"
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
    """Write the shell command that resumes an interrupted run.

    Where torchrun started processes on several machines, its own flags are the user's to repeat.
    """
    given = {argument.partition("=")[0] for argument in argv}
    wanted = {"--name": name, "--resume": "latest"}
    added = [word for option, value in wanted.items() if option not in given for word in (option, value)]
    return f"{launcher()} {shlex.join(['train', *argv, *added])}"


def default_name(model: ModelFlags, lora: LoraFlags, train: TrainArgs) -> str:
    """Name a run by date, model and the settings that differ most, as open_clip does."""
    stem = Path(model.model.removeprefix("hf:")).stem.replace("/", "-")
    kind = f"lora_r{lora.lora_r}" if lora.use_lora else "full"
    return f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{stem}-{kind}-lr_{train.lr}-b_{train.batch_size}"


def announce(clip: Clip, rows: int, unit: str, train: TrainArgs, processes: int = 1) -> None:
    """Log one line on what is about to train; `unit` says what the rows are: pairs or images."""
    import torch

    from clipgraft.lora.state import count_parameters, lora_state

    count = count_parameters(clip)
    if lora_state(clip) is not None:
        share = 100 * count.trainable / count.total
        log.info("training %s of %s weights (%.2f %%)", f"{count.trainable:,}", f"{count.total:,}", share)
    elif clip.dtype == torch.bfloat16:
        log.info("--precision bf16 rounds small updates of the model away; --precision amp_bf16 keeps them")
    batch, epochs = train.batch_size * train.accum_freq * processes, train.epochs
    shared = f" in {processes} processes" if processes > 1 else ""
    passes = "" if epochs == "auto" else f", {epochs} epoch{'s' * (epochs > 1)}"
    log.info("%d %s, batches of %d%s%s", rows, unit, batch, shared, passes)


def launcher(environment: Mapping[str, str] = os.environ) -> str:
    """Write what this process was started with, before its verb: `clipgraft`, or torchrun and its flags."""
    if not several(environment):
        return "clipgraft"
    size, here = environment["WORLD_SIZE"], environment.get("LOCAL_WORLD_SIZE")
    flags = f"--nproc-per-node {shlex.quote(size)}" if here in (size, None) else "[its flags as before]"
    # Without `--` torchrun takes --logs for the beginning of a flag of its own.
    return f"torchrun {flags} -m -- clipgraft"

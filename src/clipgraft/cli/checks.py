"""Check a command before anything slow: all faults that show without weights or pixels.

Each function gives faults, one line each, so that a command tells all of them at once, before it loads a
model or opens an image.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.shared import ClassFlags, DataFlags, ModelFlags
from clipgraft.cli.flags.training import (
    DEFAULT_TARGETS,
    ClassTrainFlags,
    LoraFlags,
    RunFlags,
    TranslateFlags,
)
from clipgraft.cli.terminal import wording
from clipgraft.data.args import ColumnArgs, LabelArgs, TableArgs
from clipgraft.errors import ClipgraftError, together
from clipgraft.files import path_exists
from clipgraft.options import part
from clipgraft.train.args import RunArgs, TrainArgs

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic")
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
# Settings that processes and micro-batches may share otherwise when a run goes on, and those of its end.
_FREE = {"batch_size", "accum_freq", "epochs", "epoch_parts"}


def refuse(faults: Iterable[str]) -> None:
    """Raise ConfigError with all faults, each once; nothing if there are none."""
    if lines := list(dict.fromkeys(faults)):
        raise together(lines)


def fault_of(check: Callable[[], object], prefix: str = "") -> list[str]:
    """Collect the faults that a check raises, each after the flag it belongs to."""
    try:
        check()
    except ClipgraftError as error:
        lines = [wording(line) for line in error.lines]
        return [f"{prefix}: {line}" if prefix and not line.startswith(prefix) else line for line in lines]
    return []


def missing_data(name: str, path: Path) -> list[str]:
    """Find what is wrong with a path to data, before anything is read: nothing, or one line."""
    from clipgraft.data.addresses import as_address
    from clipgraft.data.webdataset import find_tars, is_tar_pattern

    if path.exists():
        return []
    if as_address(path) is not None and not is_tar_pattern(path):
        return []
    if is_tar_pattern(path):
        return fault_of(lambda: find_tars(path), name)
    return [f"{name} {path}: there is no such file or folder; check the path"]


def table_faults(
    name: str, path: Path | None, columns: ColumnArgs, classes: ClassFlags | None = None
) -> list[str]:
    """Find columns that the header of a table lacks, or of a folder's captions file; no row is read.

    With `classes` of classification it is one of images and labels. A path at which nothing is, is another's
    fault to tell.
    """
    from clipgraft.data.addresses import as_address
    from clipgraft.data.doors import open_table
    from clipgraft.data.table import LABELS
    from clipgraft.data.text_files import is_tar_name

    if path is None or not (path.exists() or is_tar_name(path.name) or as_address(path)):
        return []
    if path.is_file() and path.suffix.lower() in _PICTURES:
        return [f"{name} {path}: is one picture; name a table of images and captions, or a folder"]
    if classes is not None and classes.task == "classification":
        given = part(columns, LabelArgs, csv_label_key=classes.csv_label_key)
        return fault_of(lambda: open_table(path, given, LABELS), name)
    return fault_of(lambda: open_table(path, part(columns, TableArgs)), name)


def translation_faults(data: DataFlags, flags: TranslateFlags) -> list[str]:
    """Find columns that the header of a table of translations lacks, or of the pairs beside it."""
    from clipgraft.cli.training_data import of_pairs, translation_args
    from clipgraft.data.doors import open_table
    from clipgraft.data.table import TRANSLATIONS

    faults = []
    for name, path, columns in (
        ("--train-data", data.train_data, data),
        ("--val-data", data.val_data, data.for_validation()),
    ):
        if path is not None and path.exists():
            args = translation_args(columns, flags)
            faults += fault_of(partial(open_table, path, args, TRANSLATIONS), name)
    for name, path in (("--pairs", flags.pairs), ("--val-pairs", flags.val_pairs)):
        faults += table_faults(name, path, of_pairs(data))
    return faults


def batch_faults(path: Path | None, columns: ColumnArgs, train: TrainArgs, processes: int = 1) -> list[str]:
    """Find a table with fewer rows than one step takes; only so many rows are read."""
    from clipgraft.data.doors import open_table

    if path is None or not path.is_file():
        return []
    needed = train.batch_size * train.accum_freq * processes
    try:
        table = open_table(path, part(columns, TableArgs))
        found = sum(len(getattr(row, "texts", ())) for row in islice(table.rows(), needed))
    except ClipgraftError:  # told by whoever looks at the header, or at the rows
        return []
    if found >= needed:
        return []
    step = " x ".join(
        [
            f"--batch-size {train.batch_size}",
            *([f"--accum-freq {train.accum_freq}"] if train.accum_freq > 1 else []),
            *([f"{processes} processes"] if processes > 1 else []),
        ]
    )
    largest = found // (train.accum_freq * processes)
    fix = f"use --batch-size {largest} or less" if largest >= 2 else "add data, or lower --accum-freq"
    return [f"{found} captions do not fill one batch of {step}: {fix}"]


def output_faults(name: str, path: Path | None, *, folder: bool = False) -> list[str]:
    """Find a place that cannot be written to, by trying the nearest existing folder; leaves nothing."""
    if path is None:
        return []
    if folder and path.exists() and not path.is_dir():
        return [f"{name} {path} is a file: name a folder"]
    if not folder and path.is_dir():
        return [f"{name} {path} is a folder: name a file in it"]
    above = path if path.is_dir() else path.parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        return [f"{name} {path}: {above} is a file, and no folder can be made below it; choose another path"]
    try:
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        with tempfile.TemporaryFile(dir=above):
            return []
    except OSError as error:
        return [f"{name} {path}: cannot write in {above}: {error.strerror}; choose another path"]


def device_faults(name: str) -> list[str]:
    """Find a device that does not exist here."""
    from clipgraft.cli.common import pick_device

    return fault_of(lambda: pick_device(name))


def structure_of(model: ModelFlags) -> tuple[Clip | None, list[str]]:
    """Build a model without its weights, to check sites; None if only loading it will tell.

    What is no name and no path of a model is a fault.
    """
    from clipgraft.adapters.open import split_adapter
    from clipgraft.models.meta import clip_on_meta

    place = Path(model.model)
    if place.is_file() and place.suffix.lower() in _TABLES:
        told = "is a table of data: name it with --train-data or --val-data, and here a model"
        return None, [f"--model {place}: {told}"]
    if model.pretrained and (Path(model.pretrained) / "adapter_config.json").is_file():
        told = "is an adapter: name it with --model, which brings its base"
        return None, [f"--pretrained {model.pretrained}: {told}"]
    try:
        source, _ = split_adapter(model.model, model.pretrained)
        tag = source.pretrained if source.pretrained and not path_exists(source.pretrained) else None
        return clip_on_meta(source.name, pretrained=None if tag == "none" else tag), []
    except ClipgraftError as error:
        there = Path(model.model.removeprefix("hf:")).exists() or model.model.startswith(("hf:", "hf-hub:"))
        said = str(error) if str(error).startswith(model.model) else f"{model.model}: {error}"
        return None, [] if there else [f"--model {said}"]


def target_faults(clip: Clip | None, lora: LoraFlags) -> list[str]:
    """Find targets and patterns that name no site of the model."""
    from clipgraft.lora.targets import override_values, select_sites

    if faults := fault_of(lambda: lora.asked_targets):
        return faults
    if clip is None:
        return []
    sites, targets = clip.sites, lora.asked_targets or DEFAULT_TARGETS
    faults = fault_of(lambda: select_sites(sites, targets), "--lora-targets")
    if faults:
        return faults
    adapted = select_sites(sites, targets)
    patterns: Mapping[str, Mapping[str, Any]] = {
        "--lora-rank-pattern": lora.lora_rank_pattern,
        "--lora-alpha-pattern": lora.lora_alpha_pattern,
    }
    for name, pattern in patterns.items():
        faults += fault_of(partial(override_values, sites, adapted, pattern), name)
    return faults


def variant_faults(lora: LoraFlags) -> list[str]:
    """Find options that the variant of the adapter does not have."""
    from clipgraft.lora.variants import check_variant

    r = 16 if lora.lora_r == "auto" else int(lora.lora_r)
    return fault_of(lambda: check_variant(lora.adapter(r, lora.lora_targets or DEFAULT_TARGETS)))


def adapter_faults(name: str, path: Path, clip: Clip | None, out_proj: Any = None) -> list[str]:
    """Find an adapter that is missing, cannot be read, or has sites that the model lacks."""
    from clipgraft.cli.common import read_adapter

    return fault_of(lambda: read_adapter(path, out_proj, clip), name)


def prompt_faults(classes: ClassFlags) -> list[str]:
    """Find prompts and templates that cannot be read."""
    from clipgraft.data.prompts import find_templates, read_prompts

    if classes.task != "classification":
        return []
    prompts = classes.prompts
    faults = [] if prompts is None or not prompts.exists() else fault_of(lambda: read_prompts(prompts))
    return faults + fault_of(lambda: find_templates(classes.templates))


def resume_faults(folder: Path, lora: LoraFlags, train: TrainArgs, where: RunFlags) -> list[str]:
    """Find flags that do not fit the checkpoint to resume from."""
    from clipgraft.train.checkpoint import recorded_parts, recorded_settings
    from clipgraft.train.run_folder import latest_checkpoint
    from clipgraft.train.schedule import plan_epochs

    latest = latest_checkpoint(folder)
    if where.resume is None or not latest.exists():
        return []
    try:
        settings = recorded_settings(latest)
    except ClipgraftError as error:
        return [*error.lines]
    before, faults = recorded_parts(settings), []
    fewer = before is not None and train.epochs != "auto" and train.planned_epochs < sum(before)
    if fewer or (before is not None and train.epoch_parts):
        faults += fault_of(lambda: plan_epochs(train, RunArgs(out=folder, resume=True), rows=0))
    open_ = _FREE | ({"loss"} if train.loss == "auto" else set())  # what it comes to is in the settings
    now = {name: value for name, value in train.model_dump().items() if name not in open_}
    changed = {
        name: (settings[name], now[name]) for name in now if name in settings and settings[name] != now[name]
    }
    own = settings.get("lora")
    if (own is not None) != lora.use_lora and where.from_ is None:
        changed["use_lora"] = (own is not None, lora.use_lora)
    elif isinstance(own, Mapping) and where.from_ is None and lora.lora_r != "auto":
        if own.get("r") != lora.lora_r:
            changed["lora_r"] = (own.get("r"), lora.lora_r)
        if own.get("dropout") != lora.lora_dropout:
            changed["lora_dropout"] = (own.get("dropout"), lora.lora_dropout)
    if changed:
        listed = ", ".join(f"{flag(name)} (was {was!r}, now {is_!r})" for name, (was, is_) in changed.items())
        faults.append(
            f"{latest} belongs to a run with other settings: {listed}; use the same settings, or a new --name"
        )
    return faults


def loss_faults(clip: Clip | None, classes: ClassFlags, train: TrainArgs) -> list[str]:
    """Find a loss that classes, or the model, cannot be trained with."""
    from clipgraft.train.recipes.classification import class_loss
    from clipgraft.train.recipes.pair_losses import choose_loss

    if classes.task == "classification":
        return fault_of(lambda: class_loss(train.loss))
    return [] if clip is None else fault_of(lambda: choose_loss(clip, train.loss))


def class_faults(classes: ClassFlags, data: DataFlags, *, val_size: bool = False) -> list[str]:
    """Find flags of classification that do not go together; `val_size` may have another use."""
    faults = []
    free = {"task", "val_size"} if val_size else {"task"}
    given = sorted(name for name in classes.model_fields_set if name not in free)
    if given and classes.task == "retrieval":
        faults.append(f"{', '.join(map(flag, given))} given without --task classification: add it")
    if isinstance(classes, ClassTrainFlags) and classes.val_size is not None and data.val_data is not None:
        faults.append("--val-size and --val-data both say what to evaluate on: give one of them")
    if classes.prompts is not None and not classes.prompts.exists():
        faults.append(f"--prompts {classes.prompts}: there is no such file; check the path")
    return faults

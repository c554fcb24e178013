"""`clipgraft train`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli.parser import parse
from clipgraft.config import DataSpec, LoraSpec, ModelSpec, RunSpec, Spec, TrainSpec, flag
from clipgraft.errors import ConfigError

if TYPE_CHECKING:
    from clipgraft.data.pairs import Pairs
    from clipgraft.models.clip import Clip

log = logging.getLogger("clipgraft")
_SUMMARY = "Train a LoRA adapter (--use-lora), or fine-tune the model, on images with captions."


def run(argv: Sequence[str]) -> None:
    """Parse, load, train, and say what was made."""
    kinds: list[type[Spec]] = [ModelSpec, DataSpec, LoraSpec, TrainSpec, RunSpec]
    model_spec, data, lora, train, where = parse("train", _SUMMARY, kinds, argv)
    check_together(data, lora, where)
    folder = where.logs / (where.name or default_name(model_spec, lora, train))
    from clipgraft.cli.common import load_model, read_table
    from clipgraft.train.fit import fit, headline
    from clipgraft.train.loop import Interrupted

    clip = load_model(model_spec)
    train_pairs = read_table(clip, data.train_data, data, "training data")
    val_pairs = read_table(clip, data.val_data, data, "validation data") if data.val_data else None
    if lora.use_lora:
        graft(clip, lora, train.seed)
    announce(clip, train_pairs, train)
    try:
        result = fit(
            clip,
            train_pairs,
            val_pairs,
            out=folder,
            resume=where.resume is not None,
            save_frequency=where.save_frequency,
            val_frequency=where.val_frequency,
            save_lora_only=where.save_lora_only,
            checkpoint_steps=where.checkpoint_steps,
            autocast=model_spec.precision == "amp_bf16",
            workers=data.workers,
            params={
                **model_spec.model_dump(),
                **data.model_dump(),
                **lora.model_dump(),
                **where.model_dump(),
            },
            **train.model_dump(),
        )
    except Interrupted as stop:
        raise KeyboardInterrupt(
            f"{stop}; continue with the same command and --name {folder.name} --resume latest"
        ) from None
    if result.history:
        log.info("after the last epoch: %s", headline(result.history[-1]))
    log.info(
        "saved %s (%.2f MB, %s trained weights, %.0f s)",
        result.saved,
        result.bytes / 1e6,
        f"{result.trainable:,}",
        result.seconds,
    )


def check_together(data: DataSpec, lora: LoraSpec, where: RunSpec) -> None:
    """What each spec alone cannot see; all faults at once.

    Raises:
        ConfigError: naming the flags.
    """
    faults = []
    if data.train_data is None:
        faults.append("--train-data is missing: a table of images and captions, or a folder of both")
    given = sorted(name for name in lora.model_fields_set if name != "use_lora")
    if given and not lora.use_lora:
        faults.append(
            f"{', '.join(map(flag, given))} given without --use-lora: add --use-lora to train an adapter"
        )
    if lora.lora_targets and lora.lora_target_modules:
        faults.append("--lora-targets and --lora-target-modules both choose sites: give one of them")
    if where.save_lora_only and not lora.use_lora:
        faults.append("--save-lora-only given without --use-lora: there is no adapter to save")
    if where.resume is not None and where.resume != "latest":
        faults.append(f"--resume: got {where.resume!r}, allowed is latest")
    if where.resume is not None and where.name is None:
        faults.append("--resume latest needs --name: the name of the run to continue")
    if faults:
        raise ConfigError("\n".join(faults))


def default_name(model: ModelSpec, lora: LoraSpec, train: TrainSpec) -> str:
    """Date, model and the settings that differ most between runs, as open_clip names its runs."""
    stem = Path(model.model.removeprefix("hf:")).stem.replace("/", "-")
    kind = f"lora_r{lora.lora_r}" if lora.use_lora else "full"
    return f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{stem}-{kind}-lr_{train.lr:g}-b_{train.batch_size}"


def graft(clip: Clip, lora: LoraSpec, seed: int) -> None:
    """Attach the adapter that the flags describe."""
    import torch

    from clipgraft.lora.inject import apply_lora
    from clipgraft.lora.targets import guide_targets

    targets = lora.lora_targets or "text-attention"
    if lora.lora_target_modules is not None:
        targets = guide_targets(lora.lora_target_modules)
    torch.manual_seed(seed)
    sites = apply_lora(
        clip,
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=targets,
        use_rslora=lora.lora_rslora,
        rank_pattern=lora.lora_rank_pattern,
        alpha_pattern=lora.lora_alpha_pattern,
        train_logit_scale=lora.lora_train_logit_scale,
    )
    log.info("LoRA r=%d on %d sites (%s)", lora.lora_r, sites, targets)


def announce(clip: Clip, pairs: Pairs, train: TrainSpec) -> None:
    """One line on what is about to train."""
    from clipgraft.lora.inject import count_parameters, lora_state

    count = count_parameters(clip)
    if lora_state(clip) is not None:
        share = 100 * count.trainable / count.total
        log.info("training %s of %s weights (%.2f %%)", f"{count.trainable:,}", f"{count.total:,}", share)
    rows = sum(len(captions) for captions in pairs.captions)
    log.info("%d pairs, batches of %d, %d epochs", rows, train.batch_size * train.accum_freq, train.epochs)

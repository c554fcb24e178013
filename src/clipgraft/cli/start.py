"""Prepare a model for training: the weights of `--from`, or a new adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.shared import ModelFlags
from clipgraft.cli.flags.training import LoraFlags, RunFlags
from clipgraft.errors import AdapterError, ClipgraftError, ConfigError, together

if TYPE_CHECKING:
    from clipgraft.adapters.adapter_file import AdapterFile
    from clipgraft.lora.config import LoraConfig
    from clipgraft.models.clip import Clip

log = logging.getLogger("clipgraft")
# Options that an adapter file has already, and that may change nevertheless.
_MAY_CHANGE = ("dropout", "targets", "target_modules", "init")


def starts_from_adapter(path: Path) -> bool:
    """Whether `--from` names an adapter and not a fine-tuned model; a missing path counts as an adapter."""
    from clipgraft.adapters.folder import is_adapter
    from clipgraft.adapters.run_folder import find_run_model

    found = None if is_adapter(path) else find_run_model(path)
    return found is None or found.kind == "adapter"


def carries_adapter(model: ModelFlags) -> bool:
    """Whether `--model` names an adapter on its base."""
    from clipgraft.adapters.open import split_adapter

    try:
        return split_adapter(model.model, model.pretrained)[1] is not None
    except ClipgraftError:  # told by whoever loads it
        return False


def resolve_start(
    model: ModelFlags, lora: LoraFlags, where: RunFlags
) -> tuple[ModelFlags, LoraFlags, Path | None]:
    """Resolve `--from` into the base, the LoRA flags, and the adapter to load if it is one.

    Raises:
        AdapterError: there is nothing to start from, or the adapter does not name its base.
        CheckpointError: the run has saved nothing yet.
        ConfigError: another base is named than a fine-tuned run's own.
    """
    from clipgraft.adapters.convert import read_any
    from clipgraft.adapters.run_folder import find_run_model

    path = where.from_
    if path is None:
        return model, lora, None
    named = "model" in model.model_fields_set
    if not starts_from_adapter(path):
        found = find_run_model(path)
        assert found is not None
        if named:
            raise ConfigError(
                f"--from {path} is a {found.kind} model and --model names another: drop --model {model.model}"
            )
        weights = found.weights
        update = {"model": weights.name, "pretrained": weights.pretrained or None}
        return model.model_copy(update=update), lora, None
    if not path.exists():
        raise AdapterError(f"--from {path}: there is no such file or folder; check the path")
    lora = lora.model_copy(update={"use_lora": True})
    if named:
        return model, lora, path
    base = read_any(path, peft_out_proj=where.peft_out_proj).base
    if not base.get("name"):
        raise AdapterError(f"--from {path} does not say which base it was made for: name that with --model")
    update = {"model": base["name"], "pretrained": base.get("pretrained") or None}
    return model.model_copy(update=update), lora, path


def read_start(clip: Clip, path: Path, where: RunFlags) -> AdapterFile:
    """Read the adapter to start from, in terms of this base's sites."""
    from clipgraft.adapters.attach import in_terms_of
    from clipgraft.adapters.convert import read_any

    layers = {site.tower: 1 + (site.block or 0) for site in clip.sites if site.block is not None}
    file = read_any(
        path,
        peft_out_proj=where.peft_out_proj,
        text_layers=layers.get("text"),
        vision_layers=layers.get("vision"),
    )
    return file if file.needs_base and clip.device.type == "meta" else in_terms_of(clip, file)


def contradictions(clip: Clip, file: AdapterFile, lora: LoraFlags) -> list[str]:
    """List flags that contradict the adapter to start from: one line, or none."""
    from clipgraft.lora.targets import guide_targets, select_sites

    differing: list[str] = []
    for setting, name in lora.library_names.items():
        if setting in _MAY_CHANGE:
            continue
        own = getattr(file.settings, setting)
        if name in lora.model_fields_set and getattr(lora, name) not in (own, None):
            differing.append(f"{flag(name)} {getattr(lora, name)} (it has {own})")
    if lora.lora_init != "default":
        differing.append(f"--lora-init {lora.lora_init} (it has weights already)")
    targets = lora.lora_targets
    if lora.lora_target_modules is not None:
        targets = guide_targets(lora.lora_target_modules)
    if targets is not None:
        wanted, there = set(select_sites(clip.sites, targets)), {*file.parts, *file.full}
        if wanted != there:
            name = "--lora-targets" if lora.lora_target_modules is None else "--lora-target-modules"
            differing.append(f"{name}: {len(wanted)} sites (it has {len(there)}: {file.settings.targets})")
    if not differing:
        return []
    return [f"--from {file.path} brings its adapter's settings: drop {', '.join(differing)}"]


def attach_start(clip: Clip, path: Path, lora: LoraFlags, where: RunFlags) -> None:
    """Attach the adapter to start from to its base, for further training.

    Raises:
        AdapterError: it cannot be read, or was made for another base.
        ConfigError: flags say another adapter.
    """
    from clipgraft.adapters.attach import put_on

    file = read_start(clip, path, where)
    if faults := contradictions(clip, file, lora):
        raise together(faults)
    if file.fingerprint not in (None, clip.fingerprint):
        named = " / ".join(part for part in (file.base.get("name"), file.base.get("pretrained")) if part)
        raise AdapterError(
            f"--from {path} was made for base {named or 'unnamed'} with fingerprint {file.fingerprint}, but "
            f"this one's is {clip.fingerprint}: name its own base with --model"
        )
    if "lora_dropout" in lora.model_fields_set:
        file = replace(file, settings=file.settings.replace(dropout=lora.lora_dropout))
    put_on(clip, file, "default")
    rank, sites = file.settings.r, len(file.parts)
    log.info("starting from %s: LoRA r=%d on %d sites (%s)", path, rank, sites, file.settings.targets)


def graft(
    clip: Clip, lora: LoraFlags, where: RunFlags, seed: int, choose_rank: Callable[[], tuple[int, str]]
) -> None:
    """Attach the adapter that the flags describe, or that of `--from`.

    For `--lora-r auto` it has the rank that is chosen, and the log says why.

    Raises:
        ConfigError: the base brought an adapter of its own, or flags contradict the one of `--from`.
    """
    from clipgraft.lora.state import lora_state
    from clipgraft.lora.targets import guide_targets

    if lora_state(clip) is not None:
        raise ConfigError(
            f"--model {clip.source.name}: is an adapter on its base; drop --use-lora and the "
            "other --lora flags to train it further, or give the base itself"
        )
    if where.from_ is not None and starts_from_adapter(where.from_):
        attach_start(clip, where.from_, lora, where)
        return
    targets = lora.lora_targets or "text-attention"
    if lora.lora_target_modules is not None:
        targets = guide_targets(lora.lora_target_modules)
    rank = lora.lora_r
    if rank == "auto":
        rank, reason = choose_rank()
        log.info("--lora-r auto: %s", reason)
    attach_adapter(clip, lora.adapter(rank, targets), seed)


def attach_adapter(clip: Clip, config: LoraConfig, seed: int) -> None:
    """Attach a new adapter, initialized from a seed."""
    import torch

    from clipgraft.lora.inject import apply_lora
    from clipgraft.lora.variants import variant_of

    torch.manual_seed(seed)
    sites = apply_lora(clip, config)
    label = variant_of(config).label
    log.info("%s r=%d on %d sites (%s)", label, config.r, sites, config.targets)

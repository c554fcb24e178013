"""The model of a command: load it onto its device, and give it an adapter, a new one or that of `--from`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.shared import ModelFlags
from clipgraft.cli.flags.training import DEFAULT_TARGETS, LoraFlags, RunFlags
from clipgraft.errors import AdapterError, ClipgraftError, ConfigError, ModelError, together

if TYPE_CHECKING:
    import torch

    from clipgraft.adapters.adapter_file import AdapterFile
    from clipgraft.adapters.peft_openclip import OutProj
    from clipgraft.lora.config import LoraConfig
    from clipgraft.models.clip import Clip, Source
    from clipgraft.train.distributed import World

log = logging.getLogger("clipgraft")
# Options that an adapter file has already, and that may change nevertheless.
_MAY_CHANGE = ("dropout", "targets", "target_modules", "init")


def load_model(spec: ModelFlags) -> Clip:
    """Load the base of a command onto its device, and log one line on it."""
    from clipgraft.adapters.open import load

    precision = "bf16" if spec.precision == "bf16" else "fp32"
    clip = load(spec.model, spec.pretrained, device=pick_device(spec.device), precision=precision)
    title = " / ".join(part for part in (clip.source.name, clip.source.pretrained) if part)
    log.info("base %s on %s, fingerprint %s", title, clip.device, clip.fingerprint)
    return clip


def load_own_model(spec: ModelFlags, world: World) -> Clip:
    """Load the base of a command in one of several processes, each of which has its own GPU."""
    return load_model(spec.model_copy(update={"device": own_device(spec.device, world)}))


def own_device(name: str, world: World) -> str:
    """Name the device of a process; of several, each has the GPU with its local rank for `auto` and `cuda`.

    Raises:
        ConfigError: one GPU is named for all processes, or there are more processes than GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    if world.alone or name == "cpu" or (name == "auto" and not gpus):
        return name
    if name not in ("auto", "cuda"):
        raise ConfigError(f"--device {name}: every process has a GPU of its own; use --device auto, or cpu")
    if world.local_rank >= gpus:
        raise ConfigError(
            f"--nproc-per-node {world.local_rank + 1} or more, but torch sees {gpus} GPU{'s' * (gpus != 1)} "
            "here: start one process for each, or use --device cpu"
        )
    torch.cuda.set_device(world.local_rank)
    return f"cuda:{world.local_rank}"


def name_after(path: Path, taken: Collection[str]) -> str:
    """Choose a name for an adapter after its folder, different from those taken."""
    parts = [part for part in (path.parent.name, path.stem) if part not in ("", "adapter")]
    stem = re.sub(r"[^A-Za-z0-9_+-]", "-", parts[-1] if parts else "adapter").lstrip("_+-") or "adapter"
    return next(n for i in range(len(taken) + 1) if (n := f"{stem}-{i + 1}" if i else stem) not in taken)


def pick_device(name: str) -> torch.device:
    """Turn a device flag into a device; `auto` is the first CUDA GPU if there is one, else the CPU.

    Another kind of accelerator that torch sees here, such as `mps` or `xpu`, goes by its name.

    Raises:
        ConfigError: the device does not exist here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = torch.accelerator.current_accelerator(check_available=True)
    if own is not None and name == own.type:
        return torch.device(name)
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        other = "" if own is None or own.type == "cuda" else f", or {own.type}"
        raise ConfigError(f"--device: got {name!r}, allowed is auto, cpu, cuda or cuda:N{other}")
    device, gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        seen = f"GPUs 0 to {gpus - 1}" if gpus else "no GPU"
        raise ConfigError(f"--device {name}: torch sees {seen} here; use --device auto")
    return device


def hand_over(
    clip: Clip, run: Path, metrics: Mapping[str, float] | None, base: Mapping[str, float] | None = None
) -> None:
    """Write `results/` of a run: result.json, summary.txt and structure.txt.

    A model that cannot be profiled costs a warning, not the run.
    """
    from clipgraft.report.results import RESULTS, write_results

    numbers = {name: value for name, value in (metrics or {}).items() if name != "epoch"}
    try:
        write_results(clip, run / RESULTS, numbers or None, base)
    except ModelError as error:
        log.warning("%s is left out: %s", run / RESULTS, error)


def starts_from_adapter(path: Path) -> bool:
    """Whether `--from` names an adapter and not a fine-tuned model; a missing path counts as an adapter."""
    from clipgraft.adapters.folder import is_adapter
    from clipgraft.adapters.run_folder import find_run_model

    found = None if is_adapter(path) else find_run_model(path)
    return found is None or found.kind == "adapter"


def base_below(model: ModelFlags) -> Source | None:
    """Find the base of the adapter that `--model` names; None if it names no adapter."""
    from clipgraft.adapters.open import split_adapter

    try:
        base, adapter = split_adapter(model.model, model.pretrained)
    except ClipgraftError:  # told by whoever loads it
        return None
    return None if adapter is None else base


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


def read_adapter(path: Path, out_proj: OutProj | None, clip: Clip | None = None) -> AdapterFile:
    """Read an adapter of any format; `clip`, its base, tells how many blocks there are."""
    from clipgraft.adapters.convert import read_any

    sites = () if clip is None else clip.sites
    layers = {site.tower: 1 + site.block for site in sites if site.block is not None}
    return read_any(
        path, peft_out_proj=out_proj, text_layers=layers.get("text"), vision_layers=layers.get("vision")
    )


def read_start(clip: Clip, path: Path, where: RunFlags) -> AdapterFile:
    """Read the adapter to start from, in terms of this base's sites."""
    from clipgraft.adapters.attach import in_terms_of

    file = read_adapter(path, where.peft_out_proj, clip)
    return file if file.needs_base and clip.device.type == "meta" else in_terms_of(clip, file)


def contradictions(clip: Clip, file: AdapterFile, lora: LoraFlags) -> list[str]:
    """List flags that contradict the adapter to start from: one line, or none."""
    from clipgraft.lora.targets import select_sites

    differing: list[str] = []
    for setting, name in lora.library_names.items():
        if setting in _MAY_CHANGE:
            continue
        own = getattr(file.settings, setting)
        if name in lora.model_fields_set and getattr(lora, name) not in (own, None):
            differing.append(f"{flag(name)} {getattr(lora, name)} (it has {own})")
    if lora.lora_init != "default":
        differing.append(f"--lora-init {lora.lora_init} (it has weights already)")
    if (targets := lora.asked_targets) is not None:
        wanted, there = set(select_sites(clip.sites, targets)), {*file.parts, *file.full}
        if wanted != there:
            name = "--lora-targets" if lora.lora_target_modules is None else "--lora-target-modules"
            differing.append(f"{name}: {len(wanted)} sites (it has {len(there)}: {file.settings.targets})")
    if not differing:
        return []
    return [f"--from {file.path} brings its adapter's settings: drop {', '.join(differing)}"]


def _attach_start(clip: Clip, path: Path, lora: LoraFlags, where: RunFlags) -> None:
    """Attach the adapter of `--from` to its base, for further training."""
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
        AdapterError: the adapter of `--from` cannot be read, or was made for another base.
        ConfigError: the base brought an adapter of its own, or flags contradict the one of `--from`.
    """
    from clipgraft.lora.state import lora_state

    if lora_state(clip) is not None:
        raise ConfigError(
            f"--model {clip.source.name}: is an adapter on its base; drop --use-lora and the "
            "other --lora flags to train it further, or give the base itself"
        )
    if where.from_ is not None and starts_from_adapter(where.from_):
        _attach_start(clip, where.from_, lora, where)
        return
    rank = lora.lora_r
    if rank == "auto":
        rank, reason = choose_rank()
        log.info("--lora-r auto: %s", reason)
    attach_adapter(clip, lora.adapter(rank, lora.asked_targets or DEFAULT_TARGETS), seed)


def attach_adapter(clip: Clip, config: LoraConfig, seed: int) -> None:
    """Attach a new adapter, initialized from a seed."""
    import torch

    from clipgraft.lora.inject import apply_lora
    from clipgraft.lora.variants import variant_of

    torch.manual_seed(seed)
    sites = apply_lora(clip, config)
    label = variant_of(config).label
    log.info("%s r=%d on %d sites (%s)", label, config.r, sites, config.targets)

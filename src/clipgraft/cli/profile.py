"""`clipgraft profile`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.tools import ProfileFlags
from clipgraft.cli.parser import parse
from clipgraft.errors import ConfigError, together
from clipgraft.text_tables import terminal_width

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip
    from clipgraft.models.meta import ModelConfig
    from clipgraft.profile.forward import ClipProfile
    from clipgraft.profile.llava import LlavaProfile, LlavaTokens
    from clipgraft.profile.measure import Measurement
    from clipgraft.profile.training import TrainingCost
    from clipgraft.text_tables import Table

_IMAGE_SIZE = {"transformers": "vision_config.image_size", "open_clip": "vision_cfg.image_size"}
_SUMMARY = "Show what a model costs to run and to train. Weights are neither needed nor loaded."
_OF_CLIP = ("targets", "lora_r", "batch_size", "adapter", "measure", "device", "precision", "pretrained")
_LLAVA_COUNTS = ("crops", "language_tokens", "logits")
_LLAVA_IMAGE, _LLAVA_TEXT_TOKENS = (480, 640), 64
_TRAINED = ("text-attention", "vision-attention", "attention", "all-linear", "all")


@dataclass(frozen=True)
class Report:
    """What the command prints."""

    profile: ClipProfile
    training: tuple[TrainingCost, ...]
    measured: Measurement | None


def run_profile(argv: Sequence[str]) -> None:
    """Parse, profile, measure if asked to, print."""
    (spec,) = parse("profile", _SUMMARY, [ProfileFlags], argv)
    spec = _apart(spec)
    from clipgraft.models.meta import read_model_config
    from clipgraft.profile.forward import costs
    from clipgraft.profile.training import training_costs
    from clipgraft.results import plain

    config = read_model_config(spec.model, spec.set, spec.pretrained)
    if _is_llava(config):
        _show_llava(config, spec)
        return
    if given := sorted(spec.model_fields_set & set(_LLAVA_COUNTS)):
        raise ConfigError(f"{', '.join(map(flag, given))}: of LLaVA-NeXT alone, and {spec.model} is none")
    clip = _model(spec, "meta")
    batch, length = spec.batch_size, spec.text_tokens
    report = Report(
        profile=costs(clip, batch=batch, text_tokens=length),
        training=training_costs(clip, _targets(spec, clip), spec.lora_r, batch=batch, text_tokens=length),
        measured=_measured(spec) if spec.measure else None,
    )
    if spec.format == "json":
        document = plain(report, without=frozenset({"trace"}))
        document["profile"]["layers"] = plain(report.profile.layers)
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_sections(clip, report, spec)))


def _apart(spec: ProfileFlags) -> ProfileFlags:
    """Split a run or an adapter into the structure of its base and `--adapter`."""
    from clipgraft.adapters.open import split_adapter

    source, adapter = split_adapter(spec.model, spec.pretrained)
    if adapter is not None and spec.adapter is not None:
        raise ConfigError(
            f"{spec.model} is an adapter already: drop --adapter {spec.adapter}, or name the base"
        )
    if source.name == spec.model:
        return spec
    tag = None if Path(source.pretrained).is_file() else source.pretrained or None
    named = {"model": source.name, "pretrained": tag}
    return spec.model_copy(update=named if adapter is None else {**named, "adapter": adapter})


def _model(spec: ProfileFlags, device: str) -> Clip:
    """Build the model with its adapter: without weights on the meta device, with random ones elsewhere."""
    import torch

    from clipgraft.adapters.attach import load_adapter
    from clipgraft.models.meta import build_model, read_model_config

    settings = dict(spec.set)
    if spec.image_size is not None:
        library = read_model_config(spec.model).library
        height, width = spec.image_size
        if height != width and library == "transformers":
            raise ConfigError(f"--image-size {height}x{width}: CLIP models of transformers see squares alone")
        settings[_IMAGE_SIZE[library]] = height if height == width else [height, width]
    clip = build_model(read_model_config(spec.model, settings, spec.pretrained), device)
    clip.model.to(torch.bfloat16 if spec.precision == "bf16" else torch.float32)
    if spec.adapter is not None:
        # No base has the fingerprint of its weights here, for there are none.
        load_adapter(clip, spec.adapter, force=True)
    return clip


def _targets(spec: ProfileFlags, clip: Clip) -> tuple[str, ...]:
    from clipgraft.profile.training import distinct_sets

    return spec.targets or distinct_sets(clip, _TRAINED)


def _measured(spec: ProfileFlags) -> Measurement:
    from clipgraft.cli.common import pick_device
    from clipgraft.profile.forward import costs
    from clipgraft.profile.measure import measure

    clip = _model(spec, str(pick_device(spec.device)))
    profile = costs(clip, batch=spec.batch_size, text_tokens=spec.text_tokens)
    return measure(clip, profile)


def _sections(clip: Clip, report: Report, spec: ProfileFlags) -> list[str]:
    from clipgraft.profile.tables import (
        cost_tree,
        measured_table,
        site_costs_table,
        towers_table,
        training_table,
    )

    profile = report.profile
    tree = cost_tree(clip.model, profile.trace, spec.depth)
    tables: list[Table] = [towers_table(profile), site_costs_table(profile)]
    tables.append(training_table(report.training, profile.batch))
    if report.measured is not None:
        tables.append(measured_table(report.measured))
    height, width = profile.image_size
    head = (
        f"{profile.name}: {profile.parameters:,} weights, images of {height}x{width}, "
        f"texts of {profile.text_tokens} tokens"
    )
    if spec.format == "markdown":
        return [f"# {head}", f"## modules\n\n```text\n{tree}\n```", *(t.markdown() for t in tables)]
    return [head, tree, *(table.text(terminal_width()) for table in tables)]


def _is_llava(config: ModelConfig) -> bool:
    """Whether a configuration is of LLaVA-NeXT."""
    from clipgraft.profile.llava import MODEL_TYPE

    return config.values.get("model_type") == MODEL_TYPE


def _show_llava(config: ModelConfig, spec: ProfileFlags) -> None:
    """Profile LLaVA-NeXT and print.

    Raises:
        ConfigError: flags that are of CLIP alone, or counts that are not complete.
        ModelError: no model can be built from the configuration.
    """
    from clipgraft.profile.llava import llava_costs, llava_on_meta
    from clipgraft.profile.tables import cost_tree, llava_table
    from clipgraft.results import plain

    tokens = _llava_tokens(spec)
    model = llava_on_meta(config.values)
    profile = llava_costs(
        model,
        image_size=spec.image_size or _LLAVA_IMAGE,
        text_tokens=spec.text_tokens or _LLAVA_TEXT_TOKENS,
        tokens=tokens,
    )
    if spec.format == "json":
        document = plain(profile, without=frozenset({"trace"}))
        document["layers"] = plain(profile.trace.layers)
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    head, tree, table = (
        _llava_head(config.name, profile),
        cost_tree(model, profile.trace, spec.depth),
        llava_table(profile),
    )
    if spec.format == "markdown":
        print("\n\n".join([f"# {head}", f"```text\n{tree}\n```", table.markdown()]))
    else:
        print("\n\n".join([head, tree, table.text(terminal_width())]))


def _llava_tokens(spec: ProfileFlags) -> LlavaTokens | None:
    """Return the counts that were given, if any."""
    from clipgraft.profile.llava import LlavaTokens

    given = spec.model_fields_set
    faults = [
        f"{flag(name)}: of CLIP alone, and {spec.model} is LLaVA-NeXT" for name in _OF_CLIP if name in given
    ]
    counts = [name for name in _LLAVA_COUNTS if name in given]
    missing = [name for name in _LLAVA_COUNTS if name not in given]
    if counts and missing:
        faults.append(
            f"{', '.join(map(flag, counts))} given without {', '.join(map(flag, missing))}: give all"
        )
    faults += [
        f"{flag(name)} and {flag(counts[0])} both say how much runs: give one of them"
        for name in ("image_size", "text_tokens")
        if counts and name in given
    ]
    if faults:
        raise together(faults)
    if spec.crops is None or spec.language_tokens is None or spec.logits is None:
        return None
    return LlavaTokens(spec.crops, spec.language_tokens, spec.logits)


def _llava_head(name: str, profile: LlavaProfile) -> str:
    tokens = profile.tokens
    source = ""
    if profile.image_size is not None:
        source = "an image of {}x{}: ".format(*profile.image_size)
    return (
        f"{name}: {profile.trace.total.parameters:,} weights, {profile.weight_bytes / 1e9:.2f} GB "
        f"({profile.weight_bytes / 2**30:.2f} GiB) in {profile.dtype}\n"
        f"{source}{tokens.crops:,} crops, {tokens.language:,} tokens of the language model, "
        f"{tokens.logits:,} of them with logits"
    )

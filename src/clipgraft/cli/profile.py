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
from clipgraft.errors import ConfigError
from clipgraft.text_tables import terminal_width

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip
    from clipgraft.profile.forward import ClipProfile
    from clipgraft.profile.measure import Measurement
    from clipgraft.profile.training import TrainingCost
    from clipgraft.text_tables import Table

_IMAGE_SIZE = {"transformers": "vision_config.image_size", "open_clip": "vision_cfg.image_size"}
_SUMMARY = "Show what a model costs to run and to train. Weights are neither needed nor loaded."
_TRAINED = ("text-attention", "vision-attention", "attention", "all-linear", "all")


@dataclass(frozen=True)
class Report:
    """What the command prints."""

    profile: ClipProfile
    training: tuple[TrainingCost, ...]
    measured: Measurement | None


def run(argv: Sequence[str]) -> None:
    """Parse, profile, measure if asked to, print."""
    (spec,) = parse("profile", _SUMMARY, [ProfileFlags], argv)
    spec = _apart(spec)
    from clipgraft.cli.profile_llava import is_llava, show_llava
    from clipgraft.models.meta import read_model_config
    from clipgraft.profile.forward import costs
    from clipgraft.profile.training import training_costs
    from clipgraft.results import plain

    config = read_model_config(spec.model, spec.set, spec.pretrained)
    if is_llava(config):
        show_llava(config, spec)
        return
    if given := sorted(spec.model_fields_set & {"crops", "language_tokens", "logits"}):
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
    """A run or an adapter as the structure of its base, and `--adapter`."""
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
    """The model with its adapter, without weights on the meta device, with random ones elsewhere."""
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
    from clipgraft.profile.targets import distinct_sets

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
        measured_table,
        site_costs_table,
        towers_table,
        training_table,
    )
    from clipgraft.profile.tree import cost_tree

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

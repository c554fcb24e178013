"""`clipgraft inspect` and `clipgraft profile`: describe a model, and show what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.tools import InspectFlags, ProfileFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.pretty import show
from clipgraft.errors import ConfigError, together
from clipgraft.files import file_exists, path_exists

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip
    from clipgraft.models.meta import ModelConfig
    from clipgraft.profile.forward import ClipProfile
    from clipgraft.profile.inspection import AdapterInspection, Inspection
    from clipgraft.profile.llava import LlavaProfile, LlavaTokens
    from clipgraft.profile.measure import Measurement
    from clipgraft.profile.training import TrainingCost
    from clipgraft.text_tables import Table


_INSPECT = "Describe a model, a run or an adapter. Weights of models are neither needed nor loaded."
_PROFILE = "Show what a model costs to run and to train. Weights are neither needed nor loaded."
_OF_CLIP = ("targets", "lora_r", "batch_size", "adapter", "measure", "device", "precision", "pretrained")
_LLAVA_COUNTS = ("crops", "language_tokens", "logits")
_LLAVA_IMAGE, _LLAVA_TEXT_TOKENS = (480, 640), 64
_TRAINED = ("text-attention", "vision-attention", "attention", "all-linear", "all")


def run_inspect(argv: Sequence[str]) -> None:
    """Parse, inspect, print."""
    (spec,) = parse("inspect", _INSPECT, [InspectFlags], argv)
    from clipgraft.adapters.open import split_adapter
    from clipgraft.profile.inspection import inspect

    if _is_adapter(spec.model):
        _show_adapter(spec)
        return
    source, _ = split_adapter(spec.model, spec.pretrained)
    found = inspect(
        source.name, spec.set, pretrained=_tag(source.pretrained), targets=spec.targets, r=spec.lora_r
    )
    if spec.format == "json":
        _print_json(found, found.profile)
    else:
        show(*_described(found, spec))


def _print_json(found: object, profile: ClipProfile | None = None) -> None:
    """Print a result as JSON, and under `profile` the layers of all its modules."""
    from clipgraft.results import plain

    document = plain(found, without=frozenset({"trace"}))
    if profile is not None:
        document["profile"]["layers"] = plain(profile.layers)
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _is_adapter(name: str) -> bool:
    """Whether a name is an adapter of any format, or a run that made one."""
    from clipgraft.adapters.folder import is_adapter
    from clipgraft.adapters.run_folder import find_run_model
    from clipgraft.models.load import CHECKPOINT_SUFFIXES

    path = Path(name)
    if is_adapter(path):
        return True
    found = find_run_model(path)
    if found is not None:
        return found.kind == "adapter"
    return path.is_file() and path.suffix in CHECKPOINT_SUFFIXES


def _tag(pretrained: str) -> str | None:
    """Keep a tag, which may decide on QuickGELU; drop a file, which does not."""
    return pretrained if pretrained and not path_exists(pretrained) else None


def _show_adapter(spec: InspectFlags) -> None:
    from clipgraft.profile.inspection import inspect_adapter
    from clipgraft.profile.tables import adapted_table

    if given := sorted(spec.model_fields_set - {"model", "format"}):
        raise ConfigError(
            f"{', '.join(map(flag, given))} given, but {spec.model} is an adapter: drop it, or name a model"
        )
    found = inspect_adapter(spec.model)
    if spec.format == "json":
        _print_json(found)
        return
    table = adapted_table(found.sites)
    facts = "\n".join(f"{name}: {value}" for name, value in _facts(found))
    if spec.format == "markdown":
        print(f"# {found.path}\n\n```text\n{facts}\n```\n\n{table.markdown()}")
    else:
        show(f"{found.path}\n{facts}", table)


def _facts(found: AdapterInspection) -> list[tuple[str, object]]:
    """List what the text form says of an adapter besides its sites."""
    settings = found.settings
    named = " / ".join(part for part in (found.base.get("name"), found.base.get("pretrained")) if part)
    print_of = f", fingerprint {found.fingerprint}" if found.fingerprint else ""
    plain = [name for name in ("use_rslora", "use_dora", "train_logit_scale") if getattr(settings, name)]
    variant = [] if settings.variant in ("lora", "dora") else [("variant", settings.variant)]
    return [
        ("format", found.format),
        ("base", (named or "not named") + print_of),
        ("rank", settings.r),
        ("alpha", f"{settings.alpha:g}"),
        ("dropout", f"{settings.dropout:g}"),
        ("targets", settings.targets),
        ("bias", settings.bias),
        *variant,
        *((name, "yes") for name in plain),
        ("weights", f"{found.parameters:,} at {len(found.sites)} sites, {found.bytes / 1e6:.2f} MB on disk"),
        *([("started from", found.started_from)] if found.started_from else []),
        *(("with", part) for part in found.parts),
        *((f"measured {name}", f"{value:g}") for name, value in _numbers(found.metrics)),
    ]


def _numbers(metrics: Mapping[str, object]) -> list[tuple[str, float]]:
    return [(name, float(value)) for name, value in metrics.items() if isinstance(value, int | float)]


def _described(found: Inspection, spec: InspectFlags) -> list[Table | str]:
    from clipgraft.profile.tables import layer_table, sites_table, targets_table

    config = json.dumps(found.config, indent=2, ensure_ascii=False, default=str)
    layers = layer_table(found.profile.trace, spec.depth)
    tables = (sites_table(found.sites, found.r), targets_table(found.targets))
    head = f"{found.name}, a model of {found.library}: {found.profile.parameters:,} weights"
    if spec.format == "markdown":
        blocks = (("configuration", "json", config), ("structure", "text", found.structure))
        fenced = [f"## {name}\n\n```{kind}\n{text}\n```" for name, kind, text in blocks]
        shown = [f"## layers\n\n```text\n{layers}\n```", *(table.markdown() for table in tables)]
        return [f"# {head}", *fenced, *shown]
    return [head, f"configuration\n{config}", f"structure\n{found.structure}", f"layers\n{layers}", *tables]


def run_profile(argv: Sequence[str]) -> None:
    """Parse, profile, measure if asked to, print."""
    (spec,) = parse("profile", _PROFILE, [ProfileFlags], argv)
    spec = _apart(spec)
    from clipgraft.models.meta import read_model_config
    from clipgraft.profile.forward import costs
    from clipgraft.profile.llava import MODEL_TYPE
    from clipgraft.profile.training import distinct_sets, training_costs

    config = read_model_config(spec.model, spec.set, spec.pretrained)
    if config.values.get("model_type") == MODEL_TYPE:
        _show_llava(config, spec)
        return
    if given := sorted(spec.model_fields_set & set(_LLAVA_COUNTS)):
        raise ConfigError(f"{', '.join(map(flag, given))}: of LLaVA-NeXT alone, and {spec.model} is none")
    clip = _model(spec, "meta")
    batch, length, size = spec.batch_size, spec.text_tokens, spec.image_size
    profile = costs(clip, batch=batch, text_tokens=length, image_size=size)
    targets = spec.targets or distinct_sets(clip, _TRAINED)
    training = training_costs(clip, targets, spec.lora_r, batch=batch, text_tokens=length, image_size=size)
    measured = _measured(spec) if spec.measure else None
    if spec.format == "json":
        _print_json({"profile": profile, "training": training, "measured": measured}, profile)
    else:
        show(*_profiled(clip, profile, training, measured, spec))


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
    tag = None if file_exists(source.pretrained) else source.pretrained or None
    named = {"model": source.name, "pretrained": tag}
    return spec.model_copy(update=named if adapter is None else {**named, "adapter": adapter})


def _model(spec: ProfileFlags, device: str) -> Clip:
    """Build the model with its adapter: without weights on the meta device, with random ones elsewhere."""
    import torch

    from clipgraft.adapters.attach import load_adapter
    from clipgraft.models.meta import build_model, read_model_config

    settings = dict(spec.set)
    if spec.image_size is not None:
        config = read_model_config(spec.model)
        height, width = spec.image_size
        if height != width and config.library == "transformers":
            raise ConfigError(f"--image-size {height}x{width}: CLIP models of transformers see squares alone")
        if setting := _image_size_setting(config):
            settings[setting] = height if height == width else [height, width]
    clip = build_model(read_model_config(spec.model, settings, spec.pretrained), device)
    clip.model.to(torch.bfloat16 if spec.precision == "bf16" else torch.float32)
    if spec.adapter is not None:
        # No base has the fingerprint of its weights here, for there are none.
        load_adapter(clip, spec.adapter, force=True)
    return clip


def _image_size_setting(config: ModelConfig) -> str:
    """The setting that is the size of images; "" where images are of any size, or there are none."""
    if config.library == "open_clip":
        return "vision_cfg.image_size"
    if "image_size" in config.values.get("vision_config", {}):
        return "vision_config.image_size"
    return "image_size" if "image_size" in config.values else ""


def _measured(spec: ProfileFlags) -> Measurement:
    from clipgraft.cli.common import pick_device
    from clipgraft.profile.forward import costs
    from clipgraft.profile.measure import measure

    clip = _model(spec, str(pick_device(spec.device)))
    profile = costs(clip, batch=spec.batch_size, text_tokens=spec.text_tokens, image_size=spec.image_size)
    return measure(clip, profile)


def _profiled(
    clip: Clip,
    profile: ClipProfile,
    training: Sequence[TrainingCost],
    measured: Measurement | None,
    spec: ProfileFlags,
) -> list[Table | str]:
    from clipgraft.profile.tables import (
        cost_tree,
        measured_table,
        site_costs_table,
        towers_table,
        training_table,
    )

    tree = cost_tree(clip.model, profile.trace, spec.depth)
    tables = [towers_table(profile), site_costs_table(profile), training_table(training, profile.batch)]
    if measured is not None:
        tables.append(measured_table(measured))
    sizes = [f"{profile.parameters:,} weights"]
    if profile.image_size is not None:
        sizes.append("images of {}x{}".format(*profile.image_size))
    if profile.text_tokens is not None:
        sizes.append(f"texts of {profile.text_tokens} tokens")
    head = f"{profile.name}: {', '.join(sizes)}"
    if spec.format == "markdown":
        return [f"# {head}", f"## modules\n\n```text\n{tree}\n```", *(t.markdown() for t in tables)]
    return [head, tree, *tables]


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
        show(head, tree, table)


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

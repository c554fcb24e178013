"""`clipgraft inspect`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.tools import InspectFlags
from clipgraft.cli.parser import parse
from clipgraft.errors import ConfigError
from clipgraft.text_tables import terminal_width

if TYPE_CHECKING:
    from clipgraft.profile.inspection import AdapterInspection, Inspection

_SUMMARY = "Describe a model, a run or an adapter. Weights of models are neither needed nor loaded."


def run_inspect(argv: Sequence[str]) -> None:
    """Parse, inspect, print."""
    (spec,) = parse("inspect", _SUMMARY, [InspectFlags], argv)
    from clipgraft.adapters.open import split_adapter
    from clipgraft.profile.inspection import inspect
    from clipgraft.results import plain

    if _is_adapter(spec.model):
        _show_adapter(spec)
        return
    source, _ = split_adapter(spec.model, spec.pretrained)
    found = inspect(
        source.name, spec.set, pretrained=_tag(source.pretrained), targets=spec.targets, r=spec.lora_r
    )
    if spec.format == "json":
        document = plain(found, without=frozenset({"trace"}))
        document["profile"]["layers"] = plain(found.profile.layers)
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_sections(found, spec)))


def _is_adapter(name: str) -> bool:
    """Whether a name is an adapter of any format, or a run that made one."""
    from clipgraft.adapters.folder import is_adapter
    from clipgraft.adapters.run_folder import find_run_model
    from clipgraft.models.load_openclip import CHECKPOINT_SUFFIXES

    path = Path(name)
    if is_adapter(path):
        return True
    found = find_run_model(path)
    if found is not None:
        return found.kind == "adapter"
    return path.is_file() and path.suffix in CHECKPOINT_SUFFIXES


def _tag(pretrained: str) -> str | None:
    """Keep a tag, which may decide on QuickGELU; drop a file, which does not."""
    return pretrained if pretrained and not Path(pretrained).exists() else None


def _show_adapter(spec: InspectFlags) -> None:
    from clipgraft.profile.inspection import inspect_adapter
    from clipgraft.profile.tables import adapted_table
    from clipgraft.results import plain

    if given := sorted(spec.model_fields_set - {"model", "format"}):
        raise ConfigError(
            f"{', '.join(map(flag, given))} given, but {spec.model} is an adapter: drop it, or name a model"
        )
    found = inspect_adapter(spec.model)
    if spec.format == "json":
        print(json.dumps(plain(found), indent=2, ensure_ascii=False))
        return
    table = adapted_table(found.sites)
    facts = "\n".join(f"{name}: {value}" for name, value in _facts(found))
    if spec.format == "markdown":
        print(f"# {found.path}\n\n```text\n{facts}\n```\n\n{table.markdown()}")
    else:
        print(f"{found.path}\n{facts}\n\n{table.text(terminal_width())}")


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


def _sections(found: Inspection, spec: InspectFlags) -> list[str]:
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
    return [head, f"configuration\n{config}", f"structure\n{found.structure}", f"layers\n{layers}"] + [
        table.text(terminal_width()) for table in tables
    ]

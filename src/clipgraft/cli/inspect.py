"""`clipgraft inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipgraft.cli.parser import parse
from clipgraft.config import InspectSpec

if TYPE_CHECKING:
    from clipgraft.profile.inspection import Inspection

_SUMMARY = "Show what a model is. Weights are neither needed nor loaded."


def run(argv: Sequence[str]) -> None:
    """Parse, look, print."""
    (spec,) = parse("inspect", _SUMMARY, [InspectSpec], argv)
    from clipgraft.profile.inspection import inspect_model
    from clipgraft.profile.plain import plain

    found = inspect_model(
        spec.model, spec.set, pretrained=spec.pretrained, targets=spec.targets, r=spec.lora_r
    )
    if spec.format == "json":
        document = plain(found, without=frozenset({"trace"}))
        document["profile"]["layers"] = plain(found.profile.layers)
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(_sections(found, spec)))


def _sections(found: Inspection, spec: InspectSpec) -> list[str]:
    from clipgraft.profile.layers import layer_table
    from clipgraft.profile.tables import sites_table, targets_table

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
        table.text() for table in tables
    ]

"""`clipgraft convert`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipgraft.cli.flags.tools import ConvertFlags
from clipgraft.cli.parser import parse
from clipgraft.errors import ConfigError

if TYPE_CHECKING:
    from clipgraft.adapters.adapter_file import AdapterFile

log = logging.getLogger("clipgraft")
_SUMMARY = "Rewrite an adapter in another format. What it computes stays what it was."


def run(argv: Sequence[str]) -> None:
    """Parse, read, write, and print what was read and written."""
    (spec,) = parse("convert", _SUMMARY, [ConvertFlags], argv)
    if spec.pretrained is not None and spec.model is None:
        raise ConfigError(f"--pretrained {spec.pretrained} belongs to a --model: name it too")
    from clipgraft.adapters.attach import in_terms_of
    from clipgraft.adapters.convert import check_free, detect, read_any, write_any
    from clipgraft.cli.common import base_of, with_base
    from clipgraft.models.export import size_on_disk

    check_free(spec.out, spec.to, spec.overwrite)
    adapter = read_any(
        spec.src,
        peft_out_proj=spec.peft_out_proj,
        text_layers=spec.text_layers,
        vision_layers=spec.vision_layers,
    )
    log.info("read %s", describe(adapter, detect(spec.src)))
    if spec.model is not None:
        adapter = with_base(adapter, spec.model, spec.pretrained)
    base_state = None
    if adapter.needs_base or spec.to == "guide-full":
        clip = base_of(adapter, given=spec.model is not None)
        adapter, base_state = in_terms_of(clip, adapter), clip.model.state_dict()
    written = write_any(
        adapter,
        spec.out,
        spec.to,
        base_state_dict=base_state,
        text_layers=spec.text_layers,
        vision_layers=spec.vision_layers,
        overwrite=spec.overwrite,
    )
    size = size_on_disk(written)
    log.info("wrote %s: %s, %s bytes (%.1f MB)", spec.to, written, f"{size:,}", size / 1e6)
    if adapter.logit_scale is not None and spec.to in ("guide", "clip-lora"):
        log.info(
            "its trained temperature is in that file for clipgraft alone; %s has no place for it", spec.to
        )


def describe(adapter: AdapterFile, kind: str) -> str:
    """Format, number of sites, ranks, scales and base in one line."""
    ranks = sorted({a.shape[0] for a, _ in adapter.weights.values()})
    scales = sorted(set(adapter.scales.values()))
    base = " / ".join(part for key in ("name", "pretrained") if (part := adapter.base.get(key)))
    return (
        f"{kind}: {adapter.path}, {len(adapter.weights)} sites, rank {_span(ranks)}, scale {_span(scales)}, "
        f"base {base or 'not named'}"
    )


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"

"""open_clip's own `ModifiedResNet`: its bottlenecks and its attention pooling, which reads its Linears."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from clipgraft.models.family import base_parameter
from clipgraft.models.sites import Site, SiteKind, SiteRef

_POOL = {"q_proj": "pool_q", "k_proj": "pool_k", "v_proj": "pool_v", "c_proj": "pool_out"}
_STAGES = ("layer1", "layer2", "layer3", "layer4")


def resnet_refs(visual: nn.Module) -> Iterator[SiteRef]:
    """The sites of a `ModifiedResNet` that lies at `visual` in its model; none for any other tower."""
    if not hasattr(visual, "attnpool") or not all(hasattr(visual, stage) for stage in _STAGES):
        return
    blocks = [
        (f"visual.{stage}.{index}", block) for stage in _STAGES for index, block in _items(visual, stage)
    ]
    for number, (path, block) in enumerate(blocks):
        for role in ("conv1", "conv2", "conv3"):
            yield _ref(getattr(block, role), f"{path}.{role}", Site("vision", number, role), "conv")
        for name, module in getattr(block.downsample, "_modules", {}).items():
            if isinstance(module, nn.Conv2d):
                yield _ref(module, f"{path}.downsample.{name}", Site("vision", number, "shortcut"), "conv")
    pool: Any = visual.attnpool
    table = tuple(base_parameter(pool, "positional_embedding").shape)
    site = Site("vision", None, "position_embedding")
    yield SiteRef(site, "visual.attnpool", "positional_embedding", "table", table)
    for name, role in _POOL.items():
        yield _ref(getattr(pool, name), f"visual.attnpool.{name}", Site("vision", None, role), "read")


def _items(visual: nn.Module, stage: str) -> Iterator[tuple[str, Any]]:
    yield from getattr(visual, stage).named_children()


def _ref(module: nn.Module, path: str, site: Site, kind: SiteKind) -> SiteRef:
    return SiteRef(site, path, "weight", kind, tuple(base_parameter(module, "weight").shape))

"""Updates of a Linear that computes several sites side by side: timm's `qkv` and `kv`.

Such a module is called, so that a hook reaches its input and output; each site has its own rows of the
weight, and its own share of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipgraft.lora.layers import AdapterSlot
from clipgraft.models.family import base_parameter
from clipgraft.models.sites import SiteRef


class RowSlots(nn.Module):
    """The slots of the sites that share one Linear, `lora_q` and so on, with their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, slice] = {}

    def put(self, ref: SiteRef, slot: AdapterSlot) -> None:
        """Add a site."""
        assert ref.rows is not None
        self.rows[ref.site.role] = ref.rows
        setattr(self, f"lora_{ref.site.role}", slot)

    def adapt(self, host: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        """(..., in) and the base's (..., out) -> the same with the updates of all sites."""
        parts, stop = [], 0
        for role, rows in sorted(self.rows.items(), key=lambda item: item[1].start):
            layer = getattr(self, f"lora_{role}").current
            if layer is None:
                continue
            bias = None if host.bias is None else host.bias[rows]
            own = layer.adapt(output[..., rows], x, base_parameter(host, "weight")[rows], bias)
            parts += [output[..., stop : rows.start], own]
            stop = rows.stop
        return torch.cat([*parts, output[..., stop:]], dim=-1) if parts else output


def graft_rows(host: nn.Module, ref: SiteRef, slot: AdapterSlot) -> RemovableHandle | None:
    """Hang a site's slot on its Linear; the hook that the first one needs, None for the others."""
    first = not hasattr(host, "lora")
    if first:
        host.lora = RowSlots()
    slots = host.lora
    assert isinstance(slots, RowSlots)
    slots.put(ref, slot)
    return host.register_forward_hook(_adapt) if first else None


def ungraft_rows(host: nn.Module) -> None:
    """Take the slots of all sites off a Linear."""
    if hasattr(host, "lora"):
        del host.lora


def _adapt(host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    slots = host.lora
    assert isinstance(slots, RowSlots)
    assert isinstance(host, nn.Linear)
    return slots.adapt(host, args[0], output)

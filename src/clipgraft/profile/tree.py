"""The modules of a model with what each costs and its shares of the whole."""

from __future__ import annotations

from torch import nn

from clipgraft.profile.layers import structure
from clipgraft.profile.trace import LayerCost, Trace
from clipgraft.text_tables import percent, short


def cost_tree(model: nn.Module, trace: Trace, depth: int | None = None) -> str:
    """The structure of a model with weights, multiply-adds and operations of every module, and their shares.

    Modules that are alike in all of that are folded; what stands there is that of one of them.
    """
    notes = {layer.path: _note(layer, trace.total) for layer in trace.layers}
    return structure(model, notes, depth)


def _note(layer: LayerCost, total: LayerCost) -> str:
    parts = (
        (layer.parameters, total.parameters, "Params", short(layer.parameters, billion="B")),
        (layer.macs, total.macs, "MACs", short(layer.macs, "MACs")),
        (layer.flops, total.flops, "FLOPs", short(layer.flops, "FLOPs")),
    )
    return ", ".join(f"{shown} = {percent(part, whole, 4)} {unit}" for part, whole, unit, shown in parts)

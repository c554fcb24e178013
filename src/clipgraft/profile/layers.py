"""Print a model as text: the layer table, the folded structure, and the structure with costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from clipgraft.profile.trace import LayerCost, Trace
from clipgraft.text_tables import aligned, percent, short

_COLUMNS = (
    "Layer (type:depth-idx)",
    "Input Shape",
    "Output Shape",
    "Param #",
    "Param %",
    "Kernel Shape",
    "Mult-Adds",
    "Trainable",
)
_NOTHING = "--"


def layer_table(trace: Trace, depth: int | None = None) -> str:
    """Print every module down to `depth` with its shapes, weights and multiply-adds, and the totals below.

    A module that is not unfolded any further stands for all inside it; of others, a row has their own weights
    and products alone, so that columns add up. Numbers of frozen weights are in brackets. MB are 10⁶ bytes.
    """
    shown = [layer for layer in trace.layers if depth is None or layer.depth <= depth]
    rows = [_COLUMNS, *(_row(trace, layer, unfolded=_is_unfolded(shown, layer)) for layer in shown)]
    labels = [_COLUMNS[0], *_tree(shown)]
    cells = [(label, *row[1:]) for label, row in zip(labels, rows, strict=True)]
    lines = aligned(cells, left=range(len(_COLUMNS)), gap="   ")
    rule = "=" * max(map(len, lines))
    parts = [[lines[0]], lines[1:], _counts(trace), _sizes(trace)]
    return "\n".join(line for part in parts for line in (rule, *part)) + f"\n{rule}"


def _is_unfolded(shown: Sequence[LayerCost], layer: LayerCost) -> bool:
    prefix = f"{layer.path}." if layer.path else ""
    return any(other.path.startswith(prefix) and other is not layer for other in shown)


def _row(trace: Trace, layer: LayerCost, unfolded: bool) -> tuple[str, ...]:
    parameters = layer.own_parameters if unfolded else layer.parameters
    macs = layer.own_macs if unfolded else layer.macs
    count = f"{parameters:,}" if layer.trainable else f"({parameters:,})"
    share = f"{100 * parameters / max(1, trace.total.parameters):.2f}%"
    return (
        "",
        _shape(layer.input_shape),
        _shape(layer.output_shape),
        count if parameters else _NOTHING,
        share if parameters else _NOTHING,
        _shape(layer.kernel_shape),
        f"{macs:,}" if macs else _NOTHING,
        _trains(layer),
    )


def _trains(layer: LayerCost) -> str:
    if not layer.parameters:
        return _NOTHING
    return {0: "False", layer.parameters: "True"}.get(layer.trainable, "Partial")


def _shape(shape: Iterable[int] | None) -> str:
    return _NOTHING if shape is None else str(list(shape))


def _tree(layers: Sequence[LayerCost]) -> list[str]:
    """`├─` before the first level, and a bar for each level above a deeper one."""
    labels = []
    for layer in layers:
        bars = "│    " * (layer.depth - 1)
        branch = "" if not layer.depth else "├─" if layer.depth == 1 else "└─"
        place = f": {layer.depth}-{layer.index_in_depth}" if layer.depth else ""
        labels.append(f"{bars}{branch}{layer.kind}{place}")
    return labels


def _counts(trace: Trace) -> list[str]:
    total = trace.total
    return [
        f"Total params: {total.parameters:,}",
        f"Trainable params: {total.trainable:,}",
        f"Non-trainable params: {total.parameters - total.trainable:,}",
        f"Total mult-adds: {total.macs:,}",
    ]


def _sizes(trace: Trace) -> list[str]:
    sizes = {
        "Input size": trace.input_bytes,
        "Forward pass size": trace.forward_bytes,
        "Params size": trace.total.parameter_bytes,
    }
    sizes["Estimated total size"] = sum(sizes.values())
    return [f"{name} (MB): {size / 1e6:.2f}" for name, size in sizes.items()]


def structure(model: nn.Module, notes: Mapping[str, str] | None = None, depth: int | None = None) -> str:
    """Print a model's modules like its `repr`, with equal neighbours folded: `(0-11): 12 x Block(...)`.

    Parameters that a module uses itself, without a module of their own, are listed with their shapes.

    Args:
        model: any module.
        notes: what to show with the modules at these paths; neighbours with different notes are not equal.
        depth: how many levels to show; by default all.
    """
    return "\n".join(_structure(model, "", notes or {}, depth))


def _structure(module: nn.Module, path: str, notes: Mapping[str, str], depth: int | None) -> list[str]:
    name, extra, note = type(module).__name__, module.extra_repr(), notes.get(path)
    children = {key: child for key, child in module._modules.items() if child is not None}
    own = [line for line in extra.split("\n") if line]
    inner: list[str] = []
    if depth != 0:
        below = None if depth is None else depth - 1
        shown = ((key, f"{path}.{key}".lstrip("."), child) for key, child in children.items())
        inner = [*_raw(module), *_folded((k, _structure(c, p, notes, below)) for k, p, c in shown)]
    if not inner and len(own) <= 1:
        return [f"{name}({', '.join(filter(None, [note, *own]))})"]
    first = [note] if note else []
    return [f"{name}(", *(f"  {line}" for line in (*first, *own, *inner)), ")"]


def _raw(module: nn.Module) -> Iterator[str]:
    """Parameters that neither a module inside nor the module's own description tells of."""
    if module._modules or not module.extra_repr():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"({name}): Parameter({', '.join(map(str, parameter.shape))})"


def _folded(children: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """Children by name, neighbours with numbers and the same description as one."""

    def alike(child: tuple[str, list[str]]) -> tuple[bool, list[str]]:
        return child[0].isdigit(), child[1]

    for (numbered, lines), group in itertools.groupby(children, key=alike):
        names = [name for name, _ in group]
        if numbered and len(names) > 1:
            yield f"({names[0]}-{names[-1]}): {len(names)} x {lines[0]}"
            yield from lines[1:]
            continue
        for name in names:
            yield f"({name}): {lines[0]}"
            yield from lines[1:]


def cost_tree(model: nn.Module, trace: Trace, depth: int | None = None) -> str:
    """Print the structure of a model with weights, multiply-adds and FLOPs of every module, and their shares.

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

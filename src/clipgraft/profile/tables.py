"""An inspection or a profile as text: tables, the layer table, the folded structure, and that with costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from clipgraft.profile.llava import LLAVA_PARTS
from clipgraft.profile.trace import LayerCost, Trace
from clipgraft.text_tables import Column, Table, aligned, count, percent, short, table_of

if TYPE_CHECKING:
    from clipgraft.profile.forward import ClipProfile, SiteCost, TowerCost
    from clipgraft.profile.inspection import AdaptedSite, SiteInfo
    from clipgraft.profile.llava import LlavaProfile
    from clipgraft.profile.measure import Measurement
    from clipgraft.profile.training import TargetCost, TrainingCost

_V = TypeVar("_V")


def sites_table(sites: Sequence[SiteInfo], r: int) -> Table:
    """Every role of a tower with its blocks as one row."""
    rows = []
    for label, group in _by_role((site.site, site) for site in sites):
        first = group[0]
        added = sum(site.lora_parameters for site in group)
        rows.append((label, len(group), first.kind, first.shape, added))
    columns = (
        *(Column("site", left=True), Column("sites"), Column("kind"), Column("shape", _by)),
        Column(f"LoRA weights, r={r}", count),
    )
    return table_of("sites", columns, rows)


def adapted_table(sites: Sequence[AdaptedSite]) -> Table:
    """The sites of an adapter, those of a role, rank, scale and shape as one row."""
    alike: dict[tuple[int, float, tuple[int, ...]], list[AdaptedSite]] = {}
    for site in sites:
        alike.setdefault((site.r, site.scale, site.shape), []).append(site)
    rows = []
    for (r, scale, shape), group in alike.items():
        for label, members in _by_role((site.site, site) for site in group):
            weights = sum(site.parameters for site in members)
            kind = ("whole", "") if r == 0 else (str(r), f"{scale:g}")
            rows.append((label, str(len(members)), *kind, "x".join(map(str, shape)), f"{weights:,}"))
    return Table("sites", ("site", "sites", "r", "scale", "shape", "weights"), tuple(rows))


def targets_table(targets: Iterable[TargetCost]) -> Table:
    """What adapters would weigh."""
    columns = (
        *(Column("targets", left=True), Column("r"), Column("sites"), Column("weights", count)),
        *(Column("adapter MB", _two_digits), Column("of the base", _part_of_base)),
    )
    rows = ((c.targets, c.r, c.sites, c.parameters, c.megabytes, c.share) for c in targets)
    return table_of("target sets", columns, rows)


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _two_digits(number: float) -> str:
    return f"{number:.2f}"


def _one_digit(number: float) -> str:
    return f"{number:.1f}"


def _part(share: float) -> str:
    return percent(share, 1)


def _part_of_base(share: float) -> str:
    return _part(share) if share else "--"


def towers_table(profile: ClipProfile) -> Table:
    """The towers and their sum."""
    rows = [_tower_row(tower) for tower in profile.towers]
    if len(rows) > 1:
        rows.append(_sum_row(profile))
    columns = (
        *(Column("tower", left=True), Column("input"), Column("weights", count), Column("MACs", short)),
        *(Column("of it attention", _part), Column("FLOPs", short), Column("adapter MACs", short)),
        *(Column("of the base", _part), Column("activations MB", _one_digit)),
    )
    return table_of(f"forward pass, batch {profile.batch}", columns, rows, _notes(profile))


def _sum_row(profile: ClipProfile) -> tuple[object, ...]:
    parameters, macs, flops, attention, adapter = (
        sum(getattr(tower, name) for tower in profile.towers)
        for name in ("parameters", "macs", "flops", "attention_macs", "adapter_macs")
    )
    return (
        *("both", "", parameters, macs, _share(attention, macs), flops),
        *(adapter, _share(adapter, macs), profile.trace.forward_bytes / 1e6),
    )


def _tower_row(cost: TowerCost) -> tuple[object, ...]:
    return (
        cost.tower,
        _by(cost.input_shape),
        cost.parameters,
        cost.macs,
        _share(cost.attention_macs, cost.macs),
        cost.flops,
        cost.adapter_macs,
        _share(cost.adapter_macs, cost.macs),
        cost.trace.forward_bytes / 1e6,
    )


def _share(part: float, whole: float) -> float:
    """Of nothing, 0."""
    return part / whole if whole else 0.0


def _notes(profile: ClipProfile) -> str:
    unpriced = profile.trace.unpriced
    return f"without a formula, counted as nothing: {', '.join(unpriced)}" if unpriced else ""


def site_costs_table(profile: ClipProfile) -> Table:
    """Products with the weights of every site, blocks of one role as one row."""
    rows = []
    for tower in profile.towers:
        for label, group in _by_role((str(cost.site), cost) for cost in tower.sites):
            rows.append(_site_row(label, group, tower.macs))
        attention = short(tower.attention_macs)
        share = percent(tower.attention_macs, tower.macs)
        rows.append((f"{tower.tower} scores and values", "", "", "", attention, share, ""))
    columns = ("site", "sites", "weights of each", "MACs of each", "MACs", "of the tower", "adapter MACs")
    return Table("sites", columns, tuple(rows))


def _site_row(label: str, group: Sequence[SiteCost], macs: int) -> tuple[str, ...]:
    first, total = group[0], sum(cost.macs for cost in group)
    return (
        label,
        str(len(group)),
        f"{first.parameters:,}",
        short(first.macs),
        short(total),
        percent(total, macs),
        short(sum(cost.adapter_macs for cost in group)),
    )


def llava_table(profile: LlavaProfile) -> Table:
    """The parts of LLaVA-NeXT, and the whole."""
    trace = profile.trace
    rows = []
    for label, path in (*LLAVA_PARTS.items(), ("whole", "")):
        layer = trace.layer(path)
        inside = (p for p in trace.products if p.weight is None and p.module.startswith(path))
        attention = sum(product.macs for product in inside)
        rows.append(
            (
                label,
                f"{layer.parameters:,}",
                percent(layer.parameters, trace.total.parameters),
                short(layer.macs),
                percent(layer.macs, trace.total.macs),
                percent(attention, layer.macs),
                short(layer.flops),
            )
        )
    columns = ("part", "weights", "of the whole", "MACs", "of the whole", "of it attention", "FLOPs")
    return Table("forward pass", columns, tuple(rows))


def training_table(costs: Sequence[TrainingCost], batch: int) -> Table:
    """A training step on every target set beside full tuning."""
    full = costs[0]
    rows = (
        (
            cost.targets,
            cost.trainable,
            sum(tower.forward_macs for tower in cost.towers),
            sum(tower.backward_macs for tower in cost.towers),
            _share(cost.macs, full.macs),
            _share(cost.cached_macs, full.macs),
            *(size / 1e6 for size in _memory(cost)),
        )
        for cost in costs
    )
    columns = (
        *(Column("targets", left=True), Column("trained", count), Column("forward MACs", short)),
        *(Column("backward MACs", short), Column("of full", _part), Column("with cache", _part)),
        *(Column(f"{name} MB", _one_digit) for name in ("weights", "gradients", "AdamW", "saved", "total")),
    )
    note = (
        "with cache: features of frozen towers kept instead of computed again. saved: activations kept for "
        "the backward pass. AdamW: its two moments."
    )
    return table_of(f"a training step, batch {batch}", columns, rows, note)


def _memory(cost: TrainingCost) -> tuple[int, ...]:
    parts = (cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.saved_bytes)
    return (*parts, cost.memory_bytes)


def measured_table(found: Measurement) -> Table:
    """What was measured."""
    rows = tuple(
        (
            tower.tower,
            f"{1000 * tower.seconds:.2f}",
            f"{tower.rows_per_second:.1f}",
            short(tower.flops_per_second),
            percent(tower.of_matmul, 1, 1),
        )
        for tower in found.towers
    )
    where = f"{found.device}, {found.threads} threads, {found.dtype}, random weights"
    peak = "unknown" if found.peak_megabytes is None else f"{found.peak_megabytes:.0f} MB"
    size = found.matrix
    note = f"matmul of {size}x{size}: {short(found.matmul_flops_per_second)}FLOP/s. peak memory: {peak}."
    return Table(f"measured on {where}", ("tower", "ms", "rows/s", "FLOP/s", "of matmul"), rows, note)


def _by_role(named: Iterable[tuple[str, _V]]) -> Iterator[tuple[str, list[_V]]]:
    """Sites with the blocks of a role together: `text.0-11.q`."""
    groups: dict[tuple[str, str], list[tuple[str, _V]]] = {}
    for name, value in named:
        parts = name.split(".")
        groups.setdefault((parts[0], parts[-1]), []).append((name, value))
    for (tower, role), members in groups.items():
        blocks = [int(name.split(".")[1]) for name, _ in members if name.count(".") == 2]
        label = f"{tower}.{_ranges(blocks)}.{role}" if blocks else f"{tower}.{role}"
        yield label, [value for _, value in members]


def _ranges(blocks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> `0-2+5`, as target expressions are written."""
    parts = []
    for _, group in itertools.groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        run = [block for _, block in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return "+".join(parts)


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

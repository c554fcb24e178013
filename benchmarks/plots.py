"""The plots of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import Bars

_OURS, _PEER = "#2a7f62", "#9aa5b1"


def draw(folder: Path, bars: Bars) -> None:
    """Draw one horizontal bar a contestant, ours in green."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.42 * len(bars.bars)), layout="constrained")
    names = list(bars.bars)[::-1]
    values = [bars.bars[name] for name in names]
    drawn = axes.barh(
        names, values, color=[_OURS if name.startswith("clipgraft") else _PEER for name in names]
    )
    axes.bar_label(
        drawn, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3
    )
    if bars.logarithmic:
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel(bars.unit)
    axes.set_title(bars.title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / bars.file, dpi=120)
    plt.close(figure)


def draw_lengths(path: Path, histograms: Mapping[str, Mapping[str, int]]) -> None:
    """Draw how many captions have how many tokens, one panel a variant."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(histograms), figsize=(8, 2.4), sharey=True, layout="constrained")
    for axes, (variant, counts) in zip(panels, histograms.items(), strict=True):
        axes.bar([int(length) for length in counts], list(counts.values()), color=_OURS)
        axes.set_title(variant, loc="left")
        axes.set_xlabel("tokens a caption")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("captions")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot

"""Draw the report's charts with matplotlib, as SVG text whose colours are those of the page's theme.

Charts are drawn in stand-in colours that nothing else uses, and each becomes a CSS variable in the SVG. The
page then gives them their light, dark or printed values.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from clipgraft.report.tables import ResultRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 420.0, 290.0


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its name, its points and, for several seeds, the span around them."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def curves(
    name: str,
    title: str,
    across: str,
    up: str,
    lines: Sequence[Curve],
    points: bool = False,
    kept: float | None = None,
    mark: str = "kept",
    doubling: bool = False,
) -> str:
    """Draw lines over steps or epochs; `points` marks each measurement, `kept` what was saved or is advised.

    `mark` is the word for it. With `doubling` equal steps across double the number, and what was measured is
    named below.
    """
    with style():
        figure, axes = canvas(WIDTH, HEIGHT)
        for place, line in enumerate(lines[: len(SERIES)]):
            marker = MARKERS[place] if points else None
            look: dict[str, Any] = {"color": SERIES[place], "linestyle": DASHES[place], "marker": marker}
            axes.plot(line.x, line.y, label=line.label, markeredgecolor=PAPER, markeredgewidth=0.8, **look)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=SERIES[place], alpha=0.16, linewidth=0)
        _plain_axes(axes, across, up, whole=all(float(x).is_integer() for line in lines for x in line.x))
        if doubling:
            across_all = sorted({x for line in lines for x in line.x})
            axes.set_xscale("log", base=2)
            axes.set_xticks(across_all, [f"{x:g}" for x in across_all])
            axes.minorticks_off()
        if kept is not None:
            axes.axvline(kept, color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)), zorder=0)
            above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
            _annotate(axes, f"{mark}: {kept:g}", (kept, 1), (0, 3), **above)
        if len(lines) > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        ends = "; ".join(f"{c.label} ends at {c.y[-1]:.3g}" for c in lines[: len(SERIES)] if len(c.y))
        told = "" if kept is None else f" {mark.capitalize()}: {across} {kept:g}."
        return to_svg(figure, name, title, f"{up} over {across}: {ends}.{told}")


def loss(name: str, title: str, losses: Sequence[tuple[int, float]]) -> str:
    """Draw the loss of every step faintly, and its trailing mean over a twelfth of the run."""
    steps, values = smoothed(losses, 400)
    window = max(1, len(values) // 12)
    means = [float(np.mean(values[max(0, place - window + 1) : place + 1])) for place in range(len(values))]
    with style():
        figure, axes = canvas(WIDTH, HEIGHT)
        axes.plot(steps, values, color=SERIES[0], alpha=0.35, linewidth=1)
        axes.plot(steps, means, color=SERIES[0], linewidth=2.2)
        _plain_axes(axes, "step", "loss")
        described = f"From {values[0]:.3g} to {values[-1]:.3g} in {steps[-1]:,.0f} steps."
        return to_svg(figure, name, title, described)


def _annotate(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **where: Any
) -> None:
    word = axes.annotate(text, point, offset, textcoords="offset points", fontsize=8.5, color=MUTED, **where)
    word.set_path_effects([withStroke(linewidth=2.5, foreground=PAPER)])


def _plain_axes(axes: Axes, across: str, up: str, whole: bool = True) -> None:
    axes.set_xlabel(across)
    axes.set_title(up, loc="left", fontsize=10, color=INK, pad=8)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.03)


def against_weights(name: str, metric: str, label: str, lines: Sequence[ResultRow], joined: bool) -> str:
    """Draw a metric in percent against trained weights: a point per rank; `joined` adds lines per set."""
    with style():
        figure, axes = canvas(WIDTH, HEIGHT + 20)
        _references(axes, metric, lines)
        for place, (targets, points) in enumerate(_by_targets(lines).items()):
            place %= len(SERIES)
            x = [line.trained or 1 for line in points]
            y = [100 * line.mean[metric] for line in points]
            error = [100 * line.deviation.get(metric, 0.0) for line in points]
            axes.errorbar(
                x,
                y,
                yerr=error if any(error) else None,
                label=targets,
                color=SERIES[place],
                marker=MARKERS[place],
                linestyle=DASHES[place] if joined else "none",
                **_POINTS,
            )
            for line, across, up in zip(points, x, y, strict=True):
                if line.r is not None:
                    _annotate(axes, f"r={line.r}", (across, up), (7, -4))
        axes.set_xscale("log")
        sizes = [line.trained for line in lines if line.trained]
        # Within two decades the powers of ten alone may leave an axis with a single number.
        steps = (1.0, 2.0, 5.0) if max(sizes) < 100 * min(sizes) else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(10, subs=steps, numticks=12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("trained weights (logarithmic)")
        axes.set_title(f"{label}, %", loc="left", fontsize=10, color=INK, pad=8)
        axes.grid(axis="x", visible=False)
        axes.margins(x=0.08, y=0.14)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        return to_svg(figure, name, f"{label} against trained weights", _said(metric, lines))


def by_targets(name: str, metric: str, label: str, lines: Sequence[ResultRow]) -> str:
    """Draw a metric in percent by target set: a row per set, a marker per rank, base and full as lines."""
    groups = _by_targets(lines)
    ranks = sorted({line.r or 0 for line in lines if line.kind == "lora"})
    with style():
        figure, axes = canvas(WIDTH, 96 + 34 * len(groups) + 16 * ((len(ranks) + 2) // 3))
        _references(axes, metric, lines, upright=True)
        for place, rank in enumerate(ranks):
            shift = (place - (len(ranks) - 1) / 2) * 0.62 / max(len(ranks), 2)
            found = [
                (row + shift, line)
                for row, points in enumerate(groups.values())
                for line in points
                if (line.r or 0) == rank
            ]
            error = [100 * line.deviation.get(metric, 0.0) for _, line in found]
            axes.errorbar(
                [100 * line.mean[metric] for _, line in found],
                [row for row, _ in found],
                xerr=error if any(error) else None,
                label=f"r={rank}" if rank else "adapter",
                color=SERIES[place % len(SERIES)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle="none",
                **_POINTS,
            )
        axes.set_yticks(range(len(groups)), list(groups), color=INK)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08)
        axes.set_title(f"{label}, %", loc="left", fontsize=10, color=INK, pad=8)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25 if len(groups) < 3 else -0.16), ncols=3)
        return to_svg(figure, name, f"{label} by target set", _said(metric, lines))


@dataclass(frozen=True)
class Matrix:
    """A square matrix whose cells are shaded by their value.

    Attributes:
        values: of the cells, row by row.
        texts: what is written into the cells.
        names: of the rows, and of the columns in the same order.
        limits: the values of the lightest and the darkest shade.
        up, across: what the rows and the columns are.
        framed: for each row the true column, which is framed.
    """

    values: Sequence[Sequence[float]]
    texts: Sequence[Sequence[str]]
    names: Sequence[str]
    limits: tuple[float, float]
    up: str
    across: str
    framed: Sequence[int]


def matrix(name: str, title: str, table: Matrix) -> str:
    """Draw a matrix of shaded cells with texts written into them."""
    names, size = table.names, len(table.names)
    low, high = table.limits
    edges = np.linspace(low, high if high > low else low + 1, len(HEAT) + 1)
    side = min(26.0, 520.0 / size)
    longest = max((len(label) for label in names), default=1)
    with style():
        figure, axes = canvas(90 + 5.2 * longest + side * size, 70 + 5.2 * longest + side * size)
        found = np.searchsorted(edges, np.asarray(table.values, dtype=float), side="right") - 1
        shades = np.clip(found, 0, len(HEAT) - 1)
        for shade in np.unique(shades):
            cells = [_cell(row, column) for row, column in np.argwhere(shades == shade)]
            axes.add_patch(PathPatch(Path.make_compound_path(*cells), facecolor=HEAT[shade], linewidth=0))
        axes.set_xlim(0, size)
        axes.set_ylim(size, 0)
        axes.set_aspect("equal")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        places = np.arange(size) + 0.5
        axes.set_xticks(places, names, rotation=90 if longest > 2 else 0, fontsize=8.5)
        axes.set_yticks(places, names, fontsize=9.5)
        axes.set_xlabel(table.across)
        axes.set_ylabel(table.up)
        _write(axes, table.texts, shades, min(9.0, side * 0.42))
        for row, column in enumerate(table.framed):
            corner = ([column, column + 1, column + 1, column, column], [row, row, row + 1, row + 1, row])
            axes.plot(*corner, color=INK, linewidth=1.1, clip_on=False)
        said = f"A matrix of {size} rows ({table.up}) and {size} columns ({table.across})."
        return to_svg(figure, name, title, said)


def _cell(row: int, column: int) -> Path:
    """Give the path of one cell, a little smaller than its place; a shade is drawn as one path."""
    left, right, top, bottom = column + 0.02, column + 0.98, row + 0.02, row + 0.98
    return Path([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], closed=True)


def _write(axes: Axes, texts: Sequence[Sequence[str]], shades: np.ndarray[Any, Any], size: float) -> None:
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            if text:
                ink = HEAT_INK[shades[row, column]]
                axes.text(
                    *(column + 0.5, row + 0.52, text),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color=ink,
                    in_layout=False,
                )


def _by_targets(lines: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    groups: dict[str, list[ResultRow]] = {}
    for line in lines:
        if line.kind == "lora" and line.trained:
            groups.setdefault(line.targets, []).append(line)
    return groups


def _references(axes: Axes, metric: str, lines: Sequence[ResultRow], upright: bool = False) -> None:
    """Draw base and full fine-tuning as lines across, named in the legend; full also as a point."""
    for kind, dash, word in (("base", (0, (2, 2)), "base"), ("full", (0, (7, 2)), "full fine-tuning")):
        for line in (line for line in lines if line.kind == kind and metric in line.mean):
            value = 100 * line.mean[metric]
            draw = axes.axvline if upright else axes.axhline
            draw(value, color=MUTED, linestyle=dash, linewidth=1.2, label=f"{word} {value:.1f}")
            error = 100 * line.deviation.get(metric, 0.0)
            if kind == "full" and line.trained and not upright:
                axes.errorbar(
                    [line.trained],
                    [value],
                    yerr=error or None,
                    color=MUTED,
                    marker="*",
                    markersize=10,
                    capsize=3,
                )


def _said(metric: str, lines: Sequence[ResultRow]) -> str:
    parts = []
    for line in lines:
        if metric in line.mean:
            rank = f" r={line.r}" if line.r else ""
            cost = f"{line.trained or 0:,} trained weights"
            parts.append(f"{line.label}{rank}: {100 * line.mean[metric]:.1f} % with {cost}")
    return "; ".join(parts) + "."


def short(value: float) -> str:
    """Shorten a number of weights: 12,288 -> 12k; 2,773,633 -> 2.8M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def smoothed(losses: Sequence[tuple[int, float]], most: int) -> tuple[list[float], list[float]]:
    """Reduce a loss curve to the means of at most `most` equal stretches."""
    size = max(1, -(-len(losses) // most))
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [part[-1][0] for part in parts], [sum(loss for _, loss in part) / len(part) for part in parts]


def over_seeds(label: str, runs: Sequence[Sequence[tuple[int, float]]]) -> Curve:
    """Average the loss curves of several seeds, with the span from lowest to highest."""
    length = min(len(run) for run in runs)
    means = [smoothed(run[:length], 40) for run in runs]
    values = np.array([y for _, y in means])
    if len(runs) == 1:
        return Curve(label, means[0][0], means[0][1])
    return Curve(label, means[0][0], values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist())


INK, MUTED, RULE, PAPER = "#010000", "#010001", "#010002", "#010003"
SERIES = tuple(f"#0200{number:02x}" for number in range(8))
HEAT = tuple(f"#0300{number:02x}" for number in range(11))
HEAT_INK = tuple(f"#0400{number:02x}" for number in range(len(HEAT)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), "-", "--", ":")

_POINTS: dict[str, Any] = {
    "capsize": 3,
    "elinewidth": 1.1,
    "markeredgecolor": PAPER,
    "markeredgewidth": 0.8,
}
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--paper",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES)},
    **{colour: f"--heat-{number}" for number, colour in enumerate(HEAT)},
    **{colour: f"--heat-ink-{number}" for number, colour in enumerate(HEAT_INK)},
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipgraft",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the page's matplotlib style, whatever the user's own matplotlibrc says."""
    values: Any = {**dict(mpl.rcParamsDefault), **_STYLE, "backend": mpl.rcParams["backend"]}
    with mpl.rc_context(values), warnings.catch_warnings():
        # Text is drawn by the reader's own fonts; the one here only measures it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure of a size in CSS pixels with one pair of axes; call it within `style()`."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Convert a figure into an `<svg>` element for an HTML page.

    `name` is a prefix of its ids, different for every chart of a page; `title` and `description` are what is
    read aloud instead of it, as plain text.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r"#0[1-4]00[0-9a-f]{2}\b", lambda m: f"var({_VARIABLES[m.group(0)]})", text)
    text = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m.group(0)):.2f}".rstrip("0").rstrip("."), text)
    # The page's style says what font they have, and most are not turned.
    text = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", text)
    head, body = text.split(">", 1)
    viewbox = re.search(r'viewBox="[^"]+"', head)
    assert viewbox is not None
    opening = (
        f'<svg {viewbox.group(0)} class="chart" role="img" '
        f'aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{_escaped(title)}</title>'
        f'<desc id="{name}-description">{_escaped(description)}</desc>'
    )
    return re.sub(r"\s*\n\s*", "\n", opening + body).strip()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

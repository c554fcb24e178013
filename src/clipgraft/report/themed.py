"""matplotlib's drawings as parts of a page: SVG text whose colours are those of the page's theme.

Charts are drawn in stand-in colours that nothing else uses, and each becomes a CSS variable in the SVG. The
page then gives them their light, dark or printed values.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RULE, PAPER = "#010000", "#010001", "#010002", "#010003"
SERIES = tuple(f"#0200{number:02x}" for number in range(8))
HEAT = tuple(f"#0300{number:02x}" for number in range(11))
HEAT_INK = tuple(f"#0400{number:02x}" for number in range(len(HEAT)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), "-", "--", ":")

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
    """`with style(): ...` draws as the page does, whatever the user's own matplotlibrc says."""
    values: Any = {**dict(mpl.rcParamsDefault), **_STYLE, "backend": mpl.rcParams["backend"]}
    with mpl.rc_context(values), warnings.catch_warnings():
        # Text is drawn by the reader's own fonts; the one here only measures it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many CSS pixels with one pair of axes; call it within `style()`."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an `<svg>` element to be put into HTML.

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

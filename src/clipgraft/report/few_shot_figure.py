"""Draw what few-shot modes reach by the number of images a class, as an SVG file that stands alone."""

from __future__ import annotations

from importlib import resources

from clipgraft.report.charts import Curve, curves
from clipgraft.train.fewshot.results import METRICS, ZERO_SHOT, FewShotComparison, FewShotRow


def few_shot_figure(found: FewShotComparison) -> str:
    """Return an SVG of accuracy, or of the harmonic mean, by shots: a line each mode, shaded by deviation."""
    metric = METRICS[found.setting][-1]
    start = next(row for row in found.rows if row.mode == ZERO_SHOT)
    of_mode: dict[str, list[FewShotRow]] = {}
    for row in found.rows:
        if row.mode != ZERO_SHOT:
            of_mode.setdefault(row.mode, []).append(row)
    lines = [Curve(ZERO_SHOT, list(found.shots), [100 * start.mean[metric]] * len(found.shots))]
    for mode, rows in of_mode.items():
        rows = sorted(rows, key=lambda row: row.shots)
        means = [100 * row.mean[metric] for row in rows]
        spans = [100 * row.deviation[metric] for row in rows]
        low, high = ([m + sign * s for m, s in zip(means, spans, strict=True)] for sign in (-1, 1))
        lines.append(Curve(mode, [row.shots for row in rows], means, low, high))
    title = f"{metric} by images a class"
    return _alone(curves("few-shot", title, "images a class", f"{metric} %", lines, points=True))


def _alone(svg: str) -> str:
    """Give an `<svg>` element of a page what it has from the page: a namespace, colours, paper and font."""
    css = resources.files("clipgraft.report").joinpath("page.css").read_text(encoding="utf-8")
    colours = css[: css.index("}") + 1].replace(":root", "svg")
    style = f"<style>{colours} svg {{ background: var(--paper); font-family: sans-serif }}</style>"
    opening, rest = svg.split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'

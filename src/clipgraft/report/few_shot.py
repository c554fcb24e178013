"""What a page shows of a few-shot comparison: curves by the number of images a class, and a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from clipgraft.report.charts import Curve, curves
from clipgraft.train.fewshot.results import METRICS, ZERO_SHOT, FewShotComparison, FewShotRow


@dataclass(frozen=True)
class FewShot:
    """A comparison, as far as it has come, and its folder."""

    path: Path
    found: FewShotComparison

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def in_short(self) -> str | None:
        """Say in a sentence which mode is best with the most images a class; None if none has finished."""
        if not self.found.shots:
            return None
        metric, most = METRICS[self.found.setting][-1], self.found.shots[-1]
        rows = [row for row in self.found.rows if row.shots == most]
        best = max(rows, key=lambda row: row.mean[metric])
        start = next(row for row in self.found.rows if row.mode == ZERO_SHOT)
        shares = f"{metric} {100 * best.mean[metric]:.1f} % (zero-shot {100 * start.mean[metric]:.1f})"
        return f"reaches {shares} by {best.mode} with {most} image{'s' * (most > 1)} of each class."


def few_shot_figure(found: FewShotComparison) -> str:
    """Return an SVG file of accuracy, or of the harmonic mean, by shots."""
    return _alone(few_shot_curves(found, "few-shot", METRICS[found.setting][-1]))


def few_shot_curves(found: FewShotComparison, name: str, metric: str) -> str:
    """Return an `<svg>` element of a metric by shots: a line each mode, shaded by deviation."""
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
    return curves(name, title, "images a class", f"{metric} %", lines, points=True, doubling=True)


def _alone(svg: str) -> str:
    """Give an `<svg>` element of a page what it has from the page: a namespace, colours, paper and font."""
    css = resources.files("clipgraft.report").joinpath("page.css").read_text(encoding="utf-8")
    colours = css[: css.index("}") + 1].replace(":root", "svg")
    style = f"<style>{colours} svg {{ background: var(--paper); font-family: sans-serif }}</style>"
    opening, rest = svg.split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'

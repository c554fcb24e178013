"""Choose the figures of a page and their captions; `charts` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipgraft.report import charts
from clipgraft.report.examples import Classes, Examples
from clipgraft.report.few_shot import few_shot_curves
from clipgraft.report.runs import Run, Sweep
from clipgraft.report.tables import METRIC_WORDS, ResultGroup, charted
from clipgraft.train.fewshot.results import METRICS, FewShotComparison
from clipgraft.train.strength import StrengthCurve

_MOST_CLASSES = 32


@dataclass(frozen=True)
class Figure:
    """A chart and its caption."""

    svg: str
    caption: str = ""


def learning(source: Run | Sweep, name: str) -> list[Figure]:
    """Draw loss by step and, where more than the last epoch was evaluated, metrics by epoch."""
    return _sweep_learning(source, name) if isinstance(source, Sweep) else _run_learning(source, name)


def _run_learning(run: Run, name: str) -> list[Figure]:
    figures = []
    if run.losses:
        svg = charts.loss(f"{name}-loss", f"Loss of {run.name}", run.losses)
        figures.append(Figure(svg))
    measured = run.measured
    if len(measured) > 1:
        names = [metric for metric in METRIC_WORDS if metric in measured[0] and "@10" not in metric]
        epochs = [number.get("epoch", place + 1) for place, number in enumerate(measured)]
        lines = [
            charts.Curve(METRIC_WORDS[m], epochs, [100 * e.get(m, float("nan")) for e in measured])
            for m in names
        ]
        title = f"Validation of {run.name}"
        svg = charts.curves(
            f"{name}-val", title, "epoch", "validation, %", lines, points=True, kept=run.best_epoch
        )
        figures.append(Figure(svg))
    return figures


def strength(source: Run | Sweep, name: str) -> list[Figure]:
    """Draw what is gained and what is kept by the strength of what was learnt, where that was measured."""
    curve = source.strength if isinstance(source, Run) else None
    return [] if curve is None else [_strength(curve, source.name, name)]


def _strength(curve: StrengthCurve, run: str, name: str) -> Figure:
    strengths = [point.strength for point in curve.points]
    lines = [
        charts.Curve("gained: validation", strengths, [100 * point.gained for point in curve.points]),
        charts.Curve("kept of the base", strengths, [100 * point.kept for point in curve.points]),
    ]
    svg = charts.curves(
        f"{name}-strength",
        f"Strength of {run}",
        "strength",
        "%",
        lines,
        points=True,
        kept=curve.recommended,
        mark="recommended",
    )
    saved = "and saved" if curve.applied or curve.recommended == 1 else "while 1, as trained, was saved"
    return Figure(
        svg,
        f"Strength {curve.recommended:g} is recommended, {saved}: it keeps most within a point of the best "
        "gain. Kept are first answers that are the base's, between the validation images and "
        f"{curve.texts:,} texts ({curve.source}).",
    )


def _sweep_learning(sweep: Sweep, name: str) -> list[Figure]:
    """Draw one panel per target set with a line per rank, and full fine-tuning in each for comparison."""
    by_row: dict[tuple[str, str, int], list[Sequence[tuple[int, float]]]] = {}
    for cell in sweep.cells:
        run = sweep.runs.get(cell.cell.name)
        if run is not None and run.losses:
            by_row.setdefault(cell.cell.row, []).append(run.losses)
    full = [charts.over_seeds("full", runs) for row, runs in by_row.items() if row[0] == "full"]
    targets = list(dict.fromkeys(row[1] for row in by_row if row[0] == "lora"))
    figures = []
    for place, target in enumerate(targets):
        ranks = sorted((row[2], runs) for row, runs in by_row.items() if row[:2] == ("lora", target))
        lines = [*(charts.over_seeds(f"r={rank}", runs) for rank, runs in ranks), *full]
        title = f"Loss of {sweep.name}, {target}"
        svg = charts.curves(f"{name}-loss-{place}", title, "step", f"loss, {target}", lines)
        figures.append(Figure(svg))
    if not targets and full:
        svg = charts.curves(f"{name}-loss", f"Loss of {sweep.name}", "step", "loss", full)
        figures.append(Figure(svg))
    return figures


def few_shot(found: FewShotComparison, name: str) -> list[Figure]:
    """Draw each metric by the number of images a class, where there are several numbers of them."""
    if len(found.shots) < 2:
        return []
    return [
        Figure(few_shot_curves(found, f"{name}-shots-{place}", metric))
        for place, metric in enumerate(METRICS[found.setting])
    ]


def costs(group: ResultGroup, name: str) -> list[Figure]:
    """Draw metrics against trained weights and, for several target sets, by target set."""
    lines = [line for line in group.lines if line.mean]
    adapters = [line for line in lines if line.kind == "lora" and line.trained]
    # One point says no more than its row of the table.
    if not adapters or sum(line.kind != "base" for line in lines) < 2:
        return []
    figures = []
    for place, metric in enumerate(charted(group.task)):
        words = METRIC_WORDS[metric]
        svg = charts.against_weights(f"{name}-weights-{place}", metric, words, lines, group.is_sweep)
        figures.append(Figure(svg))
    if group.is_sweep and len({line.targets for line in adapters}) > 1:
        for place, metric in enumerate(charted(group.task)):
            words = METRIC_WORDS[metric]
            figures.append(Figure(charts.by_targets(f"{name}-targets-{place}", metric, words, lines)))
    return figures


def heat_maps(examples: Examples, name: str) -> list[Figure]:
    """Draw the similarities of base and adapted model with one colour scale."""
    heat = examples.heat
    values = [value for side in (heat.base, heat.adapted) for row in side for value in row]
    numbers = [str(place + 1) for place in range(len(heat.images))]
    texts, own = ("captions", "caption") if examples.task == "retrieval" else ("classes", "class")
    figures = []
    for side, title in ((heat.base, "base"), (heat.adapted, "adapted")):
        svg = charts.matrix(
            f"{name}-heat-{title}",
            f"Similarity of images and {texts}, {title} model",
            charts.Matrix(
                side,
                texts=[[_cosine(value) for value in row] for row in side],
                names=numbers,
                limits=(min(values), max(values)),
                up="images",
                across=texts,
                framed=heat.truth,
            ),
        )
        likest = [max(range(len(row)), key=row.__getitem__) for row in side]
        right = sum(place == true for place, true in zip(likest, heat.truth, strict=True))
        caption = f"{title}: {right} of {len(side)} images are most like their own {own}"
        figures.append(Figure(svg, caption))
    return figures


def _cosine(value: float) -> str:
    """0.512 -> .51"""
    text = f"{value:.2f}".replace("0.", ".", 1).replace("-", "−")
    return ".00" if text == "−.00" else text


def confusions(classes: Classes, name: str) -> tuple[list[Figure], int]:
    """Draw the confusion matrices of base and adapted model; returns them and the number of classes left out.

    Shades are shares of the images of a class. Of very many classes those with most mistakes are drawn.
    """
    wrong = [sum(row) - row[place] for place, row in enumerate(classes.adapted)]
    kept = sorted(sorted(range(len(wrong)), key=lambda place: -wrong[place])[:_MOST_CLASSES])
    names = [classes.names[place] for place in kept]
    figures = []
    for counts, title in ((classes.base, "base"), (classes.adapted, "adapted")):
        chosen = [[counts[row][column] for column in kept] for row in kept]
        sums = [max(1, sum(counts[row])) for row in kept]
        svg = charts.matrix(
            f"{name}-confusion-{title}",
            f"Confusion matrix, {title} model",
            charts.Matrix(
                [[count / total for count in row] for row, total in zip(chosen, sums, strict=True)],
                texts=[[str(count) if count else "" for count in row] for row in chosen],
                names=names,
                limits=(0.0, 1.0),
                up="true class",
                across="taken for",
                framed=range(len(kept)),
            ),
        )
        hits = sum(counts[place][place] for place in range(len(counts)))
        caption = f"{title}: {hits:,} of {sum(map(sum, counts)):,} images right"
        figures.append(Figure(svg, caption))
    return figures, len(wrong) - len(kept)

"""Sweep the strength of what was learnt, from 0 to 1.5 times as trained: what is gained, what is kept.

An adapter's alpha is scaled. Where the model itself was trained, its weights are interpolated between those
that it began with and those it ended with (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903), so that both
kinds of training have the same curve.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipgraft.data.retained import Retained
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.metrics import DECISIVE, MEASURED_ON, task_of
from clipgraft.lora.state import Adapter, lora_state
from clipgraft.models.clip import Clip
from clipgraft.records import Finite, Whole
from clipgraft.text_tables import Table
from clipgraft.train.inputs import Inputs
from clipgraft.train.loop import running_statistics
from clipgraft.train.recipes.recipe import Recipe
from clipgraft.train.retention import as_base

log = logging.getLogger("clipgraft")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_WITHIN = 0.01
"""Of the best on the validation data: what is given up at most for keeping more."""
_MUCH = 0.1  # of what the base knew
_MOST_TEXTS = 500


@dataclass(frozen=True)
class Point:
    """What a strength gives.

    Attributes:
        gained: mean of the decisive metrics on the validation data, R@1 of both directions or accuracy.
        kept: share of first answers that are the base's.
    """

    strength: Finite
    gained: Finite
    kept: Finite


@dataclass(frozen=True)
class StrengthCurve:
    """What was gained against what was kept, by the strength of what was learnt.

    Attributes:
        points: from the base, strength 0, to 1.5 times what was trained.
        recommended: of those above 0 whose gain is within a point of the best, the one that keeps most.
        applied: whether what was saved has that strength.
        of: what was scaled: `alpha` of an adapter, or the `weights` of the model.
        texts: how many texts the images were compared with, on which nothing was trained, from `source`.
        retained: whether training held the model to its base.
        metrics: of the recommended strength on the validation data.
    """

    points: tuple[Point, ...]
    recommended: Finite
    applied: bool
    of: str
    texts: Whole
    source: str
    retained: bool
    metrics: Mapping[str, Finite]

    def at(self, strength: float) -> Point:
        """Return the point of a strength in `STRENGTHS`."""
        return next(point for point in self.points if point.strength == strength)

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, text and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        task = task_of(self.metrics)
        what = "accuracy" if task == "classification" else "R@1"
        rows = [
            (f"{point.strength:g}", f"{100 * point.gained:.1f}", f"{100 * point.kept:.1f}")
            for point in self.points
        ]
        told = Table("", ("strength", f"gained: {what} %", "kept %"), tuple(rows)).text().strip("\n")
        lines = [
            f"strength of what was learnt ({self.of} x strength); kept: first answers that are the base's, "
            f"between the validation {MEASURED_ON[task]} and {self.texts:,} texts ({self.source})",
            told,
            self._advice(),
        ]
        if not self.retained and self.at(1.0).kept < 1 - _MUCH:
            lost = 100 * (1 - self.at(1.0).kept)
            lines.append(
                f"try `retain=auto`: {lost:.0f} % of the base's first answers are others now, and it holds "
                "the model to them while it learns"
            )
        return "\n".join(lines)

    def _advice(self) -> str:
        why = "it keeps most within a point of the best gain"
        if self.applied:
            return f"saved with strength {self.recommended:g}: {why}"
        if self.recommended == 1.0:
            return f"recommended is 1, as trained: {why}"
        return f"recommended is {self.recommended:g}: {why}; `strength=auto` saves that one"


class Dial(Protocol):
    """What sets the strength of what a model has learnt."""

    of: str

    def turn(self, strength: float) -> None:
        """Let the model have this strength; 1 is as trained."""

    def keep(self, strength: float) -> None:
        """Make a strength the model's own, in what is saved of it too."""


class AdapterDial:
    """Scales the updates of an adapter, and the biases that it adds."""

    of = "alpha"

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._scales = {layer: layer.scaling for layer in adapter.layers.values()}
        self._biases = {
            module: module.lora_bias.detach().clone()
            for module in adapter.modules()
            if module.lora_bias is not None
        }

    def turn(self, strength: float) -> None:
        for layer, scale in self._scales.items():
            layer.scaling = scale * strength
        with torch.no_grad():
            for module, bias in self._biases.items():
                assert module.lora_bias is not None
                module.lora_bias.copy_(bias * strength)

    def keep(self, strength: float) -> None:
        self.turn(strength)
        adapter = self._adapter
        if any(layer.scale_of(2.0, 1, False) == layer.scale_of(1.0, 1, False) for layer in self._scales):
            self._scale_factors(strength)
            return
        settings = adapter.settings
        adapter.settings = settings.replace(
            alpha=settings.alpha * strength,
            alpha_pattern={site: alpha * strength for site, alpha in settings.alpha_pattern.items()},
        )
        for layer in self._scales:
            layer.alpha *= strength

    def _scale_factors(self, strength: float) -> None:
        """A variant without an alpha is weaker where the factor that starts at zero is smaller."""
        with torch.no_grad():
            for layer, scale in self._scales.items():
                layer.starts_at_zero.mul_(strength)
                layer.scaling = scale


class WeightsDial:
    """Interpolates weights between those that a run began with and those that it ended with."""

    of = "weights"

    def __init__(self, begun: Beginning) -> None:
        self._begun = begun
        self._ended = [tensor.detach().clone() for tensor in begun.tensors]

    def turn(self, strength: float) -> None:
        with torch.no_grad():
            for tensor, start, end in zip(self._begun.tensors, self._begun.values, self._ended, strict=True):
                tensor.copy_(end if strength == 1 else start + strength * (end - start))

    def keep(self, strength: float) -> None:
        self.turn(strength)


class Beginning:
    """The trained weights of a model, and its running statistics, as they were when a run began."""

    def __init__(self, model: nn.Module) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.tensors = [t for t in (*trained, *running_statistics(model)) if t.is_floating_point()]
        self.values = [tensor.detach().clone() for tensor in self.tensors]


def make_dial(clip: Clip, begun: Beginning | None) -> Dial | str:
    """Return what sets the strength of a model, or why there is nothing."""
    state = lora_state(clip)
    if state is None:
        return (
            "nothing of the model was trained" if begun is None or not begun.tensors else WeightsDial(begun)
        )
    adapter = state.chosen()
    rescaling = [layer for layer in adapter.layers.values() if layer.rescales]
    if rescaling:
        return f"{rescaling[0].label} also trains magnitudes, which no alpha scales"
    return AdapterDial(adapter)


class Answers:
    """Which text each image finds first, and which image each text, by the base and at a strength."""

    def __init__(self, inputs: Inputs, recipe: Recipe, retained: Retained) -> None:
        self._inputs = inputs
        assert recipe.val is not None
        self._images = recipe.val.images
        self.texts = retained.parts()[1][:_MOST_TEXTS]
        with as_base(inputs.setup.clip):
            self._base = self._first()

    def kept(self) -> float:
        """The share of first answers that are the base's, the mean of both directions."""
        now = self._first()
        shares = [float((new == old).float().mean()) for new, old in zip(now, self._base, strict=True)]
        return sum(shares) / len(shares)

    def _first(self) -> tuple[Tensor, Tensor]:
        images = self._inputs.val_features(self._images)
        texts = self._inputs.encode_captions(self.texts)
        scores = images @ texts.T
        return scores.argmax(1), scores.argmax(0)


def sweep_strength(
    inputs: Inputs, recipe: Recipe, dial: Dial, retained: Retained, *, keep: bool
) -> tuple[StrengthCurve, Measured]:
    """Measure all strengths on the validation data; the model is afterwards as trained, or as recommended.

    Args:
        retained: texts of which the part that nothing was trained on is measured.
        keep: leave the model at the recommended strength, and say so in what is saved.

    Returns:
        The curve, and what the model that is left reaches.
    """
    dial.turn(0.0)
    answers = Answers(inputs, recipe, retained)
    found: dict[float, Measured] = {}
    points = []
    for strength in STRENGTHS:
        dial.turn(strength)
        found[strength] = measured = recipe.measure(inputs)
        points.append(Point(strength, gained(measured.metrics), answers.kept() if strength else 1.0))
    recommended = recommend(points)
    left = recommended if keep else 1.0
    dial.turn(1.0)
    if keep:
        dial.keep(recommended)
    curve = StrengthCurve(
        points=tuple(points),
        recommended=recommended,
        applied=keep,
        of=dial.of,
        texts=len(answers.texts),
        source=retained.name,
        retained=recipe.retained is not None,
        metrics=found[recommended].metrics,
    )
    return curve, found[left]


def gained(metrics: Mapping[str, float]) -> float:
    """The mean of the decisive metrics."""
    names = DECISIVE[task_of(metrics)]
    return sum(metrics[name] for name in names) / len(names)


def recommend(points: Sequence[Point]) -> float:
    """Of the strengths above 0 within a point of the best gain, the one that keeps most."""
    above = [point for point in points if point.strength > 0]
    best = max(point.gained for point in above)
    near = [point for point in above if point.gained >= best - _WITHIN]
    return max(near, key=lambda point: (point.kept, point.gained)).strength

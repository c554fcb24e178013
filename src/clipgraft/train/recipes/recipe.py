"""What every recipe of training has: its data, its objective, its measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import nn

from clipgraft.data.datasets import Pairs
from clipgraft.data.retained import Retained
from clipgraft.engine.encoder import Encoder
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.models.clip import Clip
from clipgraft.models.sites import TOWERS, Tower
from clipgraft.train.args import LossKind
from clipgraft.train.feed import MicroBatch
from clipgraft.train.gradient_cache import Encode, Loss
from clipgraft.train.inputs import Inputs, prepare_inputs
from clipgraft.train.recipes.pair_losses import choose_loss
from clipgraft.train.setup import Setup
from clipgraft.train.verdict import Unit


class Objective(Protocol):
    """A loss over the features of all micro-batches of a step (`train.gradient_cache`)."""

    def parts(self, batch: Sequence[MicroBatch]) -> list[Encode]:
        """Functions that each give (image, text) features of a part of the batch."""

    def loss(self, batch: Sequence[MicroBatch]) -> Loss:
        """The scalar loss of the image and text features of all parts."""


class Recipe(ABC):
    """What is learnt, and from what; `clipgraft.train.run.run_recipe` does all the rest.

    A new recipe is a class derived from this one: the pairs that batches are drawn from, an `objective` over
    the features of a batch, and what `measure` finds after an epoch. Feature sources, caches, the loop,
    several processes, checkpoints and the run folder are the same for all.

    Attributes:
        pairs: images and texts that batches are drawn from.
        val: the same to measure on; None to measure nothing.
        unit: what the rows are called.
        has_base: whether the model that a run begins with is one that it should stay near.
        head: what trains besides the model, once `objective` has made it; None for nothing.
        retained: texts on which the model is held to its base; None for none.
        needs_tower: whether something of the model must train.
        towers: those that the model must have.
    """

    unit: ClassVar[Unit] = "pairs"
    has_base: ClassVar[bool] = True
    needs_tower: bool = True
    towers: tuple[Tower, ...] = TOWERS

    def __init__(self, pairs: Pairs, val: Pairs | None = None, retained: Retained | None = None) -> None:
        self.pairs = pairs
        self.val = val
        self.head: nn.Module | None = None
        self.retained = retained

    def check(self) -> None:  # noqa: B027 - most recipes have nothing to refuse
        """Refuse data from which nothing can be learnt, before anything is computed."""

    def check_model(self, clip: Clip) -> None:  # noqa: B027
        """Refuse a model in which the wrong weights train."""

    def choose_loss(self, clip: Clip, asked: LossKind | Literal["auto"]) -> LossKind:
        """What `TrainArgs.loss` comes to with a model; raises ConfigError for one that cannot have it."""
        return choose_loss(clip, asked)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What must be the same in a run that is resumed: the data, and the recipe's own options."""

    def sample(self) -> Pairs:
        """Pairs that show an adapter the data that it is to start on."""
        return self.pairs

    def prepare(self, setup: Setup, encoder: Encoder) -> Inputs:
        """Compute what is constant; what batches are made of."""
        return prepare_inputs(setup, encoder, self.pairs, self.val, needs_tower=self.needs_tower)

    @abstractmethod
    def objective(self, inputs: Inputs) -> Objective:
        """What a step minimises."""

    def measure(self, inputs: Inputs) -> Measured:
        """What the model reaches on `val` as it is, the same in every process."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write what the run made besides the model, into its folder."""

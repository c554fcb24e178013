"""Train a recipe: from a model, data and options to a run folder with what was learnt in it."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from clipgraft.adapters.folder import findable
from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.retained import retained_texts
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError, TrainingError
from clipgraft.evaluate.bootstrap import Measured
from clipgraft.evaluate.metrics import REPORTED, Metrics, headline, metric_column
from clipgraft.lora.initialization import changes_nothing, is_new, start_from_data
from clipgraft.lora.state import lora_state, require_unmerged
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.export import size_on_disk
from clipgraft.models.lone_tower import check_has_tower
from clipgraft.pictures import open_image
from clipgraft.results import Result
from clipgraft.text_tables import Column, Table, table_of
from clipgraft.train import rate, retention
from clipgraft.train.args import RunArgs, TrainArgs
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.feed import trains
from clipgraft.train.loop import Loop, running_statistics, same_random
from clipgraft.train.rate import Rate, choose_rate
from clipgraft.train.recipes.recipe import Objective, Recipe
from clipgraft.train.retention import Retaining, Weight, choose_weight, hold_to_base
from clipgraft.train.run_folder import RunFolder, Saver, SilentFolder, made_with
from clipgraft.train.schedule import schedule_of
from clipgraft.train.setup import Setup, make_optimizer, set_up
from clipgraft.train.strength import Beginning, StrengthCurve, make_dial, sweep_strength
from clipgraft.train.trials import Subject
from clipgraft.train.validation import BASE, STARTED, Validation
from clipgraft.train.verdict import Trained, Verdict, nothing_learnt

log = logging.getLogger("clipgraft")
_SAMPLE, _BATCH = 256, 32  # pairs that an adapter is started on


@dataclass(frozen=True, repr=False)
class FitResult(Result):
    """What a run made.

    Attributes:
        folder: the run folder.
        saved: the adapter folder, or the fine-tuned model.
        bytes: size of `saved`.
        trainable: number of trained weights, those of a classifier among them.
        seconds: of all parts of the run, encoding and evaluation included; what a kill undid is left out.
        history: metrics of every evaluated epoch of the run, those before a resume included.
        base: metrics before the first step; None without validation data.
        best_epoch: the epoch that `saved` is, the best on the validation data; without them the last.
        verdict: whether that epoch is better than what the run began with; None where that is not known.
        rate: how the learning rate was found; None where it was given.
        weight: how much what is retained counts, and how that was found; None where it was given.
        stopped: the epoch after which `patience` ended the run; None where it came to its last one.
        strength: what is gained and kept by the strength of what was learnt; None where it was not measured.
        stages: seconds of this part of the run, by what it did.
    """

    _shows = ("saved", "bytes", "trainable", "seconds", "best_epoch", "metrics", "base", "verdict")

    folder: Path
    saved: Path
    bytes: int
    trainable: int
    seconds: float
    history: list[dict[str, float]]
    base: dict[str, float] | None = None
    best_epoch: int | None = None
    verdict: Verdict | None = None
    rate: Rate | None = None
    weight: Weight | None = None
    stopped: int | None = None
    strength: StrengthCurve | None = None
    stages: Mapping[str, float] = field(default_factory=dict)

    def table(self) -> Table:
        """The base as epoch 0 and every evaluated epoch; what was saved where nothing was evaluated."""
        measured = [{**self.base, "epoch": 0.0}] if self.base else []
        measured += self.history
        names = [n for task in REPORTED.values() for n in task if any(n in line for line in measured)]
        if not names:
            return super().table()
        columns = [Column("epoch", "{:g}".format), *map(metric_column, names)]
        kept = "" if self.best_epoch is None else f"; epoch {self.best_epoch} is kept"
        title = f"{self.saved}: {self.trainable:,} weights trained in {self.seconds:.0f} s{kept}"
        rows = ([line["epoch"], *(line.get(name) for name in names)] for line in measured)
        return table_of(title, columns, rows, "" if self.verdict is None else str(self.verdict))

    @property
    def metrics(self) -> Metrics:
        """Of what was saved; empty where nothing was measured."""
        if self.strength is not None and self.strength.applied:
            return Metrics(self.strength.metrics)
        found = (line for line in reversed(self.history) if line["epoch"] == self.best_epoch)
        return Metrics(next(found, {}))


def run_recipe(
    model: ClipLike,
    recipe: Recipe,
    train: TrainArgs,
    run: RunArgs,
    features: FeatureArgs,
    world: World = ALONE,
) -> FitResult:
    """Train a model by a recipe.

    What the recipe cannot learn from is refused first; then the run has its folder, what is constant is
    encoded once, and the loop runs, with an evaluation before the first step and after each epoch.

    Raises:
        AdapterError: adapters are merged into the base, or none is active.
        ConfigError: options that do not go together, nothing to train, or the folder holds another run.
        DataError: data that cannot be learnt from, fewer rows than one batch, or an unreadable image.
        ModelError: the model is a tower alone.
        TrainingError: the loss is not finite, or gradients are where they must not be.
        Interrupted: stopped by SIGINT or SIGTERM, with everything saved; a KeyboardInterrupt.
    """
    started = time.perf_counter()
    clip = as_clip(model)
    for tower in recipe.towers:
        check_has_tower(clip.model, tower)
    require_unmerged(clip, "train")
    recipe.check()
    run = run.for_epochs(train, validated=recipe.val is not None)
    if run.waits is not None and recipe.val is None:
        raise ConfigError("`patience` needs validation data, by which the best epoch is known: give some")
    loss = recipe.choose_loss(clip, train.loss)
    if train.loss == "auto" and loss == "sigmoid":
        log.info("loss of pairs: sigmoid, as the base has a logit_bias (`loss=softmax` is the other)")
    train = train.replace(loss=loss)
    setup = set_up(clip, train, run, features, world, rows=len(recipe.pairs.rows()))
    recipe.check_model(clip)
    if recipe.retained is not None and not (trains(clip, "text") or trains(clip, "vision")):
        raise ConfigError("`retain` given, but nothing of the model trains that could forget: drop it")
    settings = {**setup.settings(), **recipe.settings()}
    if recipe.retained is not None:
        settings["retained"] = recipe.retained.digest
    recorded = {**run.params, **run.kept, **features.model_dump(), **settings}
    recorded |= {"source": asdict(findable(clip)), **_began(clip)}
    _require_same(setup, recorded)
    folder = RunFolder(run, recorded) if world.is_rank0 else SilentFolder(run.out)
    with folder:
        return _Run(setup, recipe, folder, settings).train(started)


class _Run:
    """One run in its folder: the recipe's objective in the loop, and what is measured, kept and saved."""

    def __init__(
        self, setup: Setup, recipe: Recipe, folder: RunFolder | SilentFolder, settings: Mapping[str, Any]
    ) -> None:
        self.setup = setup
        self.recipe = recipe
        self.folder = folder
        self.settings = settings
        self.saver = Saver(setup.clip, folder.path, setup.run.save_lora_only)
        first = setup.world.is_rank0
        self.validation = (
            Validation(folder.path, _began_with(setup.clip), setup.run.resume) if first else None
        )
        self.ends = frozenset(accumulate(setup.train.parts))
        self.rate: Rate | None = None
        self.weight: Weight | None = None
        self.stopped: int | None = None
        self.stages = _Stages()

    def train(self, started: float) -> FitResult:
        """Encode what is constant, train, and save; `started` is when the run began."""
        setup, recipe, world = self.setup, self.recipe, self.setup.world
        with self.stages.timed("encoding what is constant"):
            what = self._subject()
        trained = what.module
        begun = self._beginning()
        with self.stages.timed("trials"):
            objective = self._choose(what)
        loop = self._loop(trained, objective, started)
        torch.manual_seed(setup.train.seed)
        try:
            with self.stages.timed("training"):
                loop.run(self.folder, setup.run.resume)
        finally:
            setup.clip.eval()
        validation = self.validation
        kept = world.on_rank0(lambda: validation.restore(trained) if validation else None)
        world.send([p for p in trained.parameters() if p.requires_grad] + running_statistics(trained))
        with self.stages.timed("strength"):
            swept = self._sweep_strength(begun)
        result = world.on_rank0(lambda: self._finish(kept, loop, swept))
        if world.is_rank0:
            recipe.save(self.folder.path)
        return result

    def _subject(self) -> Subject:
        """Encode what is constant; what trains then, and on what."""
        setup, recipe = self.setup, self.recipe
        clip, args = setup.clip, setup.train
        encoder = Encoder(clip, setup.autocast, grad_checkpointing=args.grad_checkpointing)
        start_adapter(clip, recipe.sample(), args.seed)
        self.inputs = recipe.prepare(setup, encoder)
        objective = task = recipe.objective(self.inputs)
        if recipe.retained is not None:
            objective = hold_to_base(task, self.inputs, recipe.retained, recipe.pairs.images)
        if not trains(clip, "vision"):
            encoder.forget("vision")
        head = recipe.head
        trained = clip.model if head is None else nn.ModuleDict({"model": clip.model, "head": head})
        return Subject(setup, trained, self.inputs.feed, objective, task)

    def _choose(self, what: Subject) -> Objective:
        """Find what the options leave open: the learning rate, and how much what is retained counts."""
        args, retained, objective = self.setup.train, self.recipe.retained, what.objective
        open_weight = retained is not None and retained.weight == "auto"
        if args.lr == "auto":
            share = rate.SHARE - retention.SHARE if open_weight else rate.SHARE
            self.rate = choose_rate(what, self.folder.path, share)
            self.setup = replace(self.setup, train=args.replace(lr=self.rate.lr))
        if open_weight:
            self.weight = choose_weight(replace(what, setup=self.setup), self.folder.path)
            assert isinstance(objective, Retaining)
            objective = replace(objective, weight=self.weight.weight)
        return objective

    def _beginning(self) -> Beginning | None:
        """What a model that is itself trained is interpolated with at the end."""
        recipe = self.recipe
        wanted = recipe.val is not None and recipe.has_base and self.setup.run.strength != "none"
        return Beginning(self.setup.clip.model) if wanted and lora_state(self.setup.clip) is None else None

    def _sweep_strength(self, begun: Beginning | None) -> tuple[StrengthCurve, Measured] | None:
        """Measure what was learnt at other strengths; None where that is not asked for, or cannot be."""
        recipe, clip, choice = self.recipe, self.setup.clip, self.setup.run.strength
        if recipe.val is None or not recipe.has_base or choice == "none":
            return None
        dial = make_dial(clip, begun)
        if isinstance(dial, str):
            log.info("the strength is not swept: %s", dial)
            return None
        retained = recipe.retained or retained_texts(clip)
        with same_random():
            return sweep_strength(self.inputs, recipe, dial, retained, keep=choice == "auto")

    def _loop(self, trained: nn.Module, objective: Objective, started: float) -> Loop:
        args = self.setup.train
        return Loop(
            setup=self.setup,
            trained=trained,
            feed=self.inputs.feed,
            objective=objective,
            optimizer=make_optimizer(trained, args),
            schedule=schedule_of(args, self.inputs.feed.steps),
            settings=self.settings,
            epoch_end=self._epoch_end,
            enough=self._enough,
            began=started,
        )

    def _enough(self, epoch: int) -> bool:
        """Whether the best epoch is so long ago that no better one is waited for."""
        patience, validation = self.setup.run.waits, self.validation
        if patience is None or epoch == self.setup.train.planned_epochs:
            return False
        waited = self.setup.world.on_rank0(lambda: validation.waited(epoch) if validation else 0)
        if waited < patience:
            return False
        self.stopped = epoch
        if epoch not in self.ends and self.setup.world.is_rank0:
            self.saver.save_epoch(epoch, {})
        log.info(
            "stopped after epoch %d of %d: `patience=%d`", epoch, self.setup.train.planned_epochs, patience
        )
        return True

    def _epoch_end(self, epoch: int) -> Mapping[str, float] | None:
        """Measure and save the model before the first step (epoch 0) and after every epoch."""
        run, recipe = self.setup.run, self.recipe
        if epoch == 0:
            return self._before()
        metrics = None
        if recipe.val is not None and _due(epoch, run.val_frequency, self.ends):
            with self.stages.timed("evaluation"):
                measured = recipe.measure(self.inputs)
            metrics = measured.metrics
            log.info("epoch %d: %s", epoch, headline(metrics))
            if self.validation is not None:
                self.validation.add(epoch, measured)
        if self.setup.world.is_rank0 and _due(epoch, run.save_frequency, self.ends):
            self.saver.save_epoch(epoch, metrics or {})
        return metrics

    def _before(self) -> Mapping[str, float] | None:
        """What the model reaches as it is; a run that is resumed does not measure it again."""
        if self.recipe.val is None:
            return None
        validation = self.validation
        known = self.setup.world.on_rank0(lambda: validation.before if validation else None)
        if known is None:
            with same_random(), _blaming_the_base(), self.stages.timed("evaluation of the base"):
                measured = self.recipe.measure(self.inputs)
            if validation is not None:
                validation.begin(measured)
            known = measured.metrics
        than = validation.record.than if validation else BASE
        log.info("epoch 0, %s: %s", than, headline(known))
        return known

    def _finish(
        self, kept: int | None, loop: Loop, swept: tuple[StrengthCurve, Measured] | None
    ) -> FitResult:
        """Save what came of the run, and say what it bought; the model has the weights of epoch `kept`."""
        assert isinstance(self.folder, RunFolder)
        assert self.validation is not None
        clip, epochs = self.setup.clip, self.setup.train.planned_epochs
        history, losses = self.folder.history(), self.folder.losses()
        epoch = kept or self.stopped or epochs
        curve, measured = swept or (None, None)
        metrics = next((line for line in history if line["epoch"] == epoch), {})
        if curve is not None and curve.applied:
            metrics = {"epoch": epoch, "strength": curve.recommended, **curve.metrics}
        strength = curve.recommended if curve is not None and curve.applied else 1.0
        saved = self.saver.save_final(epoch, metrics, strength)
        result = FitResult(
            folder=self.folder.path,
            saved=saved,
            bytes=size_on_disk(saved),
            trainable=loop.trained_weights(),
            seconds=loop.seconds(),
            history=history,
            base=self.validation.before,
            best_epoch=epoch,
            verdict=self.validation.verdict(kept, self._as_trained(losses), measured),
            rate=self.rate,
            weight=self.weight,
            stopped=self.stopped,
            strength=curve,
            stages=self.stages.seconds,
        )
        rows = len(self.inputs.feed.caption_of_row)
        self.folder.finish({**asdict(result), "rows": rows, "made_with": made_with(clip)})
        self._tell(result, kept, nothing_learnt(losses, self.inputs.feed.steps))
        return result

    def _tell(self, result: FitResult, kept: int | None, nothing: str | None) -> None:
        log.info(
            "saved %s (%.2f MB, %s trained weights, %.0f s)",
            result.saved,
            result.bytes / 1e6,
            f"{result.trainable:,}",
            result.seconds,
        )
        log.info("seconds: %s", self.stages)
        if kept is not None and len(result.history) > 1:
            log.info("%s", self._which_epoch(kept, result.history))
        if self.recipe.val is None:
            log.info("without `val_data` nobody knows whether this is better than what the run began with")
        if nothing is not None:
            log.warning("%s", nothing)
        if result.verdict is not None:
            log.info("%s", result.verdict)
        if result.strength is not None:
            log.info("%s", result.strength)

    def _which_epoch(self, kept: int, history: list[dict[str, float]]) -> str:
        """Which epoch is kept, and where the last one is if that is another."""
        epochs = self.stopped or self.setup.train.planned_epochs
        told = f"kept epoch {kept} of {epochs}, the best on the validation data"
        if kept == epochs:
            return told
        return f"{told}; the last one, {headline(history[-1])}, is checkpoints/epoch_{epochs}"

    def _as_trained(self, losses: list[float]) -> Trained:
        state, steps = lora_state(self.setup.clip), self.inputs.feed.steps
        first, last = losses[:steps], losses[-steps:]
        return Trained(
            rows=len(self.inputs.feed.caption_of_row),
            unit=self.recipe.unit,
            epochs=self.setup.train.planned_epochs,
            lr=self.setup.train.peak_lr,
            roles=None if state is None else {(site.tower, site.role) for site in state.chosen().layers},
            losses=(fmean(first), fmean(last)) if len(losses) > steps else None,
        )


class _Stages:
    """Seconds by what a run does; of what is timed within something else, that counts the rest.

    Attributes:
        seconds: by name, in the order in which they began to count.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds of a block."""
        self.seconds.setdefault(name, 0.0)
        outside, self._inner, started = self._inner, 0.0, time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[name] += took - self._inner
            self._inner = outside + took

    def __str__(self) -> str:
        return ", ".join(f"{seconds:.1f} {name}" for name, seconds in self.seconds.items() if seconds >= 0.05)


def _require_same(setup: Setup, recorded: Mapping[str, Any]) -> None:
    """Refuse processes of one run that were started with other settings, data, base or adapter sites."""
    if setup.world.alone:
        return
    state = lora_state(setup.clip)
    layers = {} if state is None else state.chosen().layers
    sites = {str(site): layer.r for site, layer in layers.items()}
    setup.world.require_same({**recorded, "resume": setup.run.resume, "adapter sites": sites})


def _began_with(clip: Clip) -> str:
    """What a run is compared with: an adapter that has been trained before is no base."""
    state = lora_state(clip)
    return BASE if state is None or changes_nothing(state.chosen()) else STARTED


@contextlib.contextmanager
def _blaming_the_base() -> Iterator[None]:
    """Features that are not finite before the first step cannot be the learning rate's fault."""
    try:
        yield
    except TrainingError as error:
        if type(error) is not TrainingError:  # another process is gone
            raise
        raise TrainingError(
            "features of the validation data are not finite before the first step: likely the base or an "
            "image holds broken values; check `pretrained`, or use `autocast=False`"
        ) from error


def _began(clip: Clip) -> dict[str, str]:
    """Where the adapter was loaded from that a run trains on, for its record."""
    state = lora_state(clip)
    origin = "" if state is None else state.chosen().origin
    return {"started_from": origin} if origin else {}


def _due(epoch: int, frequency: int, ends: Collection[int]) -> bool:
    """Whether it is an epoch's turn; that of the last of every part, be it the run's end or not, always."""
    return epoch in ends or (frequency > 0 and epoch % frequency == 0)


def start_adapter(clip: Clip, pairs: Pairs, seed: int) -> None:
    """Start an adapter whose `init` is `eva` from a sample of the pairs; any other stays as it is.

    So does one that has been trained before.
    """
    state = lora_state(clip)
    adapter = None if state is None else state.chosen()
    if adapter is None or adapter.settings.init != "eva" or not is_new(adapter):
        return
    rows = pairs.rows()
    sample = random.Random(seed).sample(rows, min(_SAMPLE, len(rows)))

    def encode() -> None:
        for start in range(0, len(sample), _BATCH):
            batch = sample[start : start + _BATCH]
            if adapter.touches("text"):
                clip.encode_text([caption for _, caption in batch])
            if adapter.touches("vision"):
                transform = clip.require_preprocess()
                clip.encode_image(torch.stack([transform(open_image(pairs.images[i])) for i, _ in batch]))

    sites = start_from_data(clip, encode)
    log.info("LoRA starts on the principal directions of %d pairs at %d sites", len(sample), sites)

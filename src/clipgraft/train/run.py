"""Train a recipe: from a model, data and options to a run folder with what was learnt in it."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from clipgraft.adapters.folder import findable
from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Pairs
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import TrainingError
from clipgraft.evaluate.metrics import Metrics, headline
from clipgraft.lora.initialization import changes_nothing, is_new, start_from_data
from clipgraft.lora.state import count_parameters, lora_state, require_unmerged
from clipgraft.models.clip import Clip, ClipLike, as_clip
from clipgraft.models.export import size_on_disk
from clipgraft.pictures import open_image
from clipgraft.results import Result
from clipgraft.train.args import RunArgs, TrainArgs
from clipgraft.train.distributed import ALONE, World
from clipgraft.train.feed import trains
from clipgraft.train.inputs import prepare_inputs
from clipgraft.train.loop import Loop, running_statistics, same_random
from clipgraft.train.rate import Rate, Subject, choose_rate
from clipgraft.train.recipes.recipe import Objective, Recipe
from clipgraft.train.run_folder import RunFolder, Saver, SilentFolder, made_with
from clipgraft.train.schedule import schedule_of
from clipgraft.train.setup import Setup, make_optimizer, set_up
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
        trainable: number of trained weights.
        seconds: of all parts of the run, encoding and evaluation included; what a kill undid is left out.
        history: metrics of every evaluated epoch of the run, those before a resume included.
        base: metrics before the first step; None without validation data.
        best_epoch: the epoch that `saved` is, the best on the validation data; without them the last.
        verdict: whether that epoch is better than what the run began with; None where that is not known.
        rate: how the learning rate was found; None where it was given.
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

    @property
    def metrics(self) -> Metrics:
        """Of the epoch that `saved` is; empty where nothing was measured."""
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
        TrainingError: the loss is not finite, or gradients are where they must not be.
        Interrupted: stopped by SIGINT or SIGTERM, with everything saved; a KeyboardInterrupt.
    """
    started = time.perf_counter()
    clip = as_clip(model)
    require_unmerged(clip, "train")
    recipe.check()
    setup = set_up(clip, train, run, features, world)
    recipe.check_model(clip)
    settings = {**setup.settings(), **recipe.settings()}
    recorded = {**run.params, **run.kept, **features.model_dump(), **settings}
    recorded |= {"source": asdict(findable(clip)), **_began(clip)}
    _require_same(setup, recorded)
    folder = RunFolder(run.out, recorded, run.resume) if world.is_rank0 else SilentFolder(run.out)
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

    def train(self, started: float) -> FitResult:
        """Encode what is constant, train, and save; `started` is when the run began."""
        setup, recipe, world = self.setup, self.recipe, self.setup.world
        clip, args = setup.clip, setup.train
        encoder = Encoder(clip, setup.autocast, grad_checkpointing=args.grad_checkpointing)
        start_adapter(clip, recipe.sample(), args.seed)
        self.inputs = prepare_inputs(setup, encoder, recipe.pairs, recipe.val, needs_tower=recipe.needs_tower)
        objective = recipe.objective(self.inputs)
        if not trains(clip, "vision"):
            encoder.forget("vision")
        head = recipe.head
        trained = clip.model if head is None else nn.ModuleDict({"model": clip.model, "head": head})
        if args.lr == "auto":
            self.rate = choose_rate(Subject(setup, trained, self.inputs.feed, objective), self.folder.path)
            self.setup = replace(setup, train=args.replace(lr=self.rate.lr))
        loop = self._loop(trained, objective, started)
        torch.manual_seed(args.seed)
        try:
            loop.run(self.folder, setup.run.resume)
        finally:
            clip.eval()
        validation, trained = self.validation, loop.trained
        kept = world.on_rank0(lambda: validation.restore(trained) if validation else None)
        world.send([p for p in trained.parameters() if p.requires_grad] + running_statistics(trained))
        result = world.on_rank0(lambda: self._finish(kept, loop.seconds()))
        if world.is_rank0:
            recipe.save(self.folder.path)
        return result

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
            began=started,
        )

    def _epoch_end(self, epoch: int) -> Mapping[str, float] | None:
        """Measure and save the model before the first step (epoch 0) and after every epoch."""
        run, recipe = self.setup.run, self.recipe
        if epoch == 0:
            return self._before()
        metrics = None
        if recipe.val is not None and _due(epoch, run.val_frequency, self.ends):
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
            with same_random(), _blaming_the_base():
                measured = self.recipe.measure(self.inputs)
            if validation is not None:
                validation.begin(measured)
            known = measured.metrics
        than = validation.record.than if validation else BASE
        log.info("epoch 0, %s: %s", than, headline(known))
        return known

    def _finish(self, kept: int | None, seconds: float) -> FitResult:
        """Save what came of the run, and say what it bought; the model has the weights of epoch `kept`."""
        assert isinstance(self.folder, RunFolder)
        assert self.validation is not None
        clip, epochs = self.setup.clip, self.setup.train.epochs
        history, losses = self.folder.history(), self.folder.losses()
        epoch = kept or epochs
        saved = self.saver.save_final(epoch, next((line for line in history if line["epoch"] == epoch), {}))
        result = FitResult(
            folder=self.folder.path,
            saved=saved,
            bytes=size_on_disk(saved),
            trainable=count_parameters(clip).trainable,
            seconds=seconds,
            history=history,
            base=self.validation.before,
            best_epoch=epoch,
            verdict=self.validation.verdict(kept, self._as_trained(losses)),
            rate=self.rate,
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
        if kept is not None and len(result.history) > 1:
            log.info("%s", self._which_epoch(kept, result.history))
        if self.recipe.val is None:
            log.info("without `val_data` nobody knows whether this is better than what the run began with")
        if nothing is not None:
            log.warning("%s", nothing)
        if result.verdict is not None:
            log.info("%s", result.verdict)

    def _which_epoch(self, kept: int, history: list[dict[str, float]]) -> str:
        """Which epoch is kept, and where the last one is if that is another."""
        epochs = self.setup.train.epochs
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
            epochs=self.setup.train.epochs,
            lr=self.setup.train.peak_lr,
            roles=None if state is None else {(site.tower, site.role) for site in state.chosen().layers},
            losses=(fmean(first), fmean(last)) if len(losses) > steps else None,
        )


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
